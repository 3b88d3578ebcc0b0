"""Stored samples: decode an image file to 8-bit RGB, and check that a sample is what its dataset promises."""

import functools
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from composer_sba.data.jpeg import Jpeg, decode_jpeg
from composer_sba.errors import DatasetError, one_line

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


def decode(file: bytes, tensors: bool = False) -> Image.Image | torch.Tensor:
    """Decode an image file.

    PIL images and tensors have the same pixels, bit by bit: the wheels of Pillow and simplejpeg both decode with
    libjpeg-turbo. Decoding to a tensor takes a fifth less time.

    Args:
        file (bytes): Content of the file, in any format that PIL reads.
        tensors (bool, optional): Whether to decode a JPEG to a tensor. Default: ``False``.

    Returns:
        PIL.Image.Image | torch.Tensor: An image in mode ``'RGB'``; or a tensor of shape ``(3, H, W)``, uint8, with the
        channels of a pixel next to each other in memory. PIL decodes CMYK, other formats, and damaged JPEGs, where its
        errors are clearer.

    Raises:
        OSError: If PIL cannot decode the file.
        ValueError: If the pixels have no agreed range; see :func:`to_rgb`.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new('L', (4, 2)).save(file, 'JPEG')
        >>> decode(file.getvalue()).size, decode(file.getvalue(), tensors=True).shape
        ((4, 2), torch.Size([3, 2, 4]))
    """
    pixels = decode_jpeg(file) if tensors else None
    if pixels is not None:
        return pixels
    return to_rgb(Image.open(io.BytesIO(file)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Transparency is dropped. 16-bit grey levels are scaled to 0 to 255 and rounded; PIL alone would clip them. A TIFF of
    12 bits is scaled by its own maximum, 4095.

    Args:
        image (PIL.Image.Image): The image. If it is in mode ``'RGB'``, it is returned itself.

    Returns:
        PIL.Image.Image: The image in mode ``'RGB'``.

    Raises:
        ValueError: If its pixels are 32-bit integers (mode ``'I'``) or floats (``'F'``), which have no agreed range.

    Example:
        >>> to_rgb(Image.new('I;16', (1, 1), 32896)).getpixel((0, 0))
        (128, 128, 128)
    """
    sixteen_bit = image.mode.startswith('I;16') or (image.mode == 'I' and image.format in ('PNG', 'PPM'))
    if image.mode in ('I', 'F') and not sixteen_bit:
        raise ValueError(f'pixels of mode {image.mode} have no agreed range, convert them to 8 or 16 bits')
    if sixteen_bit:
        tags = getattr(image, 'tag_v2', {})
        bits, inverted = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        return Image.fromarray(np.asarray(image, np.int32)).point(_levels(bits, inverted), 'L').convert('RGB')
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')  # PIL warns if it converts straight to RGB
    elif image.mode == 'La':
        image = image.convert('LA')
    image.load()
    return image if image.mode == 'RGB' else image.convert('RGB')  # which would copy


@functools.cache
def _levels(bits: int, inverted: bool) -> list[int]:
    """Return the 8-bit level of each 16-bit number."""
    top = 2**bits - 1
    levels = [(255 * min(number, top) + top // 2) // top for number in range(1 << 16)]
    return [255 - level for level in levels] if inverted else levels


def decoding_error(error: Exception) -> str:
    """Return why an image cannot be decoded, in one line without PIL's name of a buffer in memory.

    Example:
        >>> decoding_error(OSError('cannot identify image file <_io.BytesIO object at 0x7f5d8c0>'))
        'cannot identify image file'
    """
    return re.sub(r' ?<[\w.]+ object at 0x\w+>', '', one_line(error))


@dataclass(frozen=True)
class Expected:
    """The properties that every sample of a dataset must have, checked as it is read.

    Args:
        folder (str): Folder of the dataset, for messages.
        num_classes (int): Number of classes. Labels must be in [0, num_classes).
        image_size (int, optional): Height and width that every image must have. ``None``: any.
        remedy (str): How to repair a broken dataset, for messages.
    """

    folder: str
    num_classes: int
    image_size: int | None
    remedy: str

    def read(
        self,
        sample_id: int,
        read: Callable[..., Mapping],
        *args: Any,
        tensors: bool = False,
        crops: bool = False,
    ) -> tuple[Image.Image | torch.Tensor | Jpeg, int]:
        """Read and check one sample.

        Args:
            sample_id (int): Index of the sample in the dataset, for messages.
            read (Callable): Returns the columns ``x``, an image or the content of its file, and ``y``.
            *args (Any): Arguments of ``read``.
            tensors (bool, optional): Whether to decode a JPEG to a tensor. Default: ``False``.
            crops (bool, optional): Whether to leave it to the transform to decode a crop of a JPEG. Default: ``False``.

        Returns:
            tuple[PIL.Image.Image | torch.Tensor | Jpeg, int]: The RGB image, as :func:`decode` returns it, or the JPEG;
            and its label.

        Raises:
            DatasetError: If the sample cannot be read, or has an impossible label or the wrong size.
        """
        try:
            sample = read(*args)
            image, label = sample['x'], int(sample['y'])
            if tensors and isinstance(image, JpegImageFile):  # Streaming opened it from memory without decoding it
                image = cast(io.BytesIO, image.fp).getvalue()
            jpeg = Jpeg.open(image) if crops and isinstance(image, bytes) else None
            image = jpeg or (decode(image, tensors) if isinstance(image, bytes) else to_rgb(image))
        except Exception as error:  # decoders raise many types, which depend on the format and the damage
            raise self.unreadable(sample_id, error) from error
        if not 0 <= label < self.num_classes:
            raise DatasetError(
                f'{self.folder}: sample {sample_id} has the label {label}, expected 0 to '
                f'{self.num_classes - 1}: correct num_classes or the data'
            )
        height, width = image.shape[1:] if isinstance(image, torch.Tensor) else (image.height, image.width)
        if self.image_size and (height, width) != (self.image_size, self.image_size):
            raise DatasetError(
                f'{self.folder}: sample {sample_id} has {width}x{height} pixels, expected '
                f'{self.image_size}x{self.image_size}: read it as name: imagefolder'
            )
        return image, label

    def unreadable(self, sample_id: int, error: Exception) -> DatasetError:
        """Return the error of a sample that cannot be read, because of ``error``."""
        return DatasetError(
            f'{self.folder}: sample {sample_id} cannot be read ({decoding_error(error)}): {self.remedy}'
        )
