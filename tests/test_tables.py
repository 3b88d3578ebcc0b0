"""Tables of invented runs compared with hand computations.

Run: pytest tests/test_tables.py
"""

import math

from composer_sba.study.groups import group
from composer_sba.study.tables import group_table
from invented_runs import RUNS, layers_study, record

PAPER = '3.23 (M = 40) †'


def only_table(runs):
    ((key, grouped),) = group(runs).items()
    return group_table(key, grouped)


def test_the_table_of_a_known_case():
    assert only_table(RUNS).splitlines() == [
        '| method | error, % | n | difference from the baseline, points | NLL, nats | calibration error, % '
        "| time ÷ baseline | FLOP ÷ baseline | paper's error, % |",
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |',
        '| baseline | 39.00 ± 1.41 | 2 |  | 1.050 ± 0.071 | 10.0 ± 0.0 | 1.00 | 1.00 | 6.92 |',
        # Welch with equal variances of 2 and n = 2: 2 degrees of freedom, t = 4.303, standard error √2
        '| SBA (M = 4) | 36.00 ± 1.41 | 2 | −3.00 [−9.08, +3.08] | 1.000 ± 0.000 | 10.0 ± 0.0 | 1.04 | 2.00 '
        f'| {PAPER} |',
        '| Cutout | 39.00 | 1 | +0.00 | 1.000 | 10.0 | 1.00 |  | 6.28 |',
        '',
        '† SBA in the paper: WRN-28-10 with Cutout, with 55 times the parameters, reaches 3.08 %.',
        '',
        'Measured on Xeon, 1 of 2 cores (cpu), 2 and 1 at a time; composer-sba 0.1.0, torch 2.7.0; 2026-11-21 to '
        '2026-11-22; commit 05fe84c and 1a2b3c4; 5 runs, seeds 1 and 2.',
    ]


def test_differences_beyond_chance_are_bold():
    runs = [record(seed=s, accuracy=0.60 + s / 1000) for s in (1, 2, 3)]
    runs += [record('mixup', s, 0.65 + s / 1000) for s in (1, 2, 3)]
    # variances of 0.01: 4 degrees of freedom, t = 2.776, standard error 0.1·√(2/3)
    assert '| Mixup | 34.80 ± 0.10 | 3 | **−5.00 [−5.23, −4.77]** |' in only_table(runs)


def test_one_seed_and_no_baseline():
    text = only_table([record('sba', accuracy=0.63)])
    assert '| SBA | 37.00 | 1 | 1.000 | 10.0 | 3.23 (M = 40) † |' in text
    assert 'The baseline has no run' in text and 'seed 1.' in text and '÷' not in text


def test_a_diverged_run_is_shown():
    runs = [record('sba', 1, 0.1), record('sba', 2, 0.1, loss=math.nan)]
    assert '| 90.00 ± 0.00 | 2 | nan ± nan |' in only_table(runs)


def test_layers_keep_their_order_and_show_accuracies_that_were_not_reached():
    lines = only_table(layers_study()).splitlines()
    titles = [line.split(' | ')[0] for line in lines[2:7]]
    assert titles == [
        '| baseline', '| latent BA at layer1', '| SBA at layer1', '| latent BA at head', '| SBA at head'
    ]  # fmt: skip
    assert ' | 2.00 | ' in lines[4]
    assert ' | never, reached with 0 of 2 seeds | ' in lines[6]
    assert 'paper' not in lines[0]


def test_etas_are_in_order_and_search_is_sorted_by_error():
    etas = [record('sba', 1, 0.6, study='eta', setting={'eta': eta}) for eta in (10.0, 0.0, 0.01)]
    assert list(dict.fromkeys(line.split(' | ')[0] for line in only_table(etas).splitlines()[2:5])) == [
        '| SBA, η = 0.0', '| SBA, η = 0.01', '| SBA, η = 10.0'
    ]  # fmt: skip
    trials = [record('sba', 1, a, study='search', setting={'fold': f, 'eta': 0.1}) for f, a in ((1, 0.5), (4, 0.6))]
    assert only_table(trials).splitlines()[2].startswith('| SBA, fold = 4, η = 0.1 | 40.00 ')
