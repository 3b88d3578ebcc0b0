"""Pixels stay bytes and become numbers on the device: what a worker need not compute, copy and hand over."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

from composer_sba.decode import to_rgb


class RandomResizedCrop(nn.Module):
    """torchvision's ``RandomResizedCrop``, which crops bytes as such.

    A PIL image, of any mode, it treats as torchvision does. A uint8 tensor gets the same crop from the same draws, in
    less than half the time, and of a photograph's pixels 1 in 250 differs from PIL's, by one of 255 levels.

    Args:
        size (int): Height and width of the result; unit: pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._crop = transforms.RandomResizedCrop(size)

    def forward(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        """Crop and resize ``image``, bilinear and antialiased."""
        if not isinstance(image, torch.Tensor):
            return self._crop(to_rgb(image))
        top, left, height, width = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        crop = image[None, :, top : top + height, left : left + width]
        # torchvision would resize it in float32, which takes three times as long, on any CPU that has AVX-512.
        return F.interpolate(crop, self._crop.size, mode='bilinear', antialias=True)[0]


class Pipeline(transforms.Compose):  # type: ignore[misc]  # torchvision, whose class Composer asks for, has no types
    """Transforms of one image that need not be a PIL image, unless others than ours were put among them.

    Example:
        >>> pipeline = Pipeline([RandomResizedCrop(224), ToBytes()])
        >>> pipeline.takes_tensors
        True
        >>> pipeline.transforms.insert(1, transforms.RandAugment())
        >>> pipeline.takes_tensors
        False
    """

    @property
    def takes_tensors(self) -> bool:
        """Whether what comes before a ``ToTensor`` takes a uint8 tensor as well."""
        before = itertools.takewhile(lambda step: not isinstance(step, transforms.ToTensor), self.transforms)
        return all(isinstance(step, RandomResizedCrop | transforms.RandomHorizontalFlip) for step in before)


class ToBytes(transforms.ToTensor):  # type: ignore[misc]  # torchvision, whose class Composer asks for, has no types
    """Turn a PIL image into a uint8 tensor of shape ``(C, H, W)``, and leave such a tensor alone.

    A ``ToTensor`` by type: before one, Composer's RandAugment, AugMix and ColOut put their transforms of images.

    Example:
        >>> ToBytes()(Image.new('RGB', (4, 2), 'white')).unique()
        tensor([255], dtype=torch.uint8)
    """

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Convert ``image``, values 0 to 255."""
        return image if isinstance(image, torch.Tensor) else TF.pil_to_tensor(image)


class ToFloats(ToBytes):
    """torchvision's ``ToTensor`` for images of bytes, which takes a uint8 tensor as well."""

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Convert ``image`` to float32, values in [0, 1]."""
        return super().__call__(image).to(torch.float32).div(255)


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
