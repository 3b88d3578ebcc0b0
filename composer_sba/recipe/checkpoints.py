"""Checkpoints: loaded as data that runs no code, checked for damage, and repaired after a run was killed."""

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

from composer_sba.errors import one_line

_TRUSTED = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # PyTorch's variable: a user who sets it to 1 trusts the checkpoint
_ONLY_DATA = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'  # PyTorch's variable too; it overrules the argument of torch.load

_MADE_BY = {'_reconstruct': np.zeros(1).__reduce__()[0], 'scalar': np.float64(0).__reduce__()[0]}
_DTYPES = [type(np.dtype(code)) for code in ('?', 'u1', 'u4', 'u8', 'i4', 'i8', 'f4', 'f8', 'U1')]
# What a Composer checkpoint holds besides tensors: clocks, versions and the state of NumPy's generator
_CLASSES: list[Any] = [timedelta, TorchVersion, np.ndarray, np.dtype, *_DTYPES]
_RENAMED: list[Any] = [
    (make, f'{module}.multiarray.{name}')
    for name, make in _MADE_BY.items()
    for module in ('numpy.core', 'numpy._core')  # before NumPy 2, and since
]

# What zipfile raises depends on the bit that is wrong: in a magic number, a length, a name, an offset, the flag of
# encryption or the method of compression. UnicodeDecodeError is a ValueError.
_DAMAGED = (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, zlib.error)

_CHECKPOINT = re.compile(r'ep(\d+)-ba(\d+)-rank0\.pt')
_UNFINISHED = 'unfinished.pt'


@contextmanager
def only_data() -> Iterator[None]:
    """Restrict ``torch.load`` to tensors and plain values. Composer lets it unpickle, and so run, anything.

    ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1`` in the environment lifts the restriction.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file, only_data():
        ...     torch.save({'evil': print}, file), file.seek(0)
        ...     torch.load(file, weights_only=False)
        Traceback (most recent call last):
        _pickle.UnpicklingError: ...
    """
    if os.environ.get(_TRUSTED, '0').lower() in ('1', 'y', 'yes', 'true'):
        yield
        return
    before = os.environ.get(_ONLY_DATA)
    os.environ[_ONLY_DATA] = '1'
    try:
        with torch.serialization.safe_globals([*_CLASSES, *_RENAMED]):
            yield
    finally:
        del os.environ[_ONLY_DATA]
        if before is not None:
            os.environ[_ONLY_DATA] = before


def loading_problem(path: str, error: BaseException) -> str:
    """Describe why a checkpoint cannot be loaded, for an error message."""
    problem = f'cannot load the checkpoint {path}: '
    code = _code_in(error)
    if code is not None:
        trust = f'if you trust its author, set {_TRUSTED}=1 in the environment'
        return f'{problem}it holds {code}, which could run code; {trust}'
    if isinstance(error, FileNotFoundError):
        return problem + one_line(error)
    if isinstance(error, pickle.UnpicklingError):  # whose text advises to load it as code
        return f'{problem}it is not a PyTorch checkpoint, or it is corrupt'
    # PyTorch names every key that differs, which may be hundreds
    reason = re.sub(
        r'("[^"]+")((?:, "[^"]+")+)', lambda found: f'{found[1]} and {found[2].count(", ")} more', one_line(error)
    )
    others, *sizes = reason.split(' size mismatch for ')
    if sizes:
        reason = f'{others} size mismatch for {sizes[0]}' + f' and for {len(sizes) - 1} more' * (len(sizes) > 1)
    return f'{problem}{reason}; it is corrupt or belongs to a different model'


def find_damage(path: Path) -> str | None:
    """Return what the checksums in a checkpoint, which ``torch.load`` ignores, show to be damaged; None if nothing."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except _DAMAGED as error:
        return str(error) or f'the file ends too early ({type(error).__name__})'
    return None if name is None else f'the checksum of {name} is wrong'


def repair_latest(latest: Path) -> None:
    """Rename the checkpoint that a killed run was writing, and restore the link to the latest complete one.

    Composer writes a checkpoint under its own name and then renews the link. It takes a file beyond the latest
    checkpoint for another run's and refuses to resume. Without a link it starts from the beginning.

    Checkpoints older than the link are left alone: they are another run's, or a user has set the link back. So are
    several beyond the link, because a kill leaves only one.

    Args:
        latest (Path): The link, in a run's folder of unsharded checkpoints with Composer's default names. The link and
            the folder may be missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, 'ep0-ba5-rank0.pt').write_bytes(b'PK')
        ...     repair_latest(Path(folder, 'latest-rank0.pt'))
        ...     [path.name for path in Path(folder).iterdir()]
        ['unfinished.pt']
    """
    found = {path: _progress(path) for path in latest.parent.glob('ep*.pt') if _progress(path)}
    if latest.exists():
        reached, renewed = _progress(latest.resolve()), latest.lstat().st_mtime_ns
        beyond = [path for path, progress in found.items() if progress > reached and path.stat().st_mtime_ns > renewed]
        if reached and len(beyond) == 1:
            _set_aside(beyond[0])
        return
    for path in sorted(found, key=lambda each: each.stat().st_mtime_ns, reverse=True):
        if _is_complete(path):
            latest.unlink(missing_ok=True)  # a link to a missing file
            latest.symlink_to(path.name)
            return
        _set_aside(path)


def adopt_checkpoints(saver: CheckpointSaver, folder: Path) -> None:
    """Let a resumed run delete the checkpoints that it saved before it was killed, when their turn comes.

    For ``save_num_checkpoints_to_keep`` Composer counts only the checkpoints that the current process has saved, which
    would leave some behind at every kill. The checkpoint itself records which ones the run has saved.

    Args:
        saver (CheckpointSaver): Composer's, with the state of the checkpoint that was loaded.
        folder (Path): The run's folder of unsharded checkpoints.
    """
    record = saver.all_saved_checkpoints_to_timestamp
    own = {str(folder / Path(name).name): time for name, time in record.items() if (folder / Path(name).name).exists()}
    saver.all_saved_checkpoints_to_timestamp = own
    saver.saved_checkpoints = list(own)


class RestOfEpoch(Callback):
    """A callback that ends the epoch in which a run resumes after ``train_subset_num_batches`` batches.

    Composer counts them from the resumed batch instead of the start of the epoch, which makes this epoch too long. Runs
    on FIT_START and on BEFORE_DATALOADER; Composer reads the length once in between. State saved: none.
    """

    def __init__(self) -> None:
        self._length: Time[int] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Shorten the epoch by the batches that it has had."""
        done = state.timestamp.batch_in_epoch.value
        if done and state.dataloader_len is not None and 'train' in state.dataset_resumption:
            self._length = state.dataloader_len
            state.dataloader_len = self._length.value - done

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Restore the length of an epoch for schedulers and the following epochs."""
        if self._length is not None:
            state.dataloader_len, self._length = self._length.value, None


def _code_in(error: BaseException) -> str | None:
    """Return what a checkpoint holds besides data, if it was refused for that."""
    found = re.search(r'GLOBAL ([\w.]+)', str(error)) if isinstance(error, pickle.UnpicklingError) else None
    return found.group(1) if found else None


def _progress(path: Path) -> tuple[int, ...]:
    """Return the epoch and the batch of a checkpoint; nothing for other files."""
    match = _CHECKPOINT.fullmatch(path.name)
    return tuple(map(int, match.groups())) if match else ()


def _is_complete(path: Path) -> bool:
    try:
        with only_data():
            torch.load(path, map_location='meta', mmap=True)
    except pickle.UnpicklingError as error:
        return _code_in(error) is not None  # complete; refused when it is loaded
    except (RuntimeError, EOFError):
        return False
    return True


def _set_aside(path: Path) -> None:
    logging.getLogger(__name__).warning(
        'The run was killed while it wrote %s. The file is now called %s.', path, _UNFINISHED
    )
    path.replace(path.with_name(_UNFINISHED))
