"""Pixels stay bytes and become numbers on the device: what a worker need not compute, copy and hand over."""

import itertools
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

from composer_sba.data.config import DatasetConfig, Known, check, default_for_training, index
from composer_sba.data.mds_index import RECORD
from composer_sba.data.samples import to_rgb
from composer_sba.errors import DatasetError, check_number


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


def transform(config: DatasetConfig) -> transforms.Compose:
    """Build the transforms from an image to a normalized tensor.

    Training: small images are padded, cropped and, digits excepted, flipped; others get torchvision's random resized
    crop and flip. Evaluation: small images are left as they are, others resized and cropped at the centre.

    The DataLoader decodes JPEGs for a random resized crop to tensors, unless a transform that needs PIL images, as
    Composer's RandAugment, is put before ``ToTensor``. The crops are the same, for a fifth less of a worker's time,
    and a pixel differs from PIL's by at most one of 255 levels. In evaluation PIL does all.

    Args:
        config (DatasetConfig): The data set.

    Returns:
        torchvision.transforms.Compose: PIL image of any mode, or RGB as a uint8 tensor if its ``takes_tensors`` is
        true -> shape ``(3, H, W)``, float32.

    Raises:
        DatasetError: If the config has a key that is wrong for this data set.

    Example:
        >>> from PIL import Image
        >>> transform(DatasetConfig('cifar10'))(Image.new('L', (32, 32))).shape
        torch.Size([3, 32, 32])
    """
    known = check(config)
    train = default_for_training(config, config.augment)
    flip = [transforms.RandomHorizontalFlip()] if known.flip and train else []
    crop_size, resize_size = config.crop_size or 224, config.resize_size or 256
    crop: list[Callable]
    if known.size is not None:
        crop = [to_rgb, *([transforms.RandomCrop(known.size, padding=known.padding)] if train else [])]
    elif train:
        crop = [RandomResizedCrop(crop_size)]
    elif crop_size <= resize_size:
        crop = [to_rgb, transforms.Resize(resize_size), transforms.CenterCrop(crop_size)]
    else:
        raise DatasetError(f'resize_size: {resize_size} is smaller than crop_size: {crop_size}: choose a larger one')
    normalize = transforms.Normalize(*_mean_and_std(config, known))
    cutout = [Cutout(config.cutout)] if config.cutout is not None and train else []
    return Pipeline([*crop, *flip, ToFloats(), normalize, *cutout])


class BatchTransform:
    """The transforms of small images that a config asks for, for a whole batch at once.

    They have the law of :func:`transform`, and each sample has draws of its own. The draws come from torch's CPU
    generator, and so are the same on every device.

    Args:
        config (DatasetConfig): The data set; its images are of one size.
        device (torch.device | str, optional): The device of the batches. Default: the CPU.

    Raises:
        DatasetError: If the config has a key that is wrong for this data set.

    Example:
        >>> BatchTransform(DatasetConfig('digits'))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 3, 8, 8])
    """

    batched = True  # Copies stack the copies of a batch behind its first dimension

    def __init__(self, config: DatasetConfig, device: torch.device | str | None = None) -> None:
        known = check(config)
        training = default_for_training(config, config.augment)
        self.normalize = Normalize(*_mean_and_std(config, known), device)
        self.padding = known.padding if training else 0
        self.flip = known.flip and training
        self.cutout = config.cutout if training else None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Transform ``images``, shape ``(N, 3, H, W)``, uint8, to normalized float32 of the same shape."""
        size, _, height, width = images.shape
        down, across = (torch.arange(length, device=images.device) for length in (height, width))

        def draw(bound: int) -> torch.Tensor:
            return torch.randint(bound, (size, 1)).to(images.device, non_blocking=True)

        if self.padding or self.flip:
            rows = down + draw(2 * self.padding + 1)
            columns = torch.where(draw(2) == 1, across.flip(0), across) if self.flip else across
            columns = columns + draw(2 * self.padding + 1)
            source = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None]
            padded = F.pad(images, [self.padding] * 4).flatten(2)
            images = padded.gather(2, source.view(size, 1, -1).expand(-1, 3, -1)).view_as(images)
        batch = self.normalize(images)
        if self.cutout:
            rows = down - draw(height) + self.cutout // 2  # counted from the top of the square, wherever that is
            columns = across - draw(width) + self.cutout // 2
            erased = (rows // self.cutout == 0)[:, :, None] & (columns // self.cutout == 0)[:, None]
            batch.masked_fill_(erased[:, None], 0)
        return batch


def _mean_and_std(config: DatasetConfig, known: Known) -> tuple[Sequence[float], Sequence[float]]:
    """Return the config's statistics of red, green and blue, else the converter's record, else those of the name."""
    mean, std = config.mean, config.std
    if config.name == 'imagefolder' and (mean is None or std is None):
        record = index(config).get(RECORD, {})
        mean, std = mean or record.get('mean'), std or record.get('std')
    return mean or known.mean, std or known.std


def image_size(config: DatasetConfig) -> int:
    """Tell height and width of the images after the transforms; unit: pixels.

    Example:
        >>> image_size(DatasetConfig('cifar10')), image_size(DatasetConfig('imagenet'))
        (32, 224)
    """
    return check(config).size or config.crop_size or 224
