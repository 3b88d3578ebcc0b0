"""Checkpoints are data: what is loaded from one may not run code."""

import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State, Time
from composer.loggers import Logger
from torch.torch_version import TorchVersion

UNSAFE = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # PyTorch's own: who sets it to 1 trusts the checkpoint
_ONLY_DATA = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # PyTorch's own too, stronger than what a caller asks for

_MADE_BY = {'_reconstruct': np.zeros(1).__reduce__()[0], 'scalar': np.float64(0).__reduce__()[0]}
_DTYPES = [type(np.dtype(code)) for code in ('?', 'u1', 'u4', 'u8', 'i4', 'i8', 'f4', 'f8', 'U1')]
# Plain values that a Composer checkpoint holds beside tensors: clocks, versions and the state of NumPy's generator
_PLAIN: list[Any] = [timedelta, TorchVersion, np.ndarray, np.dtype, *_DTYPES]
_RENAMED: list[Any] = [
    (make, f'{module}.multiarray.{name}')
    for name, make in _MADE_BY.items()
    for module in ('numpy.core', 'numpy._core')  # before NumPy 2, and since
]

# Which of them zipfile raises depends on the bit that is wrong: in a magic number, a length, a name, an offset, the
# flag of encryption or the method of compression. UnicodeDecodeError is a ValueError.
_OF_DAMAGE = (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, zlib.error)


@contextmanager
def only_data() -> Iterator[None]:
    """Let ``torch.load`` take tensors and plain values alone, where Composer has it unpickle anything too.

    ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` in the environment leaves everything as Composer has it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file, only_data():
        ...     torch.save({'evil': print}, file), file.seek(0)
        ...     torch.load(file, weights_only=False)
        Traceback (most recent call last):
        _pickle.UnpicklingError: ...
    """
    if os.environ.get(UNSAFE, '0').lower() in ('1', 'y', 'yes', 'true'):
        yield
        return
    before = os.environ.get(_ONLY_DATA)
    os.environ[_ONLY_DATA] = '1'
    try:
        with torch.serialization.safe_globals([*_PLAIN, *_RENAMED]):
            yield
    finally:
        del os.environ[_ONLY_DATA]
        if before is not None:
            os.environ[_ONLY_DATA] = before


def holds_code(error: BaseException) -> str | None:
    """What a checkpoint holds beside data, if it was refused for that."""
    found = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found.group(1) if found else None


def damage(path: Path) -> str | None:
    """What is damaged in a checkpoint, by the checksums in it, which ``torch.load`` does not look at.

    Args:
        path (Path): A file that ``torch.save`` has written; what is none, or has no checksums, is taken as it is.

    Returns:
        str | None: Words for a message, None for a whole checkpoint.
    """
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except _OF_DAMAGE as error:
        return str(error) or f'a file that ends too early ({type(error).__name__})'
    return None if name is None else f'a wrong checksum of {name}'


_CHECKPOINT = re.compile(r'ep(\d+)-ba(\d+)-rank0\.pt')
_ASIDE = 'unfinished.pt'


def mend(latest: Path) -> None:
    """Set aside the checkpoint that a killed run was writing, and make good the link to the latest one.

    A checkpoint is written under its own name, and only then becomes the latest. Composer takes a file from beyond the
    latest checkpoint for another run's, and refuses to go on; if there is no latest one, it begins anew.

    What was written before the link was renewed is left alone: that is another run's, or somebody has pointed it back
    on purpose. So are several beyond it, for a kill leaves one.

    Args:
        latest (Path): The link, in a run's folder of unsharded checkpoints of Composer's default names; neither need
            exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, 'ep0-ba5-rank0.pt').write_bytes(b'PK')
        ...     mend(Path(folder, 'latest-rank0.pt'))
        ...     [path.name for path in Path(folder).iterdir()]
        ['unfinished.pt']
    """
    found = {path: _place(path) for path in latest.parent.glob('ep*.pt') if _place(path)}
    if latest.exists():
        reached, renewed = _place(latest.resolve()), latest.lstat().st_mtime_ns
        beyond = [path for path, place in found.items() if place > reached and path.stat().st_mtime_ns > renewed]
        if reached and len(beyond) == 1:
            _set_aside(beyond[0])
        return
    for path in sorted(found, key=lambda each: each.stat().st_mtime_ns, reverse=True):
        if _is_whole(path):
            latest.unlink(missing_ok=True)  # one that leads nowhere
            latest.symlink_to(path.name)
            return
        _set_aside(path)


def take_over(saver: CheckpointSaver, folder: Path) -> None:
    """Let a resumed run delete in their turn the checkpoints that it saved before it was killed.

    Of ``save_num_checkpoints_to_keep`` Composer counts those that the process itself has saved, so that each kill would
    leave as many for ever. Which ones are the run's own, its checkpoint says.

    Args:
        saver (CheckpointSaver): Composer's, with the state of the checkpoint that was loaded.
        folder (Path): The run's folder of unsharded checkpoints.
    """
    record = saver.all_saved_checkpoints_to_timestamp
    own = {str(folder / Path(name).name): time for name, time in record.items() if (folder / Path(name).name).exists()}
    saver.all_saved_checkpoints_to_timestamp = own
    saver.saved_checkpoints = list(own)


class RestOfEpoch(Callback):
    """Ends the epoch that a run is resumed in after as many batches as ``train_subset_num_batches`` says.

    Composer counts them from the resumed batch on, where the data itself goes on: the epoch would be too long. Runs on
    FIT_START and on BEFORE_DATALOADER, between which Composer looks once. State saved: none.
    """

    def __init__(self) -> None:
        self._length: Time[int] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Leave the rest of the epoch."""
        done = state.timestamp.batch_in_epoch.value
        if done and state.dataloader_len is not None and 'train' in state.dataset_resumption:
            self._length = state.dataloader_len
            state.dataloader_len = self._length.value - done

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Say the length of the epoch again, for schedulers and the epochs to come."""
        if self._length is not None:
            state.dataloader_len, self._length = self._length.value, None


def _place(path: Path) -> tuple[int, ...]:
    """Epoch and batch of a checkpoint, nothing for other files."""
    match = _CHECKPOINT.fullmatch(path.name)
    return tuple(map(int, match.groups())) if match else ()


def _is_whole(path: Path) -> bool:
    try:
        with only_data():
            torch.load(path, map_location='meta', mmap=True)
    except pickle.UnpicklingError as error:
        return holds_code(error) is not None  # whole, and to be refused when it is loaded
    except (RuntimeError, EOFError):
        return False
    return True


def _set_aside(path: Path) -> None:
    logging.getLogger(__name__).warning('The run was killed as it wrote %s, which is now %s.', path, _ASIDE)
    path.replace(path.with_name(_ASIDE))
