"""The coin λ(t), the cut layer k(t) and the seeds of the noise, as functions of (seed, time).

These functions have no state. The same seed and time give the same answer on every rank, in a resumed run, for a
microbatch that is tried again after running out of memory, and in the second pass of SAM. In reading order: the draws
of SBA, then the seeds and streams that they and the data share.
"""

import contextlib
import hashlib
import math
import operator
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import get_worker_info

# Each decision has its own stream, independent of the others and of the data's, whose second key is an epoch. A number
# is the hash of its key, because creating a generator within a training step takes 0.1 to 0.2 ms.
_COIN, _LAYER, _NOISE = -1, -2, -3


def bernoulli_prob(omega: float) -> float:
    r"""Return the probability that a batch is augmented, given the paper's angle ω.

    Sec. 3.2 of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_: :math:`\lambda(t) \sim \mathcal{B}(\cos\omega)`.
    The paper's fair schedule, ω = π/3, augments every second batch on average.

    Args:
        omega (float): The angle ω in radians, in [0, π/2].

    Returns:
        float: cos ω, in [0, 1].

    Raises:
        ValueError: If ``omega`` is outside [0, π/2].

    Example:
        >>> round(bernoulli_prob(math.pi / 3), 3)
        0.5
    """
    if not 0 <= omega <= math.pi / 2:
        raise ValueError(f'Expected omega in [0, π/2] radians, got {omega}.')
    return math.cos(omega)


def should_augment(prob: float, seed: int, step: int) -> bool:
    r"""Return the outcome of the coin :math:`\lambda(t) \sim \mathcal{B}(p)` of Sec. 3.2.

    Args:
        prob (float): The probability p = cos ω, in [0, 1].
        seed (int): The run's seed, >= 0, the same on all ranks.
        step (int): The batch index t, or the epoch index for one coin an epoch. >= 0.

    Returns:
        bool: λ(t). For one (seed, step), a larger ``prob`` never turns ``True`` into ``False``.

    Raises:
        ValueError: If ``prob`` is outside [0, 1], or ``seed`` or ``step`` is negative.

    Example:
        >>> [should_augment(0.5, seed=17, step=t) for t in range(8)]
        [False, False, True, False, False, False, True, True]
    """
    if not 0 <= prob <= 1:
        raise ValueError(f'Expected augment_prob in [0, 1], got {prob}.')
    return bool((_draw(_COIN, seed, step) >> 11) / 2**53 < prob)  # 53 bits: as a float it stays below 1


def choose_layer(num_layers: int, seed: int, step: int) -> int:
    """Return the index of the cut layer k, drawn uniformly from the set S of eligible layers (Sec. 3.1).

    Args:
        num_layers (int): The size of S, >= 1.
        seed (int): The run's seed, >= 0, the same on all ranks.
        step (int): The batch index t, >= 0.

    Returns:
        int: An index in [0, num_layers), independent of the coin of the same step.

    Raises:
        ValueError: If ``num_layers`` is below 1, or ``seed`` or ``step`` is negative.

    Example:
        >>> [choose_layer(3, seed=17, step=t) for t in range(9)]
        [0, 1, 0, 1, 1, 0, 1, 0, 2]
    """
    if num_layers < 1:
        raise ValueError(f'Expected at least one layer to choose from, got {num_layers}.')
    return _draw(_LAYER, seed, step) % num_layers


def noise_seed(seed: int, rank: int, step: int, microbatch: int, layer: int, stream: int) -> int:
    """Return the seed of the virtual samples of one microbatch, which differs between ranks and not between retries.

    ``stream`` distinguishes the generators of one forward pass: 0 is the vicinity's, others belong to layers above the
    cut.

    Returns:
        int: 64 random bits, for ``torch.Generator.manual_seed``.

    Raises:
        ValueError: If an argument is negative.
    """
    return _draw(_NOISE, seed, rank, step, microbatch, layer, stream)


def _draw(decision: int, seed: int, *indices: int) -> int:
    if min(seed, *indices) < 0:
        raise ValueError(f'Expected a seed and indices >= 0, got {seed} and {", ".join(map(str, indices))}.')
    return hash_key(seed, decision, *indices)


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the generators of torch (on the CPU), NumPy and Python from a key, and restore them afterwards.

    A DataLoader worker does not restore them: nothing else draws there, and restoring takes ten times as long.

    Yields:
        None: Draws within the ``with`` block depend on the key alone.

    Example:
        >>> def draw():
        ...     with seeded(17, 0, 5):
        ...         return torch.rand(()).item()
        >>> draw() == draw()
        True
    """
    with _restored() if get_worker_info() is None else contextlib.nullcontext():
        seed = hash_key(*key)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def hash_key(*key: int) -> int:
    """Return one seed in [0, 2^64) for the integers that a draw depends on; adjacent keys have unrelated seeds."""
    text = repr(tuple(map(operator.index, key)))  # the same for NumPy's integers and Python's
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')
