"""Images for training and evaluation: what a recipe says about a data set, its transforms, and the DataLoader."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader
from torchvision import transforms

from composer_sba.convert import convert
from composer_sba.cutout import Cutout
from composer_sba.decode import to_rgb
from composer_sba.errors import DatasetError
from composer_sba.index import RECORD, check_hashes, read_index, remake
from composer_sba.mds import ByIndex, Expected, ImageDataset
from composer_sba.memory import BatchTransform, EachOnce, MemoryDataset
from composer_sba.pixels import Normalize, Pipeline, RandomResizedCrop, ToBytes, ToFloats
from composer_sba.sharing import shared_samples

CHEAP = 1 << 30  # bytes of shards whose hashes are compared without being asked to, in less than a second


@dataclass(frozen=True)
class _Known:
    """What is known of a data set by its name. ``size`` and ``padding`` are in pixels; ``size`` None: they differ."""

    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int | None = None
    padding: int = 0
    flip: bool = True


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KNOWN = {
    'digits': _Known(10, (0.2874,) * 3, (0.3540,) * 3, size=8, padding=1, flip=False),
    'cifar10': _Known(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), size=32, padding=4),
    'cifar100': _Known(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), size=32, padding=4),
    'imagenet': _Known(1000, *_IMAGENET),
    'imagefolder': _Known(None, *_IMAGENET),
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


def transform(config: DatasetConfig) -> transforms.Compose:
    """Build the transforms from an image to a normalized tensor.

    Training: small images are padded, cropped and, digits excepted, flipped; others get torchvision's random resized
    crop and flip. Evaluation: small images are left as they are, others resized and cropped at the centre.

    The DataLoader decodes JPEGs for a random resized crop to tensors, unless a transform that needs PIL images, as
    Composer's RandAugment, is put before ``ToTensor``. The crops are the same, for a fifth less of a worker's time,
    and a pixel differs from PIL's by at most one of 255 levels. In evaluation PIL does all.

    Args:
        config (DatasetConfig): The data set.

    Returns:
        torchvision.transforms.Compose: PIL image of any mode, or RGB as a uint8 tensor if its ``takes_tensors`` is
        true -> shape ``(3, H, W)``, float32.

    Raises:
        DatasetError: If the config has a key that is wrong for this data set.

    Example:
        >>> from PIL import Image
        >>> transform(DatasetConfig('cifar10'))(Image.new('L', (32, 32))).shape
        torch.Size([3, 32, 32])
    """
    known = _check(config)
    train = _default_for_training(config, config.augment)
    flip = [transforms.RandomHorizontalFlip()] if known.flip and train else []
    crop_size, resize_size = config.crop_size or 224, config.resize_size or 256
    crop: list[Callable]
    if known.size is not None:
        crop = [to_rgb, *([transforms.RandomCrop(known.size, padding=known.padding)] if train else [])]
    elif train:
        crop = [RandomResizedCrop(crop_size)]
    elif crop_size <= resize_size:
        crop = [to_rgb, transforms.Resize(resize_size), transforms.CenterCrop(crop_size)]
    else:
        raise DatasetError(f'resize_size: {resize_size} is smaller than crop_size: {crop_size}: choose a larger one')
    mean, std = config.mean, config.std
    if config.name == 'imagefolder' and (mean is None or std is None):
        record = _index(config).get(RECORD, {})
        mean, std = mean or record.get('mean'), std or record.get('std')
    normalize = transforms.Normalize(mean or known.mean, std or known.std)
    cutout = [Cutout(config.cutout)] if config.cutout is not None and train else []
    return Pipeline([*crop, *flip, ToFloats(), normalize, *cutout])


def dataset_classes(config: DatasetConfig) -> int:
    """Tell the number of classes of a data set, without reading a sample.

    Args:
        config (DatasetConfig): The data set.

    Returns:
        int: As the converter recorded it, else ``config.num_classes``, else as known by name.

    Raises:
        DatasetError: If the dataset is missing or incomplete, or these sources contradict one another.

    Example:
        >>> dataset_classes(DatasetConfig('digits'))
        10
    """
    known = _check(config).num_classes
    record = _index(config).get(RECORD, {})
    folder = f'{_local(config) / config.split}'
    if _KNOWN[config.name].size is not None and record.get('name', config.name) != config.name:
        raise DatasetError(f'{folder} holds {record["name"]}, not {config.name}: correct name or local')
    recorded = record.get('num_classes')
    fixed = known if config.name != 'imagenet' else None  # other data in ImageNet's layout may have fewer
    if config.num_classes is not None and config.num_classes != (recorded or fixed or config.num_classes):
        raise DatasetError(
            f'num_classes: {config.num_classes} contradicts {folder}, which has {recorded or fixed}: remove the key'
        )
    count = recorded or config.num_classes or known
    if count is None:
        raise DatasetError(f'{folder} does not tell its number of classes: set num_classes')
    return int(count)


def build_dataloader(
    config: DatasetConfig,
    batch_size: int,
    *,
    seed: int = 17,
    drop_last: bool = False,
    device: torch.device | str | None = None,
) -> DataLoader:
    """Build the DataLoader of a data set.

    Evaluation (neither shuffled nor augmented): each sample once. A ``DistributedSampler`` gives all ranks as many
    samples, up to ``world size - 1`` of them twice, which Composer takes out of the metrics again.

    Training: no sample twice in an epoch, and each once on one rank. On more ranks each has the same number of
    batches, or they would wait for one another for ever: the last global batch, if not full, is shared out evenly;
    if it has fewer samples than there are ranks it is left out. Each epoch leaves out others. With ``drop_last`` a
    last global batch that is not full is always left out. The order and the random transforms of an epoch follow
    from the seed alone, and Composer resumes in mid-epoch, as Streaming keeps the place.

    In memory all this holds too, in another order and with other draws of the same law. There the draws of a sample
    depend on its batch as well, and Composer resumes by skipping batches, which costs little.

    Where there are several ranks, call ``composer.utils.dist.initialize_dist`` with the device first.

    Args:
        config (DatasetConfig): The data set.
        batch_size (int): Samples of a batch of one rank, >= 1.
        seed (int, optional): Seeds the order and the transforms unless ``config.shuffle_seed`` does. Default: ``17``.
        drop_last (bool, optional): Whether every batch must be full. Default: ``False``.
        device (torch.device | str, optional): Where images in memory are kept. Default: the CPU.

    Returns:
        torch.utils.data.DataLoader: Batches of images, shape ``(N, 3, H, W)``, float32, and labels, shape ``(N,)``,
        int64; on ``device`` if they are in memory.

    Raises:
        DatasetError: If the config is wrong or the dataset missing, incomplete or too small; on iteration, or at once
            with images in memory, if a sample is unreadable or has an impossible label. The message is one line, and
            its last line where a worker raised.

    Example:
        >>> images, labels = next(iter(build_dataloader(DatasetConfig('digits'), batch_size=32)))
        >>> images.shape, labels.shape
        (torch.Size([32, 3, 8, 8]), torch.Size([32]))
    """
    return _dataloader(config, transform(config), batch_size, seed, drop_last, device)


def build_dataspec(
    config: DatasetConfig,
    batch_size: int,
    *,
    seed: int = 17,
    drop_last: bool = False,
    device: torch.device | str | None = None,
) -> DataSpec:
    """Build what a Trainer takes for a data set: the batches of :func:`build_dataloader`, normalized on the device.

    Workers then hand over bytes, a quarter of the memory, and never make numbers of them.
    Batches are the same bit by bit, and are normalized before the first algorithm sees them, so that the whole batch
    of a rank lies on the device, whatever its microbatches. With ``config.cutout``, which erases normalized pixels, the
    workers do all.

    Args:
        config (DatasetConfig): The data set.
        batch_size (int): Samples of a batch of one rank, >= 1.
        seed (int, optional): As there. Default: ``17``.
        drop_last (bool, optional): As there. Default: ``False``.
        device (torch.device | str, optional): Where the batches are normalized. Default: the CPU.

    Returns:
        composer.DataSpec: Of the DataLoader; errors are those of :func:`build_dataloader`.

    Example:
        >>> spec = build_dataspec(DatasetConfig('digits'), batch_size=32)
        >>> batch = next(iter(spec.dataloader))
        >>> batch[0].dtype, spec.batch_transforms(batch)[0].dtype
        (torch.uint8, torch.float32)
    """
    pipeline = transform(config)
    *before, last = pipeline.transforms
    if config.in_memory or not isinstance(last, transforms.Normalize):
        return DataSpec(_dataloader(config, pipeline, batch_size, seed, drop_last, device))
    images = Pipeline([ToBytes() if isinstance(step, transforms.ToTensor) else step for step in before])
    normalize = Normalize(last.mean, last.std, device)
    return DataSpec(
        _dataloader(config, images, batch_size, seed, drop_last, device),
        batch_transforms=lambda batch: (normalize(batch[0]), batch[1]),
    )


def _dataloader(
    config: DatasetConfig,
    pipeline: transforms.Compose,
    batch_size: int,
    seed: int,
    drop_last: bool,
    device: torch.device | str | None,
) -> DataLoader:
    num_classes = dataset_classes(config)
    shuffle = _default_for_training(config, config.shuffle)
    training = shuffle or _default_for_training(config, config.augment)
    shards, folder = _index(config)['shards'], _local(config) / config.split
    size = sum(shard['samples'] for shard in shards)
    if config.subset is not None and config.subset > size:
        raise DatasetError(f'subset: {config.subset} is more than the {size} samples of {folder}: choose a smaller one')
    if training and not shared_samples(config.subset or size, dist.get_world_size(), batch_size, drop_last):
        raise DatasetError(
            f'{folder} has {config.subset or size} samples, too few for {dist.get_world_size()} ranks'
            f'{f" with full batches of {batch_size}" if drop_last else ""}'
        )
    remedy = remake(folder, config.remote, _make(config))
    bytes_in_all = sum(shard['raw_data']['bytes'] for shard in shards)
    if (bytes_in_all <= CHEAP if config.verify is None else config.verify) and dist.get_local_rank() == 0:
        check_hashes(folder, shards, remedy)
    expected = Expected(str(folder), num_classes, _KNOWN[config.name].size, remedy)
    seed = seed if config.shuffle_seed is None else config.shuffle_seed
    if config.in_memory:
        images = MemoryDataset(
            shards, expected, BatchTransform(pipeline, device), subset=config.subset, seed=seed, device=device
        )
        order = EachOnce(images, batch_size, shuffle=shuffle, drop_last=drop_last)
        sampler = order if training else dist.get_sampler(images, drop_last=drop_last)
        return DataLoader(images, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=lambda batch: batch)
    # Streaming compares hashes when it fetches a shard, at gigabytes a second, but fails where there are none.
    hashed = config.remote is not None and all('xxh64' in shard['hashes'] for shard in shards)
    if dist.get_world_size() > 1 and not torch.distributed.is_initialized():
        dist.initialize_dist()
    try:
        dataset = ImageDataset(
            expected=expected,
            drop_last=drop_last,
            seed=seed,
            local=str(_local(config)),
            remote=config.remote,
            split=config.split,
            batch_size=batch_size,
            shuffle=shuffle,
            validate_hash='xxh64' if hashed else None,
            transform=pipeline,
            cache_limit=config.cache_limit,
            download_timeout=config.download_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise DatasetError(f'{folder}: {error}') from error
    source = dataset if training else ByIndex(dataset)
    cores = len(os.sched_getaffinity(0)) // dist.get_local_world_size()
    workers = min(cores, 8) if config.num_workers is None else config.num_workers
    return DataLoader(
        source,
        batch_size=batch_size,
        sampler=None if training else dist.get_sampler(source, drop_last=drop_last),
        drop_last=drop_last,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _default_for_training(config: DatasetConfig, value: bool | None) -> bool:
    return config.split == 'train' if value is None else value


def _local(config: DatasetConfig) -> Path:
    return Path(config.local or f'data/{config.name}')


def _make(config: DatasetConfig) -> str:
    name = 'imagefolder' if config.name == 'imagenet' else config.name
    source = '' if name == 'digits' else ' --source ...'
    return f'python -m composer_sba.convert {name}{source} --out {_local(config)}'


def _index(config: DatasetConfig) -> dict[str, Any]:
    if config.name == 'digits' and config.remote is None:
        convert('digits', None, _local(config), exist_ok=True)
    return read_index(_local(config), config.remote, config.split, make=_make(config), timeout=config.download_timeout)


def _check(config: DatasetConfig) -> _Known:
    if config.name not in _KNOWN:
        raise DatasetError(f'name: {config.name} is no known data set: choose one of {", ".join(_KNOWN)}')
    known = _KNOWN[config.name]
    if known.size is not None and (config.crop_size or config.resize_size):
        raise DatasetError(
            f'crop_size and resize_size do not apply to {config.name}, whose images are '
            f'{known.size}x{known.size}: remove them, or read the data as name: imagefolder'
        )
    if config.cutout is not None and config.cutout < 1:
        raise DatasetError(f'cutout: expected a number of pixels >= 1, got {config.cutout}')
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


def image_size(config: DatasetConfig) -> int:
    """Tell height and width of the images after the transforms; unit: pixels.

    Example:
        >>> image_size(DatasetConfig('cifar10')), image_size(DatasetConfig('imagenet'))
        (32, 224)
    """
    return _check(config).size or config.crop_size or 224


def dataset_size(config: DatasetConfig) -> int:
    """Count the samples of a data set; errors are those of :func:`dataset_classes`.

    Example:
        >>> dataset_size(DatasetConfig('digits'))
        1437
    """
    _check(config)
    return config.subset or sum(shard['samples'] for shard in _index(config)['shards'])
