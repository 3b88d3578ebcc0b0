"""Cutout: a square of each image is erased, as a transform."""

from numbers import Integral

import torch

from composer_sba.checks import check_number


class Cutout:
    """Erases a square at a random place, each image its own.

    `DeVries & Taylor, 2017 <https://arxiv.org/abs/1708.04552>`_: the centre is uniform over the image, and the square
    is clipped at the border. Put after normalization, it erases with the mean of the data set. (Composer's CutOut cuts
    one box for a whole batch.)

    Args:
        size (int): Side of the square, >= 1. Unit: pixels; 16 for CIFAR-10 and 8 for CIFAR-100 in the paper.

    Raises:
        ValueError: If ``size`` is no integer >= 1.

    Example:
        >>> erased = (Cutout(4)(torch.ones(3, 8, 8)) == 0).sum().item()
        >>> 3 * 4 <= erased <= 3 * 16
        True
    """

    def __init__(self, size: int) -> None:
        check_number('size', size, 'an integer >= 1', lambda value: value >= 1, Integral)
        self.size = size

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Erase from a copy of ``image``, shape ``(C, H, W)``."""
        height, width = image.shape[-2:]
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, left = row - self.size // 2, column - self.size // 2
        image = image.clone()
        image[..., max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = 0
        return image
