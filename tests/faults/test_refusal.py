"""Exceptions compared with the line that a user gets: which key, and what is left of the run.

pytest tests/faults/test_refusal.py
"""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from composer.core import Event

from composer_sba import SBA
from composer_sba.errors import NonFiniteError, RecipeError, UserError
from composer_sba.recipe.explain import refusal
from composer_sba.recipe.recipe import Recipe, load
from composer_sba.train import main

# Composer's, of a Trainer that was never finished
pytestmark = pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')

RECIPE = str(Path(__file__).parents[2] / 'yamls' / 'digits_sba.yaml')


@pytest.fixture
def recipe() -> Recipe:
    return load(RECIPE, ['algorithms.mixup.alpha=0.2'])


def raised(error: Exception) -> Exception:
    """As one of SBA's methods raises it."""
    sba = SBA()
    sba.eval_start = Mock(side_effect=error)
    try:
        sba.apply(Event.EVAL_START, Mock(), Mock())
    except type(error) as caught:
        return caught
    raise AssertionError('nothing was raised')


def test_what_a_component_refuses_is_told_of_its_argument(recipe: Recipe) -> None:
    told = refusal(recipe, raised(ValueError('Expected eta\nto be less')))
    assert str(told) == f'{RECIPE}: algorithms.sba.eta: Expected eta to be less'


def test_after_the_first_batch_only_users_are_to_blame(recipe: Recipe) -> None:
    assert refusal(recipe, raised(ValueError('who knows')), begun=True) is None
    told = refusal(recipe, raised(UserError('labels are missing')), begun=True)
    assert str(told) == f'{RECIPE}: algorithms.sba: labels are missing'


def test_remedies_are_no_arguments(recipe: Recipe) -> None:
    told = refusal(recipe, raised(NonFiniteError('nan: lower eta')), begun=True)
    assert str(told) == f'{RECIPE}: algorithms.sba: nan: lower eta'


def test_a_bug_keeps_its_traceback(recipe: Recipe) -> None:
    assert refusal(recipe, KeyError('x')) is None


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
    told = refusal(recipe, error, begun=begun)
    assert isinstance(told, RecipeError)
    assert f'{RECIPE}: expected a run that fits into memory, got: ' in str(told) and 'lower global_train' in str(told)


@pytest.mark.parametrize('kept', [True, False])
def test_a_mistake_at_the_first_batch_leaves_what_was_there(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: bool
) -> None:
    if kept:
        (tmp_path / 'runs' / 'mine').mkdir(parents=True)
        (tmp_path / 'runs' / 'notes').write_text('keep')
    keys = [
        f'train_dataset.local={digits_folder}',
        f'eval_dataset.local={digits_folder}',
        'train_dataset.in_memory=true',
    ]
    keys += [f'save_folder={tmp_path}/runs/mine', 'save_overwrite=false', 'max_duration=1ba', 'progress_bar=false']
    assert main(['-f', RECIPE, *keys, 'algorithms.randaugment={}']) == 2
    said = capsys.readouterr().err
    assert said.startswith('error: command line: algorithms.randaugment: To use RandAugment, the dataset must be'), said
    found = sorted(path.name for path in tmp_path.rglob('*'))
    assert found == (['mine', 'notes', 'runs'] if kept else []), found
    assert main(['-f', RECIPE, *keys]) == 0, 'the corrected command is refused'
