"""Recipes and checkpoints from strangers run no code.

pytest tests/faults/test_security.py
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_digits import RECIPE, SHORT, options

from composer_sba.train import main

# Composer's, of a Trainer that was never finished
pytestmark = [
    pytest.mark.usefixtures('in_tmp_path'),
    pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning'),
]


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ('touch pwned',)


# --- checkpoints ------------------------------------------------------------------------------------------------------

REFUSED = 'it holds posix.system, which could run code; if you trust its author, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1'


@pytest.mark.parametrize('how', [['load_weights_only=true'], []])
def test_a_checkpoint_that_would_run_code_is_refused(
    how: list[str], few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({'state': {'model': {}, 'evil': Evil()}, 'rng': []}, tmp_path / 'evil.pt')
    assert main(options(few_digits, 'save_folder=null', 'load_path=evil.pt', *how)) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f'error: command line: load_path: cannot load the checkpoint evil.pt: {REFUSED}'), line
    assert '\n' not in line and not (tmp_path / 'pwned').exists()


def test_a_checkpoint_that_would_run_code_is_not_resumed_from(
    few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'run').mkdir()
    torch.save({'state': Evil()}, tmp_path / 'run' / 'ep0-ba1-rank0.pt')
    assert main(options(few_digits, 'save_folder=run', 'save_overwrite=false', 'autoresume=true')) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f'save_folder: cannot load the checkpoint run/latest-rank0.pt: {REFUSED}' in line, line
    assert not (tmp_path / 'pwned').exists()


def test_runs_save_plain_data(few_digits: Path, tmp_path: Path) -> None:
    more = ['algorithms.ema={}', 'algorithms.mixup={}', 'callbacks={speed_monitor: {}, last_epochs_median: {}}']
    assert main(options(few_digits, 'save_folder=run', *more)) == 0
    assert (
        main(options(few_digits, 'save_folder=null', 'max_duration=2ba', 'load_path=run/latest-rank0.pt', *more)) == 0
    )
    found = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / 'run' / 'latest-rank0.pt')
    assert all(re.match(r'(numpy|datetime|torch)\b', name) for name in found), found


@pytest.fixture(scope='module')
def checkpoint(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run of one batch."""
    folder = tmp_path_factory.mktemp('checkpoint')
    assert main(options(few_digits, f'save_folder={folder}')) == 0
    return folder / 'latest-rank0.pt'


def test_a_trusted_checkpoint_may_run_code(
    few_digits: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'trusted.pt'
    torch.save(torch.load(checkpoint, weights_only=False) | {'evil': Evil()}, path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    assert main(options(few_digits, 'save_folder=null', f'load_path={path}', 'load_weights_only=true')) == 0
    assert (tmp_path / 'pwned').exists()


@pytest.mark.parametrize(
    ('damage', 'reason'),
    [
        ('cut', '.*; it is corrupt or belongs to a different model'),
        ('flipped', 'the checksum of archive/data/.* is wrong; it is corrupt'),
        ('empty', 'EOFError; it is corrupt or belongs to a different model'),
        ('gone', '.*bad.pt does not exist'),
        ('other', '.*Missing key.*; it is corrupt or belongs to a different model'),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_named(
    damage: str,
    reason: str,
    few_digits: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = checkpoint.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({'state': {'model': {'head.weight': torch.zeros(3)}}}, 'other.pt')
    content = {'cut': whole[:-100], 'flipped': bytes(flipped), 'empty': b'', 'other': Path('other.pt').read_bytes()}
    if damage != 'gone':
        (tmp_path / 'bad.pt').write_bytes(content[damage])
    capsys.readouterr()
    assert main(options(few_digits, 'save_folder=null', 'load_path=bad.pt', 'load_weights_only=true')) == 2
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(f'error: command line: load_path: cannot load the checkpoint bad.pt: {reason}', line), line


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        'seed: !!python/object/apply:os.system ["touch pwned"]\n',
        'callbacks: {x: !!python/object/new:subprocess.Popen [[touch, pwned]]}\n',
        'optimizer: {name: os.system, command: touch pwned}\n',
        'optimizer: {_target_: os.system, command: touch pwned}\n',
        'algorithms: {os.system: {command: touch pwned}}\n',
        'loggers: {subprocess.Popen: {args: [touch, pwned]}}\n',
        'callbacks: {builtins.exec: {}}\n',
        "scheduler: {name: \"__import__('os').system('touch pwned')\"}\n",
        "seed: ${eval:\"__import__('os').system('touch pwned')\"}\n",
        'algorithms: {sba: {augment_prob: {name: os.system, command: touch pwned}}}\n',
        'model: {name: torch.hub.load, num_classes: 10}\n',
    ],
)
def test_a_recipe_runs_no_code(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'recipe.yaml').write_text(f'extends: {RECIPE}\n{text}')
    assert main(['-f', 'recipe.yaml', *SHORT, 'save_folder=null']) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r'error: recipe\.yaml: .+\n', error), error
    assert not (tmp_path / 'pwned').exists()
