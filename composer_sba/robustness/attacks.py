"""Attacks by adversarial-robustness-toolbox (ART), in pixel units: the worst image within a small distance."""

import math
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from composer_sba.conditions import ATTACKS, EPSILONS
from composer_sba.errors import UserError, check_number, nearest
from composer_sba.schedule import hash_key, seeded


def attack(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    name: str,
    *,
    epsilon: float | None = None,
    steps: int = 10,
    seed: int = 0,
) -> torch.Tensor:
    r"""Search for images of other predictions within a distance ε of the given ones, by the gradient of cross-entropy.

    PGD (`Madry et al., 2018 <https://arxiv.org/abs/1706.06083>`_) starts at random, and each step has the length
    2.5 ε / ``steps``. AutoPGD (`Croce & Hein, 2020 <https://arxiv.org/abs/2003.01690>`_) starts with the length 2 ε and
    adapts it. It leaves images alone that are misclassified already.

    Args:
        model (torch.nn.Module): Maps images in pixel units to logits, in evaluation mode, on the CPU or the current
            CUDA device: a :class:`~composer_sba.robustness.pixels.PixelClassifier`.
        images (torch.Tensor): Shape ``(N, C, H, W)``, float32 in [0, 1].
        labels (torch.Tensor): Shape ``(N,)``, integers.
        name (str): One of :data:`~composer_sba.conditions.ATTACKS`.
        epsilon (float, optional): ε > 0, in units of the pixel range. Default: that of
            :data:`~composer_sba.conditions.EPSILONS`.
        steps (int, optional): Number of steps, >= 1. Default: ``10``.
        seed (int, optional): Seed of the random starts. Default: ``0``.

    Returns:
        torch.Tensor: Images in [0, 1] with :math:`\lVert x' - x \rVert \leq ε`, on the device of ``images``.

    Raises:
        UserError: If the name is unknown, a number is out of range, or ART is not installed.
    """
    if name not in ATTACKS:
        raise UserError(f"unknown attack '{name}'{nearest(name, ATTACKS)}", 'attacks')
    kind, _, norm = name.rpartition('_')
    epsilon = check_number(
        'epsilon', EPSILONS[norm] if epsilon is None else epsilon, 'a finite number > 0', lambda e: 0 < e < math.inf
    )
    steps = check_number('steps', steps, 'an integer >= 1', lambda value: value >= 1, Integral)
    toolbox = require_toolbox()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:  # ART would leave gradients behind
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            num_classes = model(images[:1]).shape[1]
        classifier = toolbox.estimators.classification.PyTorchClassifier(
            model=model,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(images.shape[1:]),
            nb_classes=num_classes,
            clip_values=(0.0, 1.0),
            device_type='gpu' if images.device.type == 'cuda' else 'cpu',
        )
        options: dict[str, Any] = {'norm': 2 if norm == 'l2' else np.inf, 'eps': float(epsilon), 'max_iter': steps}
        options |= {'batch_size': len(images), 'verbose': False}
        if kind == 'pgd':
            search = toolbox.attacks.evasion.ProjectedGradientDescent(
                classifier, eps_step=2.5 * epsilon / steps, num_random_init=1, **options
            )
        else:
            search = toolbox.attacks.evasion.AutoProjectedGradientDescent(
                classifier, eps_step=2 * epsilon, nb_random_init=1, loss_type='cross_entropy', **options
            )
        with seeded(hash_key(seed, *name.encode())), torch.inference_mode(False), torch.enable_grad():
            found = search.generate(images.cpu().numpy(), labels.cpu().numpy())
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return torch.from_numpy(found).to(images)


def require_toolbox() -> ModuleType:
    """Return ART, with the modules that :func:`attack` needs; raise UserError if it is not installed."""
    try:
        import art.attacks.evasion
        import art.estimators.classification
    except ModuleNotFoundError as error:
        raise UserError(
            'attacks need adversarial-robustness-toolbox, which is not installed: '
            "pip install 'composer-sba[robustness]', or choose --attacks none"
        ) from error
    return art
