"""Samples read compared with what is stored: those that cannot be read, and images of any mode and encoding.

Run: python -m pytest tests/test_expected.py
"""

import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from composer_sba.data.loader import DatasetConfig, build_dataloader
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
        ('train', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('val', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('train', 1, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('val', 0, b'no image', 0, r'sample 0 cannot be read \(cannot identify image file .+\): make it again with'),
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


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK', 'P', 'RGBA', 'LA', '1', 'transparent palette'])
def test_any_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    colour = Image.new('RGB', (8, 8), (255, 0, 0))
    if mode == 'transparent palette':
        buffer = io.BytesIO()
        colour.convert('P').save(buffer, 'PNG', transparency=bytes([0, 128]))
        image = buffer.getvalue()
    else:
        image = encoded(colour.convert(mode), 'JPEG' if mode == 'CMYK' else 'PNG')
    write(tmp_path / 'mds' / 'val', [image])
    keys = {'name': 'imagefolder', 'num_classes': 1, 'crop_size': 8, 'resize_size': 8, 'split': 'val'}
    config = DatasetConfig(local=str(tmp_path / 'mds'), mean=[0, 0, 0], std=[1, 1, 1], **keys)
    images, _ = next(iter(build_dataloader(config, 1)))
    assert images.shape == (1, 3, 8, 8) and images.dtype == torch.float32
    red, green, blue = images[0].mean(dim=(1, 2)).tolist()
    grey = mode in ('L', 'LA', '1')
    assert (red == green == blue) if grey else (red > 0.95 and green < 0.05 and blue < 0.05), (red, green, blue)


def test_datasets_of_streamings_converters_are_read(tmp_path: Path) -> None:
    images = [picture.resize((32, 32)) for picture in small_images(10)]
    write(tmp_path / 'val', images, encoding='pil')
    config = DatasetConfig('cifar10', local=str(tmp_path), split='val', mean=[0, 0, 0], std=[1, 1, 1])
    found, found_labels = next(iter(build_dataloader(config, 10)))
    assert found_labels.tolist() == list(range(10))
    expected = torch.arange(10).reshape(10, 1, 1, 1).expand(10, 3, 32, 32) / 255
    torch.testing.assert_close(found, expected)
