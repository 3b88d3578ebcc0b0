"""What processes that read one dataset share: the samples of an epoch, and names in the machine's shared memory."""

import contextlib
import fcntl
import functools
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed
from composer.utils import dist
from filelock import FileLock
from streaming.base.constant import SHM_TO_CLEAN
from streaming.base.partition import algos

_SHARED_MEMORY = Path('/dev/shm')


def shared_samples(num_samples: int, ranks: int, batch_size: int, drop_last: bool) -> int:
    """Count the samples of an epoch that all ranks can share such that each has the same number of batches.

    All of them, but for a last global batch that has fewer samples than there are ranks (or any last global batch
    that is not full, with ``drop_last``): a rank without a batch would leave the others waiting for its gradients.

    Args:
        num_samples (int): Samples to share.
        ranks (int): World size.
        batch_size (int): Samples of a full batch of one rank.
        drop_last (bool): Whether every batch must be full.

    Returns:
        int: Samples that are read; the rest, fewer than ``ranks`` (``ranks * batch_size``), sits this epoch out.

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
    """Deal the positions of an epoch to nodes, ranks and workers, none of them twice.

    Streaming's own algorithms repeat samples until all shares are equal, here shares may differ by one sample. The
    order does not depend on the number of ranks, so a run may resume on another number of them.

    Args:
        num_samples (int): Positions in the epoch.
        num_canonical_nodes (int): Parts of the epoch; with as many nodes, each reads, and downloads, one.
        num_physical_nodes (int): Nodes.
        ranks_per_node (int): Ranks on each node.
        workers_per_rank (int): DataLoader workers of each rank.
        batch_size (int): Samples of a batch of one rank.
        drop_first (int, optional): Positions read before the run was resumed. Default: ``0``.
        initial_physical_nodes (int, optional): Not used; Streaming passes it. Default: ``None``.
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


@contextlib.contextmanager
def registration() -> Iterator[None]:
    """Let the ranks of one run at a time, on this machine, choose names in shared memory for a new dataset.

    Streaming takes names that nobody has (``000000_locals``, ...) by looking first, so two runs that start together
    take the same ones; and blocks that a killed run has left make it fail or refuse the folder of the dataset. Here
    one run chooses after another, and blocks of runs that have ended are removed first. Of several machines every run
    takes hold in the order of their names, or two could each hold one and wait for the other.

    Yields:
        None: While this run may choose.
    """
    # Where the names are: TMPDIR may be the job's own.
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    lock = FileLock(folder / f'composer-sba-{os.getuid()}.lock')
    initialized = torch.distributed.is_initialized()
    here = platform.node()
    with contextlib.ExitStack() as held:
        for node in sorted(set(dist.all_gather_object(here))) if initialized else [here]:
            if node == here and dist.get_local_rank() == 0:
                held.enter_context(lock)
                _remove_stale_blocks()
            if initialized:
                torch.distributed.barrier()
        yield


def claim(prefix: int) -> None:
    """Mark blocks as this process's own, until it and its workers end, however they end.

    Args:
        prefix (int): The number that the names of the blocks begin with.
    """
    path = _SHARED_MEMORY / f'{prefix:06}_locals'
    if dist.get_local_rank() == 0 and path.exists():
        block = os.open(path, os.O_RDONLY)  # never closed, for its lock shall last as long as the process
        fcntl.flock(block, fcntl.LOCK_SH)
        os.fchmod(block, 0o700)  # says that the lock tells who lives: runs without this package hold none


def _remove_stale_blocks() -> None:
    if not _SHARED_MEMORY.is_dir():
        return  # not Linux: there is no list of blocks
    name = re.compile(rf'(\d{{6}})_({"|".join(SHM_TO_CLEAN)})|torch_(\d+)_\w+')
    # Listed before looking who uses them: a run that is starting maps what it makes at once.
    found = {path: match for path in _SHARED_MEMORY.iterdir() if (match := name.fullmatch(path.name))}
    mapped: set[str] = set()
    for maps in Path('/proc').glob('[0-9]*/maps') if found else ():
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            mapped |= set(re.findall(r'/dev/shm/(\d{6}|torch_\w+)', maps.read_text()))
    ended: dict[str, bool] = {}  # by prefix
    for path, (prefix, _, creator) in ((path, match.groups()) for path, match in found.items()):
        with contextlib.suppress(FileNotFoundError):  # its owner has removed it meanwhile
            file = path.stat()
            if file.st_uid != os.getuid():
                continue
            if creator:
                # Of a worker that was killed as it handed over a batch: elsewise they have a name for microseconds.
                lost = not Path(f'/proc/{creator}').exists() and time.time() - file.st_mtime > 60
                ended[path.name] = lost and path.name not in mapped
            elif prefix not in ended:
                owner = _SHARED_MEMORY / f'{prefix}_locals'
                # Streaming maps every block that it comes across, so blocks may be mapped though their owner has ended.
                claimed = owner.exists() and owner.stat().st_mode & 0o100
                ended[prefix] = _is_unlocked(owner) if claimed else prefix not in mapped
            if ended[prefix or path.name]:
                path.unlink()


def _is_unlocked(path: Path) -> bool:
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
