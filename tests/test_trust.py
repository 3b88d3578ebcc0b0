"""A checkpoint with one bit flipped, anywhere: told in words, or as good as it was, or refused by torch.load.

Run: pytest tests/test_trust.py
"""

import random
from collections import Counter
from pathlib import Path

import torch

from composer_sba.recipe.checkpoints import damage

CONTENT = {'weights': torch.arange(20.0), 'name': 'digits'}


def outcome(path: Path) -> str:
    problem = damage(path)
    if problem is not None:
        assert problem.strip() and '\n' not in problem, repr(problem)
        return 'told'
    try:
        loaded = torch.load(path)
    except Exception:  # of many kinds, each of which ends the run
        return 'refused'
    same = loaded.keys() == CONTENT.keys() and torch.equal(loaded['weights'], CONTENT['weights'])
    return 'same' if same and loaded['name'] == CONTENT['name'] else 'other'


def test_a_flipped_bit_never_loads_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / 'checkpoint.pt'
    torch.save(CONTENT, path)
    assert outcome(path) == 'same'
    whole, draw = path.read_bytes(), random.Random(0)
    outcomes: Counter[str] = Counter()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        outcomes[outcome(path)] += 1
    print(outcomes)
    assert outcomes['other'] == 0, outcomes
    assert outcomes['told'] > len(whole) // 3, outcomes  # the rest is padding between the records, for the most part


def test_what_is_no_archive_is_left_to_torch(tmp_path: Path) -> None:
    path = tmp_path / 'old.pt'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert outcome(path) == 'same'


def test_a_file_that_ends_too_early_never_loads(tmp_path: Path) -> None:
    path = tmp_path / 'checkpoint.pt'
    torch.save(CONTENT, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert outcome(path) in ('told', 'refused'), length
