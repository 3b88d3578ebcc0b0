"""Sources of every kind compared with what they become, each image's bytes and label; and sources with mistakes.

Run: python -m pytest tests/test_readers.py
"""

import io
import os
import pickle
import re
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from composer_sba.convert import main
from composer_sba.data.conversion import convert
from composer_sba.errors import DatasetError
from conversions import (
    CIFAR10C,
    cifar10c_arrays,
    cifar_batches,
    content,
    image_folder,
    record,
    samples,
    small_folder,
    text_file,
    visible,
)


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


def test_cifar10c_blocks_become_splits(tmp_path: Path) -> None:
    arrays, labels = cifar10c_arrays(tmp_path / 'CIFAR-10-C')
    (tmp_path / 'CIFAR-10-C' / 'README.txt').write_text('left out')
    with tarfile.open(tmp_path / 'CIFAR-10-C.tar', 'w') as archive:
        archive.add(tmp_path / 'CIFAR-10-C', 'CIFAR-10-C')
    counts = convert('cifar10c', tmp_path / 'CIFAR-10-C', tmp_path / 'a')
    assert counts == {f'{name}/{severity}': 4 for name in sorted(CIFAR10C) for severity in range(1, 6)}
    assert len(CIFAR10C) == 19
    convert('cifar10c', tmp_path / 'CIFAR-10-C.tar', tmp_path / 'b')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
    for name in ('brightness', 'snow', 'zoom_blur'):
        for severity in (1, 3, 5):
            found = samples(tmp_path / 'a' / name / str(severity))
            block = slice(4 * (severity - 1), 4 * severity)
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample['x']))) for sample in found])
            assert np.array_equal(pixels, arrays[name][block]), (name, severity)
            assert [sample['y'] for sample in found] == labels[block].tolist()
    assert record(tmp_path / 'a' / 'fog' / '2')['classes'][:3] == ['airplane', 'automobile', 'bird']
    with pytest.raises(DatasetError, match='already holds a dataset'):
        convert('cifar10c', tmp_path / 'CIFAR-10-C', tmp_path / 'a')


@pytest.mark.parametrize(
    ('name', 'array', 'line'),
    [
        ('labels', None, r'labels.npy of CIFAR-10-C: nothing to convert'),
        ('labels', np.zeros(19, np.uint8), r'labels.npy: labels of shape \(19,\) are not those of one test set'),
        ('labels', np.arange(20, dtype=np.uint8) % 10, r'labels.npy: labels of shape \(20,\) are not those'),
        ('labels', np.zeros((5, 4), np.uint8), r'labels.npy: labels of shape \(5, 4\)'),
        ('labels', np.full(20, 10, np.uint8), r'labels.npy: labels from 10 to 10, expected 0 to 9'),
        ('fog', None, r'fog.npy: is missing: download the archive again'),
        ('fog', np.zeros((20, 32, 32), np.uint8), r'fog.npy: uint8 of shape \(20, 32, 32\), expected uint8 of'),
        ('fog', np.zeros((16, 32, 32, 3), np.uint8), r'fog.npy: uint8 of shape \(16, 32, 32, 3\), expected'),
        ('fog', np.zeros((20, 32, 32, 3)), r'fog.npy: float64 of shape'),
        ('fog', np.array([print]), r'fog.npy: not a readable array \(.*: download the archive again'),
        ('fog', b'\x93NUMPY', r'fog.npy: not a readable array \('),
        ('fog', 'cut', r'fog.npy: not a readable array \('),
    ],
)
def test_a_damaged_cifar10c_is_refused(tmp_path: Path, name: str, array: Any, line: str, capsys: Any) -> None:
    folder = tmp_path / 'CIFAR-10-C'
    cifar10c_arrays(folder)
    path = folder / f'{name}.npy'
    if array is None:
        path.unlink()
    elif isinstance(array, np.ndarray):
        np.save(path, array, allow_pickle=True)
    else:
        path.write_bytes(path.read_bytes()[:-100] if array == 'cut' else array)
    assert main(['cifar10c', '--source', str(folder), '--out', str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err
    assert re.search(line, error) and error.count('\n') == 1, error
    assert not (tmp_path / 'out').exists()


def test_cifar100_batches_have_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    batch = {b'data': np.zeros((200, 3072), np.uint8), b'fine_labels': [*range(100)] * 2, b'coarse_labels': [0] * 200}
    for name in ('train', 'test'):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / 'meta').write_bytes(pickle.dumps({b'fine_label_names': [b'%d' % i for i in range(100)]}, protocol=2))
    convert('cifar100', folder, tmp_path / 'out')
    assert sorted(sample['y'] for sample in samples(tmp_path / 'out' / 'val')) == sorted([*range(100)] * 2)


# --- what is read and what is left out --------------------------------------------------------------------------------


def link(root: Path, path: str, target: str) -> None:
    (root / path).symlink_to(target)


def linked_folders(root: Path) -> None:
    small_folder(root, *(f'pool/{i}.png' for i in range(3)))
    for split in ('train', 'val'):
        for name in ('ant', 'bee'):
            link(root, f'{split}/{name}/more', '../../pool')


def linked_in_links(root: Path) -> None:
    small_folder(root, 'pool/deep/0.png')
    link(root, 'pool/again', 'deep')
    link(root, 'train/ant/more', '../../pool')


def linked_class(root: Path) -> None:
    for split in ('train', 'val'):
        link(small_folder(root), f'{split}/cat', 'ant')


def queue(root: Path) -> None:
    os.mkfifo(small_folder(root) / 'train' / 'ant' / 'queue')


@pytest.mark.parametrize(
    ('make', 'counts', 'left_out'),
    [
        (small_folder, (2, 2), None),
        (linked_folders, (8, 8), '1 entry .beside train and val.: SOURCE/pool$'),
        (linked_in_links, (4, 2), '1 entry .beside train and val.: SOURCE/pool$'),
        (linked_class, (3, 3), None),
        (lambda root: small_folder(root, 'train/ant/sub/1.png'), (3, 2), None),
        (
            lambda root: small_folder(root, 'train/ant/.ipynb_checkpoints/1.png'),
            (2, 2),
            '1 entry .*hidden.*checkpoints',
        ),
        (
            lambda root: small_folder(root, 'train/ant/._0.png', 'val/bee/._0.png'),
            (2, 2),
            '2 entries .hidden, or made by the operating system.: SOURCE/train',
        ),
        (lambda root: small_folder(root, 'train/ant/@eaDir/0.png'), (2, 2), '1 entry .*: SOURCE/train/ant/@eaDir$'),
        (lambda root: small_folder(root, 'train/__MACOSX/ant/._0.png'), (2, 2), '1 entry .*: SOURCE/train/__MACOSX$'),
        (lambda root: small_folder(root, '.cache/0.png'), (2, 2), '1 entry .hidden, or .*: SOURCE/.cache$'),
        (
            lambda root: small_folder(root, *(f'train/{i}.png' for i in range(5))),
            (2, 2),
            '5 entries .beside the class folders.: SOURCE/train/0.png, SOURCE/train/1.png, SOURCE/train/2.png, ...$',
        ),
        (lambda root: small_folder(root, 'test/ant/0.png'), (2, 2), '1 entry .beside train and val.: SOURCE/test$'),
        (lambda root: small_folder(root / 'set', 'b/0.png'), (2, 2), '1 entry .beside train and val.: SOURCE/set/b$'),
        (lambda root: small_folder(root / 'set', '../b/0.png'), (2, 2), '1 entry .beside set.: SOURCE/b$'),
        (queue, (2, 2), '1 entry .neither a file nor a folder.: SOURCE/train/ant/queue$'),
    ],
)
def test_what_is_left_out_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], Any], counts: tuple[int, int],
    left_out: str | None,
) -> None:  # fmt: skip
    make(tmp_path / 'source')
    assert tuple(convert('imagefolder', tmp_path / 'source', tmp_path / 'out').values()) == counts
    assert len(caplog.messages) == (left_out is not None), caplog.messages
    if left_out is not None:
        pattern = 'SOURCE: left out ' + left_out
        assert re.search(pattern.replace('SOURCE', str(tmp_path / 'source')), caplog.messages[0]), caplog.messages


def test_class_names_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, 'café') for form in ('NFC', 'NFD'))
    for split, name in (('train', decomposed), ('val', composed)):
        small_folder(tmp_path / 'source', f'{split}/{name}/0.png')
    assert convert('imagefolder', tmp_path / 'source', tmp_path / 'out') == {'train': 3, 'val': 3}
    assert record(tmp_path / 'out' / 'val')['classes'] == ['ant', 'bee', composed]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def other_classes(root: Path) -> Path:
    (small_folder(root) / 'val' / 'dog').mkdir()
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


def empty_class(root: Path, split: str) -> Path:
    small_folder(root, 'train/cat/0.png', 'val/cat/0.png')
    (root / split / 'cat' / '0.png').rename(root / split / 'cat' / '.0.png')
    return root


def flat(root: Path, split: str) -> Path:
    small_folder(root)
    for i, name in enumerate(('ant', 'bee')):
        (root / split / name / '0.png').rename(root / split / f'ILSVRC2012_{i}.png')
        (root / split / name).rmdir()
    return root


def loop(root: Path) -> Path:
    link(small_folder(root), 'train/ant/all', '../../train')
    return root


def two_sets(root: Path) -> Path:
    small_folder(root / 'first')
    small_folder(root / 'second')
    return root


def two_forms(root: Path) -> Path:
    return small_folder(root, *(f'train/{unicodedata.normalize(form, "é")}/0.png' for form in ('NFC', 'NFD')))


def escaping_archive(root: Path) -> Path:
    with tarfile.open(root / 'evil.tar', 'w') as archive:
        info = tarfile.TarInfo('../../evil')
        info.size = 4
        archive.addfile(info, io.BytesIO(b'evil'))
    return root / 'evil.tar'


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


def archive_of_a_broken_image(root: Path) -> Path:
    with tarfile.open(root / 'set.tar', 'w') as archive:
        archive.add(text_file(root / 'set'), 'set')
    return root / 'set.tar'


@pytest.mark.parametrize(
    ('name', 'make', 'message'),
    [
        ('imagefolder', lambda root: root / 'nowhere', r'--source .*nowhere does not exist: give a folder'),
        ('imagefolder', lambda root: root, r'has no train/<class>/ folders and no CIFAR batches'),
        ('imagefolder', no_val, r'has no val/<class>/ or test/<class>/ beside train'),
        ('imagefolder', other_classes, r"train and val differ in their classes: only one of them has \['dog'\]"),
        ('imagefolder', empty_split, r'the train split has no images'),
        (
            'imagefolder',
            lambda root: empty_class(root, 'train'),
            r"train has no images of 1 of its 3 classes, \['cat'\]",
        ),
        (
            'imagefolder',
            lambda root: empty_class(root, 'val'),
            r"val has no images of 1 of its 3 classes, \['cat'\]: add",
        ),
        (
            'imagefolder',
            lambda root: flat(root, 'val'),
            r'val has 2 files and no class folders: move each .*val/<class>/',
        ),
        (
            'imagefolder',
            lambda root: flat(root, 'train'),
            r'train has 2 files and no class folders: move each image to',
        ),
        ('imagefolder', loop, r'train/ant/all/ant contains itself, through a link in this path: remove the link'),
        ('imagefolder', two_sets, r'holds 2 datasets \(first, second\): give one of them as --source'),
        ('imagefolder', two_forms, r"train has two folders 'é', in two forms of Unicode: merge them"),
        ('imagefolder', broken_image, r'train/bee/0a.jpg: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', text_file, r'val/ant/notes.txt: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', archive_of_a_broken_image, r'source/set.tar/set/val/ant/notes.txt: not an image that can be'),
        ('imagefolder', escaping_archive, r'evil.tar: cannot be unpacked \(.*outside the destination'),
        ('imagefolder', cifar_batches, r'holds CIFAR batches, no image files: choose cifar10 or cifar100'),
        ('imagenet', small_folder, r"unknown dataset 'imagenet': convert it as 'imagefolder'"),
        ('cifar-10', small_folder, r"unknown dataset 'cifar-10'; did you mean 'cifar10'\?"),
        ('cifar10', small_folder, r"has 2 classes, CIFAR-10 has 10: choose 'imagefolder'"),
        ('cifar10', evil_pickle, r'data_batch_3: not a readable CIFAR batch \(.*posix.system is not plain data'),
        ('cifar10', batch_missing, r'data_batch_4: not a readable CIFAR batch \(.*No such file'),
        ('digits', small_folder, r'digits come with scikit-learn: remove --source .*/source'),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    tmp_path: Path, name: str, make: Callable[[Path], Path | None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / 'source'
    if make is not cifar_batches:
        root.mkdir()
    (tmp_path / 'out').mkdir()
    made = make(root)
    source = made if isinstance(made, Path) else root
    assert main([name, '--source', str(source), '--out', str(tmp_path / 'out' / 'mds')]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, line), line
    assert visible(tmp_path / 'out') == [], 'something half-made was left'
    assert not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('name', ['imagefolder', 'cifar10', 'cifar10c'])
def test_a_missing_source_is_asked_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, '--out', str(tmp_path / 'mds')]) == 2
    line = capsys.readouterr().err.strip()
    assert line == 'error: --source is required: give a folder of images or an archive of one', line
