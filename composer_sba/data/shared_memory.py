"""Names in the machine's shared memory: one run registers at a time, and removes what ended runs left."""

import contextlib
import fcntl
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed
from composer.utils import dist
from filelock import FileLock
from streaming.base.constant import SHM_TO_CLEAN

_SHARED_MEMORY = Path('/dev/shm')


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
