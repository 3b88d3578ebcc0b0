"""Small file systems of a test's own, in memory."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(folder: Path, options: str = 'size=4m') -> Iterator[Path]:
    """Mount a small disk, which a test may fill or lock; the real one must stay as it is."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', options, 'none', str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f'only root may mount a disk: {mounted.stderr.strip()}')
    yield folder
    subprocess.run(['umount', '--lazy', str(folder)], check=True)
