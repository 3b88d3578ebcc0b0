"""Indexes: incomplete datasets and missing remotes are refused before a sample is read.

Run: python -m pytest tests/test_index.py
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from streaming.base.storage import CloudDownloader

from composer_sba.data.loader import DatasetConfig, build_dataloader, dataset_classes
from composer_sba.errors import DatasetError
from shards import dataset


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rewrite(path: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(content)


def no_samples(folder: Path) -> None:
    (folder / 'val' / 'index.json').write_text('{"version": 2, "shards": []}')


def outside(folder: Path) -> None:
    path = folder / 'val' / 'index.json'
    path.write_text(path.read_text().replace('shard.00000', '../shard.00000'))


INDEX, SHARD = 'val/index.json', 'val/shard.00000.mds'
MAKE = r'composer-sba convert imagefolder --source \.\.\. --out \S+mds'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (remove(''), rf'mds does not exist: make it with {MAKE}$'),
        (remove('val'), rf"mds has no split 'val' \(found: \['train'\]\): correct split, or make it with {MAKE}$"),
        (remove(INDEX), rf'mds/val has no index.json, it is incomplete: make it again with {MAKE} --overwrite$'),
        (rewrite(INDEX, b''), rf'{INDEX} is not the index of an MDS dataset \(.+\): make it again with {MAKE}'),
        (rewrite(INDEX, b'[]'), rf'{INDEX} is not the index of an MDS dataset \(.+\): make it again with {MAKE}'),
        (remove(SHARD), rf'{SHARD} is missing, index.json lists it: make it again with {MAKE}'),
        (rewrite(SHARD, b'cut'), rf'{SHARD} has 3 bytes, index.json says [\d,]+: make it again with {MAKE}'),
        (no_samples, rf'mds/val holds no samples: make it again with {MAKE}'),
        (
            outside,
            rf"{INDEX} is not the index of an MDS dataset \(ValueError\('a shard outside its folder'\)\): make it",
        ),
    ],
)
def test_incomplete_datasets_are_refused_before_training(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    keys = dataset(tmp_path / 'mds', 5)
    damage(tmp_path / 'mds')
    for refused in (dataset_classes, lambda config: build_dataloader(config, 4)):
        with pytest.raises(DatasetError, match=message) as caught:
            refused(DatasetConfig(**keys, split='val'))
        assert '\n' not in str(caught.value)


def test_a_remote_that_does_not_exist(tmp_path: Path) -> None:
    config = DatasetConfig('cifar10', local=str(tmp_path / 'cache'), remote=str(tmp_path / 'nowhere'))
    with pytest.raises(DatasetError, match=r'nowhere/train/index.json cannot be fetched \(.+\): check remote'):
        dataset_classes(config)
    assert list((tmp_path / 'cache' / 'train').iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(remote: str, local: str, timeout: float) -> None:
        Path(local).write_text('{"shar')
        raise OSError('the connection was lost')

    monkeypatch.setattr(CloudDownloader, 'direct_download', break_off)
    config = DatasetConfig('cifar10', local=str(tmp_path / 'cache'), remote='s3://somewhere')
    with pytest.raises(DatasetError, match='the connection was lost'):
        dataset_classes(config)
    assert list((tmp_path / 'cache' / 'train').iterdir()) == []
