"""Exceptions compared with the line that a user gets: which key it names, and what is left of the run.

pytest tests/faults/test_explain.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.algorithms import MixUp
from composer.callbacks import LRMonitor
from composer.core import Event
from composer.loggers import FileLogger

from composer_sba import SBA
from composer_sba.errors import CutLayerError, NonFiniteError, RecipeError, TooWideError, UserError
from composer_sba.recipe.explain import explain, explained, mark
from composer_sba.recipe.recipe import Recipe, load
from composer_sba.train import main, train

# Composer's, of a Trainer that was never finished
pytestmark = pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')

RECIPE = str(Path(__file__).parents[2] / 'yamls' / 'digits_sba.yaml')


@pytest.fixture
def recipe() -> Recipe:
    return load(RECIPE, ['algorithms.sba.vicinity.basis=normalized'])


@pytest.fixture
def options(few_digits: Path, tmp_path: Path) -> list[str]:
    data = [f'{section}.local={few_digits}' for section in ('train_dataset', 'eval_dataset')]
    more = ['train_dataset.in_memory=true', 'max_duration=1ba', 'progress_bar=false', 'save_overwrite=false']
    return ['-f', RECIPE, *data, *more, f'save_folder={tmp_path}/runs/mine']


def raised(recipe: Recipe, error: Exception, entry: str = 'algorithms.sba') -> Exception:
    """Return an exception that a component raises in a run of the recipe."""

    class Raising(SBA):
        def match(self, event: Event, state: Any) -> bool:
            raise error

    component = Raising()
    mark(component, entry, recipe.algorithms['sba'])
    with pytest.raises(type(error)):
        component.match(Event.FIT_START, None)
    return error


@pytest.mark.parametrize('begun', [False, True])
@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (UserError('Expected eta\nto be less', 'eta'), f'{RECIPE}: algorithms.sba.eta: Expected eta to be less'),
        (UserError('labels are missing'), 'command line: algorithms.sba: labels are missing'),
        (TooWideError('the basis is too wide'), 'command line: algorithms.sba.vicinity.basis: the basis is too wide'),
        (CutLayerError('no such layer'), f'{RECIPE}: algorithms.sba.layers: no such layer'),
        (NonFiniteError('nan: lower eta'), 'command line: algorithms.sba: nan: lower eta'),
    ],
)
def test_our_errors_name_the_argument(recipe: Recipe, error: UserError, line: str, begun: bool) -> None:
    assert str(explain(recipe.sources, raised(recipe, error), begun=begun)) == line


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        # No key is read out of the text
        (ValueError('To use it, lower eta'), 'command line: algorithms.sba: To use it, lower eta'),
        (ZeroDivisionError('division by zero'), 'command line: algorithms.sba: division by zero'),
        (KeyError('x'), "command line: algorithms.sba: KeyError: 'x'"),
    ],
)
def test_other_errors_name_the_entry_before_the_first_batch(recipe: Recipe, error: Exception, line: str) -> None:
    assert str(explain(recipe.sources, raised(recipe, error))) == line


def test_other_errors_keep_their_traceback_later(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(recipe, ValueError('who knows'))
    with pytest.raises(ValueError, match='^who knows$'), explained(recipe.sources, lambda: True):
        raise error
    line = 'error: command line: algorithms.sba: it failed in training, with the traceback below\n'
    assert capsys.readouterr().err == line


def test_an_error_of_no_component_keeps_its_traceback(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match='^eta$'), explained(recipe.sources):
        raise ValueError('eta')
    assert capsys.readouterr().err == ''
    assert explain(recipe.sources, KeyError('x')) is None


@pytest.mark.parametrize('begun', [True, False])
@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.'),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_has_a_remedy(recipe: Recipe, error: Exception, begun: bool) -> None:
    explanation = explain(recipe.sources, error, begun=begun)
    assert isinstance(explanation, RecipeError)
    assert f'{RECIPE}: the run does not fit into memory (' in str(explanation)
    assert 'lower global_train' in str(explanation)


NO_SPACE = OSError(28, 'No space left on device')
AFTER_IT = RuntimeError('unexpected pos 64')
AFTER_IT.__context__ = NO_SPACE
CHECKPOINT = 'save_folder: a checkpoint cannot be written ({}): fix that and start again with autoresume=true'


@pytest.mark.parametrize('begun', [True, False])
@pytest.mark.parametrize(
    ('entry', 'error', 'line'),
    [
        ('save_folder', NO_SPACE, CHECKPOINT.format('[Errno 28] No space left on device')),
        ('save_folder', AFTER_IT, CHECKPOINT.format('[Errno 28] No space left on device')),
        ('save_folder', RuntimeError('failed writing'), CHECKPOINT.format('failed writing')),
        ('loggers.file', OSError(28, 'No space left on device'), 'loggers.file: [Errno 28] No space left on device'),
    ],
)
def test_a_full_disk_is_described_in_one_line(
    recipe: Recipe, entry: str, error: Exception, line: str, begun: bool
) -> None:
    vars(error).pop('recipe_key', None)
    explanation = str(explain(recipe.sources, raised(recipe, error, entry), begun=begun))
    assert explanation.partition('.yaml: ')[2] == line


@pytest.mark.parametrize('kept', [True, False])
def test_a_mistake_at_the_first_batch_leaves_what_was_there(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    if kept:
        (tmp_path / 'runs' / 'mine').mkdir(parents=True)
        (tmp_path / 'runs' / 'notes').write_text('keep')
    assert main([*options, 'algorithms.r_drop={}', 'model.dropout=0']) == 2
    line = capsys.readouterr().err
    assert line.startswith('error: command line: algorithms.r_drop: RDrop compares two passes through dropout'), line
    found = sorted(path.name for path in tmp_path.rglob('*'))
    assert found == (['mine', 'notes', 'runs'] if kept else []), found
    assert main(options) == 0, 'the corrected command is refused'


@pytest.mark.parametrize(
    ('overrides', 'line'),
    [
        (['algorithms.mixup.alpha=-0.5'], 'algorithms.mixup: AssertionError'),
        (['scheduler={name: polynomial, power: -1, t_max: 0ba}'], 'scheduler: '),
        (['loggers.file.filename=/proc/nowhere/log.txt'], "loggers.file: [Errno 2] No such file or directory: '/proc"),
        (['algorithms.r_drop={}', 'model.dropout=0'], 'algorithms.r_drop: RDrop compares two passes'),
    ],
)
def test_what_fails_before_the_first_batch_names_its_entry(
    options: list[str], capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    assert main([*options, *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: command line: {line}') and err.count('\n') == 1, err


def test_what_fails_later_keeps_its_traceback(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def batch_end(self: LRMonitor, state: Any, logger: Any) -> None:
        if state.timestamp.batch == 2:
            raise ValueError('of this callback')

    monkeypatch.setattr(LRMonitor, 'batch_end', batch_end)
    with pytest.raises(ValueError, match='^of this callback$'):
        main([*options, 'callbacks.lr_monitor={}', 'max_duration=3ba'])
    assert capsys.readouterr().err == (
        'error: command line: callbacks.lr_monitor: it failed in training, with the traceback below\n'
    )


def test_components_keep_their_classes(options: list[str], tmp_path: Path) -> None:
    """Composer and its algorithms look for components by class."""
    overrides = [f'loggers.file.filename={tmp_path}/log.txt', 'algorithms.mixup={}']
    trainer = train(load(RECIPE, [*options[2:], *overrides]))
    assert {type(each) for each in trainer.state.algorithms} >= {SBA, MixUp}
    assert FileLogger in {type(each) for each in trainer.logger.destinations}
