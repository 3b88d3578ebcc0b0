"""Checkpoints are data: what is loaded from one may not run code."""

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
