"""What a recipe says of a data set: keys that are wrong, and the digits, made when they are first asked for.

Run: python -m pytest tests/test_dataset_config.py
"""

import multiprocessing
import sys
from pathlib import Path

import pytest
from PIL import Image

from composer_sba.data.loader import DatasetConfig, build_dataloader, dataset_classes, transform
from composer_sba.errors import DatasetError
from shards import dataset, encoded, write

# PyTorch's DataLoader, when it ends workers after one of them has raised; it then waits 5 s for each.
pytestmark = pytest.mark.filterwarnings(
    'ignore:Exception in thread QueueFeederThread:pytest.PytestUnhandledThreadExceptionWarning'
)


def test_wrong_keys_are_refused(tmp_path: Path, digits_folder: Path) -> None:
    unlabelled = dataset(tmp_path / 'mds', 5) | {'num_classes': None}
    write(tmp_path / 'bare' / 'train', [encoded(Image.new('RGB', (8, 8)))])
    for keys, message in (
        ({'name': 'mnist'}, r'name: mnist is no known data set: choose one of digits, cifar10, cifar100, imagenet'),
        ({'name': 'cifar10', 'crop_size': 28}, r'crop_size and resize_size do not apply to cifar10, .* 32x32'),
        ({'name': 'imagefolder', 'crop_size': 0}, r'crop_size: expected a number of pixels >= 1, got 0'),
        ({'name': 'imagefolder', 'resize_size': -5}, r'resize_size: expected a number of pixels >= 1, got -5'),
        ({'name': 'cifar10', 'num_workers': -1}, r'num_workers: expected a number >= 0, got -1'),
        ({'name': 'cifar10', 'cache_limit': '1gb'}, r'cache_limit without a remote would delete the only copy'),
        ({'name': 'cifar10', 'mean': [0.5]}, r'mean: expected three numbers, got \[0.5\]'),
        ({'name': 'cifar10', 'std': [1, 1, 0]}, r'std: expected three positive numbers, got \[1, 1, 0\]'),
        (
            {'name': 'cifar10', 'local': str(digits_folder)},
            r'digits/train holds digits, not cifar10: correct name or local',
        ),
        (
            {'name': 'digits', 'local': str(digits_folder), 'num_classes': 9},
            r'num_classes: 9 contradicts .*which has 10',
        ),
        (unlabelled, r'mds/train does not tell its number of classes: set num_classes'),
        ({'name': 'cifar10', 'local': str(tmp_path / 'bare')}, r'sample 0 has 8x8 pixels, expected 32x32'),
        (
            {'name': 'imagefolder', 'split': 'val', 'crop_size': 300},
            r'resize_size: 256 is smaller than crop_size: 300: choose a larger one',
        ),
    ):
        with pytest.raises(DatasetError, match=message):
            config = DatasetConfig(**keys)
            transform(config)
            list(build_dataloader(config, 1))


def test_digits_without_scikit_learn_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(DatasetError, match=r"not installed: pip install 'composer-sba\[demo\]'"):
        dataset_classes(DatasetConfig('digits', local=str(tmp_path / 'digits')))


def _make_digits(folder: str) -> None:
    assert dataset_classes(DatasetConfig('digits', local=folder)) == 10


def test_processes_that_make_digits_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context('spawn')
    folder = str(tmp_path / 'digits')
    processes = [context.Process(target=_make_digits, args=(folder,), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
