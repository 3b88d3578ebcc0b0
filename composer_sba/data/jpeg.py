"""Partial decoding of JPEG files: only a crop, at the scale that it needs."""

import simplejpeg
import torch

_FILL = 0xFF
_SIZES = (0xC0, 0xC1, 0xC2)  # markers of the segment that holds the size: baseline, extended and progressive


class JpegError(Exception):
    """A JPEG file that cannot be decoded."""


class Jpeg:
    """A JPEG file that is decoded when its crop is known.

    Args:
        file (bytes): Content of the file, which :meth:`open` has looked at.
        height (int): Height of the image. Unit: pixels.
        width (int): Its width.
        height_at (int): Position of the height in the file.
    """

    def __init__(self, file: bytes, height: int, width: int, height_at: int) -> None:
        self.file = file
        self.height = height
        self.width = width
        self._height_at = height_at

    @classmethod
    def open(cls, file: bytes) -> 'Jpeg | None':
        """Return the file, or None if it is not a complete JPEG of grey levels or colours.

        Example:
            >>> Jpeg.open(b'GIF87a') is None
            True
        """
        if not file.endswith(b'\xff\xd9'):
            return None
        size, height_at = _size(file), _position_of_height(file)
        return cls(file, *size, height_at) if size and height_at else None

    def crop(self, top: int, left: int, height: int, width: int, size: int) -> torch.Tensor:
        """Decode a rectangle that will be resized to ``size`` by ``size`` pixels.

        The rows below the rectangle are not decoded. The scale is 1/8, 1/4 or 1/2 if each side still has twice as many
        pixels as needed, and the border is then rounded to whole pixels. At full scale the pixels are those of the
        decoded image, bit by bit.

        Args:
            top (int): First row of the rectangle.
            left (int): First column.
            height (int): Number of rows at full scale.
            width (int): Number of columns.
            size (int): Height and width after resizing. Unit: pixels.

        Returns:
            torch.Tensor: Shape ``(3, H, W)``, uint8, with the channels of a pixel next to each other in memory.

        Raises:
            JpegError: If the decoder cannot go on. Like PIL, it passes over damage within the compressed pixels.
        """
        # With fewer than twice as many pixels, the decoder in place of the resizing would decide how sharp they become.
        scale = next((each for each in (8, 4, 2) if min(height, width) >= 2 * size * each), 1)
        # The decoder stops at the height in the file. It interpolates the colour of a row from the rows beside it.
        rows = min(self.height, top + height + 2 * scale)
        file = self.file[: self._height_at] + rows.to_bytes(2, 'big') + self.file[self._height_at + 2 :]
        at_least = {'min_height': -(-rows // scale), 'min_width': -(-self.width // scale)}
        try:
            pixels = simplejpeg.decode_jpeg(file, **at_least, strict=False)  # the rows left over are not a fault
        except ValueError as error:
            raise JpegError(str(error)) from error
        vertical, horizontal = (
            slice(round(start / scale), round((start + length) / scale))
            for start, length in ((top, height), (left, width))
        )
        return torch.from_numpy(pixels[vertical, horizontal]).permute(2, 0, 1)


def decode_jpeg(file: bytes) -> torch.Tensor | None:
    """Decode a whole JPEG of grey levels or colours to shape ``(3, H, W)``; return None for CMYK and for other files.

    Example:
        >>> decode_jpeg(b'GIF87a') is None
        True
    """
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1) if _size(file) else None
    except ValueError:
        return None


def _size(file: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG of grey levels or colours, or None for CMYK and for other files."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(file)
    except (ValueError, KeyError):  # it has no name for the subsampling 4:4:1
        return None
    return (height, width) if colors in ('Gray', 'YCbCr', 'RGB') else None


def _position_of_height(file: bytes) -> int | None:
    """Return where a JPEG file stores its height, or None if its method of compression is not supported."""
    at = 2
    while file[at : at + 1] == b'\xff':
        marker = file[at + 1]
        if marker in _SIZES:
            return at + 5
        at += 1 if marker == _FILL else 2 + int.from_bytes(file[at + 2 : at + 4], 'big')
    return None
