"""The study of robustness: what its settings cost, what a run measures, and its tables.

Run: pytest tests/test_robustness_study.py
"""

import re
from pathlib import Path

import pytest

from composer_sba.errors import UserError
from composer_sba.study.__main__ import main
from composer_sba.study.flops import training_flops
from composer_sba.study.groups import group
from composer_sba.study.plan import plan
from composer_sba.study.records import read_records
from composer_sba.study.report import report
from composer_sba.study.robustness_report import robustness_tables
from composer_sba.study.stats import paired_difference
from invented_runs import record, robustness_study, write

YAMLS = Path(__file__).parent.parent / 'yamls'
COSTS = {  # in operations of the baseline's training
    **{'baseline': 1, 'gaussian_half': 1, 'gaussian_half_longer': 1.5, 'sba_robust': 1.5, 'sba_robust_every_step': 2},
    **{'twice': 2, 'latent_ba_input': 2, 'label_smoothing': 1, 'augmix': 1, 'gaussian_half_twice': 2, 'gaussian': 1},
    **{'sba_robust_gaussian_half': 1.5},
}


def test_settings_cost_what_they_are_compared_at() -> None:
    """The name of a method says its cost, except where a step has half of the raw rows or the cut is elsewhere."""
    runs = plan('robustness', YAMLS, networks=['resnet8'], seeds=1, forms=True)
    costs = {
        run.name.partition(' seed')[0].removeprefix('resnet8 cifar10 '): training_flops(run.recipe) for run in runs
    }
    ratios = {name: cost / costs['baseline'] for name, cost in costs.items()}
    for name, ratio in ratios.items():
        method, _, setting = name.partition(' ')
        if 'layer=' in setting:
            assert 1.2 < ratio < 1.5, (name, ratio)
        else:
            expected = 1 if 'raw rows' in setting else COSTS[method]
            assert ratio == pytest.approx(expected, rel=0.01), (name, ratio)
    assert {name.partition(' ')[0] for name in ratios} == {*COSTS}
    assert len(runs) == 23 and len(plan('robustness', YAMLS, networks=['resnet8'], seeds=1)) == 10


def test_the_script_for_a_gpu_compares_at_equal_cost() -> None:
    script = (YAMLS.parent / 'benchmarks' / 'gpu_robustness.sh').read_text()
    found = re.search(r'SCALE:-([\d.]+)', script)
    assert found is not None
    options = {'networks': ['vgg16'], 'datasets': ['cifar10'], 'methods': ['gaussian_half_longer', 'sba_robust']}
    runs = plan('robustness', YAMLS, **options, seeds=1, epochs_scale=float(found[1]))
    longer, _, sba = sorted((training_flops(run.recipe), run.name) for run in runs)
    assert sba[0] == pytest.approx(longer[0], rel=0.01), runs


def test_a_run_measures_the_network_that_it_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    arguments = [
        'robustness',
        '--datasets',
        'digits',
        '--recipes',
        str(YAMLS),
        '--methods',
        'sba_robust',
        '--seeds',
        '1',
    ]
    changes = ['train_dataset.in_memory=true', 'eval_dataset.in_memory=true', 'max_duration=2ep', 'eval_last_epochs=1']
    changes += ['eval_dataset.subset=120']
    assert main([*arguments, '--set', *changes]) == 0
    (found,) = read_records(Path('results/robustness.jsonl'))
    measured = found['robustness']
    assert measured['images'] == 120
    accuracy = found['epochs'][-1]['accuracy']
    assert measured['clean']['error'] == pytest.approx(1 - accuracy, abs=1e-4) and accuracy > 0.3, accuracy
    errors = [each['error'] for each in measured['noise']]
    assert errors[0] == measured['clean']['error'] and errors[-1] > errors[0], errors
    assert [each['severity'] for each in measured['corruptions']['fog']] == [1, 3, 5]
    assert measured['attacks'][0]['error'] > measured['clean']['error'], measured['attacks']
    assert main(['report', '--page', 'page.md']) == 0
    assert '| SBA at the input (M = 1) | 1 |' in Path('page.md').read_text()


def test_differences_are_paired_and_at_equal_cost() -> None:
    ((found, runs),) = group(robustness_study()).items()
    table = robustness_tables(found, runs)
    assert '| SBA at the input | 2 | 30.0 ± 0.0 | 40.8 ± 1.8 | 81.5 ± 3.5 |' in table
    _, from_baseline, after_the_same_epochs, from_gaussian, from_between, *stronger = table.split('Differences')
    after_stronger, from_stronger = stronger
    # 37 + 2.5 s less 60 + 2 s, less 40 + 2 s, less 38 + 2.5 s, less 36 + 2.5 s, less 36 + 2 s, and less 35 + 2.5 s
    assert '| SBA at the input | 2 | +0.00 | **−22.25 [−25.43, −19.07]** | ' in from_baseline
    assert '| SBA at the input | 2 | +0.00 | −2.25 [−5.43, +0.93] | ' in after_the_same_epochs
    assert 'epochs |' not in after_the_same_epochs, 'a longer training has other epochs'
    assert '| SBA at the input | 2 | +0.00 | −1.00 | −2.00 | −1.00 | +0.00 |' in from_gaussian
    assert from_between.startswith(' from Gaussian noise of σ = 0.15 on half of the images at the same number of oper')
    assert '| SBA at the input | 2 | +0.00 | +1.00 | +2.00 | +1.00 | +0.00 |' in from_between
    assert '| SBA at the input | 2 | +0.00 | +1.75 [−1.43, +4.93] | ' in after_stronger
    assert '| SBA at the input | 2 | +0.00 | +2.00 | +4.00 | +2.00 | +0.00 |' in from_stronger
    assert '| baseline | 2 | +0.00 | +20.00' in from_gaussian  # compared with the noise at cost 1
    assert 'Gaussian noise on half' not in from_gaussian.replace('from Gaussian noise on half of the images', '')


def test_seeds_that_one_side_lacks_are_left_out() -> None:
    assert paired_difference({1: 1.0}, {2: 1.0}) is None
    assert paired_difference({1: 0.3, 2: 0.8}, {1: 0.2, 2: 0.7}) == (pytest.approx(0.1), None, None)  # but for rounding
    found = paired_difference({1: 5.0, 2: 7.0, 3: 100.0}, {1: 4.0, 2: 4.0})
    assert found is not None and found.mean == 2.0 and found.low is not None and found.low < 0


def test_a_run_without_measurement_is_named(tmp_path: Path) -> None:
    write(tmp_path, record(study='robustness'))
    with pytest.raises(UserError, match='lacks robustness: delete its line'):
        report(tmp_path, tmp_path / 'page.md')


def test_every_group_has_its_figures(tmp_path: Path) -> None:
    write(tmp_path, *robustness_study())
    written = report(tmp_path, tmp_path / 'page.md')
    kinds = [path.stem.rpartition('-')[2] for path in written[1:]]
    assert kinds == ['noise', 'corruptions', 'cost'] and all(path.stat().st_size > 5000 for path in written[1:])
