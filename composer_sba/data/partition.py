"""The partition of an epoch: which node, rank and worker reads which samples, each sample once."""

import functools

import numpy as np
from streaming.base.partition import algos


def shared_samples(num_samples: int, ranks: int, batch_size: int, drop_last: bool) -> int:
    """Return how many samples of an epoch are read if all ranks have the same number of batches.

    These are all samples, except those of a last global batch with fewer samples than ranks (with ``drop_last``, of any
    incomplete one). A rank without a batch would keep the others waiting for its gradients.

    Args:
        num_samples (int): Samples in the epoch.
        ranks (int): World size.
        batch_size (int): Samples in a full batch of one rank.
        drop_last (bool): Whether every batch must be full.

    Returns:
        int: Samples that are read. The others, fewer than ``ranks`` (``ranks * batch_size``), are left out this epoch.

    Example:
        >>> [shared_samples(n, ranks=2, batch_size=4, drop_last=False) for n in (8, 9, 10, 13)]
        [8, 8, 10, 13]
    """
    remainder = num_samples % (ranks * batch_size)
    return num_samples - remainder if drop_last or remainder < ranks else num_samples


def partition(
    num_samples: int,
    num_canonical_nodes: int,
    num_physical_nodes: int,
    ranks_per_node: int,
    workers_per_rank: int,
    batch_size: int,
    drop_first: int = 0,
    initial_physical_nodes: int | None = None,
    *,
    drop_last: bool = False,
) -> np.ndarray:
    """Distribute the positions of an epoch over nodes, ranks and workers, each position at most once.

    Streaming's own algorithms repeat samples until all shares are equal; here shares may differ by one sample. The
    order does not depend on the number of ranks, so a run may resume on another number of them.

    Args:
        num_samples (int): Positions in the epoch.
        num_canonical_nodes (int): Parts of the epoch. With as many nodes, each reads, and downloads, one part.
        num_physical_nodes (int): Nodes.
        ranks_per_node (int): Ranks on each node.
        workers_per_rank (int): DataLoader workers of each rank.
        batch_size (int): Samples in a batch of one rank.
        drop_first (int, optional): Positions read before the run was resumed. Default: ``0``.
        initial_physical_nodes (int, optional): Unused; Streaming passes it. Default: ``None``.
        drop_last (bool, optional): Whether every batch must be full. Default: ``False``.

    Returns:
        numpy.ndarray: Positions, shape ``(nodes, ranks per node, workers per rank, batches, batch size)``, int64; -1
        where a batch is not full.
    """
    ranks = num_physical_nodes * ranks_per_node
    positions = np.arange(num_samples)
    starts = np.arange(num_canonical_nodes + 1) * num_samples // num_canonical_nodes
    part = np.searchsorted(starts, positions, side='right') - 1
    order = np.lexsort((part, positions - starts[part]))[drop_first:]
    order = order[: shared_samples(len(order), ranks, batch_size, drop_last)]
    batches = -(-len(order) // (ranks * batch_size * workers_per_rank))
    dealt = np.full(batches * workers_per_rank * batch_size * ranks, -1, np.int64)
    dealt[: len(order)] = order
    shape = (batches, workers_per_rank, batch_size, ranks_per_node, num_physical_nodes)
    return dealt.reshape(shape).transpose(4, 3, 1, 0, 2)


algos.update(each_once=partition, each_once_full=functools.partial(partition, drop_last=True))
