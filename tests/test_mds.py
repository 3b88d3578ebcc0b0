"""Shards that are fetched: requested once, compared with their hash before they are read, never awaited in vain.

Run: python -m pytest tests/test_mds.py
"""

import concurrent.futures
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import streaming.base.stream
from streaming import StreamingDataset
from streaming.base.hashing import get_hash

from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.errors import DatasetError
from shards import dataset, labels

pytestmark = [
    # Streaming leaves a fetched shard open while it compares its hash.
    pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning'),
    # PyTorch's DataLoader, as it ends workers after one of them has raised; it then waits 5 s for each.
    pytest.mark.filterwarnings(
        'ignore:Exception in thread QueueFeederThread:pytest.PytestUnhandledThreadExceptionWarning'
    ),
]


def test_a_shard_is_requested_once_and_not_for_each_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming locks a file for each request. With a limit it records the last use of a shard."""
    asked: list[int] = []
    prepare_shard = StreamingDataset.prepare_shard

    def recorded(self: StreamingDataset, shard_id: int, blocking: bool = True) -> None:
        asked.append(shard_id)
        prepare_shard(self, shard_id, blocking)

    monkeypatch.setattr(StreamingDataset, 'prepare_shard', recorded)
    keys = dataset(tmp_path / 'mds', 97)
    limited = {'remote': keys['local'], 'local': str(tmp_path / 'c'), 'cache_limit': '1gb'}
    for cache, once in ({}, True), (limited, False):
        asked.clear()
        loader = build_dataloader(DatasetConfig(**keys | cache, num_workers=0), 4)
        assert [len(labels(loader)) for _ in range(2)] == [97, 97]
        shards = set(range(loader.dataset.num_shards))
        assert set(asked) == shards and len(shards) > 1
        # Streaming's requesting thread may be behind when an epoch ends
        assert len(asked) == len(shards) if once else len(asked) > 2 * len(shards), (cache, len(asked), len(shards))


@pytest.mark.parametrize(('split', 'workers'), [('train', 0), ('train', 2), ('val', 0)])
def test_a_shard_that_cannot_be_fetched_ends_the_epoch_with_an_error(tmp_path: Path, split: str, workers: int) -> None:
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    loader = build_dataloader(DatasetConfig(**keys, split=split, num_workers=workers), 4)
    (tmp_path / 'remote' / split / 'shard.00001.mds').write_bytes(b'not what was hashed')
    with pytest.raises(DatasetError) as caught:
        list(loader)
    last = str(caught.value).strip().splitlines()[-1]
    assert 'Checksum failure' in last and f'delete {tmp_path}/cache/{split} to fetch it again' in last, last
    assert not (tmp_path / 'cache' / split / 'shard.00001.mds').exists(), 'the next run would read the bad shard'


def test_an_epoch_ends_though_both_threads_of_a_worker_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming waits for threads that return; here the thread that fetches fails, and then the thread that reads."""

    def fails_too(self: StreamingDataset, it: Any) -> None:
        assert self._event.wait(60)
        raise OSError('this thread fails as well')

    monkeypatch.setattr(StreamingDataset, '_ready_thread', fails_too)
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    loader = build_dataloader(DatasetConfig(**keys, num_workers=0), 4)
    (tmp_path / 'remote' / 'train' / 'shard.00001.mds').write_bytes(b'not what was hashed')
    said: list[str] = []

    def read() -> None:
        try:
            list(loader)
        except DatasetError as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), 'the epoch of a dataset that lacks a shard does not end'
    assert len(said) == 1 and 'a shard cannot be fetched' in said[0], said


def test_no_sample_is_read_from_a_shard_before_its_hash_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker reads a shard that another has fetched but not compared yet; one bit of it differs."""
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    stored = tmp_path / 'remote' / 'train' / 'shard.00001.mds'
    broken = bytearray(stored.read_bytes())
    broken[-1] ^= 1
    stored.write_bytes(broken)
    data = build_dataloader(DatasetConfig(**keys, num_workers=0), 4).dataset
    comparing, look = threading.Event(), threading.Event()

    def slowly(algorithm: str, content: bytes) -> str:
        comparing.set()
        assert look.wait(60)
        return get_hash(algorithm, content)

    monkeypatch.setattr(streaming.base.stream, 'get_hash', slowly)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        fetched = threads.submit(data.prepare_shard, 1)  # as another worker would
        assert comparing.wait(60)
        read = threads.submit(data.get_item, 96)
        time.sleep(0.5)  # it could have read a hundred samples
        look.set()
        for error in fetched.exception(60), read.exception(60):
            assert 'Checksum failure' in str(error), error
