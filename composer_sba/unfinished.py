"""Checkpoints that a run was killed over: what Composer's autoresume does not forgive is put in order before it."""

import logging
import re
import zipfile
from pathlib import Path

_CHECKPOINT = re.compile(r'ep\d+-ba(\d+)-rank0\.pt')
_LATEST = 'latest-rank0.pt'


def mend(folder: Path) -> None:
    """Remove the half of a checkpoint that a killed run has left, and point ``latest-rank0.pt`` at the last whole one.

    A checkpoint is written under its own name, and only then becomes the latest. A run that is killed in between would
    be refused by Composer, which takes a file from beyond the latest checkpoint for another run's; one killed as the
    link is renewed would begin anew. PyTorch writes the directory of its archive last, so half of one is known.

    Args:
        folder (Path): A run's folder of unsharded checkpoints, of Composer's default names; it need not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, 'ep0-ba5-rank0.pt').write_bytes(b'PK')
        ...     mend(Path(folder))
        ...     list(Path(folder).iterdir())
        []
    """
    whole: dict[int, Path] = {}
    for path in folder.glob('ep*.pt'):
        match = _CHECKPOINT.fullmatch(path.name)
        if match is None:
            continue
        if zipfile.is_zipfile(path):
            whole[int(match[1])] = path
        else:
            logging.getLogger(__name__).warning('%s was cut off as it was written, and is removed.', path)
            path.unlink()
    latest = folder / _LATEST
    if whole and latest.resolve() != whole[max(whole)].resolve():
        renewed = folder / f'.{_LATEST}'
        renewed.unlink(missing_ok=True)
        renewed.symlink_to(whole[max(whole)].name)
        renewed.replace(latest)
