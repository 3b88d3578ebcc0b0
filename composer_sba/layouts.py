"""The sources that can be converted: scikit-learn's digits, CIFAR's python batches, folders of images, archives."""

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from composer_sba.archives import refuse_links, unpack
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
