"""Registration of datasets in shared memory: one run at a time, the same on all ranks, after ended runs are removed.

Streaming's processes coordinate through blocks in ``/dev/shm`` whose names begin with a number, such as
``000000_locals``. Each dataset takes the first free number.
"""

import contextlib
import fcntl
import itertools
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import streaming.base.dataset
import streaming.base.shared.prefix
from composer.utils import dist
from filelock import FileLock
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _check_and_find_retrying, _get_path, _pack_locals
from streaming.base.world import World

from composer_sba.errors import DatasetError, one_line

_SHARED_MEMORY = Path('/dev/shm')

# A block is empty for microseconds, while it is created. One that is empty for longer was left by a killed process.
_SECONDS_OF_CREATION = 10


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raise on every rank if the block raises on one: a rank that went on alone would wait for the others forever.

    Yields:
        None: While the block runs; it must not skip a collective operation when it raises.

    Raises:
        DatasetError: If the block raised on another rank; the message is that of the first such rank.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    messages = dist.all_gather_object('' if problem is None else one_line(problem))
    if problem is not None:
        raise problem
    for message in filter(None, messages):
        raise DatasetError(message)


@contextlib.contextmanager
def registration() -> Iterator[None]:
    """Let one run at a time, on this machine, construct a ``StreamingDataset``.

    Streaming looks for a free number and takes it afterwards, so two runs that start together would take the same one.
    Each rank looks by itself and would find another number if a run ended in between, so the first rank of each node
    chooses for all. Blocks of ended runs would stop the next run that uses their folder, so they are removed first.

    Yields:
        None: While this run may register; every rank constructs one dataset.

    Raises:
        DatasetError: If the construction failed on another rank.
    """
    # TMPDIR may differ between jobs, so the lock is in the folder of the blocks.
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    # Nodes of one run may be containers that share a machine's memory: one rank locks for all of them.
    boot, inode = Path('/proc/sys/kernel/random/boot_id'), folder.stat()
    memory = (boot.read_text() if boot.exists() else platform.node(), inode.st_dev, inode.st_ino)
    memories = dist.all_gather_object(memory)
    skipped = _numbers_with_lock_files()  # numbers that Streaming's search passes over
    met = False  # whether the ranks have met in ``choose_number``

    def choose_number(
        locals_: list[str], remotes: list[str | None], world: World, retry: int = 100
    ) -> tuple[int, SharedMemory]:
        nonlocal met
        number, block, problem = -1, None, ''
        if world.is_local_leader:
            try:
                number, block = _register(locals_, remotes, retry, skipped)
            except Exception as error:
                problem = one_line(error)
        met = True
        answers = dist.all_gather_object((number, locals_, problem))
        for *_, problem in answers:
            if problem:
                raise DatasetError(problem)
        number, leaders_locals, _ = answers[world.rank - world.rank_of_node]
        if locals_ != leaders_locals:
            raise DatasetError(f'local: the ranks of one node read {leaders_locals} and {locals_}: use one folder')
        return number, block or SharedMemory(_get_path(number, LOCALS), False)

    with fail_together(), contextlib.ExitStack() as held:
        for each in sorted(set(memories)):  # all runs lock in this order, or two could wait for each other
            with fail_together():
                if memories.index(each) == dist.get_global_rank():
                    held.enter_context(FileLock(folder / f'composer-sba-{os.getuid()}.lock'))
                    _remove_blocks_of_ended_runs(folder)
        dataset: Any = streaming.base.dataset
        held.callback(setattr, dataset, 'get_shm_prefix', dataset.get_shm_prefix)
        dataset.get_shm_prefix = choose_number
        prefix: Any = streaming.base.shared.prefix
        held.callback(setattr, prefix, '_each_prefix_int', prefix._each_prefix_int)
        prefix._each_prefix_int = lambda: itertools.filterfalse(skipped.__contains__, itertools.count())
        try:
            yield
        except Exception as error:
            if not met:
                dist.all_gather_object((-1, [], one_line(error)))
            dist.barrier()  # where the constructor ends on ranks without an error
            raise


def _register(locals_: list[str], remotes: list[str | None], retry: int, skipped: set[int]) -> tuple[int, SharedMemory]:
    deadline = time.monotonic() + 2 * _SECONDS_OF_CREATION
    while True:
        try:
            number = max(_check_and_find_retrying(locals_, remotes, name, retry) for name in SHM_TO_CLEAN)
        except ValueError as error:
            if 'cannot mmap an empty file' in str(error) and time.monotonic() < deadline:
                _remove_blocks_of_ended_runs(_SHARED_MEMORY)  # its creator fills it soon, or was killed
                continue
            if 'Reused local directory' not in str(error):
                raise
            raise DatasetError(
                'another run caches a remote in this folder: choose another local, or, if nothing else is running, '
                'call streaming.base.util.clean_stale_shared_memory()'
            ) from error
        content = _pack_locals(locals_, number)
        try:
            block = SharedMemory(_get_path(number, LOCALS), True, len(content))
        except FileExistsError:
            # A run that does not take the lock was faster, or lives above a number without this kind of block, where
            # Streaming's search of the kind ended. The next search begins here.
            skipped.update(range(number))
            continue
        _claim(_SHARED_MEMORY / _get_path(number, LOCALS))
        block.buf[: len(content)] = content
        # Nobody else uses this number. Streaming's search of a kind ends at the first number without such a block.
        for name in SHM_TO_CLEAN:
            path = _SHARED_MEMORY / _get_path(number, name)
            if path.exists() and not path.stat().st_size:
                path.unlink()
        return number, block


def _numbers_with_lock_files() -> set[int]:
    """List the numbers that Streaming does not use again.

    Streaming leaves the lock files of each dataset in the folder for temporary files, and looks for both of each number
    nine times. After a thousand datasets that takes longer than the rest of the construction; one listing does not.
    """
    lock_file = re.compile(rf'(\d+)_({BARRIER_FILELOCK}|{CACHE_FILELOCK})')
    found = map(lock_file.fullmatch, os.listdir(tempfile.gettempdir()))
    return {int(each[1]) for each in found if each}


def _claim(path: Path) -> None:
    """Lock a block until this process and its workers end, however they end, and mark it as locked."""
    if path.exists():  # elsewhere than on Linux it is no file
        file = os.open(path, os.O_RDONLY)  # never closed: closing would unlock
        fcntl.flock(file, fcntl.LOCK_SH)
        os.fchmod(file, 0o700)  # distinguishes blocks of this package from those of runs that lock nothing


def _remove_blocks_of_ended_runs(folder: Path) -> None:
    """Remove blocks of ended runs: those that this package claimed and nobody locks, and those that stayed empty.

    Other blocks stay, even if no visible process maps them: a run in another container may.
    """
    for path in folder.glob(f'{"[0-9]" * 6}_*'):
        number, kind = path.name.split('_', 1)
        if kind not in SHM_TO_CLEAN:
            continue
        with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
            file = path.stat()
            claimed = kind == LOCALS and file.st_mode & 0o100
            # Streaming fails at an empty block.
            abandoned = not file.st_size and time.time() - file.st_mtime > _SECONDS_OF_CREATION
            if file.st_uid == os.getuid() and (claimed or abandoned) and _is_unlocked(path):
                for name in reversed(SHM_TO_CLEAN) if claimed else [kind]:  # the claim goes last
                    path.with_name(f'{number}_{name}').unlink(missing_ok=True)


def _is_unlocked(path: Path) -> bool:
    with path.open('rb') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
