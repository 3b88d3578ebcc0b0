"""Crops of JPEG files, compared with crops of the images that they hold.

Run: python -m pytest tests/test_jpeg.py
"""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from composer_sba.algorithms.batch_augmentation import Copies
from composer_sba.data.jpeg import Jpeg
from composer_sba.data.loader import DatasetConfig, build_dataloader, build_dataspec
from composer_sba.data.samples import decode
from composer_sba.data.transforms import RandomResizedCrop
from composer_sba.errors import DatasetError
from shards import encoded, write

NUMBERS = np.random.default_rng(0)


def photograph(width: int, height: int, mode: str = 'RGB', **options: Any) -> bytes:
    """A JPEG with the amplitude spectrum of photographs, 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(NUMBERS.normal(size=(3, height, width))) / frequency
    pixels = np.fft.irfft2(waves, s=(height, width)).transpose(1, 2, 0)
    image = Image.fromarray((127 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, 'JPEG', **options)
    return buffer.getvalue()


def sampled_441(file: bytes) -> bytes:
    """Return a JPEG of 4:4:4 with the header of 4:4:1, as jpegtran makes it from 4:1:1 when it turns the image."""
    luma = file.index(b'\xff\xc0') + 11
    assert file[luma] == 0x11
    return file[:luma] + b'\x14' + file[luma + 1 :]


def opened(file: bytes) -> Jpeg:
    jpeg = Jpeg.open(file)
    assert jpeg is not None
    return jpeg


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'subsampling': 0},
        {'subsampling': 1},
        {'progressive': True},
        {'progressive': True, 'subsampling': 0, 'quality': 30},
        {'restart_marker_rows': 1},
        {'optimize': True, 'exif': bytes(60000)},
        {'comment': b'\xff\xc0\x00\x11\x08'},  # what looks like the segment of the size
        {'mode': 'L'},
        {'keep_rgb': True, 'subsampling': 0},
    ],
    ids=str,
)
def test_a_crop_has_the_pixels_of_the_image(options: dict[str, Any]) -> None:
    """Also the rows beside those that are not decoded, whose colours libjpeg interpolates."""
    for width, height in ((97, 61), (240, 320)):
        file = photograph(width, height, **options)
        jpeg, image = opened(file), decode(file, tensors=True)
        assert isinstance(image, torch.Tensor) and (jpeg.height, jpeg.width) == (height, width)
        for _ in range(20):
            top, left = int(NUMBERS.integers(height)), int(NUMBERS.integers(width))
            rows, columns = int(NUMBERS.integers(1, height - top + 1)), int(NUMBERS.integers(1, width - left + 1))
            expected = image[:, top : top + rows, left : left + columns]
            assert torch.equal(jpeg.crop(top, left, rows, columns, size=224), expected), (top, left, rows, columns)


def test_the_rows_below_a_crop_are_not_decoded() -> None:
    jpeg = opened(photograph(1000, 800))

    def seconds(rows: int) -> float:
        times = []
        for _ in range(7):
            begun = time.thread_time()
            jpeg.crop(0, 0, rows, 1000, size=1000)
            times.append(time.thread_time() - begun)
        return min(times)

    part, whole = seconds(80), seconds(800)
    assert part < 0.4 * whole, f'{1000 * part:.1f} of {1000 * whole:.1f} ms for a tenth of the rows'


@pytest.mark.parametrize(
    ('sides', 'size', 'scale'),
    [((111, 250), 28, 1), ((112, 250), 28, 2), ((224, 250), 28, 4), ((250, 112), 7, 8), ((60, 60), 28, 1)],
)
def test_a_crop_has_twice_the_pixels_that_are_needed(sides: tuple[int, int], size: int, scale: int) -> None:
    found = opened(photograph(251, 251)).crop(1, 0, *sides, size=size).shape[1:]
    expected = [side / scale for side in sides]
    assert all(abs(one - other) <= 1 for one, other in zip(found, expected, strict=True)), (found, expected)


@pytest.mark.parametrize(('size', 'mean', 'most'), [((160, 120), 0, 0), ((400, 300), 4, 40), ((750, 550), 3, 40)])
def test_the_scale_changes_a_resized_crop_little(size: tuple[int, int], mean: float, most: int) -> None:
    file, crop = photograph(*size), RandomResizedCrop(56)
    far = []
    for seed in range(20):
        crops = []
        for image in (decode(file, tensors=True), opened(file)):
            torch.manual_seed(seed)
            crops.append(crop(image).int())
            following = torch.rand(())
        far.append((crops[0] - crops[1]).abs().double())
        torch.manual_seed(seed)
        transforms.RandomResizedCrop(56)(decode(file))
        assert torch.rand(()) == following, 'not as many draws as torchvision'
    levels = torch.stack(far)
    assert levels.mean() <= mean and levels.max() <= most, (levels.mean(), levels.max())


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'file',
    [
        b'',
        b'\xff\xd8\xff\xd9',
        photograph(40, 30)[:-2],
        photograph(40, 30) + b'more',
        photograph(40, 30, mode='CMYK'),
        sampled_441(photograph(40, 30, subsampling=0)),
        encoded(Image.new('RGB', (40, 30))),
    ],
    ids=['empty', 'nothing', 'cut short', 'followed by others', 'CMYK', '4:4:1', 'PNG'],
)
def test_another_file_is_decoded_as_a_whole(file: bytes) -> None:
    assert Jpeg.open(file) is None


def test_a_damaged_jpeg_is_named(tmp_path: Path) -> None:
    file = photograph(100, 80).replace(b'\xff\xdb', b'\xff\xe9')  # its tables are not recognized
    write(tmp_path / 'train', [file])
    config = DatasetConfig('imagefolder', local=str(tmp_path), num_classes=1, num_workers=0)
    with pytest.raises(DatasetError, match=r'/train: sample 0 cannot be read \(Quantization table.*\): make it again'):
        list(build_dataloader(config, 1))


def test_copies_decode_an_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / 'train', [photograph(100, 80)])
    config = DatasetConfig('imagefolder', local=str(tmp_path), num_classes=1, crop_size=24, num_workers=0)
    dataset: Any = build_dataspec(config, 1).dataloader.dataset
    assert dataset.transform.takes_jpegs
    dataset.transform = Copies(dataset.transform, 3)
    monkeypatch.setattr(Jpeg, 'crop', lambda *args: pytest.fail('each copy is decoded'))
    assert dataset.get_item(0)[0].shape == (3, 3, 24, 24)
