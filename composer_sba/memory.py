"""Small images in memory: decoded once, kept as uint8 on the training device, and transformed there by batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import dist
from streaming.base.format import reader_from_json
from torch.utils.data import Dataset, DistributedSampler
from torchvision import transforms

from composer_sba.cutout import Cutout
from composer_sba.decode import to_rgb
from composer_sba.expected import Expected
from composer_sba.pixels import Normalize
from composer_sba.seeding import hash_key, seeded
from composer_sba.sharing import shared_samples


class BatchTransform:
    """The transforms of small images, for a whole batch at once.

    The law is that of the transforms for single images, every sample having draws of its own. They come from torch's
    CPU generator, so that they are the same on any device.

    Args:
        pipeline (torchvision.transforms.Compose): For single images: ``ToTensor`` and ``Normalize``, and for training
            ``RandomCrop`` to the size of the image, ``RandomHorizontalFlip`` and ``Cutout``.
        device (torch.device | str, optional): Where the batches are. Default: the CPU.

    Raises:
        ValueError: If the pipeline has any other transform.

    Example:
        >>> pipeline = transforms.Compose([transforms.RandomCrop(8, 1), transforms.ToTensor(),
        ...                                transforms.Normalize([0.5] * 3, [0.5] * 3)])
        >>> BatchTransform(pipeline)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).unique()
        tensor([-1.])
    """

    batched = True  # for Copies, which stack those of a batch behind its first dimension

    def __init__(self, pipeline: transforms.Compose, device: torch.device | str | None = None) -> None:
        kinds = [transforms.RandomCrop, transforms.RandomHorizontalFlip, transforms.Normalize, Cutout]
        steps: dict[type, Any] = dict.fromkeys(kinds)
        others = (step for step in pipeline.transforms if step is not to_rgb)
        steps |= {type(step): step for step in others if not isinstance(step, transforms.ToTensor)}
        if len(steps) > len(kinds):
            raise ValueError(f'Expected only transforms that have a batched form here, got {pipeline}.')
        crop, flip, normalize, cutout = steps.values()
        self.normalize = Normalize(normalize.mean, normalize.std, device)
        self.padding: int = crop.padding if crop else 0
        self.flip = flip is not None
        self.cutout: int | None = cutout.size if cutout else None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Transform ``images``, shape ``(N, 3, H, W)``, uint8, to normalized float32 of the same shape."""
        size, _, height, width = images.shape
        down, across = (torch.arange(length, device=images.device) for length in (height, width))

        def draw(bound: int) -> torch.Tensor:
            return torch.randint(bound, (size, 1)).to(images.device, non_blocking=True)

        if self.padding or self.flip:
            rows = down + draw(2 * self.padding + 1)
            columns = torch.where(draw(2) == 1, across.flip(0), across) if self.flip else across
            columns = columns + draw(2 * self.padding + 1)
            source = rows[:, :, None] * (width + 2 * self.padding) + columns[:, None]
            padded = F.pad(images, [self.padding] * 4).flatten(2)
            images = padded.gather(2, source.view(size, 1, -1).expand(-1, 3, -1)).view_as(images)
        batch = self.normalize(images)
        if self.cutout:
            rows = down - draw(height) + self.cutout // 2  # counted from the top of the square, wherever that is
            columns = across - draw(width) + self.cutout // 2
            erased = (rows // self.cutout == 0)[:, :, None] & (columns // self.cutout == 0)[:, None]
            batch.masked_fill_(erased[:, None], 0)
        return batch


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
        transform: BatchTransform,
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
