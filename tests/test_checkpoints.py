"""Damaged checkpoints and those that a killed run leaves, compared with what is found, renamed and left alone.

pytest tests/test_checkpoints.py
"""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from composer_sba.recipe.checkpoints import find_damage, repair_latest

CONTENT = {'weights': torch.arange(20.0), 'name': 'digits'}


# --- damage -----------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    damage = find_damage(path)
    if damage is not None:
        assert damage.strip() and '\n' not in damage, repr(damage)
        return 'found'
    try:
        loaded = torch.load(path)
    except Exception:  # of many types, each of which ends the run
        return 'refused'
    same = loaded.keys() == CONTENT.keys() and torch.equal(loaded['weights'], CONTENT['weights'])
    return 'same' if same and loaded['name'] == CONTENT['name'] else 'other'


def test_a_flipped_bit_never_loads_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / 'checkpoint.pt'
    torch.save(CONTENT, path)
    assert outcome(path) == 'same'
    intact, draw = path.read_bytes(), random.Random(0)
    outcomes: Counter[str] = Counter()
    for byte in range(len(intact)):
        flipped = bytearray(intact)
        flipped[byte] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        outcomes[outcome(path)] += 1
    print(outcomes)
    assert outcomes['other'] == 0, outcomes
    assert outcomes['found'] > len(intact) // 3, outcomes  # most of the rest is padding between the records


def test_a_file_that_is_no_archive_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / 'old.pt'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert outcome(path) == 'same'


def test_a_truncated_file_never_loads(tmp_path: Path) -> None:
    path = tmp_path / 'checkpoint.pt'
    torch.save(CONTENT, path)
    intact = path.read_bytes()
    for length in range(0, len(intact), 7):
        path.write_bytes(intact[:length])
        assert outcome(path) in ('found', 'refused'), length


# --- unfinished checkpoints -------------------------------------------------------------------------------------------


def save(folder: Path, batch: int, *, truncated: bool = False) -> Path:
    path = folder / f'ep0-ba{batch}-rank0.pt'
    torch.save({'batch': batch}, path)
    if truncated:
        path.write_bytes(path.read_bytes()[:-100])
    time.sleep(0.01)  # the clock of a file system is coarse
    return path


def link(folder: Path, batch: int) -> None:
    (folder / 'latest-rank0.pt').unlink(missing_ok=True)
    (folder / 'latest-rank0.pt').symlink_to(f'ep0-ba{batch}-rank0.pt')
    time.sleep(0.01)


def latest(folder: Path) -> int:
    return torch.load(folder / 'latest-rank0.pt')['batch']


@pytest.mark.parametrize('truncated', [True, False])
def test_an_unfinished_checkpoint_is_renamed(tmp_path: Path, truncated: bool) -> None:
    others = [tmp_path / name for name in ('recipe.yaml', 'best.pt', 'ep0-ba20-rank1.pt')]
    for path in others:
        path.write_text('not ours')
    save(tmp_path, 5), save(tmp_path, 10)
    link(tmp_path, 10)
    last = save(tmp_path, 15, truncated=truncated)
    for _ in range(2):  # the second time, nothing is left to do
        repair_latest(tmp_path / 'latest-rank0.pt')
        assert latest(tmp_path) == 10
        assert not last.exists() and (tmp_path / 'unfinished.pt').exists()
        assert all(path.exists() for path in others)


@pytest.mark.parametrize(('truncated', 'expected'), [(True, 5), (False, 10)])
def test_a_missing_link_is_restored(tmp_path: Path, truncated: bool, expected: int) -> None:
    save(tmp_path, 5), save(tmp_path, 10, truncated=truncated)
    repair_latest(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == expected
    repair_latest(tmp_path / 'nowhere' / 'latest-rank0.pt')
    assert not (tmp_path / 'nowhere').exists()


def test_checkpoints_older_than_the_link_are_left_alone(tmp_path: Path) -> None:
    """They are those of another run, which was overwritten, or the user has set the link back."""
    save(tmp_path, 100), save(tmp_path, 10)
    link(tmp_path, 10)
    repair_latest(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == 10 and (tmp_path / 'ep0-ba100-rank0.pt').exists()


def test_several_checkpoints_beyond_the_link_are_left_alone(tmp_path: Path) -> None:
    """A kill leaves only one."""
    save(tmp_path, 5)
    link(tmp_path, 5)
    others = [save(tmp_path, 10), save(tmp_path, 15)]
    repair_latest(tmp_path / 'latest-rank0.pt')
    assert latest(tmp_path) == 5 and all(path.exists() for path in others)
