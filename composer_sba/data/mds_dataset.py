"""Images in MDS shards: a StreamingDataset that checks each sample and repeats its random transforms."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from streaming.base.dataset import StreamingDataset, _Iterator, _ShardState
from streaming.vision.base import StreamingVisionDataset
from torch.utils.data import Dataset

from composer_sba.data.jpeg import JpegError
from composer_sba.data.partition import shared_samples
from composer_sba.data.samples import Expected
from composer_sba.data.shared_memory import registration
from composer_sba.errors import DatasetError, one_line
from composer_sba.schedule import hash_key, seeded


class ImageDataset(StreamingVisionDataset):
    """RGB images and labels from MDS shards, written by :mod:`composer_sba.convert` or by Streaming's converters.

    Random transforms draw from the generators of torch, NumPy and Python, which are seeded for each sample with (seed,
    epoch, sample) and then restored. A transformed image therefore depends neither on workers and ranks nor on whether
    the run was resumed.

    Args:
        batch_size (int): Samples in a batch of one rank, as in the DataLoader.
        transform (Callable): Maps an RGB image to a tensor. If it has a true attribute ``takes_tensors``, JPEGs are
            passed as uint8 tensors of shape ``(3, H, W)``; if it also has a true attribute ``takes_jpegs``, as
            ``Jpeg`` of ``composer_sba.data.jpeg``, before they are decoded.
        expected (Expected): The properties that every sample must have.
        drop_last (bool): Whether every batch must be full.
        seed (int): Seed of the order and the transforms.
        **kwargs (Any): Arguments of :class:`streaming.vision.StreamingVisionDataset`.

    Raises:
        DatasetError: On iteration, if a shard cannot be fetched or a sample cannot be read.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        transform: Callable[[Any], Any],
        expected: Expected,
        drop_last: bool,
        seed: int,
        **kwargs: Any,
    ) -> None:
        with registration():
            super().__init__(
                # In Streaming, neighbouring seeds have the same shuffles, one epoch apart.
                shuffle_seed=hash_key(seed) % 2**31,
                # Shuffles across shards; the default for images, 'py1s', shuffles inside one shard at a time.
                shuffle_algo='py1e',
                partition_algo='each_once_full' if drop_last else 'each_once',
                batch_size=batch_size,
                **kwargs,
            )
        self.transform: Callable[[Any], Any] = transform  # Composer's RandAugment and AugMix look for this name
        self.expected = expected
        self.epoch = 0
        self._failure: BaseException | None = None
        self._prepared: set[int] = set()
        world = self._parallel_rank_world
        shared = shared_samples(self.num_samples, world.num_ranks, batch_size, drop_last)
        self.length = -(-shared // world.num_ranks)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over this worker's share of the epoch.

        Yields:
            tuple[torch.Tensor, int]: Image, shape ``(3, H, W)``, float32, and label.

        Raises:
            DatasetError: If a shard could not be fetched; Streaming alone would end the epoch early.
        """
        yield from super().__iter__()
        if self._failure is not None:
            raise DatasetError(
                f'{self.expected.folder}: a shard cannot be fetched ({one_line(self._failure)}): {self.expected.remedy}'
            )

    def get_item(self, sample_id: int, retry: int = 7) -> tuple[Any, int]:
        """Read one sample.

        Args:
            sample_id (int): Index of the sample in the dataset.
            retry (int, optional): Attempts to fetch its shard again. Default: ``7``.

        Returns:
            tuple[Any, int]: The transformed image and its label.

        Raises:
            DatasetError: If the sample cannot be read or has an impossible label.
        """
        tensors, crops = (getattr(self.transform, name, False) for name in ('takes_tensors', 'takes_jpegs'))
        image, label = self.expected.read(sample_id, self._read, sample_id, retry, tensors=tensors, crops=crops)
        with seeded(self.shuffle_seed, self.epoch, int(sample_id)):
            try:
                return self.transform(image), label
            except JpegError as error:
                raise self.expected.unreadable(sample_id, error) from error

    def _read(self, sample_id: int, retry: int) -> dict[str, Any]:
        shard_id, _ = self.spanner[sample_id]
        try:
            if not self._is_checked(shard_id):
                self.prepare_shard(shard_id)
            return StreamingDataset.get_item(self, sample_id, retry)
        except Exception as error:
            raise self._failure or error from None  # the error of the thread that fetched the shard is the cause

    def _is_checked(self, shard_id: int) -> bool:
        """Return whether a shard is on disk and its hash was compared; Streaming reads any file that exists."""
        shard = self.shards[shard_id]
        exists = os.path.exists(os.path.join(shard.dirname, shard.split, shard.file_pairs[0][0].basename))
        return exists and self._shard_states[shard_id] == _ShardState.LOCAL  # a corrupt one is deleted before LOCAL

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position in the data, for a checkpoint.

        Args:
            num_samples (int): Samples that were read.
            from_beginning (bool): Whether they are counted from the start of the epoch.

        Returns:
            dict[str, Any]: Epoch and sample to continue with, and the settings that determine the order.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # Between two epochs Streaming records the one that has ended; a resumed run would repeat its order.
            state['epoch'] = max(state['epoch'], self.next_epoch)
        return state

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard.

        Args:
            shard_id (int): The shard.
            blocking (bool, optional): Whether to wait while another worker fetches it. Default: ``True``.
        """
        # A worker's background threads call this for each sample, and each time Streaming would lock a file, which
        # takes a tenth of a worker's time for an image of ImageNet.
        if not blocking and shard_id in self._prepared and self._shard_states[shard_id] == _ShardState.LOCAL:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            # Workers that wait for this shard would wait forever. LOCAL without a file, it fails in each of them.
            shard, stream = self.shards[shard_id], self.streams[self.stream_per_shard[shard_id]]
            if stream.safe_keep_zip:  # without a remote, the compressed file is the only copy
                shard._evict_raw()
            else:
                shard.evict()
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise
        if self.cache_limit is None and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._prepared.add(shard_id)  # with a limit Streaming records when a shard was last used

    def on_exception(self, future: Future) -> None:
        """Store the exception of a thread that fetches shards; the loop that waits for the shards raises it."""
        if future.exception() is not None:
            self._failure = future.exception()
            self._event.set()

    def _prepare_thread(self, it: _Iterator) -> None:
        with _count_exit_on_error(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: _Iterator) -> None:
        with _count_exit_on_error(it):
            super()._ready_thread(it)

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        # Only here does each worker learn its epoch, also after resuming.
        self.epoch = epoch
        return super()._get_work(epoch, sample_in_epoch)


@contextlib.contextmanager
def _count_exit_on_error(it: _Iterator) -> Iterator[None]:
    """Count a thread as ended if it raises: Streaming waits for two threads and counts only those that return."""
    try:
        yield
    except BaseException:
        it.on_exit()
        raise


class ByIndex(Dataset):
    """A view of a dataset for evaluation, in which a sampler chooses the samples.

    PyTorch's ``DistributedSampler`` repeats samples until all ranks have the same number, and Composer removes the
    repetitions from the metrics. No sample is lost or counted twice, and no rank waits for another one's batch, even
    with fewer samples than ranks.

    Args:
        dataset (ImageDataset): The dataset.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.num_samples

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset.get_item(index)
