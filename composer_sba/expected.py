"""What every sample of a dataset must be."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from composer_sba.decode import decode, to_rgb
from composer_sba.errors import DatasetError
from composer_sba.index import said


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
            tuple[PIL.Image.Image | torch.Tensor, int]: The RGB image, as :func:`composer_sba.decode.decode` gives it,
            and its label.

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
                f'{self.folder}: sample {sample_id} cannot be read ({said(error)}): {self.remedy}'
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
