"""Small images in memory: decoded once, kept as uint8 on the training device, and transformed there by batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.format import reader_from_json
from torch.utils.data import Dataset, DistributedSampler

from composer_sba.data.partition import shared_samples
from composer_sba.data.samples import Expected
from composer_sba.schedule import hash_key, seeded


class MemoryDataset(Dataset):
    """The images and labels of one MDS split, all of one size, as two tensors on a device.

    Random transforms draw from torch's CPU generator, seeded for each batch from (seed, epoch, first sample): a resumed
    run repeats them, and the generator is otherwise left alone.

    Args:
        shards (Sequence[dict]): As ``index.json`` lists them; their files lie in ``expected.folder``.
        expected (Expected): What every sample must be.
        transform (Callable): From a batch of shape ``(N, 3, H, W)``, uint8, to ``(N, *)``.
        subset (int, optional): Keep this many samples only, drawn by a fixed seed. Default: all, in their order.
        seed (int): Seeds the transforms, and the order of :class:`EachOnce`.
        device (torch.device | str, optional): Where the samples are kept. Default: the CPU.

    Raises:
        DatasetError: If a sample cannot be read, is not of one size or has an impossible label.
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
        readers = [reader_from_json(expected.folder, None, shard) for shard in shards]
        stored = [(reader, i) for reader in readers for i in range(reader.samples)]
        chosen = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))[:subset].tolist()
        # Threads would not be faster, as reading and decoding so few pixels holds Python's lock most of the time.
        samples = [
            expected.read(i, lambda reader, at: reader[at], *stored[i])
            for i in (range(len(stored)) if subset is None else chosen)
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples]))
        self.images = pixels.permute(0, 3, 1, 2).contiguous().to(device)
        self.labels = torch.tensor([label for _, label in samples], device=device)
        self.transform = transform  # by name, for BatchAugmentation
        self.seed = seed
        self.epoch = 0  # as EachOnce says

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform the samples of a batch; a DataLoader whose ``collate_fn`` is the identity calls this."""
        rows = torch.tensor(indices).to(self.labels.device, non_blocking=True)
        with seeded(self.seed, self.epoch, indices[0]):
            return self.transform(self.images[rows]), self.labels[rows]


class EachOnce(DistributedSampler):
    """Deals the samples of an epoch to the ranks, none of them twice and to each rank as many batches.

    The samples of each global batch, and their order, depend on (seed, epoch) and not on the number of ranks. One epoch
    follows the other; ``set_epoch``, which Composer calls, chooses one.

    Args:
        dataset (MemoryDataset): The dataset, which learns the epoch from here.
        batch_size (int): Samples of a batch of one rank.
        **kwargs (Any): ``shuffle``, ``drop_last``, ``num_replicas`` and ``rank`` of ``DistributedSampler``, the latter
            two by default Composer's world size and rank.
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
