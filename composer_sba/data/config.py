"""What a recipe says of a data set, checked against what is known of it by its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_sba.data.mds_index import read_index
from composer_sba.errors import DatasetError


@dataclass(frozen=True)
class Known:
    """What is known of a data set by its name. ``size`` and ``padding`` are in pixels; ``size`` None: they differ."""

    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    padding: int = 0
    flip: bool = True


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOWN = {
    'digits': Known(10, (0.2874,) * 3, (0.3540,) * 3, size=8, padding=1, flip=False),
    'cifar10': Known(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), size=32, padding=4),
    'cifar100': Known(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), size=32, padding=4),
    'imagenet': Known(1000, *_IMAGENET),
    'imagefolder': Known(None, *_IMAGENET),
}


@dataclass
class DatasetConfig:
    """The keys of a recipe's ``train_dataset:`` and ``eval_dataset:``."""

    name: str
    """Data set: 'digits', 'cifar10', 'cifar100', 'imagenet' or 'imagefolder'."""
    local: str | None = None
    """Folder of the MDS dataset, or the local cache of ``remote``. None: data/<name>. Digits are made on first use."""
    remote: str | None = None
    """Where Streaming fetches the dataset from: s3://..., gs://..., or a path. None: ``local`` has it all."""
    split: str = 'train'
    """Sub-folder: 'train' or 'val'."""
    augment: bool | None = None
    """Whether to use the random transforms for training. None: if split is 'train'."""
    shuffle: bool | None = None
    """Whether to shuffle, anew in each epoch. None: if split is 'train'."""
    shuffle_seed: int | None = None
    """Seeds the order and the random transforms. None: the recipe's seed."""
    cutout: int | None = None
    """Side of the square that Cutout erases from each training image, in pixels. None: nothing is erased."""
    crop_size: int | None = None
    """Height and width of the images of imagenet and imagefolder after cropping, in pixels. None: 224."""
    resize_size: int | None = None
    """Their shorter side before the crop in evaluation, in pixels. None: 256."""
    mean: list[float] | None = None
    """Means of red, green and blue in [0, 1] to normalize with. None: those of the data set."""
    std: list[float] | None = None
    """Standard deviations to normalize with. None: those of the data set."""
    num_classes: int | None = None
    """Number of classes. None: as the converter recorded it, else as known by name."""
    num_workers: int | None = None
    """Processes that decode and transform, for each rank; 0: the training process does it. None: one for each core that
    the rank has to itself, at most 8."""
    cache_limit: str | None = None
    """Size at which the local cache of ``remote`` drops its oldest shards, as '100gb'. None: it keeps all."""
    download_timeout: float = 60
    """Longest wait for a shard from ``remote``, in seconds."""
    verify: bool | None = None
    """Whether the shards in ``local`` are compared with their hashes before training, which reads them all. None: if
    they have at most 1 GiB together. What comes from ``remote`` is compared as it comes."""
    in_memory: bool = False
    """Whether the images are decoded once, kept as uint8 on the training device and transformed there, a batch at a
    time and without workers. For digits, cifar10 and cifar100."""
    subset: int | None = None
    """Use this many samples, the same ones in every run, drawn by a fixed seed; needs ``in_memory``. None: all."""


def check(config: DatasetConfig) -> Known:
    """Refuse keys that are wrong for the data set, by a :class:`DatasetError`; give what is known of it by name."""
    if config.name not in KNOWN:
        raise DatasetError(f'name: {config.name} is no known data set: choose one of {", ".join(KNOWN)}')
    known = KNOWN[config.name]
    if known.size is not None and (config.crop_size or config.resize_size):
        raise DatasetError(
            f'crop_size and resize_size do not apply to {config.name}, whose images are '
            f'{known.size}x{known.size}: remove them, or read the data as name: imagefolder'
        )
    for key in ('cutout', 'crop_size', 'resize_size'):
        pixels = getattr(config, key)
        if pixels is not None and pixels < 1:
            raise DatasetError(f'{key}: expected a number of pixels >= 1, got {pixels}')
    if config.num_workers is not None and config.num_workers < 0:
        raise DatasetError(f'num_workers: expected a number >= 0, got {config.num_workers}')
    if config.cache_limit is not None and config.remote in (None, config.local):
        raise DatasetError('cache_limit without a remote would delete the only copy of the data: remove the key')
    if config.in_memory and known.size is None:
        raise DatasetError(f'in_memory does not apply to {config.name}, whose images differ in size: remove the key')
    if config.in_memory and config.remote is not None:
        raise DatasetError('in_memory reads the shards of local: fetch the dataset there, and remove remote')
    if config.in_memory and config.num_workers:
        raise DatasetError(f'num_workers: {config.num_workers} workers have no work with in_memory: remove the key')
    if config.subset is not None and not config.in_memory:
        raise DatasetError('subset needs in_memory: true')
    if config.subset is not None and config.subset < 1:
        raise DatasetError(f'subset: expected a number of samples >= 1, got {config.subset}')
    for key, values in (('mean', config.mean), ('std', config.std)):
        if values is not None and (len(values) != 3 or (key == 'std' and min(values) <= 0)):
            raise DatasetError(f'{key}: expected three {"positive " * (key == "std")}numbers, got {list(values)}')
    return known


def default_for_training(config: DatasetConfig, value: bool | None) -> bool:
    """Give the value of a key whose default is whether the split is for training."""
    return config.split == 'train' if value is None else value


def local(config: DatasetConfig) -> Path:
    """Give the folder of the dataset, or of its local cache."""
    return Path(config.local or f'data/{config.name}')


def make(config: DatasetConfig) -> str:
    """Give the command that makes the dataset, for messages."""
    name = 'imagefolder' if config.name == 'imagenet' else config.name
    source = '' if name == 'digits' else ' --source ...'
    return f'python -m composer_sba.convert {name}{source} --out {local(config)}'


def index(config: DatasetConfig) -> dict[str, Any]:
    """Read the index of the split."""
    return read_index(local(config), config.remote, config.split, make=make(config), timeout=config.download_timeout)
