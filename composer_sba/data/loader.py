"""The DataLoader of a data set, for training or evaluation."""

import os
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader
from torchvision import transforms

from composer_sba.data.config import KNOWN, check, default_for_training, index, local, make
from composer_sba.data.config import DatasetConfig as DatasetConfig  # who builds a DataLoader needs this file alone
from composer_sba.data.conversion import convert
from composer_sba.data.in_memory import EachOnce, MemoryDataset
from composer_sba.data.mds_dataset import ByIndex, ImageDataset
from composer_sba.data.mds_index import RECORD, check_hashes, remake
from composer_sba.data.partition import shared_samples
from composer_sba.data.samples import Expected
from composer_sba.data.transforms import BatchTransform, Normalize, Pipeline, ToBytes
from composer_sba.data.transforms import image_size as image_size
from composer_sba.data.transforms import transform as transform
from composer_sba.errors import DatasetError

CHEAP = 1 << 30  # bytes of shards whose hashes are compared without being asked to, in less than a second


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
    known = check(config).num_classes
    record = _index(config).get(RECORD, {})
    folder = f'{local(config) / config.split}'
    if KNOWN[config.name].size is not None and record.get('name', config.name) != config.name:
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
    shuffle = default_for_training(config, config.shuffle)
    training = shuffle or default_for_training(config, config.augment)
    shards, folder = _index(config)['shards'], local(config) / config.split
    size = sum(shard['samples'] for shard in shards)
    if config.subset is not None and config.subset > size:
        raise DatasetError(f'subset: {config.subset} is more than the {size} samples of {folder}: choose a smaller one')
    if training and not shared_samples(config.subset or size, dist.get_world_size(), batch_size, drop_last):
        raise DatasetError(
            f'{folder} has {config.subset or size} samples, too few for {dist.get_world_size()} ranks'
            f'{f" with full batches of {batch_size}" if drop_last else ""}'
        )
    remedy = remake(folder, config.remote, make(config))
    bytes_in_all = sum(shard['raw_data']['bytes'] for shard in shards)
    if (bytes_in_all <= CHEAP if config.verify is None else config.verify) and dist.get_local_rank() == 0:
        check_hashes(folder, shards, remedy)
    expected = Expected(str(folder), num_classes, KNOWN[config.name].size, remedy)
    seed = seed if config.shuffle_seed is None else config.shuffle_seed
    if config.in_memory:
        images = MemoryDataset(
            shards, expected, BatchTransform(config, device), subset=config.subset, seed=seed, device=device
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
            local=str(local(config)),
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


def dataset_size(config: DatasetConfig) -> int:
    """Count the samples of a data set; errors are those of :func:`dataset_classes`.

    Example:
        >>> dataset_size(DatasetConfig('digits'))
        1437
    """
    check(config)
    return config.subset or sum(shard['samples'] for shard in _index(config)['shards'])


def _index(config: DatasetConfig) -> dict[str, Any]:
    """Read the index of the split; make the digits if they do not exist yet."""
    if config.name == 'digits' and config.remote is None:
        convert('digits', None, local(config), exist_ok=True)
    return index(config)
