"""What a save that was cut off leaves: it is set aside, and nothing else is touched.

pytest tests/test_unfinished.py
"""

import time
from pathlib import Path

import pytest
import torch

from composer_sba.recipe.checkpoints import mend


def save(folder: Path, batch: int, *, torn: bool = False) -> Path:
    path = folder / f'ep0-ba{batch}-rank0.pt'
    torch.save({'batch': batch}, path)
    if torn:
        path.write_bytes(path.read_bytes()[:-100])
    time.sleep(0.01)  # the clock of a file system is coarse
    return path


def renew(folder: Path, batch: int) -> None:
    (folder / 'latest-rank0.pt').unlink(missing_ok=True)
    (folder / 'latest-rank0.pt').symlink_to(f'ep0-ba{batch}-rank0.pt')
    time.sleep(0.01)


def latest(folder: Path) -> int:
    return torch.load(folder / 'latest-rank0.pt')['batch']


@pytest.mark.parametrize('torn', [True, False])
def test_a_save_that_was_cut_off_is_set_aside(tmp_path: Path, torn: bool) -> None:
    others = [tmp_path / name for name in ('recipe.yaml', 'best.pt', 'ep0-ba20-rank1.pt')]
    for path in others:
        path.write_text('not ours')
    save(tmp_path, 5), save(tmp_path, 10)
    renew(tmp_path, 10)
    last = save(tmp_path, 15, torn=torn)
    for _ in range(2):  # the second time there is nothing to do
        mend(tmp_path / 'latest-rank0.pt')
        assert latest(tmp_path) == 10
        assert not last.exists() and (tmp_path / 'unfinished.pt').exists()
        assert all(path.exists() for path in others)


@pytest.mark.parametrize(('torn', 'expected'), [(True, 5), (False, 10)])
def test_a_latest_checkpoint_that_was_being_renewed_is_made_good(tmp_path: Path, torn: bool, expected: int) -> None:
    save(tmp_path, 5), save(tmp_path, 10, torn=torn)
    mend(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == expected
    mend(tmp_path / 'nowhere' / 'latest-rank0.pt')
    assert not (tmp_path / 'nowhere').exists()


def test_checkpoints_from_before_are_left_alone(tmp_path: Path) -> None:
    """Another run's, that was overwritten; or one's own, and the latest pointed back on purpose."""
    save(tmp_path, 100), save(tmp_path, 10)
    renew(tmp_path, 10)
    mend(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == 10 and (tmp_path / 'ep0-ba100-rank0.pt').exists()


def test_several_checkpoints_beyond_the_latest_are_left_alone(tmp_path: Path) -> None:
    """A kill leaves one."""
    save(tmp_path, 5)
    renew(tmp_path, 5)
    others = [save(tmp_path, 10), save(tmp_path, 15)]
    mend(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == 5 and all(path.exists() for path in others)
