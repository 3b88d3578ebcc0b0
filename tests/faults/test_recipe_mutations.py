"""Recipes with mistakes: each trains a batch, or is refused in one line that leaves nothing behind.

pytest tests/faults/test_recipe_mutations.py; MUTATIONS=1200 pytest tests/faults -k mutated --hypothesis-seed=1 -s
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
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from mutations import Mutant, mutants

from composer_sba.train import Summary, main

# Composer's, of a Trainer that was never finished
pytestmark = pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')

MUTATIONS = int(os.environ.get('MUTATIONS', '0'))
SECONDS = 60  # the longest that one batch may take
MEMORY = 3 << 30  # bytes that a mutant may ask for

LINE = re.compile(r'error: (\S+\.yaml|command line): (.+: .|expected )')  # the key; that no key could be read
LOGS = {'log.txt', 'tensorboard_logs'}  # a logger's, begun before the first batch; they may say why there was none


@contextlib.contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with so much time and memory, and leave the process as it was."""
    before, limit = os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    ends: list[Any] = []
    mapped = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    late = signal.signal(signal.SIGALRM, _too_late)
    memory = streaming.base.shared.memory
    shared, memory.atexit = memory.atexit, SimpleNamespace(register=ends.append)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, limit[1]))
        signal.alarm(SECONDS)
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, late)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        os.chdir(before)
        memory.atexit = shared
        for end in ends:
            end()
        torch.use_deterministic_algorithms(False)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)


class TooLateError(BaseException):
    """Nobody may catch it."""


def _too_late(*_: Any) -> None:
    raise TooLateError(f'not through after {SECONDS} s')


def left(folder: Path) -> set[str]:
    """What is in a folder; datasets that were made on first use are whole, and stay, with their locks."""
    made = [index.parent.parent for index in folder.rglob('train/index.json')]
    kept = {path for each in made for path in (each, *each.rglob('*'), *each.parents)}
    found = [path for path in folder.rglob('*') if path not in kept and path.name not in LOGS]
    return {str(path.relative_to(folder)) for path in found if path.suffix != '.lock'}


def run(mutant: Mutant) -> tuple[int, str, set[str]]:
    """Exit code, standard error, and what is there that was not before."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        folder = Path(place)
        (folder / 'recipe.yaml').write_bytes(mutant.content)
        before = left(folder)
        with tempfile.TemporaryFile('w+') as said, tempfile.TemporaryFile('w+') as printed:  # real ones, for progress
            with confined(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
                code = main(['-f', 'recipe.yaml', '--', *mutant.overrides])
            said.seek(0)
            return code, said.read(), left(folder) - before


@pytest.fixture
def one_batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever its duration is, a run ends after a batch."""
    monkeypatch.setattr(Summary, 'batch_end', lambda self, state, logger: state.stop_training(), raising=False)
    yield
    print(f'{len(OUTCOMES)} mutants, exit codes {Counter(OUTCOMES.values())}')


OUTCOMES: dict[Mutant, int] = {}  # exit codes; what is drawn twice counts once


@pytest.mark.usefixtures('one_batch')
@given(data=st.data())
@settings(
    max_examples=MUTATIONS or 60,
    derandomize=not MUTATIONS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a mutant is small as it is
)
def test_a_mutated_recipe_trains_or_is_refused_in_one_line(digits_folder: Path, data: st.DataObject) -> None:
    mutant = data.draw(mutants(digits_folder))
    note(mutant.content.decode('utf-8', 'replace'))
    code, said, new = run(mutant)
    OUTCOMES[mutant] = code
    lines = said.splitlines()
    assert code in (0, 2), f'{mutant.done}: exit code {code}'
    assert 'Traceback' not in said, f'{mutant.done}: {said}'
    if code == 2:
        assert len(lines) == 1 and LINE.match(lines[0]), f'{mutant.done}: {said}'
        assert not new, f'{mutant.done}: {sorted(new)} are left after {said}'
