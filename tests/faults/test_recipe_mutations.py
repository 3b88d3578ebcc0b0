"""Recipes with mistakes: each trains a batch, or ends in one line that names its key and leaves no files.

pytest tests/faults/test_recipe_mutations.py. For a campaign, add --campaign 1200 --hypothesis-seed=1 -s
"""

import contextlib
import logging
import os
import re
import resource
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import streaming.base.shared.memory
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from mutations import Mutant, mutants

from composer_sba.summary import Summary
from composer_sba.train import main

# Composer's, of a Trainer that was never finished
pytestmark = pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')

SECONDS = 60  # the longest time for one batch
MEMORY = 3 << 30  # bytes that a mutant may allocate

LINE = re.compile(r'error: (\S+\.yaml|command line): (.+: .|expected )')  # with a key, or without one that can be read
LOGS = {'log.txt', 'tensorboard_logs'}  # loggers start these before the first batch


@contextlib.contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Work in ``folder`` with limits on time and memory, and restore the process afterwards."""
    before, home, limit = os.getcwd(), os.environ['HOME'], resource.getrlimit(resource.RLIMIT_AS)
    ends: list[Any] = []
    mapped = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    late = signal.signal(signal.SIGALRM, _too_late)
    memory = streaming.base.shared.memory
    shared, memory.atexit = memory.atexit, SimpleNamespace(register=ends.append)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        os.chdir(folder)
        os.environ['HOME'] = str(folder)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limit[1]))
        signal.alarm(SECONDS)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, late)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        os.chdir(before)
        os.environ['HOME'] = home
        memory.atexit = shared
        for end in ends:
            end()
        torch.use_deterministic_algorithms(False)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)


class TooLateError(BaseException):
    """Not an Exception: no code under test catches it."""


def _too_late(*_: Any) -> None:
    raise TooLateError(f'not finished after {SECONDS} s')


def files(folder: Path) -> set[str]:
    """Return what is in a folder, without datasets that were made on first use, their locks and logs."""
    datasets = [index.parent.parent for index in folder.rglob('train/index.json')]
    kept = {path for each in datasets for path in (each, *each.rglob('*'), *each.parents)}
    found = [path for path in folder.rglob('*') if path not in kept and path.name not in LOGS]
    return {str(path.relative_to(folder)) for path in found if path.suffix != '.lock'}


def run(mutant: Mutant) -> tuple[int, str, set[str]]:
    """Run the command; return its exit code, its standard error and the files that are new."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder = Path(name)
        (folder / 'recipe.yaml').write_bytes(mutant.content)
        before = files(folder)
        with tempfile.TemporaryFile('w+') as stderr, tempfile.TemporaryFile('w+') as stdout:  # progress bars need files
            with confined(folder), contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
                code = main(['-f', 'recipe.yaml', '--', *mutant.overrides])
            stderr.seek(0)
            return code, stderr.read(), files(folder) - before


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End every run after one batch, whatever its duration is."""
    monkeypatch.setattr(Summary, 'batch_end', lambda self, state, logger: state.stop_training(), raising=False)
    yield
    print(f'{len(OUTCOMES)} mutants, exit codes {Counter(OUTCOMES.values())}')


OUTCOMES: dict[Mutant, int] = {}  # exit codes; a mutant that is drawn twice counts once


@pytest.mark.usefixtures('one_batch')
@given(data=st.data())
def test_a_mutated_recipe_trains_or_is_refused_in_one_line(few_digits: Path, data: st.DataObject) -> None:
    mutant = data.draw(mutants(few_digits))
    note(mutant.content.decode('utf-8', 'replace'))
    code, stderr, new = run(mutant)
    OUTCOMES[mutant] = code
    lines = stderr.splitlines()
    assert code in (0, 2), f'{mutant.changes}: exit code {code}'
    assert 'Traceback' not in stderr, f'{mutant.changes}: {stderr}'
    if code == 2:
        assert len(lines) == 1 and LINE.match(lines[0]), f'{mutant.changes}: {stderr}'
        assert not new, f'{mutant.changes}: {sorted(new)} are left after {stderr}'
