"""Small images in memory, decoded once, stored as uint8 on the training device and transformed there in batches."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.compression import decompress
from streaming.base.format import Reader, reader_from_json
from torch.utils.data import DistributedSampler
from torchvision.datasets import VisionDataset

from composer_sba.data.partition import shared_samples
from composer_sba.data.samples import Expected
from composer_sba.errors import DatasetError, one_line
from composer_sba.schedule import hash_key, seeded


class MemoryDataset(VisionDataset):  # type: ignore[misc]  # torchvision has no types
    """The images and labels of an MDS split, all of one size, as two tensors on a device.

    Random transforms draw from the generators of torch (on the CPU), NumPy and Python, which are seeded for each batch
    with (seed, epoch, first sample) and restored afterwards. A resumed run repeats the draws. It is a ``VisionDataset``
    because Composer's RandAugment, AugMix and ColOut insert their transforms only into one.

    Args:
        shards (Sequence[dict]): As ``index.json`` lists them; their files are in ``expected.folder``.
        expected (Expected): The properties that every sample must have.
        transform (Callable): Maps a batch of shape ``(N, 3, H, W)``, uint8, to one of shape ``(N, *)``.
        subset (int, optional): Keep this many samples, drawn with a fixed seed. Default: all, in their order.
        seed (int): Seed of the transforms, and of the order of :class:`EachOnce`.
        device (torch.device | str, optional): Device that holds the samples. Default: the CPU.

    Raises:
        DatasetError: If a shard cannot be decompressed, or a sample cannot be read, has another size than the others
            or an impossible label.
    """

    def __init__(
        self,
        shards: Sequence[dict[str, Any]],
        expected: Expected,
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        subset: int | None = None,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            readers = [_reader(shard, expected, Path(scratch)) for shard in shards]
            stored = [(reader, i) for reader in readers for i in range(reader.samples)]
            chosen = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))[:subset].tolist()
            # Threads would not be faster: reading and decoding so few pixels holds Python's lock most of the time.
            samples = [
                expected.read(i, lambda reader, at: reader[at], *stored[i])
                for i in (range(len(stored)) if subset is None else chosen)
            ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples]))
        self.images = pixels.permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.tensor([label for _, label in samples], device=device)
        super().__init__(expected.folder, transform=transform)  # BatchAugmentation looks for this name too
        self.seed = seed
        self.epoch = 0  # set by EachOnce

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform the samples of a batch; a DataLoader whose ``collate_fn`` is the identity calls this."""
        rows = torch.tensor(indices).to(self.labels.device, non_blocking=True)
        with seeded(self.seed, self.epoch, indices[0]):
            return self.transform(self.images[rows]), self.labels[rows]


def _reader(shard: dict[str, Any], expected: Expected, scratch: Path) -> Reader:
    """Open a shard, after decompressing it to ``scratch`` if only its compressed file exists."""
    raw, compressed = shard['raw_data'], shard['zip_data']
    if compressed is None or Path(expected.folder, raw['basename']).is_file():
        return reader_from_json(expected.folder, None, shard)
    path = Path(expected.folder, compressed['basename'])
    try:
        content = decompress(shard['compression'], path.read_bytes())
        if len(content) != raw['bytes']:
            raise ValueError(f'{len(content):,} bytes, index.json says {raw["bytes"]:,}')
    except Exception as error:  # each compression has its own exceptions
        raise DatasetError(f'{path} cannot be decompressed ({one_line(error)}): {expected.remedy}') from error
    decompressed = scratch / raw['basename']
    decompressed.parent.mkdir(parents=True, exist_ok=True)
    decompressed.write_bytes(content)
    return reader_from_json(str(scratch), None, shard)


class EachOnce(DistributedSampler):
    """A sampler that distributes an epoch over the ranks: each sample at most once, equally many batches per rank.

    The samples of each global batch, and their order, depend on (seed, epoch) and not on the number of ranks. Each
    iteration is the next epoch; Composer calls ``set_epoch`` to choose one.

    Args:
        dataset (MemoryDataset): The dataset; the sampler sets its epoch.
        batch_size (int): Samples in a batch of one rank.
        **kwargs (Any): ``shuffle``, ``drop_last``, ``num_replicas`` and ``rank`` of ``DistributedSampler``. The last
            two default to Composer's world size and rank.
    """

    dataset: MemoryDataset

    def __init__(self, dataset: MemoryDataset, batch_size: int, **kwargs: Any) -> None:
        ranks = {'num_replicas': dist.get_world_size(), 'rank': dist.get_global_rank()}
        super().__init__(dataset, seed=dataset.seed, **(ranks | kwargs))
        self.total_size = shared_samples(len(dataset), self.num_replicas, batch_size, self.drop_last)
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's samples."""
        self.dataset.epoch = self.epoch
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            generator = torch.Generator().manual_seed(hash_key(self.seed, self.epoch))
            order = torch.randperm(len(self.dataset), generator=generator)
        self.epoch += 1
        return iter(order[self.rank : self.total_size : self.num_replicas].tolist())
