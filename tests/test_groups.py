"""Groups and rows of invented runs: apart what cannot be compared, together what a row averages, each seed once.

Run: pytest tests/test_groups.py
"""

import pytest

from composer_sba.errors import UserError
from composer_sba.study.groups import group, rows
from invented_runs import record


def test_groups_keep_apart_what_cannot_be_compared():
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


def test_rows_of_equal_label_stay_apart():
    assert list(rows([record('ba'), record('ba2')])) == ['BA', 'BA [ba2]']


def test_a_seed_counts_once():
    with pytest.raises(UserError, match='resnet44 on cifar10, baseline: seed 1 has two runs, baselineNone1 and '):
        group([record(), record(accuracy=0.7)])


def test_recipes_of_a_row_must_agree():
    runs = [record('sba', seed, algorithms={'sba': {'fold': fold, 'seed': seed}}) for seed, fold in ((1, 4), (2, 8))]
    with pytest.raises(UserError, match='seeds 1 and 2 differ in algorithms: delete the lines of one recipe'):
        group(runs)
    runs[1]['recipe']['algorithms']['sba']['fold'] = 4
    assert len(group(runs)) == 1  # seeds may differ
