"""Samples as they are read, compared with what is stored: images of every mode and encoding, and broken ones.

Run: python -m pytest tests/test_samples.py
"""

import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from composer_sba.data.conversion import convert
from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.data.samples import decode
from composer_sba.errors import DatasetError
from shards import encoded, small_images, write

# PyTorch's DataLoader, when it ends workers after one of them has raised; it then waits 5 s for each.
pytestmark = pytest.mark.filterwarnings(
    'ignore:Exception in thread QueueFeederThread:pytest.PytestUnhandledThreadExceptionWarning'
)
TRUNCATED = encoded(Image.new('RGB', (64, 64)), 'JPEG')[:400]
BLACK = encoded(Image.new('RGB', (8, 8)))


@pytest.mark.parametrize(
    ('split', 'workers', 'image', 'label', 'message'),
    [
        ('train', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with composer-sba convert'),
        ('val', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with composer-sba convert'),
        ('train', 1, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with composer-sba convert'),
        ('val', 0, b'no image', 0, r'sample 0 cannot be read \(cannot identify image file\): make it again with'),
        ('val', 0, b'', 0, r'sample 0 cannot be read \(cannot identify image file\): make it again with'),
        ('train', 0, BLACK, 7, r'sample 0 has the label 7, expected 0 to 4: correct num_classes or the data'),
        ('val', 0, BLACK, -1, r'sample 0 has the label -1, expected 0 to 4: correct num_classes or the data'),
    ],
)
def test_unreadable_samples_are_named(
    tmp_path: Path, split: str, workers: int, image: bytes, label: int, message: str
) -> None:
    write(tmp_path / split, [image], [label])
    config = DatasetConfig('imagefolder', local=str(tmp_path), split=split, num_classes=5, num_workers=workers)
    with pytest.raises(DatasetError) as caught:
        list(build_dataloader(config, 1))
    last = str(caught.value).strip().splitlines()[-1]  # a worker's traceback comes before
    assert re.search(f'{tmp_path}/{split}: {message}', last), str(caught.value)


def test_no_message_shows_a_buffer_that_streaming_decodes(tmp_path: Path) -> None:
    write(tmp_path / 'val', [b'no image'])
    index = json.loads((tmp_path / 'val' / 'index.json').read_text())
    index['shards'][0]['column_encodings'][1] = 'jpeg'
    (tmp_path / 'val' / 'index.json').write_text(json.dumps(index))
    config = DatasetConfig('imagefolder', local=str(tmp_path), split='val', num_classes=1, num_workers=0)
    with pytest.raises(DatasetError, match=r'sample 0 cannot be read \(cannot identify image file\): make'):
        list(build_dataloader(config, 1))


# --- modes ------------------------------------------------------------------------------------------------------------

RED, GREY = (200, 10, 30), (77, 77, 77)
NO_RANGE = r'pixels of mode {} have no agreed range, convert them to 8 or 16 bits'
# Mode, value of each pixel, its RGB or the error, and a format of files in which Pillow stores the mode.
MODES = [
    ('1', 1, (255, 255, 255), 'PNG'),
    ('L', 77, GREY, 'PNG'),
    ('LA', (77, 128), GREY, 'PNG'),
    ('La', (77, 255), GREY, None),
    ('P', 0, RED, 'PNG'),
    ('PA', (0, 128), RED, 'TIFF'),
    ('RGB', RED, RED, 'PNG'),
    ('RGBA', (*RED, 128), RED, 'PNG'),
    ('RGBa', (*RED, 255), RED, None),
    ('RGBX', (*RED, 0), RED, 'TIFF'),
    ('CMYK', (0, 255, 255, 0), (255, 0, 0), 'JPEG'),
    ('YCbCr', (76, 85, 255), (254, 0, 0), 'IM'),
    ('HSV', (0, 255, 255), (255, 0, 0), None),
    ('LAB', (128, 128, 128), (119, 119, 119), 'TIFF'),
    ('I;16', 77 * 257, GREY, 'PNG'),
    ('I;16L', 77 * 257, GREY, 'IM'),
    ('I;16B', 77 * 257, GREY, 'TIFF'),
    ('I;16N', 77 * 257, GREY, None),
    ('I', 77 * 257, NO_RANGE.format('I'), 'TIFF'),
    ('F', 0.3, NO_RANGE.format('F'), 'TIFF'),
]


def uniform(mode: str, value: Any) -> Image.Image:
    image = Image.new(mode, (8, 8), value)
    if mode in ('P', 'PA'):
        image.putpalette([*RED, *[0] * 765])
    return image


def read_one(folder: Path, classes: int = 1) -> list[list[int]]:
    """The colours of a split's images, each of one colour, in their order."""
    keys = {'name': 'imagefolder', 'crop_size': 8, 'resize_size': 8, 'split': 'val', 'num_workers': 0}
    config = DatasetConfig(local=str(folder), mean=[0, 0, 0], std=[1, 1, 1], num_classes=classes, **keys)
    images, _ = next(iter(build_dataloader(config, 32)))
    assert images.shape[1:] == (3, 8, 8) and images.dtype == torch.float32
    assert torch.equal(images, images[:, :, :1, :1].expand_as(images)), 'not of one colour'
    return (images[:, :, 0, 0] * 255).round().int().tolist()


def test_the_table_has_every_mode_of_pillow() -> None:
    assert {mode for mode, *_ in MODES} == set(Image.MODES)


@pytest.mark.parametrize(('mode', 'value', 'expected', 'file_format'), MODES)
def test_every_mode_is_read_as_rgb_or_refused(
    tmp_path: Path, mode: str, value: Any, expected: Any, file_format: str | None
) -> None:
    image = uniform(mode, value)
    stored = [image] if file_format is None else [encoded(image, file_format)]
    write(tmp_path / 'val', stored, encoding='pil' if file_format is None else 'bytes')
    if isinstance(expected, str):
        with pytest.raises(DatasetError, match=rf'val: sample 0 cannot be read \({expected}\): make it again'):
            read_one(tmp_path)
    else:
        assert read_one(tmp_path) == [list(expected)]


def test_every_mode_is_converted_or_named(tmp_path: Path) -> None:
    """The accepted modes in one dataset, a class each; the refused ones in another, all in one message."""
    accepted: list[list[int]] = []
    for mode, value, expected, file_format in MODES:
        if file_format is None:
            continue
        image, refused = uniform(mode, value), isinstance(expected, str)
        for split in ('train', 'val'):
            path = tmp_path / ('refused' if refused else 'accepted') / split / f'{len(accepted):02}'
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f'{mode}.{file_format.lower()}', file_format)
        if not refused:
            accepted.append(list(expected))
    convert('imagefolder', tmp_path / 'accepted', tmp_path / 'out')
    assert read_one(tmp_path / 'out', len(accepted)) == accepted
    with pytest.raises(DatasetError) as caught:
        convert('imagefolder', tmp_path / 'refused', tmp_path / 'never')
    for mode, _, expected, file_format in MODES:
        if isinstance(expected, str) and file_format:
            for split in ('train', 'val'):
                assert re.search(rf'{split}/\d+/{mode}.tiff[^,]* \({expected}\)', str(caught.value)), str(caught.value)


def with_tag(file: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF whose ``tag``, one SHORT, has another value."""
    at = file.index(struct.pack('<HHI', tag, 3, 1)) + 8
    return file[:at] + struct.pack('<H', value) + file[at + 2 :]


@pytest.mark.parametrize('tensors', [False, True])
@pytest.mark.parametrize(
    ('file', 'expected'),
    [
        (encoded(uniform('I;16', 77 * 257), 'PPM'), 77),  # which Pillow opens in mode I
        (b'P5 1 1 4095\n' + struct.pack('>H', 1000), 62),  # 1000 / 4095 * 255
        (b'P5 1 1 255\n' + bytes([62]), 62),
        (encoded(uniform('I;16', 77 * 257), 'JPEG2000'), 77),
        (with_tag(encoded(uniform('I;16', 77 * 257), 'TIFF'), 262, 0), 255 - 77),  # WhiteIsZero
        (with_tag(encoded(uniform('L', 77), 'TIFF'), 262, 0), 255 - 77),
        (
            with_tag(encoded(uniform('L', 77), 'TIFF'), 258, 12)[:-64] + b'\x4d\x44\xd4' * 32,
            77,
        ),  # 12 bits, 0x4d4 / 0xfff
        (encoded(uniform('L', 77), 'JPEG'), 77),
        (encoded(uniform('1', 1), 'JPEG'), 255),
    ],
    ids=lambda value: 'file' if isinstance(value, bytes) else None,
)
def test_grey_levels_keep_their_scale_in_every_format(file: bytes, expected: int, tensors: bool) -> None:
    image = decode(file, tensors)
    pixels = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    assert pixels.dtype == np.uint8 and np.unique(pixels).tolist() == [expected]


def test_sixteen_bits_are_rounded_to_eight() -> None:
    levels = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode(encoded(Image.fromarray(levels))))
    np.testing.assert_array_equal(pixels, np.round(levels / 257)[..., None].repeat(3, 2))


def test_transparent_palettes_are_read_as_rgb() -> None:
    buffer = io.BytesIO()
    uniform('P', 0).save(buffer, 'PNG', transparency=bytes([0, 128]))
    image = decode(buffer.getvalue())
    assert isinstance(image, Image.Image) and image.getcolors() == [(64, RED)]


def test_datasets_of_streamings_converters_are_read(tmp_path: Path) -> None:
    images = [picture.resize((32, 32)) for picture in small_images(10)]
    write(tmp_path / 'val', images, encoding='pil')
    config = DatasetConfig('cifar10', local=str(tmp_path), split='val', mean=[0, 0, 0], std=[1, 1, 1])
    found, found_labels = next(iter(build_dataloader(config, 10)))
    assert found_labels.tolist() == list(range(10))
    expected = torch.arange(10).reshape(10, 1, 1, 1).expand(10, 3, 32, 32) / 255
    torch.testing.assert_close(found, expected)
