"""Conversions that resize large images, compared with resizing alone, and the line that tells what was stored.

Run: python -m pytest tests/test_max_side.py
"""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_sba.convert import main
from composer_sba.data.conversion import convert
from conversions import content, image_folder, record, samples, small_folder


def ramp(width: int, height: int, **options: Any) -> bytes:
    """A JPEG that becomes brighter to the right and redder to the bottom."""
    down, across = np.mgrid[0:height, 0:width]
    pixels = np.stack([down * 255 / height, across * 255 / width, across * 0 + 99], 2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{'format': 'JPEG', 'quality': 95} | options)
    return buffer.getvalue()


TURNED = Image.Exif()
TURNED[0x0112] = 6  # reading ignores it, as torchvision's ImageFolder does


def test_only_images_beyond_max_side_are_stored_again(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'source')
    files = {
        '1.jpg': (ramp(64, 48), None),
        '2.jpg': (ramp(65, 48), (64, 47)),
        '3.jpg': (ramp(48, 400, exif=TURNED), (8, 64)),
        '4.png': (ramp(1000, 800, format='PNG'), (64, 51)),
        '5.jpg': (ramp(1000, 800, progressive=True, comment=b'of its source'), (64, 51)),
        '6.png': (ramp(64, 64, format='PNG'), None),
    }
    for name, (file, _) in files.items():
        (source / 'val' / 'bee' / name).write_bytes(file)
    convert('imagefolder', source, tmp_path / 'out', max_side=64, quality=80)
    stored = [sample['x'] for sample in samples(tmp_path / 'out' / 'val')][2:]
    for found, (file, size) in zip(stored, files.values(), strict=True):
        if size is None:
            assert found == file
            continue
        image = Image.open(io.BytesIO(found))
        quantized = Image.open(io.BytesIO(ramp(8, 8, quality=80))).quantization
        assert (image.format, image.size, image.quantization) == ('JPEG', size, quantized)
        assert not image.getexif() and not image.info.get('comment')
        buffer = io.BytesIO()
        Image.open(io.BytesIO(file)).resize(size, Image.Resampling.LANCZOS).save(buffer, 'JPEG', quality=80)
        expected = Image.open(buffer)
        far = np.abs(np.asarray(image, np.int32) - np.asarray(expected, np.int32))
        assert far.mean() < 2 and far.max() < 16, (size, far.mean(), far.max())
    found = record(tmp_path / 'out' / 'train')
    before = sum(path.stat().st_size for path in source.rglob('*.*'))
    after = sum(len(sample['x']) for split in ('train', 'val') for sample in samples(tmp_path / 'out' / split))
    assert found == record(tmp_path / 'out' / 'val') and after < before
    assert [found[key] for key in ('max_side', 'quality', 'resized')] == [64, 80, 4]
    assert (found['source_bytes'], found['stored_bytes']) == (before, after)


def test_images_of_every_mode_are_resized_as_they_are_read(tmp_path: Path) -> None:
    """The same bytes each time, with statistics of what is stored."""
    source = image_folder(tmp_path / 'source')
    for out in ('first', 'second'):
        convert('imagefolder', source, tmp_path / out, max_side=6)
    assert content(tmp_path / 'first') == content(tmp_path / 'second')
    stored = [Image.open(io.BytesIO(sample['x'])) for sample in samples(tmp_path / 'first' / 'train')]
    assert {(image.format, image.mode, image.size) for image in stored} == {('JPEG', 'RGB', (6, 5))}
    pixels = np.concatenate([np.asarray(image, np.float64).reshape(-1, 3) for image in stored]) / 255
    found = record(tmp_path / 'first' / 'train')
    assert found['resized'] == 63 + 21
    np.testing.assert_allclose(found['mean'], pixels.mean(0), atol=0.02)  # of the pixels before JPEG
    np.testing.assert_allclose(found['std'], pixels.std(0), atol=0.04)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['cifar10', '--max-side', '512'], r'max_side: 512 resizes files of an imagefolder, not cifar10: leave it out'),
        (['imagefolder', '--max-side', '0'], r'Expected max_side to be an integer >= 1, got 0\.'),
        (
            ['imagefolder', '--quality', '80'],
            r'quality: 80 is for images that max_side resizes, which is not given: add --max-side PIXELS '
            r'\(max_side in Python\), or leave --quality out',
        ),
        (
            ['digits', '--quality', '80'],
            r'quality: 80 is for resized files of an imagefolder, not digits: leave it out',
        ),
        (['imagefolder', '--quality', '101'], r'Expected quality to be an integer from 1 to 100, got 101\.'),
    ],
)
def test_odd_sizes_and_qualities_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, '--source', str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
    assert re.fullmatch(f'error: {message}\n', capsys.readouterr().err)


@pytest.mark.parametrize(
    ('options', 'line'),
    [
        ([], r'All files unchanged, [\d.]+kB \(--max-side PIXELS would store larger images resized\)\.'),
        (
            ['--max-side', '6', '--quality', '75'],
            r'84 images beyond 6 pixels resized and stored as JPEG of quality 75, the other files unchanged: '
            r'[\d.]+kB before, [\d.]+kB after\.',
        ),
    ],
)
def test_the_command_says_what_it_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    source, out = image_folder(tmp_path / 'source'), tmp_path / 'out'
    assert main(['imagefolder', '--source', str(source), '--out', str(out), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(line, printed[1]), printed
