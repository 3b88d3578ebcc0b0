"""A seed for what a draw depends on, and the generators seeded from it for a while."""

import contextlib
import hashlib
import operator
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators of torch (on the CPU), NumPy and Python from a key, and put them back afterwards.

    In a worker of a DataLoader, where nothing else draws, they are not put back, which would take ten times as long.

    Yields:
        None: While what is drawn depends on the key alone.

    Example:
        >>> def draw():
        ...     with seeded(17, 0, 5):
        ...         return torch.rand(()).item()
        >>> draw() == draw()
        True
    """
    with _kept() if get_worker_info() is None else contextlib.nullcontext():
        seed = hash_key(*key)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def hash_key(*key: int) -> int:
    """Turn the integers that a draw depends on into one seed in [0, 2^64); neighbouring keys have unrelated seeds."""
    text = repr(tuple(map(operator.index, key)))  # for which NumPy's integers are Python's
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')
