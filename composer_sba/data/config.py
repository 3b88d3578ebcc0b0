"""The configuration of a dataset: the keys of a recipe, their defaults, and what is known about each dataset."""

import contextlib
import math
import os
import sys
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from composer_sba.data.mds_index import read_index
from composer_sba.errors import DatasetError, check_number

_TINY = sys.float_info.min  # the smallest positive number


@dataclass(frozen=True)
class KnownDataset:
    """The facts that follow from a dataset's name.

    ``size`` is the height and width of the images, ``None`` if they differ; ``padding`` is what a random crop adds on
    each side. Unit of both: pixels.
    """

    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    padding: int = 0
    flip: bool = True


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN_DATASETS = {
    'digits': KnownDataset(10, (0.2874,) * 3, (0.3540,) * 3, size=8, padding=1, flip=False),
    'cifar10': KnownDataset(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), size=32, padding=4),
    'cifar100': KnownDataset(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), size=32, padding=4),
    'imagenet': KnownDataset(1000, *_IMAGENET),
    'imagefolder': KnownDataset(None, *_IMAGENET),
    'cifar10c': KnownDataset(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), size=32, padding=4),
}


@dataclass(frozen=True)
class PixelNoise:
    """Gaussian noise of standard deviation ``sigma``, in units of the pixel range, on a share ``prob`` of images."""

    sigma: float
    prob: float


@dataclass
class DatasetConfig:
    """The keys of a recipe's ``train_dataset:`` and ``eval_dataset:``."""

    name: str
    """Dataset: 'digits', 'cifar10', 'cifar100', 'imagenet', 'imagefolder' or 'cifar10c'."""
    local: str | None = None
    """Folder of the MDS dataset, or the local cache of ``remote``. None: data/<name>. The digits are made on first
    use. A leading ~ is the home folder."""
    remote: str | None = None
    """Where Streaming downloads the dataset from: s3://..., gs://..., or a folder. None: ``local`` is complete."""
    split: str = 'train'
    """Sub-folder: 'train' or 'val'; of cifar10c, '<corruption>/<severity>'."""
    augment: bool | None = None
    """Whether to use the random transforms for training. None: if split is 'train'."""
    shuffle: bool | None = None
    """Whether to shuffle, in a new order each epoch. None: if split is 'train'."""
    shuffle_seed: int | None = None
    """Seed of the order and the random transforms. None: the recipe's seed."""
    cutout: int | None = None
    """Side of the square that Cutout erases from each training image, in pixels. None: no Cutout."""
    gaussian_noise: PixelNoise | None = None
    """Gaussian noise for training: {sigma: 0.1, prob: 0.5} adds it to half of the images, with the pixel range as unit,
    and clips them to it. None: no noise."""
    crop_size: int | None = None
    """Height and width of the images of imagenet and imagefolder after cropping, in pixels. None: 224."""
    resize_size: int | None = None
    """Their shorter side before the crop in evaluation, in pixels. None: crop_size / 0.875, rounded down, which keeps
    7/8 of each side; 256 for 224."""
    mean: list[float] | None = None
    """Means of red, green and blue in [0, 1], for normalization. None: those of the dataset."""
    std: list[float] | None = None
    """Standard deviations for normalization. None: those of the dataset."""
    num_classes: int | None = None
    """Number of classes. None: as recorded by the converter, or as known by name."""
    num_workers: int | None = None
    """Processes per rank that decode and transform; 0: the training process does it. None: one for each of the rank's
    cores, at most 8."""
    cache_limit: str | None = None
    """Size at which the local cache of ``remote`` drops its oldest shards, such as '100gb'. None: unlimited."""
    download_timeout: float = 60
    """Longest wait for a shard from ``remote``, in seconds."""
    verify: bool | None = None
    """Whether to compare the shards in ``local`` with their hashes before training, which reads all of them. None: if
    they have at most 1 GiB together. Downloads are always compared."""
    in_memory: bool = False
    """Whether to decode the images once, keep them as uint8 on the training device and transform them there, a batch
    at a time and without workers. For digits, cifar10 and cifar100."""
    subset: int | None = None
    """Use this many samples, drawn with a fixed seed and therefore the same in every run; requires ``in_memory``.
    None: all."""


@dataclass
class ResolvedConfig(DatasetConfig):
    """A valid configuration with Python's own numbers and with those defaults that need no index."""

    local: str = ''
    augment: bool = False
    shuffle: bool = False
    crop_size: int = 0
    resize_size: int = 0
    known: KnownDataset = KNOWN_DATASETS['digits']

    @property
    def folder(self) -> Path:
        """Folder of the split."""
        return Path(self.local, self.split)

    @property
    def conversion_command(self) -> str:
        """The command that makes the dataset, for messages."""
        name = 'imagefolder' if self.name == 'imagenet' else self.name
        source = '' if name == 'digits' else ' --source ...'
        return f'composer-sba convert {name}{source} --out {self.local}'

    def read_index(self) -> dict[str, Any]:
        """Read the index of the split; see :func:`composer_sba.data.mds_index.read_index`."""
        command, timeout = self.conversion_command, self.download_timeout
        return read_index(Path(self.local), self.remote, self.split, command=command, timeout=timeout)


def resolve(config: DatasetConfig) -> ResolvedConfig:
    """Validate a configuration and fill in its defaults.

    Args:
        config (DatasetConfig): The configuration; it is left alone.

    Returns:
        ResolvedConfig: A copy. ``remote`` is None if it is the folder ``local`` itself.

    Raises:
        DatasetError: If a key is wrong by itself or for this dataset.
    """
    if isinstance(config, ResolvedConfig):
        return config
    if config.name not in KNOWN_DATASETS:
        raise DatasetError(f'name: unknown dataset {config.name!r}: choose one of {", ".join(KNOWN_DATASETS)}')
    known = KNOWN_DATASETS[config.name]
    values = vars(config) | {'known': known}
    for key, unit, minimum in (
        ('cutout', 'pixels', 1),
        ('crop_size', 'pixels', 1),
        ('resize_size', 'pixels', 1),
        ('num_classes', 'classes', 1),
        ('num_workers', 'processes', 0),
        ('subset', 'samples', 1),
    ):
        values[key] = _number(key, values[key], f'a number of {unit} >= {minimum}', minimum)
    values['shuffle_seed'] = _number('shuffle_seed', config.shuffle_seed, 'an integer', -(2**63))
    values['download_timeout'] = _number('download_timeout', config.download_timeout, 'a number > 0', _TINY, Real)
    for key in ('augment', 'shuffle', 'verify', 'in_memory'):
        if not isinstance(values[key], bool | np.bool_ | None):
            raise DatasetError(f'{key}: expected true or false, got {values[key]!r}')
    if config.gaussian_noise is not None:
        given = config.gaussian_noise
        noise = given if isinstance(given, PixelNoise) else PixelNoise(**given)  # a recipe has a mapping
        sigma = _number('gaussian_noise.sigma', noise.sigma, 'a number > 0', _TINY, Real, sys.float_info.max)
        prob = _number('gaussian_noise.prob', noise.prob, 'a number in [0, 1]', 0, Real, 1)
        values['gaussian_noise'] = PixelNoise(sigma, prob)
    values['mean'] = _channels('mean', config.mean, 'three numbers in [0, 1]', 0, 1)
    values['std'] = _channels('std', config.std, 'three positive numbers', _TINY, sys.float_info.max)
    if known.size is not None and (config.crop_size or config.resize_size):
        raise DatasetError(
            f'crop_size and resize_size do not apply to {config.name}, whose images are '
            f'{known.size}x{known.size}: remove them, or read the data as name: imagefolder'
        )
    values['crop_size'] = known.size or values['crop_size'] or 224
    values['resize_size'] = known.size or values['resize_size'] or values['crop_size'] * 8 // 7  # timm's crop_pct
    for key in ('augment', 'shuffle'):
        values[key] = config.split == 'train' if values[key] is None else bool(values[key])
    local = values['local'] = os.path.expanduser(config.local or f'data/{config.name}')
    if config.remote is not None:
        remote = os.path.expanduser(config.remote)
        values['remote'] = None if os.path.realpath(remote) == os.path.realpath(local) else remote
    if config.cache_limit is not None and values['remote'] is None:
        raise DatasetError('cache_limit without a remote would delete the only copy of the data: remove the key')
    if config.in_memory and known.size is None:
        raise DatasetError(f'in_memory does not apply to {config.name}, whose images differ in size: remove the key')
    if config.in_memory and values['remote'] is not None:
        raise DatasetError('in_memory reads the shards of local: download the dataset there, and remove remote')
    if config.in_memory and config.num_workers:
        raise DatasetError(f'num_workers: {config.num_workers} workers are not used with in_memory: remove the key')
    if config.subset is not None and not config.in_memory:
        raise DatasetError('subset requires in_memory: true')
    return ResolvedConfig(**values)


def filled_in(config: DatasetConfig) -> dict[str, Any]:
    """Return the keys of a configuration with those defaults that follow from its name and its other keys.

    Those that the index, the machine or the recipe's seed determine stay None.

    Example:
        >>> filled = filled_in(DatasetConfig('digits', split='val'))
        >>> filled['local'], filled['augment'], filled['num_workers']
        ('data/digits', False, None)
    """
    resolved = resolve(config)
    values = {field.name: getattr(config, field.name) for field in fields(DatasetConfig)}
    found = ('augment', 'shuffle') if resolved.known.size else ('augment', 'shuffle', 'crop_size', 'resize_size')
    values |= {key: getattr(resolved, key) for key in found}
    values['local'] = config.local or resolved.local
    if config.name != 'imagefolder':  # whose index has the statistics
        values |= {key: list(getattr(config, key) or getattr(resolved.known, key)) for key in ('mean', 'std')}
    return values


def _number(
    key: str, value: Any, expected: str, minimum: float, kind: type = Integral, maximum: float = math.inf
) -> Any:
    if value is None:
        return None
    try:
        return check_number(key, value, expected, lambda number: minimum <= number <= maximum, kind)
    except ValueError:
        raise DatasetError(f'{key}: expected {expected}, got {value!r}') from None


def _channels(key: str, values: Any, expected: str, minimum: float, maximum: float) -> list[float] | None:
    if values is None:
        return None
    with contextlib.suppress(TypeError, DatasetError):
        numbers = [float(_number(key, value, '', minimum, Real, maximum)) for value in values]
        if len(numbers) == 3:
            return numbers
    raise DatasetError(f'{key}: expected {expected}, got {values!r}')
