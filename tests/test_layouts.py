"""Sources of every layout compared with what they become, every image's bytes and every label; and those with mistakes.

Run: python -m pytest tests/test_layouts.py
"""

import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from composer_sba.convert import main
from composer_sba.data.conversion import convert
from conversions import cifar_batches, content, image_folder, record, samples, text_file, visible


@pytest.mark.parametrize('held_out', ['val', 'test'])
def test_image_folder_keeps_bytes_and_labels(tmp_path: Path, held_out: str) -> None:
    source = image_folder(tmp_path / 'source', held_out=held_out)
    assert convert('imagefolder', source, tmp_path / 'out') == {'train': 63, 'val': 21}
    for split, folder in (('train', 'train'), ('val', held_out)):
        expected = [
            (path.read_bytes(), label)
            for label, name in enumerate(('ant', 'bee', 'cat'))
            for path in sorted((source / folder / name).iterdir())
        ]
        found = [(sample['x'], sample['y']) for sample in samples(tmp_path / 'out' / split)]
        assert sorted(found) == sorted(expected)
        assert (found == expected) == (split == 'val'), 'train is shuffled, val keeps its order'


def test_digits_are_lossless_and_stratified(tmp_path: Path) -> None:
    convert('digits', None, tmp_path / 'digits')
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((tuple(row), int(label)) for row, label in zip(pixels, labels, strict=True))
    found = [sample for split in ('train', 'val') for sample in samples(tmp_path / 'digits' / split)]
    images = [np.asarray(Image.open(io.BytesIO(sample['x'])), float).ravel() / 15 for sample in found]
    assert sorted((tuple(image), sample['y']) for image, sample in zip(images, found, strict=True)) == expected
    counts = np.bincount([sample['y'] for sample in samples(tmp_path / 'digits' / 'val')])
    assert counts.sum() == 360 and counts.min() >= 35 and counts.max() <= 37, counts


def test_cifar10_batches_are_lossless_from_folder_and_archive(tmp_path: Path) -> None:
    pixels = cifar_batches(tmp_path / 'cifar-10-batches-py')
    with tarfile.open(tmp_path / 'cifar.tar.gz', 'w:gz') as archive:
        archive.add(tmp_path / 'cifar-10-batches-py', 'cifar-10-batches-py')
    assert convert('cifar10', tmp_path / 'cifar-10-batches-py', tmp_path / 'a') == {'train': 100, 'val': 20}
    convert('cifar10', tmp_path / 'cifar.tar.gz', tmp_path / 'b')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
    found = np.stack([np.asarray(Image.open(io.BytesIO(sample['x']))) for sample in samples(tmp_path / 'a' / 'val')])
    np.testing.assert_array_equal(found, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert record(tmp_path / 'a' / 'val')['classes'][3] == 'class3'


def test_cifar100_batches_have_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    batch = {b'data': np.zeros((200, 3072), np.uint8), b'fine_labels': [*range(100)] * 2, b'coarse_labels': [0] * 200}
    for name in ('train', 'test'):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / 'meta').write_bytes(pickle.dumps({b'fine_label_names': [b'%d' % i for i in range(100)]}, protocol=2))
    convert('cifar100', folder, tmp_path / 'out')
    assert sorted(sample['y'] for sample in samples(tmp_path / 'out' / 'val')) == sorted([*range(100)] * 2)


def no_train(root: Path) -> Path:
    return root


def other_classes(root: Path) -> Path:
    (image_folder(root) / 'val' / 'dog').mkdir()
    return root


def broken_image(root: Path) -> Path:
    path = image_folder(root) / 'train' / 'bee' / '0a.jpg'
    path.write_bytes(path.read_bytes()[:200])
    return root


def no_val(root: Path) -> Path:
    (root / 'train' / 'ant').mkdir(parents=True)
    return root


def empty_split(root: Path) -> Path:
    for split in ('train', 'val'):
        (root / split / 'ant').mkdir(parents=True)
    return root


def escaping_archive(root: Path) -> Path:
    with tarfile.open(root / 'evil.tar', 'w') as archive:
        info = tarfile.TarInfo('../../evil')
        info.size = 4
        archive.addfile(info, io.BytesIO(b'evil'))
    return root / 'evil.tar'


def broken_archive(root: Path) -> Path:
    cifar_batches(root / 'batches', per_batch=200)
    with tarfile.open(root / 'cut.tar.gz', 'w:gz') as archive:
        archive.add(root / 'batches')
    whole = (root / 'cut.tar.gz').read_bytes()
    (root / 'cut.tar.gz').write_bytes(whole[: len(whole) // 2])
    return root / 'cut.tar.gz'


def no_archive(root: Path) -> Path:
    (root / 'notes.txt').write_text('no archive')
    return root / 'notes.txt'


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ('true',)


def evil_pickle(root: Path) -> Path:
    cifar_batches(root / 'batches')
    (root / 'batches' / 'data_batch_3').write_bytes(pickle.dumps(Evil()))
    return root / 'batches'


def batch_missing(root: Path) -> Path:
    cifar_batches(root / 'batches')
    (root / 'batches' / 'data_batch_4').unlink()
    return root / 'batches'


@pytest.mark.parametrize(
    ('name', 'make', 'message'),
    [
        ('imagefolder', lambda root: root / 'nowhere', r'--source .*nowhere does not exist: give a folder'),
        ('imagefolder', no_train, r'has no train/<class>/ folders and no CIFAR batches'),
        ('imagefolder', no_val, r'has no val/<class>/ or test/<class>/ beside train'),
        ('imagefolder', other_classes, r"train and val differ in their classes: only one of them has \['dog'\]"),
        ('imagefolder', empty_split, r'the train split has no images'),
        ('imagefolder', broken_image, r'train/bee/0a.jpg: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', text_file, r'val/ant/notes.txt: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', escaping_archive, r'evil.tar: cannot be unpacked \(.*outside the destination'),
        ('imagefolder', no_archive, r'notes.txt is neither a folder nor a .tar'),
        ('cifar10', image_folder, r"has 3 classes, CIFAR-10 has 10: choose 'imagefolder'"),
        ('cifar10', broken_archive, r'cut.tar.gz: cannot be unpacked \(.+\): download it again'),
        ('cifar10', evil_pickle, r'data_batch_3: not a readable CIFAR batch \(.*posix.system is not plain data'),
        ('cifar10', batch_missing, r'data_batch_4: not a readable CIFAR batch \(.*No such file'),
        ('digits', image_folder, r'digits come with scikit-learn and take no --source'),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'source').mkdir()
    (tmp_path / 'out').mkdir()
    source = make(tmp_path / 'source')
    assert main([name, '--source', str(source), '--out', str(tmp_path / 'out' / 'mds')]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert re.search(message, line), line
    assert visible(tmp_path / 'out') == [], 'something half-made was left'
    assert not (tmp_path / 'evil').exists()
