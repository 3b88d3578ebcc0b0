"""The runs that a study plans, and which of them are the same.

Run: pytest tests/test_plan.py
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.study.flops import flops_per_image
from composer_sba.study.plan import ETAS, MAX_COST, plan
from composer_sba.study.recipe_index import families as find_families
from composer_sba.study.runs import Run

YAMLS = Path(__file__).parent.parent / 'yamls'


def _names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


def test_table_1_has_its_29_cells_sorted_by_seed() -> None:
    runs = plan('table1', YAMLS, seeds=2)
    assert len(runs) == 58
    assert [run.recipe.seed for run in runs] == [17] * 29 + [18] * 29
    assert 'resnet50 imagenet ba seed 17' in _names(runs)
    assert {run.network for run in runs} == {'alexnet', 'resnet44', 'resnet50', 'vgg16'}


def test_a_method_is_its_own_recipe_or_its_file_over_the_baseline() -> None:
    runs = plan('methods', YAMLS, datasets=['digits'], methods=['cutout', 'mixup', 'sba'], seeds=1)
    by_method = {run.method: run.recipe for run in runs}
    assert by_method['cutout'].train_dataset['cutout'] == 3
    assert by_method['mixup'].algorithms == {'mixup': {'alpha': 0.2}}
    assert by_method['sba'].algorithms['sba']['fold'] == 8


def test_methods_has_every_method_file() -> None:
    methods = {run.method for run in plan('methods', YAMLS, datasets=['digits'], seeds=1)}
    assert methods >= {path.stem for path in (YAMLS / 'methods').glob('*.yaml')} | {'baseline', 'sba_conv'}


def test_eta_varies_only_eta() -> None:
    runs = plan('eta', YAMLS, networks=['resnet44'], datasets=['cifar10'], seeds=1)
    assert [run.setting.get('eta') for run in runs] == [None, *ETAS]
    assert [run.recipe.algorithms['sba']['eta'] for run in runs[1:]] == list(ETAS)
    assert all(run.recipe.algorithms['sba']['fold'] == 40 for run in runs[1:])


def test_layers_cuts_every_stage_with_sba_and_latent_ba() -> None:
    runs = plan('layers', YAMLS, networks=['resnet8'], seeds=1)
    at = [run.setting['layer'] for run in runs if run.method == 'sba']
    assert at == ['stem', 'stage1', 'stage2', 'stage3', 'head']
    assert [run.setting['layer'] for run in runs if run.method == 'latent_ba'] == at
    assert all(r.recipe.algorithms['sba']['target'] == 'hard' for r in runs if r.method == 'latent_ba')


def test_search_keeps_to_its_budget_and_is_reproducible() -> None:
    runs = plan('search', YAMLS, datasets=['digits'], seeds=1, trials=3)
    assert runs[0].method == 'baseline' and len(runs) == 4
    costs = [flops_per_image(run.recipe) / flops_per_image(runs[0].recipe) for run in runs]
    assert max(costs) <= MAX_COST, costs
    assert len({run.hash for run in runs}) == 4
    assert _names(runs) == _names(plan('search', YAMLS, datasets=['digits'], seeds=1, trials=3))


@pytest.mark.parametrize('name', ['sba', 'SBA'])
def test_an_override_of_an_algorithm_applies_to_the_runs_that_have_it(name: str) -> None:
    overrides = [f'algorithms.{name}.fold=3', 'max_duration=5ep']
    runs = plan('methods', YAMLS, datasets=['digits'], methods=['baseline', 'sba'], seeds=1, overrides=overrides)
    assert [run.recipe.max_duration for run in runs] == ['5ep', '5ep']
    assert [run.recipe.algorithms.get('sba', {}).get('fold') for run in runs] == [None, 3]


def test_epochs_scale_multiplies_the_ratio_of_the_method() -> None:
    runs = plan('methods', YAMLS, datasets=['digits'], methods=['baseline', 'twice'], seeds=1, epochs_scale=0.25)
    assert [run.recipe.scale_schedule_ratio for run in runs] == [0.25, 0.5]


@pytest.mark.parametrize(
    ('override', 'same'),
    [
        ('device=gpu', True),
        ('train_dataset.local=/elsewhere', True),
        ('train_dataset.num_workers=3', True),
        ('save_interval=2ep', True),
        ('optimizer.lr=0.2', False),
        ('train_dataset.cutout=4', False),
        ('precision=amp_bf16', False),
        ('seed=18', False),
    ],
)
def test_the_hash_depends_on_what_changes_the_model(override: str, same: bool) -> None:
    plain, other = (
        plan('methods', YAMLS, datasets=['digits'], methods=['baseline'], seeds=1, overrides=overrides)[0]
        for overrides in ([], [override])
    )
    assert (plain.hash == other.hash) is same, (plain.facts, other.facts)


def test_other_folders_of_images_are_other_runs() -> None:
    name = 'torchvision_resnet18_imagefolder_sba'
    recipes = [load(YAMLS / f'{name}.yaml', [f'train_dataset.local=data/{what}']) for what in ('flowers', 'cars')]
    flowers, cars = (Run('methods', 'torchvision_resnet18', 'imagefolder', 'sba', {}, recipe) for recipe in recipes)
    assert flowers.hash != cars.hash


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'networks': ['resnet4']}, "--networks: unknown 'resnet4'; did you mean 'resnet44'?"),
        ({'datasets': ['cifar']}, "--datasets: unknown 'cifar'"),
        ({'methods': ['mixpu']}, "--methods: unknown 'mixpu'; did you mean 'mixup'?"),
        ({'networks': ['resnet8'], 'datasets': ['imagenet']}, 'no recipe'),
        ({'seeds': 0}, '--seeds: expected at least 1, got 0'),
        ({'epochs_scale': math.nan}, '--epochs-scale: must be positive and finite, got nan'),
    ],
)
def test_a_mistake_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan('methods', YAMLS, **arguments)


@pytest.mark.parametrize(
    ('study', 'override', 'message'),
    [
        ('methods', 'algorithms.sbaa.fold=3', '--set algorithms.sbaa.fold=3: no run of this study has the algorithm'),
        ('methods', 'algorithms.gyro_dropout.p=0.1', "no run of this study has the algorithm 'gyro_dropout'"),
        ('eta', 'algorithms.sba.eta=0.5', '--set algorithms.sba.eta=0.5: the study varies this key itself'),
        ('layers', 'algorithms.SBA.layers=conv1', 'the study varies this key itself'),
        ('search', 'algorithms.sba.vicinity.sigma=0.2', 'the study varies this key itself'),
    ],
)
def test_an_override_without_an_effect_is_refused(study: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        plan(study, YAMLS, datasets=['digits'], seeds=1, overrides=[override])


@pytest.mark.parametrize(
    ('override', 'methods'),
    [
        ('scale_schedule_ratio=1.0', 'digits digits baseline seed 17 and digits digits longer seed 17'),
        ('train_dataset.cutout=3', 'digits digits baseline seed 17 and digits digits cutout seed 17'),
    ],
)
def test_two_methods_that_are_one_run_are_refused(override: str, methods: str) -> None:
    """A finished run is recognized by its recipe: the second method would have no line in the results."""
    chosen = {'datasets': ['digits'], 'methods': ['baseline', 'cutout', 'longer']}
    with pytest.raises(UserError, match=f'^{methods} have the same recipe: leave one of them out$'):
        plan('methods', YAMLS, **chosen, seeds=1, overrides=[override])


def test_a_method_named_twice_is_planned_once() -> None:
    assert len(plan('methods', YAMLS, datasets=['digits'], methods=['sba', 'sba'], seeds=1)) == 1


def test_search_cuts_layers_that_are_too_wide_for_the_dense_basis_of_the_recipe() -> None:
    (run,) = plan('search', YAMLS, networks=['resnet44'], datasets=['cifar10'], methods=['sba'], seeds=1, trials=1)
    assert run.recipe.algorithms['sba']['vicinity']['basis'] == 'identity'


def test_search_says_how_many_settings_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('composer_sba.study.plan.SEARCH', {'fold': (1, 2), 'eta': (0.1, 1.0)})
    arguments = {'datasets': ['digits'], 'methods': ['sba'], 'seeds': 1}
    message = r'^--trials: only \d+ settings cost at most 1.3 times the baseline, got 99$'
    with pytest.raises(UserError, match=message) as caught:
        plan('search', YAMLS, **arguments, trials=99)
    found = int(str(caught.value).split()[2])
    assert len(plan('search', YAMLS, **arguments, trials=found)) == found


class TestRecipeIndex:
    """The networks, datasets and methods of a folder of recipes, by their file names."""

    @pytest.fixture
    def recipes(self, tmp_path: Path) -> Path:
        (tmp_path / 'methods').mkdir()
        for name in ('vgg16_cifar10_baseline', 'vgg16_cifar10_sba', 'methods/mixup'):
            (tmp_path / f'{name}.yaml').touch()
        return tmp_path

    @pytest.mark.parametrize(
        ('file', 'families'),
        [
            ('vgg16_cifar10_cutout.yaml', {'vgg16_cifar10': ['baseline', 'cutout', 'mixup', 'sba']}),
            # One family's name may begin with another's
            (
                'vgg16_cifar10_small_baseline.yaml',
                {'vgg16_cifar10': ['baseline', 'mixup', 'sba'], 'vgg16_cifar10_small': ['baseline', 'mixup']},
            ),
            ('vgg16_cifar100_sba.yaml', {'vgg16_cifar10': ['baseline', 'mixup', 'sba']}),  # without a baseline
            ('._vgg16_cifar10_baseline.yaml', {'vgg16_cifar10': ['baseline', 'mixup', 'sba']}),  # of macOS
            ('methods/.mixup.yaml', {'vgg16_cifar10': ['baseline', 'mixup', 'sba']}),
            ('vgg16_cifar10_sba.yaml~', {'vgg16_cifar10': ['baseline', 'mixup', 'sba']}),
        ],
    )
    def test_a_file_belongs_to_one_family(self, recipes: Path, file: str, families: dict[str, list[str]]) -> None:
        (recipes / file).touch()
        assert {family.stem: family.methods() for family in find_families(recipes)} == families
