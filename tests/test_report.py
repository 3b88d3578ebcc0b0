"""The report against hand computations on invented runs, and against what people do to the page and the records.

Run: pytest tests/test_report.py
"""

import ast
import json
import math
import os
from multiprocessing import get_context
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from composer_sba.errors import UserError
from composer_sba.study import paper, records
from composer_sba.study.groups import group, rows
from composer_sba.study.records import append, read
from composer_sba.study.report import report
from composer_sba.study.statistics import cost_ratios, difference, median_ratio, paired_ratio, spread, time_to
from composer_sba.study.tables import table


def record(method='baseline', seed=1, accuracy=0.6, seconds=100.0, *, study='rivals', setting=None, **others):
    """A run of ten epochs whose accuracy rises evenly to its final value and stays there for the last five."""
    recipe = {'max_duration': '10ep', 'seed': seed, 'algorithms': {}, 'model': {'name': 'resnet_cifar'}}
    algorithms = others.pop('algorithms', {})
    return {
        'study': study,
        'network': 'resnet44',
        'dataset': 'cifar10',
        'method': method,
        'setting': setting or {},
        'seed': seed,
        'hash': f'{method}{setting}{seed}',
        'recipe': {**recipe, 'algorithms': algorithms, **others.pop('recipe', {})},
        'commit': '05fe84c',
        'date': f'2026-11-2{seed}T09:12:00+00:00',
        'device': 'cpu',
        'hardware': 'Xeon, 1 of 2 cores',
        'jobs': 2,
        'versions': {'composer-sba': '0.1.0', 'torch': '2.7.0'},
        'train_samples': 5000,
        'epochs': [
            {
                **{'epoch': epoch, 'seconds': seconds * epoch / 10, 'accuracy': accuracy * min(epoch, 6) / 6},
                **{'loss': 1.0, 'calibration_error': 0.1, 'train_loss': 1.0},
            }
            for epoch in range(1, 11)
        ],
        'accuracy': accuracy,
        'loss': 1.0,
        'calibration_error': 0.1,
        'train_seconds': seconds,
        'wall_seconds': seconds + 10,
        'images_per_second': 500.0,
        'flops': 1e14,
        **others,
    }


RUNS = [  # errors: baseline 40 and 38, SBA 37 and 35, Cutout 39
    record('sba', 1, 0.63, 103.0, algorithms={'sba': {'fold': 4}}, flops=2e14),
    record('baseline', 1, 0.60, 100.0),
    record('baseline', 2, 0.62, 110.0, loss=1.1, jobs=1),
    record('sba', 2, 0.65, 115.5, algorithms={'sba': {'fold': 4}}, flops=2e14, commit='1a2b3c4'),
    record('cutout', 1, 0.61, 100.0, flops=None),
]
PAPER = '3.23 (M = 40) †'


def write(folder, *runs):
    for run in runs:
        append(folder / f'{run["study"]}.jsonl', run)


def only_table(runs):
    ((key, grouped),) = group(runs).items()
    return table(key, grouped)


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
        '† SBA in the paper: nearly the 3.08 % of WRN-28-10 with Cutout, which has 55 times the parameters.',
        '',
        'Measured on Xeon, 1 of 2 cores (cpu), 2 and 1 at a time; composer-sba 0.1.0, torch 2.7.0; 2026-11-21 to '
        '2026-11-22; commit 05fe84c and 1a2b3c4; 5 runs, seeds 1 and 2.',
    ]


def test_differences_beyond_chance_are_bold():
    runs = [record(seed=s, accuracy=0.60 + s / 1000) for s in (1, 2, 3)]
    runs += [record('mixup', s, 0.65 + s / 1000) for s in (1, 2, 3)]
    # variances of 0.01: 4 degrees of freedom, t = 2.776, standard error 0.1·√(2/3)
    assert '| Mixup | 34.80 ± 0.10 | 3 | **−5.00 [−5.23, −4.77]** |' in only_table(runs)


def test_welch_by_hand():
    values, baseline = [31.0, 33.0, 32.0, 36.0], [35.0, 35.5]
    found = difference(values, baseline)
    a, b = np.var(values, ddof=1) / 4, np.var(baseline, ddof=1) / 2
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 1)
    t = (found.high - found.mean) / math.sqrt(a + b)
    # 95 % of Student's t with so many degrees of freedom must lie within ±t: its density, summed
    grid = np.linspace(-t, t, 200_001)
    density = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    share = np.trapezoid(density * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2), grid)
    assert found.mean == pytest.approx(-2.25)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert share == pytest.approx(0.95, abs=1e-6), f'{found}, {freedom} degrees of freedom'


def test_no_interval_without_spread():
    assert spread([30.0]) == (30.0, None, 1)
    assert difference([30.0], [31.0, 33.0]) == (-2.0, None, None)
    assert difference([30.0, 30.0], [31.0, 31.0]) == (-1.0, None, None)
    assert difference([0.83, 0.83, 0.83], [1.2, 0.9, 1.3]).excludes_zero is False  # one side alone does not vary
    assert not difference([30.0], [31.0, 33.0]).excludes_zero


def test_ratios_pair_the_seeds():
    assert paired_ratio({1: 20.0, 2: 60.0}, {2: 30.0, 3: 1.0}) == 2.0
    assert paired_ratio({1: 20.0}, {2: 30.0}) is None


def test_one_seed_and_no_baseline():
    text = only_table([record('sba', accuracy=0.63)])
    assert '| SBA | 37.00 | 1 | 1.000 | 10.0 | 3.23 (M = 40) † |' in text
    assert 'No run of the baseline' in text and 'seed 1.' in text and '÷' not in text


def test_a_diverged_run_shows():
    runs = [record('sba', 1, 0.1), record('sba', 2, 0.1, loss=math.nan)]
    assert '| 90.00 ± 0.00 | 2 | nan ± nan |' in only_table(runs)


def test_time_to_accuracy_and_cost_ratio():
    ba = [record('latent_ba', s, 0.60, 400.0, study='layers') for s in (1, 2, 3)]
    sba = [record('sba', s, accuracy, 200.0, study='layers') for s, accuracy in ((1, 0.62), (2, 0.60), (3, 0.59))]
    assert time_to(ba[0], 0.595) == 240.0  # the sixth of ten epochs
    assert time_to(sba[0], 0.595) == 120.0
    assert time_to(sba[2], 0.595) is None
    assert cost_ratios(ba, sba) == {1: 2.0, 2: 2.0, 3: 0.0}
    assert cost_ratios(ba[:1], sba[1:]) == {}
    assert median_ratio([2.0, 0.0]) == 0.0  # half of the seeds never get there: neither does the median
    assert median_ratio([2.0, 3.0]) == 2.5


def layers_study():
    runs = [record(seed=s, study='layers', accuracy=0.6 + s / 100) for s in (1, 2)]
    for layer, accuracy in (('layer1', 0.61), ('head', 0.5)):
        for s in (1, 2):
            setting = {'layer': layer}
            runs.append(record('sba', s, accuracy + s / 100, 200.0, study='layers', setting=setting))
            runs.append(record('latent_ba', s, 0.60 + s / 100, 400.0, study='layers', setting=setting))
    return runs


def test_layers_keep_their_order_and_show_what_was_not_reached():
    lines = only_table(layers_study()).splitlines()
    titles = [line.split(' | ')[0] for line in lines[2:7]]
    assert titles == [
        '| baseline', '| latent BA at layer1', '| SBA at layer1', '| latent BA at head', '| SBA at head'
    ]  # fmt: skip
    assert ' | 2.00 | ' in lines[4]
    assert ' | never, reached with 0 of 2 seeds | ' in lines[6]
    assert 'paper' not in lines[0]


def test_etas_are_in_order_and_search_is_by_error():
    etas = [record('sba', 1, 0.6, study='eta', setting={'eta': eta}) for eta in (10.0, 0.0, 0.01)]
    assert list(dict.fromkeys(line.split(' | ')[0] for line in only_table(etas).splitlines()[2:5])) == [
        '| SBA, η = 0.0', '| SBA, η = 0.01', '| SBA, η = 10.0'
    ]  # fmt: skip
    trials = [record('sba', 1, a, study='search', setting={'fold': f, 'eta': 0.1}) for f, a in ((1, 0.5), (4, 0.6))]
    assert only_table(trials).splitlines()[2].startswith('| SBA, fold = 4, η = 0.1 | 40.00 ')


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


def test_records_come_back_as_they_went(tmp_path):
    write(tmp_path / 'new', *RUNS)
    assert read(tmp_path / 'new' / 'rivals.jsonl') == RUNS
    assert read(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize(
    ('line', 'fault'),
    [
        ('{"study": ', 'is not JSON'),
        ('', 'is not JSON'),
        ('[1]', 'is not a JSON object'),
        (
            json.dumps({key: value for key, value in record().items() if key not in ('seed', 'loss')}),
            'lacks loss, seed',
        ),
        (json.dumps(record() | {'accuracy': '0.6'}), "has accuracy '0.6', expected float"),
        (json.dumps(record(recipe={'max_duration': '30'})), "has recipe.max_duration '30', expected a duration"),
        (json.dumps(record() | {'epochs': []}), 'has epochs whose seconds are not training time since the run began'),
        (json.dumps(record() | {'epochs': [{'epoch': 1}]}), 'has epochs that are not evaluations'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, fault):
    path = tmp_path / 'rivals.jsonl'
    path.write_text(f'{json.dumps(record())}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f'{path}, line 2: {fault}') and '\n' not in str(caught.value)
    with pytest.raises(UserError, match='report|record'):
        append(path, json.loads(line) if line.startswith('{"study": "') else {})


def test_a_torn_last_line_is_told_of_and_cut_off(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    whole = json.dumps(record())
    path.write_text(f'{whole}\n{whole[:100]}')
    with pytest.warns(UserWarning, match=f'{path}, line 2: torn as it was written, left out'):
        assert read(path) == [record()]
    append(path, record(seed=2))
    assert read(path) == [record(), record(seed=2)]


def test_a_last_line_without_newline_counts(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    path.write_text(json.dumps(record()))
    assert read(path) == [record()]
    append(path, record(seed=2))
    assert read(path) == [record(), record(seed=2)]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'rivals.jsonl'
    append(path, record())
    genuine = os.write
    monkeypatch.setattr('os.write', lambda descriptor, data: genuine(descriptor, data[:10]))
    with pytest.raises(OSError, match='only a part of the line could be written'):
        append(path, record(seed=2))
    monkeypatch.undo()
    assert read(path) == [record()]


def _append_ten(path, first):
    for seed in range(first, first + 10):
        append(path, record(seed=seed))


def test_processes_append_at_the_same_time(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    spawn = get_context('spawn')
    workers = [spawn.Process(target=_append_ten, args=(path, first), daemon=True) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert sorted(run['seed'] for run in read(path)) == list(range(30))


def test_a_study_runs_without_scipy_and_matplotlib():
    needed = {'records', 'groups', 'names', 'paper'}
    folder = Path(records.__file__).parent
    nodes = [node for each in sorted(needed) for node in ast.walk(ast.parse((folder / f'{each}.py').read_text()))]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not {module for module in modules if module.startswith(('scipy', 'matplotlib'))}
    assert {module.rpartition('.')[2] for module in modules if module.startswith('composer_sba.study')} <= needed


def eta_study():
    runs = [record(seed=s, study='eta', accuracy=0.6 + s / 100) for s in (1, 2)]
    return runs + [
        record('sba', s, 0.61 + s / 100, study='eta', setting={'eta': eta}) for eta in (0.0, 0.01, 10.0) for s in (1, 2)
    ]


def test_all_sections_and_figures(tmp_path):
    write(tmp_path, *RUNS, *eta_study(), *layers_study(), *(run | {'study': 'table1'} for run in RUNS))
    write(tmp_path, record('sba', accuracy=0.63, study='search', setting={'fold': 1}))
    page = tmp_path / 'docs' / 'results.md'
    written = report(tmp_path, page)
    assert [path.relative_to(page.parent).as_posix() for path in written] == [
        'results.md',
        *(f'figures/table1-resnet44-cifar10-5000-10ep-{kind}.png' for kind in ('time', 'curves')),
        'figures/eta-resnet44-cifar10-5000-10ep-eta.png',
        'figures/layers-resnet44-cifar10-5000-10ep-layers.png',
        *(f'figures/rivals-resnet44-cifar10-5000-10ep-{kind}.png' for kind in ('time', 'curves')),
    ]
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith('## ')] == [
        '## Table 1 of the paper',
        '## The weight η (Fig. 2)',
        '## The cut layer (Fig. 3)',
        '## Other methods',
        '## Search for settings',
    ]
    for figure in written[1:]:
        assert f'](figures/{figure.name})' in text
        pixels = matplotlib.image.imread(figure)
        assert pixels.shape[1] == 1200, f'{figure.name} is {pixels.shape}'
        drawn = (pixels[..., :3] < 0.9).any(axis=-1).mean()
        assert 0.005 < drawn < 0.5, f'{figure.name} is covered to {drawn:.3f}'


@pytest.mark.parametrize('seconds', [0.5, 5.0, 500.0, 50_000.0])
def test_runs_of_any_length_can_be_drawn(tmp_path, seconds):
    write(tmp_path, record('baseline', 1, seconds=seconds), record('sba', 1, seconds=2 * seconds))
    assert 'time.png' in str(report(tmp_path, tmp_path / 'results.md'))


def test_a_second_report_changes_nothing(tmp_path):
    write(tmp_path, *RUNS, *layers_study())
    page = tmp_path / 'results.md'
    first = {path: path.read_bytes() for path in report(tmp_path, page)}
    assert {path: path.read_bytes() for path in report(tmp_path, page)} == first


def test_prose_around_the_markers_stays(tmp_path):
    page = tmp_path / 'results.md'
    write(tmp_path, *RUNS)
    report(tmp_path, page)
    generated = page.read_text().partition('<!-- rivals:begin -->')[2].partition('<!-- rivals:end -->')[0]
    page.write_text('Before.\n\n<!-- rivals:begin -->\nstale\n<!-- rivals:end -->\n\nAfter.\n')
    write(tmp_path, *eta_study())
    report(tmp_path, page)
    text = page.read_text()
    assert text.startswith(
        f'Before.\n\n<!-- rivals:begin -->{generated}<!-- rivals:end -->\n\nAfter.\n\n## The weight η'
    )
    (tmp_path / 'eta.jsonl').unlink()
    report(tmp_path, page)
    assert '<!-- eta:begin -->\n\nNo finished runs.\n\n<!-- eta:end -->' in page.read_text()


@pytest.mark.parametrize('text', ['<!-- rivals:begin -->', '<!-- rivals:end -->\n<!-- rivals:begin -->'])
def test_half_a_pair_of_markers_is_refused(tmp_path, text):
    write(tmp_path, *RUNS)
    (tmp_path / 'results.md').write_text(text)
    with pytest.raises(UserError, match='expected <!-- rivals:begin --> once and <!-- rivals:end --> once after it'):
        report(tmp_path, tmp_path / 'results.md')
    assert (tmp_path / 'results.md').read_text() == text


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match='has no finished runs of table1, eta, layers, rivals, search'):
        report(tmp_path, tmp_path / 'results.md')


def test_groups_that_differ_in_hardware_have_headings_and_figures_of_their_own(tmp_path):
    write(tmp_path, record(), record(hardware='H200'))
    written = report(tmp_path, tmp_path / 'results.md')
    assert len(set(written)) == 5
    assert '10 epochs, H200\n' in written[0].read_text() and '10 epochs, Xeon, 1 of 2 cores\n' in written[0].read_text()


@pytest.mark.parametrize('study', ['eta', 'layers'])
def test_a_study_that_has_just_begun(tmp_path, study):
    write(tmp_path, record(study=study))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 1
    write(tmp_path, record('sba', study=study, setting={'eta': 0.1} if study == 'eta' else {'layer': 'head'}))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 2


def test_table_1_is_consistent():
    improvements = {  # the last column of the paper's Table 1, in per cent
        ('cifar10', 'resnet44'): 53.32,
        ('cifar10', 'vgg16'): 83.20,
        ('cifar10', 'alexnet'): 24.50,
        ('cifar100', 'resnet44'): 12.14,
        ('cifar100', 'vgg16'): 42.62,
        ('imagenet', 'resnet50'): 4.26,
        ('imagenet', 'vgg16'): 18.54,
        ('imagenet', 'alexnet'): 17.49,
    }
    found = {
        key: 100 * (1 - cells['sba'].error / cells['baseline'].error) for key, cells in paper.TABLE_1.items()
    }  # fmt: skip
    assert found == pytest.approx(improvements, abs=0.01)
