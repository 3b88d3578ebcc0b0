"""Transforms of images: one at a time in a worker, or a whole batch on the device.

:func:`transform` builds the pipeline of a dataset for single images, :class:`BatchTransform` the same distribution for
batches in memory. The other classes are their steps. Pixels stay bytes as long as possible: workers copy less, and the
device converts and normalizes a batch at once.
"""

import itertools
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from composer_sba.data.config import DatasetConfig, resolve
from composer_sba.data.jpeg import Jpeg
from composer_sba.data.mds_index import RECORD
from composer_sba.data.samples import to_rgb
from composer_sba.errors import DatasetError, check_number


def transform(config: DatasetConfig) -> transforms.Compose:
    """Build the transforms from an image to a normalized tensor.

    For training, images of a fixed size are padded, cropped and, except digits, flipped; others get torchvision's
    random resized crop and flip. For evaluation, images of a fixed size are left alone; others are resized and cropped
    at the centre.

    A random resized crop is drawn first, and only what it needs of a JPEG is decoded, unless a transform that needs PIL
    images, such as Composer's RandAugment, is inserted before ``ToTensor``. The crop is the same. A pixel differs from
    PIL's by at most one of 255 levels, unless each side of the crop has four times as many pixels as the result: the
    crop is then decoded at a smaller scale, and its pixels differ by two to three levels. Evaluation uses PIL only.

    Args:
        config (DatasetConfig): The dataset.

    Returns:
        torchvision.transforms.Compose: Maps a PIL image of any mode to shape ``(3, H, W)``, float32. If its
        ``takes_tensors`` and ``takes_jpegs`` are true, it also accepts RGB as a uint8 tensor, and a
        ``Jpeg`` of ``composer_sba.data.jpeg``.

    Raises:
        DatasetError: If a key of the config is wrong for this dataset.

    Example:
        >>> from PIL import Image
        >>> transform(DatasetConfig('cifar10'))(Image.new('L', (32, 32))).shape
        torch.Size([3, 32, 32])
    """
    config = resolve(config)
    known, crop_size, resize_size = config.known, config.crop_size, config.resize_size
    crop: list[Callable]
    if known.size is not None:
        crop = [to_rgb, *([transforms.RandomCrop(known.size, padding=known.padding)] if config.augment else [])]
    elif config.augment:
        crop = [RandomResizedCrop(crop_size)]
    elif crop_size <= resize_size:
        crop = [to_rgb, transforms.Resize(resize_size), transforms.CenterCrop(crop_size)]
    else:
        raise DatasetError(f'resize_size: {resize_size} is smaller than crop_size: {crop_size}: choose a larger one')
    flip = [transforms.RandomHorizontalFlip()] if known.flip and config.augment else []
    noise, given = [], config.gaussian_noise
    if given is not None and config.augment:
        noise = [v2.RandomApply([v2.GaussianNoise(sigma=given.sigma)], given.prob)]
    cutout = [Cutout(config.cutout)] if config.cutout is not None and config.augment else []
    return Pipeline([*crop, *flip, ToFloats(), *noise, transforms.Normalize(*mean_and_std(config)), *cutout])


class BatchTransform(transforms.Compose):  # type: ignore[misc]  # torchvision has no types
    """The transforms of a dataset with images of one size, for a whole batch at once.

    Their distribution is that of :func:`transform`, with independent draws for each sample. The draws come from torch's
    CPU generator and are the same on every device. A transform of single images that Composer's RandAugment, AugMix or
    ColOut inserts before ``ToTensor`` is applied to the images of a batch one by one.

    Args:
        config (DatasetConfig): The dataset.
        device (torch.device | str, optional): Device of the batches. Default: the CPU.

    Raises:
        DatasetError: If a key of the config is wrong for this dataset.

    Example:
        >>> BatchTransform(DatasetConfig('digits'))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
        torch.Size([2, 3, 8, 8])
    """

    batched = True  # tells BatchAugmentation that the copies of a batch are stacked behind its first dimension

    def __init__(self, config: DatasetConfig, device: torch.device | str | None = None) -> None:
        config = resolve(config)
        self.normalize = Normalize(*mean_and_std(config), device)
        self.padding = config.known.padding if config.augment else 0
        self.flip = config.known.flip and config.augment
        self.noise = config.gaussian_noise if config.augment else None
        self.cutout = config.cutout if config.augment else None
        self._of_batches = [self._crop_and_flip, ToBytes(), self.normalize, self._add_noise, self._cut_out]
        super().__init__([*self._of_batches])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Transform ``images``, shape ``(N, 3, H, W)``, uint8, to normalized float32 of the same shape."""
        for step in self.transforms:
            images = step(images) if step in self._of_batches else _one_by_one(step, images)
        return images

    def __repr__(self) -> str:
        names = (getattr(step, '__name__', type(step).__name__).lstrip('_') for step in self.transforms)
        return f'{type(self).__name__}({", ".join(names)})'

    def _crop_and_flip(self, images: torch.Tensor) -> torch.Tensor:
        if not self.padding and not self.flip:
            return images
        down, across = _positions(images)
        rows = down + _draw(2 * self.padding + 1, images)
        columns = torch.where(_draw(2, images) == 1, across.flip(0), across) if self.flip else across
        columns = columns + _draw(2 * self.padding + 1, images)
        source = rows[:, :, None] * (len(across) + 2 * self.padding) + columns[:, None]
        padded = F.pad(images, [self.padding] * 4).flatten(2)
        return padded.gather(2, source.view(len(images), 1, -1).expand(-1, 3, -1)).view_as(images)

    def _add_noise(self, images: torch.Tensor) -> torch.Tensor:
        if self.noise is None:
            return images
        black, white = ((level - self.normalize.mean) / self.normalize.std for level in (0, 1))
        draws = torch.randn(images.shape).to(images.device, non_blocking=True)
        noisy = (images + self.noise.sigma / self.normalize.std * draws).clamp(black, white)
        chosen = torch.rand(len(images), 1, 1, 1).to(images.device, non_blocking=True) < self.noise.prob
        return torch.where(chosen, noisy, images)

    def _cut_out(self, images: torch.Tensor) -> torch.Tensor:
        if not self.cutout:
            return images
        down, across = _positions(images)
        rows = down - _draw(len(down), images) + self.cutout // 2  # from the top of the square, which may be outside
        columns = across - _draw(len(across), images) + self.cutout // 2
        erased = (rows // self.cutout == 0)[:, :, None] & (columns // self.cutout == 0)[:, None]
        return images.masked_fill_(erased[:, None], 0)


def _positions(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of rows and of columns."""
    height, width = images.shape[2:]
    return torch.arange(height, device=images.device), torch.arange(width, device=images.device)


def _draw(bound: int, images: torch.Tensor) -> torch.Tensor:
    """Draw an integer below ``bound`` for each image, shape ``(N, 1)``."""
    return torch.randint(bound, (len(images), 1)).to(images.device, non_blocking=True)


def _one_by_one(step: Callable[[Image.Image], Image.Image], images: torch.Tensor) -> torch.Tensor:
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    changed = [TF.pil_to_tensor(step(Image.fromarray(array))) for array in arrays]
    return torch.stack(changed).to(images.device, non_blocking=True)


class Pipeline(transforms.Compose):  # type: ignore[misc]  # torchvision has no types
    """A sequence of transforms that accepts tensors unless a transform that needs a PIL image is inserted.

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
        """Whether every step before the ``ToTensor`` accepts a uint8 tensor."""
        before = itertools.takewhile(lambda step: not isinstance(step, transforms.ToTensor), self.transforms)
        return all(isinstance(step, RandomResizedCrop | transforms.RandomHorizontalFlip) for step in before)

    @property
    def takes_jpegs(self) -> bool:
        """Whether the first step decodes a ``Jpeg``, and the others accept a tensor."""
        return isinstance(self.transforms[0], RandomResizedCrop) and self.takes_tensors


class RandomResizedCrop(nn.Module):
    """torchvision's ``RandomResizedCrop``, faster for JPEG files and for uint8 tensors.

    A PIL image, of any mode, is cropped by torchvision. A tensor or a JPEG gets the same crop from the same draws. 1 in
    250 pixels of a photograph differs from PIL's, by one of 255 levels. A crop of a JPEG with at least four times
    as many pixels a side as the result is decoded at a smaller scale, and differs by two to three levels.

    Args:
        size (int): Height and width of the result. Unit: pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._crop = transforms.RandomResizedCrop(size)

    def forward(self, image: Image.Image | torch.Tensor | Jpeg) -> Image.Image | torch.Tensor:
        """Crop and resize ``image``, bilinear and antialiased."""
        if isinstance(image, Image.Image):
            return self._crop(to_rgb(image))
        size = torch.empty(image.height, image.width) if isinstance(image, Jpeg) else image
        top, left, height, width = self._crop.get_params(size, self._crop.scale, self._crop.ratio)
        if isinstance(image, Jpeg):
            crop = image.crop(top, left, height, width, self._crop.size[0])
        else:
            crop = image[:, top : top + height, left : left + width]
        # torch resizes pixels twice as fast if they are contiguous, with the strides of a batch of this format.
        # torchvision would resize in float32, which takes three times as long on any CPU with AVX-512.
        batch = crop.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        return F.interpolate(batch, self._crop.size, mode='bilinear', antialias=True)[0]


class ToBytes(transforms.ToTensor):  # type: ignore[misc]  # torchvision has no types
    """A transform from a PIL image to a uint8 tensor of shape ``(C, H, W)``; it leaves such a tensor alone.

    It is a ``ToTensor`` because Composer's RandAugment, AugMix and ColOut insert their image transforms before one.

    Example:
        >>> ToBytes()(Image.new('RGB', (4, 2), 'white')).unique()
        tensor([255], dtype=torch.uint8)
    """

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Convert ``image`` to values from 0 to 255."""
        return image if isinstance(image, torch.Tensor) else TF.pil_to_tensor(image)


class ToFloats(ToBytes):
    """torchvision's ``ToTensor`` for 8-bit images, which also accepts a uint8 tensor."""

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """Convert ``image`` to float32 values in [0, 1]."""
        return super().__call__(image).to(torch.float32).div(255)


class Normalize:
    """A transform from uint8 to normalized images, bit by bit equal to torchvision's ``ToTensor`` and ``Normalize``.

    Args:
        mean (Sequence[float]): Means of red, green and blue in [0, 1].
        std (Sequence[float]): Their standard deviations.
        device (torch.device | str, optional): Device of the result. Default: the CPU.

    Example:
        >>> Normalize([0.5] * 3, [0.25] * 3)(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None) -> None:
        self.mean, self.std = (
            torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in (mean, std)
        )
        self.white = torch.full((1, 1, 1), 255.0, device=device)  # a GPU divides less exactly by a Python number

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize ``images``, shape ``(*, 3, H, W)``, to float32 on the device."""
        images = images.to(self.mean.device, non_blocking=True)
        return images.to(torch.float32).div_(self.white).sub_(self.mean).div_(self.std)


class Cutout:
    """A transform that erases a square at a random position of each image.

    Implements Cutout of `DeVries & Taylor, 2017 <https://arxiv.org/abs/1708.04552>`_: the centre is uniform over the
    image, and the square is clipped at the border. After normalization it erases with the mean of the dataset.
    Composer's CutOut, in contrast, erases the same box in every image of a batch.

    Args:
        size (int): Side of the square, >= 1. Unit: pixels; 16 for CIFAR-10 and 8 for CIFAR-100 in the paper.

    Raises:
        ValueError: If ``size`` is not an integer >= 1.

    Example:
        >>> erased = (Cutout(4)(torch.ones(3, 8, 8)) == 0).sum().item()
        >>> 3 * 4 <= erased <= 3 * 16
        True
    """

    def __init__(self, size: int) -> None:
        self.size = check_number('size', size, 'an integer >= 1', lambda value: value >= 1, Integral)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Erase a square from a copy of ``image``, shape ``(C, H, W)``."""
        height, width = image.shape[-2:]
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, left = row - self.size // 2, column - self.size // 2
        image = image.clone()
        image[..., max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = 0
        return image


def image_size(config: DatasetConfig) -> int:
    """Return height and width of the images after the transforms. Unit: pixels.

    Example:
        >>> image_size(DatasetConfig('cifar10')), image_size(DatasetConfig('imagenet'))
        (32, 224)
    """
    return resolve(config).crop_size


def mean_and_std(config: DatasetConfig) -> tuple[Sequence[float], Sequence[float]]:
    """Return the statistics of red, green and blue that images are normalized with.

    They are the config's, or else those of the converter's record, or those known by name.

    Example:
        >>> mean_and_std(DatasetConfig('cifar10'))
        ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
    """
    config = resolve(config)
    mean, std = config.mean, config.std
    if config.name == 'imagefolder' and (mean is None or std is None):
        record = config.read_index().get(RECORD, {})
        mean, std = mean or record.get('mean'), std or record.get('std')
    return mean or config.known.mean, std or config.known.std
