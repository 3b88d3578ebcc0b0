"""DataLoaders: the batches of a dataset, for training or evaluation."""

import os
from numbers import Integral
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from composer_sba.data.config import DatasetConfig as DatasetConfig  # re-exported, with the two functions below
from composer_sba.data.config import ResolvedConfig, resolve
from composer_sba.data.conversion import convert
from composer_sba.data.in_memory import EachOnce, MemoryDataset
from composer_sba.data.mds_dataset import ByIndex, ImageDataset
from composer_sba.data.mds_index import RECORD, check_decompression, check_hashes, rebuild_remedy
from composer_sba.data.partition import shared_samples
from composer_sba.data.samples import Expected
from composer_sba.data.shared_memory import fail_together
from composer_sba.data.transforms import BatchTransform, Normalize, Pipeline, ToBytes
from composer_sba.data.transforms import image_size as image_size
from composer_sba.data.transforms import transform as transform
from composer_sba.errors import DatasetError, check_number

VERIFIED_BYTES = 1 << 30  # shards up to this size are compared with their hashes by default, in less than a second


def dataset_classes(config: DatasetConfig) -> int:
    """Return the number of classes of a dataset without reading a sample.

    Args:
        config (DatasetConfig): The dataset.

    Returns:
        int: As the converter recorded it, or ``config.num_classes``, or as known by name.

    Raises:
        DatasetError: If the dataset is missing or incomplete, or these sources contradict each other.

    Example:
        >>> dataset_classes(DatasetConfig('digits'))
        10
    """
    config = resolve(config)
    record = _read_index(config).get(RECORD, {})
    if config.known.size is not None and record.get('name', config.name) != config.name:
        raise DatasetError(f'{config.folder} holds {record["name"]}, not {config.name}: correct name or local')
    recorded = record.get('num_classes')
    fixed = config.known.num_classes if config.name != 'imagenet' else None  # its layout may hold fewer classes
    if config.num_classes is not None and config.num_classes != (recorded or fixed or config.num_classes):
        raise DatasetError(
            f'num_classes: {config.num_classes} contradicts {config.folder}, which has {recorded or fixed}: '
            'remove the key'
        )
    count = recorded or config.num_classes or config.known.num_classes
    if count is None:
        raise DatasetError(f'{config.folder} does not record its number of classes: set num_classes')
    return int(count)


def dataset_size(config: DatasetConfig) -> int:
    """Return the number of samples of a dataset; errors are those of :func:`dataset_classes`.

    Example:
        >>> dataset_size(DatasetConfig('digits'))
        1437
    """
    config = resolve(config)
    return config.subset or sum(shard['samples'] for shard in _read_index(config)['shards'])


def build_dataloader(
    config: DatasetConfig,
    batch_size: int,
    *,
    seed: int = 17,
    drop_last: bool = False,
    device: torch.device | str | None = None,
) -> DataLoader:
    """Build the DataLoader of a dataset.

    Evaluation, which neither shuffles nor augments, reads each sample once. A ``DistributedSampler`` repeats up to
    ``world size - 1`` samples to give all ranks the same number, and Composer removes the repetitions from the metrics.

    Training reads no sample twice in an epoch. On one rank it reads all samples. On several ranks each has the same
    number of batches, or they would wait for each other forever: an incomplete last global batch is divided evenly, and
    left out if it has fewer samples than ranks. Each epoch leaves out different samples. With ``drop_last`` an
    incomplete last global batch is always left out. The order and the random transforms of an epoch depend on the seed
    only. Composer resumes in mid-epoch because Streaming records the position.

    The same holds in memory, with another order and other draws from the same distribution. In memory, the draws of a
    sample also depend on its batch, and Composer resumes by skipping batches, which costs little.

    On several ranks, call ``composer.utils.dist.initialize_dist`` with the device first.

    Args:
        config (DatasetConfig): The dataset.
        batch_size (int): Samples in a batch of one rank, >= 1.
        seed (int, optional): Seed of the order and the transforms unless ``config.shuffle_seed`` is set. Default:
            ``17``.
        drop_last (bool, optional): Whether every batch must be full. Default: ``False``.
        device (torch.device | str, optional): Device that holds images in memory. Default: the CPU.

    Returns:
        torch.utils.data.DataLoader: Batches of images, shape ``(N, 3, H, W)``, float32, and labels, shape ``(N,)``,
        int64; on ``device`` if they are in memory.

    Raises:
        DatasetError: If the config is wrong or the dataset missing, incomplete or too small, on any rank. If a sample
            is unreadable or has an impossible label: on iteration, or at once with images in memory. The message is one
            line; it is the last line of the traceback of a worker.
        ValueError: If ``batch_size`` is not an integer >= 1.

    Example:
        >>> images, labels = next(iter(build_dataloader(DatasetConfig('digits', num_workers=0), batch_size=32)))
        >>> images.shape, labels.shape
        (torch.Size([32, 3, 8, 8]), torch.Size([32]))
    """
    return _dataloader(config, _pipeline(config), batch_size, seed, drop_last, device)


def build_dataspec(
    config: DatasetConfig,
    batch_size: int,
    *,
    seed: int = 17,
    drop_last: bool = False,
    device: torch.device | str | None = None,
) -> DataSpec:
    """Build the DataSpec of a dataset: the batches of :func:`build_dataloader`, normalized on the device.

    Workers pass on bytes, which take a quarter of the memory, and the device converts them. The batches are bit by bit
    the same. They are normalized before the first algorithm runs, so a rank's whole batch is on the device, even with
    microbatches. With ``config.cutout``, which erases normalized pixels, or ``config.gaussian_noise``, the workers
    normalize.

    Args:
        config (DatasetConfig): The dataset.
        batch_size (int): Samples in a batch of one rank, >= 1.
        seed (int, optional): Seed, as in :func:`build_dataloader`. Default: ``17``.
        drop_last (bool, optional): Whether every batch must be full. Default: ``False``.
        device (torch.device | str, optional): Device that normalizes the batches. Default: the CPU.

    Returns:
        composer.DataSpec: The DataLoader and its batch transform. Errors are those of :func:`build_dataloader`.

    Example:
        >>> spec = build_dataspec(DatasetConfig('digits', num_workers=0), batch_size=32)
        >>> batch = next(iter(spec.dataloader))
        >>> batch[0].dtype, spec.batch_transforms(batch)[0].dtype
        (torch.uint8, torch.float32)
    """
    pipeline = _pipeline(config)
    *before, last = pipeline.transforms
    adds_noise = any(isinstance(step, v2.RandomApply) for step in before)
    if config.in_memory or adds_noise or not isinstance(last, transforms.Normalize):
        return DataSpec(_dataloader(config, pipeline, batch_size, seed, drop_last, device))
    images = Pipeline([ToBytes() if isinstance(step, transforms.ToTensor) else step for step in before])
    normalize = Normalize(last.mean, last.std, device)
    return DataSpec(
        _dataloader(config, images, batch_size, seed, drop_last, device),
        batch_transforms=lambda batch: (normalize(batch[0]), batch[1]),
    )


def _pipeline(config: DatasetConfig) -> transforms.Compose:
    if dist.get_world_size() > 1 and not torch.distributed.is_initialized():
        dist.initialize_dist()
    with fail_together():
        return transform(config)  # it may read the dataset's index


def _dataloader(
    config: DatasetConfig,
    pipeline: transforms.Compose,
    batch_size: int,
    seed: int,
    drop_last: bool,
    device: torch.device | str | None,
) -> DataLoader:
    config = resolve(config)
    batch_size = check_number('batch_size', batch_size, 'an integer >= 1', lambda value: value >= 1, Integral)
    seed = seed if config.shuffle_seed is None else config.shuffle_seed
    training = config.shuffle or config.augment
    ranks = dist.get_world_size()
    with fail_together():
        num_classes, shards = dataset_classes(config), _read_index(config)['shards']
        folder, remedy = config.folder, rebuild_remedy(config.folder, config.remote, config.conversion_command)
        size = sum(shard['samples'] for shard in shards)
        if config.subset is not None and config.subset > size:
            raise DatasetError(
                f'subset: {config.subset} is more than the {size} samples of {folder}: choose a smaller one'
            )
        if training and not shared_samples(config.subset or size, ranks, batch_size, drop_last):
            full = f' with full batches of {batch_size}' if drop_last else ''
            raise DatasetError(f'{folder} has {config.subset or size} samples, too few for {ranks} ranks{full}')
        small = sum(shard['raw_data']['bytes'] for shard in shards) <= VERIFIED_BYTES
        if (small if config.verify is None else config.verify) and dist.get_local_rank() == 0:
            check_hashes(folder, shards, remedy)
        if config.remote is None and not config.in_memory:
            check_decompression(folder, shards)
    expected = Expected(str(folder), num_classes, config.known.size, remedy)
    if config.in_memory:
        with fail_together():
            images = MemoryDataset(
                shards, expected, BatchTransform(config, device), subset=config.subset, seed=seed, device=device
            )
        order = EachOnce(images, batch_size, shuffle=config.shuffle, drop_last=drop_last)
        sampler = order if training else dist.get_sampler(images, drop_last=drop_last)
        return DataLoader(images, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=lambda batch: batch)
    # Streaming compares hashes of downloads, at gigabytes a second, but fails if a shard has none.
    hashed = config.remote is not None and all('xxh64' in shard['hashes'] for shard in shards)
    try:
        dataset = ImageDataset(
            expected=expected,
            drop_last=drop_last,
            seed=seed,
            local=config.local,
            remote=config.remote,
            split=config.split,
            batch_size=batch_size,
            shuffle=config.shuffle,
            validate_hash='xxh64' if hashed else None,
            transform=pipeline,
            cache_limit=config.cache_limit,
            download_timeout=config.download_timeout,
        )
    except (ValueError, RuntimeError, OSError) as error:
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


def _read_index(config: ResolvedConfig) -> dict[str, Any]:
    """Read the index of the split, after making the digits if they do not exist yet."""
    if config.name == 'digits' and config.remote is None:
        convert('digits', None, config.local, exist_ok=True)
    return config.read_index()
