"""The sources that can be converted: scikit-learn's digits, CIFAR's python batches, folders of images, archives."""

import functools
import os
import pickle
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np

from composer_sba.errors import DatasetError

Split = Sequence[tuple[Path | np.ndarray, int]]


@dataclass
class Source:
    """What there is to convert: class names in the order of their indices, and images with labels by split."""

    classes: list[str]
    splits: Mapping[str, Split]


def _digits(source: str | Path | None, scratch: Path) -> Source:
    if source is not None:
        raise DatasetError(f'digits come with scikit-learn and take no --source, got {source}')
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DatasetError("digits come with scikit-learn, not installed: pip install 'composer-sba[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels * 15).astype(np.uint8).reshape(-1, 8, 8)  # 0..16 -> 0..240: exact, and bright enough to look at
    parts = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, val = ([(images[i], int(labels[i])) for i in sorted(part)] for part in parts)
    return Source([str(digit) for digit in range(10)], {'train': train, 'val': val})


def _cifar(num_classes: int, source: str | Path | None, scratch: Path) -> Source:
    root = _root(source, scratch)
    found = _class_folders(root) if (root / 'train').is_dir() else _cifar_batches(root)
    if len(found.classes) != num_classes:
        raise DatasetError(
            f'{source} has {len(found.classes)} classes, CIFAR-{num_classes} has {num_classes}: choose '
            f"'imagefolder' for other images"
        )
    return found


def _imagefolder(source: str | Path | None, scratch: Path) -> Source:
    root = _root(source, scratch)
    if not (root / 'train').is_dir():
        raise DatasetError(f'{source} holds python batches, no image files: choose cifar10 or cifar100')
    return _class_folders(root)


READERS: dict[str, Callable[[str | Path | None, Path], Source]] = {
    'digits': _digits,
    'cifar10': functools.partial(_cifar, 10),
    'cifar100': functools.partial(_cifar, 100),
    'imagefolder': _imagefolder,
}


def _root(source: str | Path | None, scratch: Path) -> Path:
    """The folder that holds ``train``, or CIFAR's batches: the source, what it unpacks to, or a folder in that."""
    if source is None or not Path(source).exists():
        raise DatasetError(f'--source {source} does not exist: give a folder of images or an archive of one')
    folder = Path(source)
    if not folder.is_dir():
        unpack(folder, scratch)
        folder = scratch
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if any((root / name).exists() for name in ('train', 'batches.meta')):
            refuse_links(folder)
            return root
    raise DatasetError(f'{source} has no train/<class>/ folders and no CIFAR batches: nothing to convert')


def _class_folders(root: Path) -> Source:
    held_out = next((root / name for name in ('val', 'test') if (root / name).is_dir()), None)
    if held_out is None:
        raise DatasetError(f'{root} has no val/<class>/ or test/<class>/ beside train/<class>/')
    folders = {'train': root / 'train', 'val': held_out}
    classes = {split: _names(folder, Path.is_dir) for split, folder in folders.items()}
    if classes['train'] != classes['val']:
        odd = sorted(set(classes['train']) ^ set(classes['val']))
        raise DatasetError(f'{root}: train and {held_out.name} differ in their classes: only one of them has {odd[:5]}')
    if not classes['train']:
        raise DatasetError(f'{root / "train"} has no class folders: expected train/<class>/<image files>')
    splits = {
        split: [(path, label) for label, name in enumerate(classes['train']) for path in _files(folder / name)]
        for split, folder in folders.items()
    }
    return Source(classes['train'], splits)


def _names(folder: Path, kind: Callable[[Path], bool]) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith('.') and kind(path))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob('*') if path.is_file() and not path.name.startswith('.'))


class _PlainUnpickler(pickle.Unpickler):
    """Reads arrays and plain containers: a pickle may otherwise run any code that its author liked."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype'):
            return super().find_class(module.replace('numpy.core', 'numpy._core'), name)
        if (module, name) == ('_codecs', 'encode'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not plain data')


def _cifar_batches(root: Path) -> Source:
    if (root / 'batches.meta').is_file():
        meta, files = 'batches.meta', {'train': [f'data_batch_{i}' for i in range(1, 6)], 'val': ['test_batch']}
    else:
        meta, files = 'meta', {'train': ['train'], 'val': ['test']}
    path = root / meta
    try:
        names = _unpickle(path)
        classes = [name.decode() for name in names.get(b'label_names') or names[b'fine_label_names']]
        splits: dict[str, Split] = {}
        for split, batches in files.items():
            samples: list[tuple[np.ndarray, int]] = []
            for batch in batches:
                path = root / batch
                content = _unpickle(path)
                images = content[b'data'].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                labels = content.get(b'labels') or content[b'fine_labels']
                samples += zip(images, map(int, labels), strict=True)
            splits[split] = samples
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise DatasetError(f'{path}: not a readable CIFAR batch ({error!r}): download the archive again') from error
    return Source(classes, splits)


def _unpickle(path: Path) -> dict[bytes, Any]:
    with open(path, 'rb') as file:
        return _PlainUnpickler(file, encoding='bytes').load()


MAX_RATIO = 100  # bytes that one byte of an archive may become; images are compressed already, and become about one
SMALL = 1 << 30  # bytes that no archive is refused for


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder.

    Args:
        archive (Path): A .tar, .tar.gz, .tar.xz or .zip.
        folder (Path): Where to; it is made.

    Raises:
        DatasetError: If the archive is none, is broken, reaches outside ``folder``, or becomes more than there is room
            for or than images can.
    """
    try:
        if tarfile.is_tarfile(archive):
            room = _Room(archive, folder)
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter=room.take)
        elif zipfile.is_zipfile(archive):
            room = _Room(archive, folder)
            with zipfile.ZipFile(archive) as unzipped:
                for member in unzipped.infolist():
                    room.refuse_path(member.filename)
                    room.add(member.file_size)
                unzipped.extractall(folder)
        else:
            raise DatasetError(f'{archive} is neither a folder nor a .tar, .tar.gz, .tar.xz or .zip archive')
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error) as error:
        raise DatasetError(f'{archive}: cannot be unpacked ({error}): download it again') from error


def refuse_links(folder: Path) -> None:
    """Raise DatasetError if a link in ``folder`` leads out of it: what it leads to is not part of the data set."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                continue
            if not os.path.exists(path):
                raise DatasetError(f'{path} is a link that leads nowhere: remove it')
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise DatasetError(
                    f'{path} is a link out of {folder}, to {os.path.realpath(path)}: put the files themselves there'
                )


class _Room:
    """Counts what an archive becomes, and says when that is too much."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive, self.bytes = archive, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.free = shutil.disk_usage(folder).free
        self.plausible = max(SMALL, MAX_RATIO * archive.stat().st_size)

    def add(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.plausible:
            problem = f'expected at most {MAX_RATIO} times its {self.archive.stat().st_size:,} bytes'
            raise DatasetError(f'{self.archive}: {problem}, got {self.bytes:,} and more: no archive of images')
        if self.bytes > self.free:
            raise DatasetError(f'{self.archive}: needs more than the {self.free:,} bytes that are free: make room')

    def refuse_path(self, name: str) -> None:
        if name.startswith(('/', '\\')) or '..' in name.replace('\\', '/').split('/'):
            raise DatasetError(
                f'{self.archive}: expected files inside the archive, got the path {name!r}: do not trust it'
            )

    def take(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """Python's own filter of data, which refuses paths and devices, and no links: images need none.

        By way of links the filters of Python before 3.10.18, 3.11.13 and 3.12.11 can be deceived (CVE-2025-4517).
        """
        if member.issym() or member.islnk():
            problem = f'expected files, got the link {member.name!r} to {member.linkname!r}'
            raise DatasetError(f'{self.archive}: {problem}: unpack it yourself if you trust it, and give the folder')
        self.add(member.size)
        return tarfile.data_filter(member, folder)
