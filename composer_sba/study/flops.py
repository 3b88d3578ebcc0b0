"""The floating-point operations of a training, counted from shapes without data or computation."""

import functools
import inspect
import json
import math
from typing import Any

import torch
from composer.core import Time, TimeUnit
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from composer_sba.data.loader import DatasetConfig, dataset_size, image_size
from composer_sba.latent.expander import LatentExpander
from composer_sba.recipe.recipe import Recipe, component_arguments
from composer_sba.recipe.registry import components, construct
from composer_sba.vicinity import Vicinity

# Sizes of the training sets, which let a dry run count operations without the data
TRAIN_SIZES = {'digits': 1437, 'cifar10': 50_000, 'cifar100': 50_000, 'imagenet': 1_281_167}
_ROWS = 2


def flops_per_image(recipe: Recipe) -> float:
    """Count the operations of training on one image, in expectation over λ(t) and over the cut layers.

    The count covers the forward and the backward pass. A multiplication and an addition are two operations.
    Convolutions, matrix products and the projection Σ count; normalization, activations, losses, noise and evaluation
    do not. An ``augment_prob`` that is a scheduler counts as 1.

    Args:
        recipe (Recipe): The run. The algorithms that change the count are SBA, BatchAugmentation, RDrop and SAM.

    Returns:
        float: Unit: floating-point operations.

    Example:
        >>> from composer_sba.recipe.recipe import load
        >>> f'{flops_per_image(load("yamls/resnet44_cifar10_baseline.yaml")):.3g}'
        '5.82e+08'
    """
    network = json.dumps([recipe.model['name'], component_arguments(recipe.model)], sort_keys=True)
    size = image_size(DatasetConfig(**recipe.train_dataset))
    operations = _plain_step(network, size)
    sba = construct('algorithms', 'sba', recipe.algorithms['sba']) if 'sba' in recipe.algorithms else None
    if sba is not None:
        layers = sba.layers if isinstance(sba.layers, str) else tuple(sba.layers)
        augmented = _augmented_step(network, size, layers, sba.fold, sba.vicinity)
        operations += (1.0 if callable(sba.augment_prob) else sba.augment_prob) * (augmented - operations)
    if 'batch_augmentation' in recipe.algorithms:
        operations *= _argument(recipe, 'batch_augmentation', 'fold')
    if 'r_drop' in recipe.algorithms:
        operations *= 2
    if 'sam' in recipe.algorithms:
        operations *= 1 + 1 / _argument(recipe, 'sam', 'interval')  # a SAM step makes two passes
    return operations


def training_flops(recipe: Recipe) -> float:
    """Count the operations of a complete training.

    Args:
        recipe (Recipe): The run, with a ``max_duration`` in epochs, batches or samples.

    Returns:
        float: Unit: floating-point operations.

    Raises:
        RecipeError: If ``max_duration`` has another unit.
    """
    duration = Time.from_input(recipe.max_duration, TimeUnit.EPOCH)
    dataset = DatasetConfig(**recipe.train_dataset)
    images = dataset.subset or TRAIN_SIZES.get(dataset.name) or dataset_size(dataset)
    steps = math.ceil(images / recipe.global_train_batch_size)
    images_in = {TimeUnit.EPOCH: images, TimeUnit.BATCH: images / steps, TimeUnit.SAMPLE: 1}
    if duration.unit not in images_in:
        problem = f'must be in epochs, batches or samples, got {recipe.max_duration!r}'
        raise recipe.sources.error('max_duration', problem)
    scaled = int(duration.value * recipe.scale_schedule_ratio)  # as Composer does
    return flops_per_image(recipe) * scaled * images_in[duration.unit]


def _argument(recipe: Recipe, algorithm: str, name: str) -> Any:
    default = inspect.signature(components('algorithms')[algorithm]).parameters[name].default
    return recipe.algorithms[algorithm].get(name, default)


@functools.cache
def _plain_step(network: str, size: int) -> float:
    with FakeTensorMode():
        return _operations(_build(network), size)


@functools.cache
def _augmented_step(network: str, size: int, layers: str | tuple[str, ...], fold: int, vicinity: Vicinity) -> float:
    """Return the mean over the cut layers."""
    operations = []
    with FakeTensorMode():
        for layer in (layers,) if isinstance(layers, str) else layers:
            expander = LatentExpander(_build(network), layer, fold, vicinity)
            with expander.armed(step=0):
                operations.append(_operations(expander.model, size))
    return sum(operations) / len(operations)


def _build(network: str) -> torch.nn.Module:
    name, arguments = json.loads(network)
    model: torch.nn.Module = construct('model', name, arguments)
    return model


def _operations(model: torch.nn.Module, size: int) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(_ROWS, 3, size, size)).sum().backward()
    return counter.get_total_flops() / _ROWS
