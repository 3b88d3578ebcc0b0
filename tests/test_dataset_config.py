"""Configurations of datasets: keys that are refused, equivalent forms, and digits that are made on first use.

Run: python -m pytest tests/test_dataset_config.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from composer_sba.data import DatasetConfig, build_dataloader, dataset_classes, dataset_size, image_size, transform
from composer_sba.errors import DatasetError
from programs import start
from shards import dataset, encoded, labels, write

pytestmark = [
    # PyTorch's DataLoader, as it ends workers after one of them has raised; it then waits 5 s for each.
    pytest.mark.filterwarnings(
        'ignore:Exception in thread QueueFeederThread:pytest.PytestUnhandledThreadExceptionWarning'
    ),
    # Streaming leaves a fetched shard open while it compares its hash.
    pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning'),
]

REFUSED = [
    ({'name': 'mnist'}, "name: unknown dataset 'mnist': choose one of digits, cifar10, cifar100, imagenet"),
    ({'name': 'cifar10', 'crop_size': 28}, 'crop_size and resize_size do not apply to cifar10, .* 32x32'),
    ({'name': 'imagefolder', 'crop_size': 0}, 'crop_size: expected a number of pixels >= 1, got 0'),
    ({'name': 'imagefolder', 'resize_size': -5}, 'resize_size: expected a number of pixels >= 1, got -5'),
    ({'name': 'imagefolder', 'crop_size': 8.5}, 'crop_size: expected a number of pixels >= 1, got 8.5'),
    ({'name': 'cifar10', 'cutout': True}, 'cutout: expected a number of pixels >= 1, got True'),
    ({'name': 'cifar10', 'cutout': float('nan')}, 'cutout: expected a number of pixels >= 1, got nan'),
    ({'name': 'cifar10', 'num_workers': -1}, 'num_workers: expected a number of processes >= 0, got -1'),
    ({'name': 'cifar10', 'num_workers': '2'}, "num_workers: expected a number of processes >= 0, got '2'"),
    ({'name': 'imagefolder', 'num_classes': 0}, 'num_classes: expected a number of classes >= 1, got 0'),
    ({'name': 'digits', 'in_memory': True, 'subset': True}, 'subset: expected a number of samples >= 1, got True'),
    ({'name': 'digits', 'shuffle_seed': 1.5}, 'shuffle_seed: expected an integer, got 1.5'),
    ({'name': 'digits', 'download_timeout': 0}, 'download_timeout: expected a number > 0, got 0'),
    ({'name': 'digits', 'download_timeout': float('nan')}, 'download_timeout: expected a number > 0, got nan'),
    ({'name': 'digits', 'augment': 'no'}, "augment: expected true or false, got 'no'"),
    ({'name': 'digits', 'in_memory': 1}, 'in_memory: expected true or false, got 1'),
    ({'name': 'cifar10', 'cache_limit': '1gb'}, 'cache_limit without a remote would delete the only copy'),
    ({'name': 'cifar10', 'mean': [0.5]}, r'mean: expected three numbers in \[0, 1\], got \[0.5\]'),
    ({'name': 'cifar10', 'mean': 0.5}, r'mean: expected three numbers in \[0, 1\], got 0.5'),
    (
        {'name': 'cifar10', 'mean': [0.5, float('nan'), 0.5]},
        r'mean: expected three numbers in \[0, 1\], got \[0.5, nan',
    ),
    ({'name': 'cifar10', 'mean': [125.3, 123.0, 113.9]}, r'mean: expected three numbers in \[0, 1\], got \[125.3'),
    ({'name': 'cifar10', 'std': [1, 1, 0]}, r'std: expected three positive numbers, got \[1, 1, 0\]'),
    ({'name': 'cifar10', 'std': [1, 1, True]}, r'std: expected three positive numbers, got \[1, 1, True\]'),
    ({'name': 'cifar10', 'std': [1, 1, float('inf')]}, r'std: expected three positive numbers, got \[1, 1, inf\]'),
    ({'name': 'cifar10', 'local': 'DIGITS'}, 'digits/train holds digits, not cifar10: correct name or local'),
    ({'name': 'digits', 'local': 'DIGITS', 'num_classes': 9}, 'num_classes: 9 contradicts .*which has 10'),
    ({'name': 'imagefolder', 'local': 'UNLABELLED'}, 'train does not record its number of classes: set num_classes'),
    ({'name': 'cifar10', 'local': 'BARE'}, 'sample 0 has 8x8 pixels, expected 32x32'),
    (
        {'name': 'imagefolder', 'split': 'val', 'crop_size': 300, 'resize_size': 256},
        'resize_size: 256 is smaller than crop_size: 300: choose a larger one',
    ),
]


@pytest.mark.parametrize(('keys', 'message'), REFUSED)
def test_wrong_keys_are_refused(tmp_path: Path, digits_folder: Path, keys: dict[str, Any], message: str) -> None:
    folders = {'DIGITS': digits_folder, 'UNLABELLED': tmp_path / 'unlabelled', 'BARE': tmp_path / 'bare'}
    image = encoded(Image.new('RGB', (8, 8)))
    write(tmp_path / 'unlabelled' / 'train', [image] * 5)
    write(tmp_path / 'bare' / 'train', [image])
    if keys.get('local') in folders:
        keys = keys | {'local': str(folders[keys['local']])}
    with pytest.raises(DatasetError, match=message) as caught:
        config = DatasetConfig(**keys)
        transform(config)
        list(build_dataloader(config, 1))
    assert '\n' not in str(caught.value) or 'sample' in message


@pytest.mark.parametrize(
    'keys',
    [
        {'cutout': np.int64(2)},
        {'mean': np.float32([0.5, 0.5, 0.5]), 'std': (np.float64(0.25), 1, 1)},
        {'shuffle_seed': np.int32(-3), 'num_workers': np.int8(0)},
        {'augment': np.bool_(True), 'num_classes': np.int64(10), 'download_timeout': np.float32(5)},
        {'in_memory': np.bool_(True), 'subset': np.int16(100)},
    ],
)
def test_numpys_numbers_are_pythons(few_digits: Path, keys: dict[str, Any]) -> None:
    """The same batches, and classes and sizes of Python's types, which JSON takes."""

    def plain(value: Any) -> Any:
        return (
            [plain(each) for each in value] if isinstance(value, tuple) else getattr(value, 'tolist', lambda: value)()
        )

    ours, theirs = (
        DatasetConfig('digits', **{'local': str(few_digits), 'num_workers': 0} | values)
        for values in (keys, {key: plain(value) for key, value in keys.items()})
    )
    if 'in_memory' in keys:
        ours.num_workers = theirs.num_workers = None
    for images, expected in zip(build_dataloader(ours, np.int64(100)), build_dataloader(theirs, 100), strict=True):
        assert torch.equal(images[0], expected[0]) and torch.equal(images[1], expected[1])
    json.dumps([dataset_classes(ours), dataset_size(ours), image_size(ours)])


@pytest.mark.parametrize('batch_size', [0, -4, True, 2.5])
def test_batch_sizes_that_are_refused(digits_folder: Path, batch_size: Any) -> None:
    with pytest.raises(ValueError, match=f'Expected batch_size to be an integer >= 1, got {batch_size}'):
        build_dataloader(DatasetConfig('digits', local=str(digits_folder)), batch_size)


@pytest.mark.parametrize(
    'keys',
    [
        {'local': '~/data/sixteen'},
        {'local': Path('~/data/sixteen')},
        {'local': '~/cache', 'remote': '~/data/sixteen'},
        {'local': '~/data/sixteen', 'remote': '~/data/../data/sixteen/'},  # one folder
    ],
)
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    stored = dataset(tmp_path / 'data' / 'sixteen', 16)
    config = DatasetConfig(**stored | keys, num_workers=0)
    assert sorted(labels(build_dataloader(config, 4))) == list(range(16))
    assert dataset_size(config) == 16
    assert not (tmp_path / '~').exists()
    with pytest.raises(DatasetError, match=f'{tmp_path}/data/none does not exist: .* --out {tmp_path}/data/none$'):
        dataset_classes(DatasetConfig('imagefolder', local='~/data/none'))


@pytest.mark.parametrize('remote', ['mds', './mds/', 'other/../mds', 'LINK'])
def test_a_cache_limit_never_deletes_the_only_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str
) -> None:
    """The remote is the local folder, written in another way."""
    monkeypatch.chdir(tmp_path)
    keys = dataset(tmp_path / 'mds', 16) | {'local': 'mds', 'cache_limit': '1gb'}
    if remote == 'LINK':
        (tmp_path / 'link').symlink_to(tmp_path / 'mds')
        remote = str(tmp_path / 'link')
    with pytest.raises(DatasetError, match='cache_limit without a remote would delete the only copy of the data'):
        build_dataloader(DatasetConfig(**keys, remote=remote), 4)


def test_digits_without_scikit_learn_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(DatasetError, match=r"not installed: pip install 'composer-sba\[demo\]'"):
        dataset_classes(DatasetConfig('digits', local=str(tmp_path / 'digits')))


def test_processes_that_make_digits_at_the_same_time(tmp_path: Path) -> None:
    script = tmp_path / 'digits.py'
    script.write_text(
        'import sys\n'
        'from composer_sba.data import DatasetConfig, dataset_classes\n'
        'print(dataset_classes(DatasetConfig("digits", local=sys.argv[1])))\n'
    )
    programs = [start(script, str(tmp_path / 'digits'), output=tmp_path / f'{i}.log') for i in range(3)]
    try:
        assert [program.wait(120) for program in programs] == [0, 0, 0], [program.said for program in programs]
        assert [program.said for program in programs] == ['10\n'] * 3
    finally:
        for program in programs:
            program.kill()
