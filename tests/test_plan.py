"""Which runs a study plans, and which of them are the same.

pytest tests/test_plan.py
"""

import re
from pathlib import Path
from typing import Any

import pytest

from composer_sba.errors import UserError
from composer_sba.study.flops import flops_per_image
from composer_sba.study.plan import ETAS, MAX_COST, Run, plan

YAMLS = Path(__file__).parent.parent / 'yamls'


def _names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


def test_table_1_has_all_of_its_29_cells_in_seed_order() -> None:
    runs = plan('table1', YAMLS, seeds=2)
    assert len(runs) == 58
    assert [run.recipe.seed for run in runs] == [17] * 29 + [18] * 29
    assert 'resnet50 imagenet ba seed 17' in _names(runs)
    assert {run.network for run in runs} == {'alexnet', 'resnet44', 'resnet50', 'vgg16'}


def test_a_method_is_its_own_recipe_or_its_file_over_the_baseline() -> None:
    runs = plan('rivals', YAMLS, datasets=['digits'], methods=['cutout', 'mixup', 'sba'], seeds=1)
    by_method = {run.method: run.recipe for run in runs}
    assert by_method['cutout'].train_dataset['cutout'] == 3
    assert by_method['mixup'].algorithms == {'mixup': {'alpha': 0.2}}
    assert by_method['sba'].algorithms['sba']['fold'] == 8


def test_rivals_know_every_method_file() -> None:
    methods = {run.method for run in plan('rivals', YAMLS, datasets=['digits'], seeds=1)}
    assert methods >= {path.stem for path in (YAMLS / 'methods').glob('*.yaml')} | {'baseline', 'sba_conv'}


def test_eta_varies_eta_alone() -> None:
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


def test_search_keeps_to_its_budget_and_repeats() -> None:
    runs = plan('search', YAMLS, networks=['resnet8'], seeds=1, trials=12)
    assert runs[0].method == 'baseline' and len(runs) == 13
    costs = [flops_per_image(run.recipe) / flops_per_image(runs[0].recipe) for run in runs]
    assert max(costs) <= MAX_COST, costs
    assert len({run.hash for run in runs}) == 13
    assert _names(runs) == _names(plan('search', YAMLS, networks=['resnet8'], seeds=1, trials=12))


def test_an_override_of_an_algorithm_reaches_those_who_have_it() -> None:
    overrides = ['algorithms.sba.fold=3', 'max_duration=5ep']
    runs = plan('rivals', YAMLS, datasets=['digits'], methods=['baseline', 'sba'], seeds=1, overrides=overrides)
    assert [run.recipe.max_duration for run in runs] == ['5ep', '5ep']
    assert [run.recipe.algorithms.get('sba', {}).get('fold') for run in runs] == [None, 3]


def test_epochs_scale_multiplies_what_a_method_has() -> None:
    runs = plan('rivals', YAMLS, datasets=['digits'], methods=['baseline', 'twice'], seeds=1, epochs_scale=0.25)
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
def test_the_hash_tells_models_apart_and_nothing_else(override: str, same: bool) -> None:
    plain, other = (
        plan('rivals', YAMLS, datasets=['digits'], methods=['baseline'], seeds=1, overrides=overrides)[0]
        for overrides in ([], [override])
    )
    assert (plain.hash == other.hash) is same, (plain.facts, other.facts)


@pytest.mark.parametrize(
    ('names', 'said'),
    [
        ({'networks': ['resnet4']}, "--networks: unknown 'resnet4'; did you mean 'resnet44'?"),
        ({'datasets': ['cifar']}, "--datasets: unknown 'cifar'"),
        ({'methods': ['mixpu']}, "--methods: unknown 'mixpu'; did you mean 'mixup'?"),
        ({'networks': ['resnet8'], 'datasets': ['imagenet']}, 'no recipe'),
        ({'seeds': 0}, '--seeds: expected at least 1, got 0'),
    ],
)
def test_what_is_not_there_is_named(names: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plan('rivals', YAMLS, **names)
