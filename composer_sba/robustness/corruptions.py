"""Corruptions of CIFAR-10-C and ImageNet-C, computed for a whole batch on its device.

`Hendrycks & Dietterich, 2019 <https://arxiv.org/abs/1903.12261>`_ define 19 corruptions with five severities each, and
publish constants for 32-pixel images (CIFAR-10-C) and for 224-pixel images (ImageNet-C). This module has the 14 of
:data:`~composer_sba.conditions.CORRUPTIONS`. Frost needs files of textures; glass blur moves one pixel after another;
snow, spatter and the elastic transform are left out. Read these from the published sets.

The published sets store bytes: CIFAR-10-C rounds down to 8 bits, and ImageNet-C also compresses with JPEG. Here, values
stay floats. Errors on the two may therefore differ by some tenths of a point.

Shapes: N images, C channels (3 for brightness, saturate and jpeg_compression), height H, width W.
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import decode_jpeg, encode_jpeg

from composer_sba.conditions import CORRUPTIONS, SEVERITIES
from composer_sba.errors import UserError, check_number, nearest

Constants = Literal['cifar', 'imagenet']
_LARGEST_OF_CIFAR = 64  # pixels; larger images take ImageNet's constants

# AlexNet's errors on ImageNet-C, means over the five severities, as fractions of 1. ImageNet-C's mean corruption error
# is relative to them. It has 15 corruptions; speckle noise, Gaussian blur and saturate are additional.
ALEXNET_ERRORS = {
    'gaussian_noise': 0.886428,
    'shot_noise': 0.894468,
    'impulse_noise': 0.922640,
    'defocus_blur': 0.819880,
    'glass_blur': 0.826268,
    'motion_blur': 0.785948,
    'zoom_blur': 0.798360,
    'snow': 0.866816,
    'frost': 0.826572,
    'fog': 0.819324,
    'brightness': 0.564592,
    'contrast': 0.853204,
    'elastic_transform': 0.646056,
    'pixelate': 0.717840,
    'jpeg_compression': 0.606500,
}


def corrupt(
    images: torch.Tensor,
    name: str,
    severity: int,
    *,
    generator: torch.Generator | None = None,
    constants: Constants | None = None,
) -> torch.Tensor:
    """Corrupt a batch of images.

    Args:
        images (torch.Tensor): Shape ``(N, 3, H, W)``, floating, in [0, 1].
        name (str): One of :data:`~composer_sba.conditions.CORRUPTIONS`.
        severity (int): 1 to 5.
        generator (torch.Generator, optional): Source of the noise, on the device of the images. Default: ``None``,
            PyTorch's own.
        constants (str, optional): ``'cifar'``, the constants for 32-pixel images, or ``'imagenet'``, those for 224
            pixels. Default: ``None``, which takes ``'cifar'`` for images of at most 64 pixels.

    Returns:
        torch.Tensor: The corrupted images in [0, 1], of the same shape and dtype, and on the same device.

    Raises:
        UserError: If the name or the severity is unknown.

    Example:
        >>> corrupt(torch.full((1, 3, 4, 4), 0.5), 'brightness', 5).unique()
        tensor([0.8000])
    """
    if name not in _DEFINITIONS:
        raise UserError(f"unknown corruption '{name}'{nearest(name, CORRUPTIONS)}", 'name')
    severity = check_number('severity', severity, 'an integer from 1 to 5', lambda value: value in SEVERITIES, Integral)
    function, of_cifar, of_imagenet = _DEFINITIONS[name]
    small = takes_cifar_constants(images.shape) if constants is None else constants == 'cifar'
    values = (of_cifar if small else of_imagenet)[severity - 1]
    values = values if isinstance(values, tuple) else (values,)
    random = (generator,) if name in _RANDOM else ()
    return function(images, *values, *random).clamp(0, 1)


def takes_cifar_constants(shape: Sequence[int]) -> bool:
    """Return whether :func:`corrupt` takes the constants for 32 pixels by default, by the shape of the images."""
    return max(shape[-2:]) <= _LARGEST_OF_CIFAR


# --- noise ------------------------------------------------------------------------------------------------------------


def _normal(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)


def _uniform(images: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=images.device, dtype=images.dtype)


def _gaussian_noise(images: torch.Tensor, sigma: float, generator: torch.Generator | None) -> torch.Tensor:
    return images + sigma * _normal(images, generator)


def _speckle_noise(images: torch.Tensor, sigma: float, generator: torch.Generator | None) -> torch.Tensor:
    return images + images * sigma * _normal(images, generator)


def _shot_noise(images: torch.Tensor, photons: float, generator: torch.Generator | None) -> torch.Tensor:
    """Replace each value by a Poisson count, of which ``photons`` make white."""
    return torch.poisson(images * photons, generator=generator) / photons


def _impulse_noise(images: torch.Tensor, amount: float, generator: torch.Generator | None) -> torch.Tensor:
    """Set each value with probability ``amount``, half of them to 0 and half to 1, each channel by itself."""
    draw = _uniform(images, images.shape, generator)
    return images.masked_fill(draw < amount / 2, 0).masked_fill(draw >= 1 - amount / 2, 1)


# --- blur -------------------------------------------------------------------------------------------------------------


def _filter(images: torch.Tensor, kernel: torch.Tensor, mode: str) -> torch.Tensor:
    """Correlate each channel with a kernel of odd height and width, after padding by ``mode``."""
    down, across = (size // 2 for size in kernel.shape)
    planes = F.pad(images.flatten(0, 1)[:, None], (across, across, down, down), mode=mode)
    return F.conv2d(planes, kernel[None, None].to(images)).view_as(images)


def _gaussian(radius: int, sigma: float) -> torch.Tensor:
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()


def _gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    kernel = _gaussian(int(4 * sigma + 0.5), sigma)
    return _filter(_filter(images, kernel[:, None], 'replicate'), kernel[None], 'replicate')


def _defocus_blur(images: torch.Tensor, radius: float, softness: float) -> torch.Tensor:
    """Blur with a disk whose edge a Gaussian of standard deviation ``softness`` makes smooth."""
    extent, edge = (8, 1) if radius <= 8 else (int(radius), 2)
    at = torch.arange(-extent, extent + 1)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).double()
    smooth = _gaussian(edge, softness)
    kernel = _filter(disk[None, None] / disk.sum(), smooth[:, None] * smooth, 'reflect')[0, 0]
    margin = int((kernel.sum(0) > 0).nonzero()[0])  # zeros around a small disk would need as much padding
    return _filter(images, kernel[margin : len(kernel) - margin, margin : len(kernel) - margin], 'reflect')


def _motion_blur(images: torch.Tensor, radius: int, sigma: float, generator: torch.Generator | None) -> torch.Tensor:
    """Average along a line that begins at the pixel, at an angle within 45 degrees of the rows, one for each image."""
    size, channels, height, width = images.shape
    angle = torch.pi / 2 * (_uniform(images, (size,), generator) - 0.5)
    weights = torch.exp(-0.5 * (torch.arange(2 * radius + 1, dtype=torch.float64) / sigma) ** 2)
    weights /= weights.sum()
    down, across = (torch.arange(length, device=images.device) for length in (height, width))
    planes, blurred = images.flatten(2), torch.zeros_like(images).flatten(2)
    for step, weight in enumerate(weights.tolist()):
        offsets = (torch.ceil(step * turn - 0.5).long()[:, None] for turn in (angle.sin(), angle.cos()))
        rows, columns = (
            (at + offset).clamp(0, len(at) - 1) for at, offset in zip((down, across), offsets, strict=True)
        )
        source = (rows[:, :, None] * width + columns[:, None]).view(size, 1, -1)
        blurred += weight * planes.gather(2, source.expand(-1, channels, -1))
    return blurred.view_as(images)


def _zoom_blur(images: torch.Tensor, stop: float, step: float) -> torch.Tensor:
    """Average the image and its centre enlarged by the factors 1, 1 + ``step``, ... below ``stop``."""
    factors = np.arange(1, stop, step).tolist()  # the published sets use arange, so its rounding is part of them
    total = images.clone()
    for factor in factors:
        kept = [int(np.ceil(side / factor)) for side in images.shape[-2:]]
        zoomed = _centre(images, kept)
        sides = [round(side * factor) for side in kept]
        zoomed = F.interpolate(zoomed, sides, mode='bilinear', align_corners=True)
        total += _centre(zoomed, list(images.shape[-2:]))
    return total / (len(factors) + 1)


def _centre(images: torch.Tensor, sides: list[int]) -> torch.Tensor:
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], sides, strict=True))
    return images[..., top : top + sides[0], left : left + sides[1]]


# --- weather and light ------------------------------------------------------------------------------------------------


def _fog(images: torch.Tensor, amount: float, decay: float, generator: torch.Generator | None) -> torch.Tensor:
    """Add a plasma fractal and scale to the maximum of the image.

    The diamond-square algorithm on a torus: each new point is the mean of its four neighbours and a uniform draw whose
    range shrinks by ``decay`` at each halving of the grid.
    """
    size = len(images)
    side = 1 << (max(images.shape[-2:]) - 1).bit_length()
    plasma = images.new_zeros(size, side, side)
    step, reach = side, 100.0

    def perturbed(neighbours: torch.Tensor) -> torch.Tensor:
        return neighbours / 4 + reach**2 * (2 * _uniform(images, neighbours.shape, generator) - 1)

    while step >= 2:
        half = step // 2
        corners = plasma[:, ::step, ::step]
        of_rows, of_columns = corners + corners.roll(-1, 1), corners + corners.roll(-1, 2)
        centres = perturbed(of_rows + of_rows.roll(-1, 2))
        plasma[:, half::step, half::step] = centres
        plasma[:, ::step, half::step] = perturbed(of_columns + centres + centres.roll(1, 1))
        plasma[:, half::step, ::step] = perturbed(of_rows + centres + centres.roll(1, 2))
        step, reach = half, reach / decay
    plasma -= plasma.amin((1, 2), keepdim=True)
    plasma /= plasma.amax((1, 2), keepdim=True)
    brightest = images.amax((1, 2, 3), keepdim=True)
    foggy = images + amount * plasma[:, None, : images.shape[-2], : images.shape[-1]]
    return foggy * brightest / (brightest + amount)


def _brightness(images: torch.Tensor, amount: float) -> torch.Tensor:
    """Add to the value of HSV. With hue and saturation fixed, the three channels scale with the value."""
    value = images.amax(1, keepdim=True)
    raised = (value + amount).clamp(0, 1)
    return torch.where(value > 0, images * (raised / value.clamp(min=1e-12)), raised)


def _saturate(images: torch.Tensor, factor: float, amount: float) -> torch.Tensor:
    """Change the saturation of HSV. With hue and value fixed, distances from the value scale with the saturation."""
    value, least = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    saturation = (value - least) / value.clamp(min=1e-12)
    changed = (saturation * factor + amount).clamp(0, 1)
    grey = saturation == 0  # without a hue, which is 0 by convention: red
    red = torch.cat([value, value * (1 - changed), value * (1 - changed)], 1)
    return torch.where(grey, red, value - (value - images) * (changed / saturation.masked_fill(grey, 1)))


def _contrast(images: torch.Tensor, factor: float) -> torch.Tensor:
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means


# --- resolution and compression ---------------------------------------------------------------------------------------


def _pixelate(images: torch.Tensor, factor: float) -> torch.Tensor:
    """Replace each pixel by the mean of its block: a box filter to ``factor`` times the size, and back."""

    def averaging(side: int) -> torch.Tensor:
        block = (2 * torch.arange(side) + 1) * int(side * factor) // (2 * side)
        same = (block[:, None] == block).to(images)
        return same / same.sum(1, keepdim=True)

    height, width = images.shape[-2:]
    return averaging(height) @ images @ averaging(width).T


def _jpeg_compression(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress and decompress with libjpeg-turbo, on the CPU: nvJPEG keeps more of the colours."""
    pixels = (images.cpu() * 255).round().to(torch.uint8)
    decoded = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in pixels])
    return decoded.to(images.device).to(images.dtype) / 255


_RANDOM = ('gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise', 'motion_blur', 'fog')
_DEFINITIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...], tuple[Any, ...]]] = {
    # function, its constants for the severities 1 to 5 at 32 pixels, and at 224 pixels
    'gaussian_noise': (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    'shot_noise': (_shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    'impulse_noise': (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    'speckle_noise': (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6)),
    'gaussian_blur': (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6)),
    'defocus_blur': (
        _defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    'motion_blur': (
        _motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    'zoom_blur': (
        _zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    'fog': (
        _fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    'brightness': (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    'contrast': (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    'saturate': (
        _saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
    'pixelate': (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    'jpeg_compression': (_jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
