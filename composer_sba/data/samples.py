"""From the file of an image to RGB: as a PIL image, or, where a tensor will do, a JPEG straight to a tensor."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.io import decode_jpeg

from composer_sba.errors import DatasetError, one_line


def decode(file: bytes, tensors: bool = False) -> Image.Image | torch.Tensor:
    """Decode the file of an image.

    Both ways give the same pixels, bit by bit, where Pillow and torchvision bring the same libjpeg-turbo's arithmetic,
    as their wheels do; to a tensor it takes a fifth less time.

    Args:
        file (bytes): In any format that PIL reads.
        tensors (bool, optional): Whether a JPEG shall become a tensor. Default: ``False``.

    Returns:
        PIL.Image.Image | torch.Tensor: In mode ``'RGB'``; or of shape ``(3, H, W)``, uint8, with a pixel's colours side
        by side in memory. CMYK, and what torchvision refuses, is left to PIL, as other formats are.

    Raises:
        OSError: If PIL cannot decode it either.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new('L', (4, 2)).save(file, 'JPEG')
        >>> decode(file.getvalue()).size, decode(file.getvalue(), tensors=True).shape
        ((4, 2), torch.Size([3, 2, 4]))
    """
    if tensors and file.startswith(b'\xff\xd8\xff'):
        with contextlib.suppress(RuntimeError):  # PIL bears more, and says what is wrong with the rest
            pixels = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8))  # of bytes torch would warn
            if len(pixels) in (1, 3):
                return pixels.expand(3, -1, -1)
    return to_rgb(Image.open(io.BytesIO(file)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image to RGB; data sets hold grayscale, palette, CMYK and transparent files as well.

    Args:
        image (PIL.Image.Image): An opened image of any mode.

    Returns:
        PIL.Image.Image: The image in mode ``'RGB'``, itself if it was; transparency is dropped.
    """
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # PIL's own advice: straight to RGB it warns
    image.load()
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy


@dataclass(frozen=True)
class Expected:
    """What every sample of a dataset must be, or its reader says in one line what it is instead.

    Args:
        folder (str): Where the dataset is, for messages.
        num_classes (int): Labels are refused unless in [0, num_classes).
        image_size (int, optional): Height and width that every image must have. ``None``: any.
        remedy (str): What to do about a broken dataset, for messages.
    """

    folder: str
    num_classes: int
    image_size: int | None
    remedy: str

    def read(
        self, sample_id: int, read: Callable[..., Mapping], *args: Any, tensors: bool = False
    ) -> tuple[Image.Image | torch.Tensor, int]:
        """Read and check one sample.

        Args:
            sample_id (int): Index of the sample in the dataset, for messages.
            read (Callable): Called with ``args``, gives the columns ``x``, an image or its file, and ``y``.
            *args (Any): Its arguments.
            tensors (bool, optional): Whether a JPEG shall become a tensor. Default: ``False``.

        Returns:
            tuple[PIL.Image.Image | torch.Tensor, int]: The RGB image, as :func:`decode` gives it, and its
            label.

        Raises:
            DatasetError: If the sample cannot be read, has an impossible label or the wrong size.
        """
        try:
            sample = read(*args)
            image, label = sample['x'], int(sample['y'])
            if tensors and isinstance(image, JpegImageFile):  # opened by Streaming, from memory, and not decoded yet
                image = cast(io.BytesIO, image.fp).getvalue()
            image = decode(image, tensors) if isinstance(image, bytes) else to_rgb(image)
        except Exception as error:  # what a decoder raises depends on the format and on where the bytes are broken
            raise DatasetError(
                f'{self.folder}: sample {sample_id} cannot be read ({one_line(error)}): {self.remedy}'
            ) from error
        if not 0 <= label < self.num_classes:
            raise DatasetError(
                f'{self.folder}: sample {sample_id} has the label {label}, expected 0 to '
                f'{self.num_classes - 1}: correct num_classes or the data'
            )
        height, width = image.shape[1:] if isinstance(image, torch.Tensor) else image.size[::-1]
        if self.image_size and (height, width) != (self.image_size, self.image_size):
            raise DatasetError(
                f'{self.folder}: sample {sample_id} has {width}x{height} pixels, expected '
                f'{self.image_size}x{self.image_size}: read it as name: imagefolder'
            )
        return image, label
