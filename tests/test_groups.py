"""Groups and rows of invented runs: which runs share a group, and which a row may average.

Run: pytest tests/test_groups.py
"""

import pytest

from composer_sba.errors import UserError
from composer_sba.study.groups import group, rows
from invented_runs import record


def test_groups_separate_runs_that_cannot_be_compared():
    runs = [
        record(),
        record(recipe={'scale_schedule_ratio': 0.5}),
        record(train_samples=50_000),
        record(hardware='H200'),
        record('twice', recipe={'scale_schedule_ratio': 2.0}),
        record('twice', recipe={'scale_schedule_ratio': 1.0}),  # twice the 5 epochs
    ]
    groups = group(runs)
    assert [(key.max_duration, key.train_samples, key.hardware) for key in groups] == [
        ('10ep', 5000, 'Xeon, 1 of 2 cores'),
        ('5ep', 5000, 'Xeon, 1 of 2 cores'),
        ('10ep', 50_000, 'Xeon, 1 of 2 cores'),
        ('10ep', 5000, 'H200'),
    ]
    labels = [list(rows(each)) for each in groups.values()]
    assert labels[:2] == [['baseline', 'baseline, 20 epochs'], ['baseline', 'baseline, 10 epochs']]
    assert next(iter(groups)).title == 'ResNet44 on CIFAR-10, 5,000 training images, 10 epochs'


def test_the_study_of_robustness_compares_errors_of_all_processors():
    runs = [record(study='robustness', hardware='Xeon'), record('sba', study='robustness', hardware='Epyc')]
    assert [len(each) for each in group(runs).values()] == [2]
    assert len(group([*runs, record(seed=2, study='robustness', device='gpu', hardware='H200')])) == 2


def test_methods_with_equal_labels_have_separate_rows():
    assert list(rows([record('ba'), record('ba2')])) == ['BA', 'BA [ba2]']


def test_a_seed_counts_once():
    with pytest.raises(UserError, match='resnet44 on cifar10, baseline: seed 1 has two runs, baselineNone1 and '):
        group([record(), record(accuracy=0.7)])


@pytest.mark.parametrize(
    ('key', 'values'),
    [
        ('algorithms', [{'sba': {'fold': 4}}, {'sba': {'fold': 8}}]),
        ('algorithms', [{'sba': {}}, {'sba': {}, 'seed_each_batch': {}}]),  # a name that contains 'seed' is not a seed
        ('train_dataset', [{'subset': 1000}, {'subset': 2000}]),
        ('eval_dataset', [{'split': 'val'}, {'split': 'train'}]),
    ],
)
def test_recipes_of_a_row_must_agree(key, values):
    runs = [record('sba', seed, recipe={key: value}) for seed, value in enumerate(values, start=1)]
    with pytest.raises(UserError, match=f'seeds 1 and 2 differ in {key}: delete the lines of one recipe'):
        group(runs)


def test_recipes_of_a_row_may_differ_in_their_seeds():
    runs = [record('sba', seed, algorithms={'sba': {'seed': seed}}) for seed in (1, 2)]
    for run in runs:
        run['recipe']['train_dataset'] = {'shuffle_seed': run['seed']}
    assert len(group(runs)) == 1
