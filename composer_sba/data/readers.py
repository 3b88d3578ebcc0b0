"""Sources of a conversion: scikit-learn's digits, CIFAR's batches, CIFAR-10-C, and folders or archives of images."""

import functools
import os
import pickle
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from composer_sba.data.archives import unpack
from composer_sba.errors import DatasetError, one_line

Split = Sequence[tuple[Path | np.ndarray, int]]

_CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
_CIFAR10C_CORRUPTIONS = (
    'brightness', 'contrast', 'defocus_blur', 'elastic_transform', 'fog', 'frost', 'gaussian_blur', 'gaussian_noise',
    'glass_blur', 'impulse_noise', 'jpeg_compression', 'motion_blur', 'pixelate', 'saturate', 'shot_noise', 'snow',
    'spatter', 'speckle_noise', 'zoom_blur',
)  # fmt: skip
_SEVERITIES = 5
_MARKS = {'train': 'train/<class>/ folders', 'batches.meta': 'CIFAR batches'}


@dataclass
class Source:
    """Images to convert.

    Args:
        classes (list[str]): Names of the classes, in the order of their labels.
        splits (Mapping[str, Split]): Images, as files or as pixels, and labels of each split.
        left_out (Mapping[str, list[Path]], optional): Files and folders that are not converted, by reason.
        location (Callable[[Path], Path], optional): Where the user finds a file, for messages: an archive is unpacked
            to a temporary folder.
    """

    classes: list[str]
    splits: Mapping[str, Split]
    left_out: Mapping[str, list[Path]] = field(default_factory=dict)
    location: Callable[[Path], Path] = Path


def _digits(source: Path | None, scratch: Path) -> Source:
    if source is not None:
        raise DatasetError(f'digits come with scikit-learn: remove --source {source}')
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise DatasetError(
            "digits need scikit-learn, which is not installed: pip install 'composer-sba[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = (pixels * 15).astype(np.uint8).reshape(-1, 8, 8)  # 0..16 -> 0..240: exact, and bright enough to look at
    parts = train_test_split(np.arange(len(labels)), test_size=360, random_state=0, stratify=labels)
    train, val = ([(images[i], int(labels[i])) for i in sorted(part)] for part in parts)
    return Source([str(digit) for digit in range(10)], {'train': train, 'val': val})


def _cifar(num_classes: int, source: Path | None, scratch: Path) -> Source:
    folder = _Folder(source, scratch)
    found = folder.read_classes() if (folder.root / 'train').is_dir() else _cifar_batches(folder)
    if len(found.classes) != num_classes:
        raise DatasetError(
            f'{source} has {len(found.classes)} classes, CIFAR-{num_classes} has {num_classes}: choose '
            f"'imagefolder' for other images"
        )
    return found


def _imagefolder(source: Path | None, scratch: Path) -> Source:
    folder = _Folder(source, scratch)
    if not (folder.root / 'train').is_dir():
        raise DatasetError(f'{source} holds CIFAR batches, no image files: choose cifar10 or cifar100')
    return folder.read_classes()


def _cifar10c(source: Path | None, scratch: Path) -> Source:
    folder = _Folder(source, scratch, marks={'labels.npy': 'labels.npy of CIFAR-10-C'})
    labels = _array(folder, 'labels.npy')
    size, rest = divmod(len(labels), _SEVERITIES) if labels.ndim == 1 else (0, 0)
    blocks = labels[: len(labels) - rest].reshape(_SEVERITIES, -1) if size else labels
    if rest or not size or labels.dtype.kind not in 'iu' or (blocks != blocks[0]).any():
        problem = f'labels of shape {labels.shape} are not those of one test set, repeated for 5 severities'
        raise DatasetError(f'{folder.location(folder.root / "labels.npy")}: {problem}: download it again')
    if not 0 <= labels.min() <= labels.max() < len(_CIFAR10_CLASSES):
        problem = f'labels from {labels.min()} to {labels.max()}, expected 0 to {len(_CIFAR10_CLASSES) - 1}'
        raise DatasetError(f'{folder.location(folder.root / "labels.npy")}: {problem}: download it again')
    splits: dict[str, Split] = {}
    for name in _CIFAR10C_CORRUPTIONS:
        images = _array(folder, f'{name}.npy')
        if images.shape != (len(labels), 32, 32, 3) or images.dtype != np.uint8:
            problem = f'{images.dtype} of shape {images.shape}, expected uint8 of ({len(labels)}, 32, 32, 3)'
            raise DatasetError(f'{folder.location(folder.root / f"{name}.npy")}: {problem}: download it again')
        for severity in range(1, _SEVERITIES + 1):
            block = slice((severity - 1) * size, severity * size)
            splits[f'{name}/{severity}'] = list(zip(images[block], labels[block].tolist(), strict=True))
    known = {f'{name}.npy' for name in ('labels', *_CIFAR10C_CORRUPTIONS)}
    others = [entry for entry in sorted(folder.root.iterdir()) if entry.name not in known]
    return Source(list(_CIFAR10_CLASSES), splits, {**folder.left_out, 'not of CIFAR-10-C': others}, folder.location)


def _array(folder: '_Folder', name: str) -> np.ndarray:
    path = folder.root / name
    try:
        return np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        problem = 'is missing' if isinstance(error, FileNotFoundError) else f'not a readable array ({one_line(error)})'
        raise DatasetError(f'{folder.location(path)}: {problem}: download the archive again') from error


READERS: dict[str, Callable[[Path | None, Path], Source]] = {
    'digits': _digits,
    'cifar10': functools.partial(_cifar, 10),
    'cifar100': functools.partial(_cifar, 100),
    'cifar10c': _cifar10c,
    'imagefolder': _imagefolder,
}

# --- folders of images ------------------------------------------------------------------------------------------------

# Folders that macOS, a NAS or a file system adds. Some hold small copies of the images.
_SYSTEM_FOLDERS = ('__MACOSX', '@eaDir', '#recycle', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')


class _Folder:
    """Folder of a dataset: the source, what an archive unpacks to, or the only dataset in one of these.

    Args:
        source (Path, optional): Folder or archive that the user gave.
        scratch (Path): Folder to unpack an archive to.
        marks (Mapping[str, str], optional): Entries that identify a dataset, with their names in messages.
    """

    def __init__(self, source: Path | None, scratch: Path, marks: Mapping[str, str] = _MARKS) -> None:
        if source is None or not source.exists():
            problem = '--source is required' if source is None else f'--source {source} does not exist'
            raise DatasetError(f'{problem}: give a folder of images or an archive of one')
        self.source = self.folder = source
        if not source.is_dir():
            self.folder = scratch
            unpack(source, scratch)
        self.left_out: dict[str, list[Path]] = defaultdict(list)
        entries = self._visible(self.folder)
        roots = [root for root in (self.folder, *entries) if any((root / mark).exists() for mark in marks)]
        if not roots:
            raise DatasetError(f'{source} has no {" and no ".join(marks.values())}: nothing to convert')
        self.root = roots[0]
        if self.root == self.folder:
            self.left_out.clear()  # read_classes() will look at it
        elif len(roots) > 1:
            names = ', '.join(root.name for root in roots[:5])
            raise DatasetError(f'{source} holds {len(roots)} datasets ({names}): give one of them as --source')
        else:
            self.left_out[f'beside {self.root.name}'] = [entry for entry in entries if entry != self.root]
        refuse_links(self.folder)

    def location(self, path: Path) -> Path:
        """Return where the user finds a file, which may be in an archive."""
        return self.source / path.relative_to(self.folder)

    def read_classes(self) -> Source:
        """Return the images in the class folders of both splits."""
        held_out = next((name for name in ('val', 'test') if (self.root / name).is_dir()), None)
        if held_out is None:
            raise DatasetError(f'{self.location(self.root)} has no val/<class>/ or test/<class>/ beside train/<class>/')
        beside = [entry for entry in self._visible(self.root) if entry.name not in ('train', held_out)]
        self.left_out[f'beside train and {held_out}'] = beside
        folders = {
            split: self._class_folders(self.root / name) for split, name in (('train', 'train'), ('val', held_out))
        }
        classes = list(folders['train'])
        if classes != list(folders['val']):
            odd = sorted({*classes} ^ {*folders['val']})
            problem = f'train and {held_out} differ in their classes: only one of them has {odd[:5]}'
            raise DatasetError(f'{self.location(self.root)}: {problem}')
        splits = {}
        for split, of_class in folders.items():
            files = {name: list(self._files(folder)) for name, folder in of_class.items()}
            empty = [name for name in classes if not files[name]]
            if 0 < len(empty) < len(classes):
                raise DatasetError(
                    f'{self.location(of_class[empty[0]].parent)} has no images of {len(empty)} of its {len(classes)} '
                    f'classes, {empty[:5]}: add images, or remove the classes from both splits'
                )
            splits[split] = [(path, label) for label, name in enumerate(classes) for path in files[name]]
        return Source(classes, splits, self.left_out, self.location)

    def _class_folders(self, split: Path) -> dict[str, Path]:
        """Return the class folders of a split by name, sorted; names are in Unicode's composed form, NFC."""
        folders: dict[str, Path] = {}
        strays = []
        for entry in self._visible(split):
            name = unicodedata.normalize('NFC', entry.name)
            if not entry.is_dir():
                strays.append(entry)
            elif name in folders:
                problem = f'has two folders {name!r}, in two forms of Unicode'
                raise DatasetError(f'{self.location(split)} {problem}: merge them')
            else:
                folders[name] = entry
        if not folders:
            problem = f'has {len(strays):,} files and no class folders'
            remedy = f'move each image to {split.name}/<class>/'
            hint = ', as extract_ILSVRC.sh in imagenet/ of pytorch/examples does for ImageNet' if strays else ''
            raise DatasetError(f'{self.location(split)} {problem}: {remedy}{hint}')
        self.left_out['beside the class folders'] += strays
        return dict(sorted(folders.items()))

    def _files(self, folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
        """Yield all files below a folder, also in linked folders, sorted by their paths."""
        real = os.path.realpath(folder)
        if real in above:
            problem = f'{self.location(folder)} contains itself, through a link in this path'
            raise DatasetError(f'{problem}: remove the link')
        for entry in self._visible(folder):
            if entry.is_file():
                yield entry
            elif entry.is_dir():
                yield from self._files(entry, (*above, real))
            else:
                self.left_out['neither a file nor a folder'].append(entry)

    def _visible(self, folder: Path) -> list[Path]:
        """Return the entries of a folder, sorted, without those that are hidden or that a system adds."""
        visible = []
        for entry in sorted(folder.iterdir()):
            if is_hidden(entry.name):
                self.left_out['hidden, or made by the operating system'].append(entry)
            else:
                visible.append(entry)
        return visible


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is hidden, or made by the operating system."""
    return name.startswith('.') or name in _SYSTEM_FOLDERS


def refuse_links(folder: Path) -> None:
    """Raise DatasetError if a link in ``folder`` leads out of it: its target is not part of the dataset."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                continue
            if not os.path.exists(path):
                raise DatasetError(f'{path} is a broken link: remove it')
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise DatasetError(
                    f'{path} links to {os.path.realpath(path)}, outside {folder}: copy the files into the folder'
                )


# --- CIFAR's Python batches -------------------------------------------------------------------------------------------


class _DataUnpickler(pickle.Unpickler):
    """Unpickler of arrays and plain containers alone: other pickles may run any code of their authors."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype'):
            return super().find_class(module.replace('numpy.core', 'numpy._core'), name)
        if (module, name) == ('_codecs', 'encode'):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name} is not plain data')


def _cifar_batches(folder: _Folder) -> Source:
    root = folder.root
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
        problem = f'not a readable CIFAR batch ({error!r}): download the archive again'
        raise DatasetError(f'{folder.location(path)}: {problem}') from error
    return Source(classes, splits)


def _unpickle(path: Path) -> dict[bytes, Any]:
    with open(path, 'rb') as file:
        return _DataUnpickler(file, encoding='bytes').load()
