"""The conditions under which the robustness of a classifier is measured: their names and default values.

The command's help needs them, so this module does not import PyTorch.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

from composer_sba.errors import check_number

SIGMAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
"""Standard deviations of the noise sweep, in units of the pixel range."""
CORRUPTIONS = (
    'gaussian_noise',
    'shot_noise',
    'impulse_noise',
    'speckle_noise',
    'gaussian_blur',
    'defocus_blur',
    'motion_blur',
    'zoom_blur',
    'fog',
    'brightness',
    'contrast',
    'saturate',
    'pixelate',
    'jpeg_compression',
)
"""Names of the corruptions that :func:`~composer_sba.robustness.corruptions.corrupt` knows."""
SEVERITIES = (1, 2, 3, 4, 5)
"""Severities of the corruptions."""
ATTACKS = ('pgd_l2', 'pgd_linf', 'auto_pgd_l2', 'auto_pgd_linf')
"""Names of the attacks, which are projected gradient descent and AutoPGD in two norms."""
EPSILONS = {'l2': 0.25, 'linf': 1 / 255}
"""Largest distances of attacks by norm, in units of the pixel range."""


@dataclass(frozen=True)
class Smoothing:
    """Settings of randomized smoothing, under the names of Cohen et al.

    Args:
        sigma (float, optional): Standard deviation of the noise, > 0, in units of the pixel range. Default: ``0.25``.
        n0 (int, optional): Samples that choose the class, >= 1. Default: ``100``.
        n (int, optional): Samples that bound its probability, >= 1. Default: ``10_000``.
        alpha (float, optional): Probability that a certificate is wrong, in (0, 1). Default: ``0.001``.

    Raises:
        UserError: If a value is out of range.
    """

    sigma: float = 0.25
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        for name, kind, expected, holds in (
            ('sigma', Real, 'a finite number > 0', lambda value: 0 < value < math.inf),
            ('n0', Integral, 'an integer >= 1', lambda value: value >= 1),
            ('n', Integral, 'an integer >= 1', lambda value: value >= 1),
            ('alpha', Real, 'a number in (0, 1)', lambda value: 0 < value < 1),
        ):
            object.__setattr__(self, name, check_number(name, getattr(self, name), expected, holds, kind))
