"""The study of robustness: the methods and settings that it compares, and what it measures of a trained network."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from composer_sba.recipe.recipe import Recipe
from composer_sba.robustness import evaluate
from composer_sba.study.recipe_index import BASELINE
from composer_sba.trained import pixel_loader

SEVERITIES = (1, 3, 5)
ATTACK, ATTACK_IMAGES = 'pgd_l2', 500


class Setting(NamedTuple):
    """A method's name, the values in which it differs from the method's recipe, and the overrides that set them."""

    method: str
    values: dict[str, Any] = {}
    overrides: tuple[str, ...] = ()


COMPARED = (  # those that decide the question first
    *(BASELINE, 'gaussian_half', 'gaussian_half_longer', 'sba_robust', 'sba_robust_every_step', 'twice'),
    *('latent_ba_input', 'label_smoothing', 'augmix'),
)

_SIGMA = 'σ of the pixel range'
BETWEEN, STRONGER = {_SIGMA: 0.15}, {_SIGMA: 0.2}  # the recipes have 0.1, and the tables end at 0.2


def settings(batch_size: int, stages: Sequence[str], forms: bool) -> list[Setting]:
    """List the methods of the study and their settings.

    Args:
        batch_size (int): The ``global_train_batch_size`` of the baseline.
        stages (Sequence[str]): The names of the network's stages, from the input upwards, without the head.
        forms (bool): Whether to add other forms of SBA at the input and of Gaussian noise to those that decide
            the question.

    Returns:
        list[Setting]: In the order to run them.
    """
    compared = [
        *map(Setting, COMPARED),
        # SBA is better than Gaussian noise where noise is stronger than in training: so is stronger noise in training
        _gaussian('gaussian_half_longer', STRONGER),
    ]
    if not forms:
        return compared
    half = (f'global_train_batch_size={max(batch_size // 2, 1)}', 'scale_schedule_ratio=0.5')
    everywhere = ','.join(['input', *stages])
    moved = [*((stage, stage) for stage in stages[:2]), ('a random one', f'[{everywhere}]')]
    return [
        *compared,
        _gaussian('gaussian_half', STRONGER),
        _gaussian('gaussian_half_longer', BETWEEN),
        *map(Setting, ('gaussian_half_twice', 'gaussian', 'sba_robust_gaussian_half')),
        *(Setting(name, {'raw rows': 'half'}, half) for name in ('sba_robust_every_step', 'latent_ba_input')),
        Setting('sba_robust', {'stop_gradient': False}, ('algorithms.sba.stop_gradient=false',)),
        *(Setting('sba_robust', {'sigma': s}, (f'algorithms.sba.vicinity.sigma={s}',)) for s in (0.2, 0.8)),
        *(Setting('sba_robust', {'layer': name}, (f'algorithms.sba.layers={key}',)) for name, key in moved),
    ]


def _gaussian(method: str, values: dict[str, Any]) -> Setting:
    return Setting(method, values, (f'train_dataset.gaussian_noise.sigma={values[_SIGMA]}',))


def measure(recipe: Recipe, network: nn.Module, device: torch.device) -> dict[str, Any]:
    """Measure a trained network under noise, corruptions and an attack.

    Args:
        recipe (Recipe): The recipe of the network, with an ``eval_dataset`` to measure on.
        network (torch.nn.Module): The network, on the device.
        device (torch.device): The device that evaluates.

    Returns:
        dict[str, Any]: From :func:`composer_sba.robustness.evaluate`: ``images``, ``clean``, ``noise``, ``corruptions``
        at :data:`SEVERITIES`, ``mean_corruption_error`` and ``attacks``, with five decimals.
    """
    loader, _, mean, std = pixel_loader(recipe, device)
    result = evaluate(
        network,
        loader,
        mean=mean,
        std=std,
        severities=SEVERITIES,
        attacks=[ATTACK],
        attack_images=ATTACK_IMAGES,
        device=device,
    )
    kept = ('images', 'clean', 'noise', 'corruptions', 'mean_corruption_error', 'attacks')
    rounded: dict[str, Any] = _rounded({key: result[key] for key in kept})
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value
