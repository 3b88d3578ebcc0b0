"""Pixels travel as bytes and become numbers on the device: what a worker need not compute, copy and hand over."""

from collections.abc import Sequence

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as TF


class ToBytes(transforms.ToTensor):  # type: ignore[misc]  # torchvision has no types
    """Turn a PIL image into a uint8 tensor of shape ``(C, H, W)``.

    A ``ToTensor`` by type: before one, Composer's RandAugment, AugMix and ColOut put their transforms of images.

    Example:
        >>> ToBytes()(Image.new('RGB', (4, 2), 'white')).unique()
        tensor([255], dtype=torch.uint8)
    """

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Convert ``image``, values 0 to 255."""
        return TF.pil_to_tensor(image)


class Normalize:
    """Turn uint8 images into normalized ones, bit by bit what ``ToTensor`` and torchvision's ``Normalize`` give.

    Args:
        mean (Sequence[float]): Of red, green and blue in [0, 1].
        std (Sequence[float]): Their standard deviations.
        device (torch.device | str, optional): Where the images shall be. Default: the CPU.

    Example:
        >>> Normalize([0.5] * 3, [0.25] * 3)(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None) -> None:
        self.mean, self.std = (
            torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (mean, std)
        )
        self.white = torch.full((1, 1, 1), 255.0, device=device)  # by a number a GPU would divide less exactly

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize ``images``, shape ``(*, 3, H, W)``, to float32 on the device."""
        images = images.to(self.mean.device, non_blocking=True)
        return images.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)
