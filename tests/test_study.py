"""The study: which runs it plans, what they cost, and that each is trained once, whatever is killed.

pytest tests/test_study.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from composer_sba.errors import UserError
from composer_sba.recipe import load
from composer_sba.study import worker
from composer_sba.study.__main__ import main
from composer_sba.study.cost import flops_per_image, training_flops
from composer_sba.study.plan import ETAS, MAX_COST, Run, plan
from composer_sba.study.records import read

ROOT = Path(__file__).parent.parent
YAMLS = ROOT / 'yamls'
DIGITS = ['--datasets', 'digits', '--recipes', str(YAMLS)]
IN_MEMORY = ['--set', 'train_dataset.in_memory=true', 'eval_dataset.in_memory=true']


def _cost(name: str, *overrides: str) -> float:
    return flops_per_image(load(YAMLS / f'{name}.yaml', overrides))


def _names(runs: list[Run]) -> list[str]:
    return [run.name for run in runs]


@pytest.mark.parametrize('changed', ['package/study/worker.py', 'package/sba.py', 'yamls/recipe.yaml'])
def test_the_commit_tells_whether_the_code_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    for name in ('package/study/worker.py', 'package/sba.py', 'yamls/recipe.yaml', 'results/runs.jsonl'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('one\n')
    author = ['-c', 'user.name=a', '-c', 'user.email=a@b']
    for arguments in (['init', '-q'], ['add', '.'], [*author, 'commit', '-qm', 'one']):
        subprocess.run(['git', '-C', str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(worker, '__file__', str(tmp_path / 'package/study/worker.py'))
    (tmp_path / 'results/runs.jsonl').write_text('two\n')
    assert re.fullmatch('[0-9a-f]{12}', worker.commit())
    (tmp_path / changed).write_text('two\n')
    assert re.fullmatch(r'[0-9a-f]{12}\+', worker.commit()), changed


class TestPlan:
    def test_table_1_has_all_of_its_29_cells_in_seed_order(self) -> None:
        runs = plan('table1', YAMLS, seeds=2)
        assert len(runs) == 58
        assert [run.recipe.seed for run in runs] == [17] * 29 + [18] * 29
        assert 'resnet50 imagenet ba seed 17' in _names(runs)
        assert {run.network for run in runs} == {'alexnet', 'resnet44', 'resnet50', 'vgg16'}

    def test_a_method_is_its_own_recipe_or_its_file_over_the_baseline(self) -> None:
        runs = plan('rivals', YAMLS, datasets=['digits'], methods=['cutout', 'mixup', 'sba'], seeds=1)
        by_method = {run.method: run.recipe for run in runs}
        assert by_method['cutout'].train_dataset['cutout'] == 3
        assert by_method['mixup'].algorithms == {'mixup': {'alpha': 0.2}}
        assert by_method['sba'].algorithms['sba']['fold'] == 8

    def test_rivals_know_every_method_file(self) -> None:
        methods = {run.method for run in plan('rivals', YAMLS, datasets=['digits'], seeds=1)}
        assert methods >= {path.stem for path in (YAMLS / 'methods').glob('*.yaml')} | {'baseline', 'sba_conv'}

    def test_eta_varies_eta_alone(self) -> None:
        runs = plan('eta', YAMLS, networks=['resnet44'], datasets=['cifar10'], seeds=1)
        assert [run.setting.get('eta') for run in runs] == [None, *ETAS]
        assert [run.recipe.algorithms['sba']['eta'] for run in runs[1:]] == list(ETAS)
        assert all(run.recipe.algorithms['sba']['fold'] == 40 for run in runs[1:])

    def test_layers_cuts_every_stage_with_sba_and_latent_ba(self) -> None:
        runs = plan('layers', YAMLS, networks=['resnet8'], seeds=1)
        at = [run.setting['layer'] for run in runs if run.method == 'sba']
        assert at == ['stem', 'stage1', 'stage2', 'stage3', 'head']
        assert [run.setting['layer'] for run in runs if run.method == 'latent_ba'] == at
        assert all(r.recipe.algorithms['sba']['target'] == 'hard' for r in runs if r.method == 'latent_ba')

    def test_search_keeps_to_its_budget_and_repeats(self) -> None:
        runs = plan('search', YAMLS, networks=['resnet8'], seeds=1, trials=12)
        assert runs[0].method == 'baseline' and len(runs) == 13
        costs = [flops_per_image(run.recipe) / flops_per_image(runs[0].recipe) for run in runs]
        assert max(costs) <= MAX_COST, costs
        assert len({run.hash for run in runs}) == 13
        assert _names(runs) == _names(plan('search', YAMLS, networks=['resnet8'], seeds=1, trials=12))

    def test_an_override_of_an_algorithm_reaches_those_who_have_it(self) -> None:
        overrides = ['algorithms.sba.fold=3', 'max_duration=5ep']
        runs = plan('rivals', YAMLS, datasets=['digits'], methods=['baseline', 'sba'], seeds=1, overrides=overrides)
        assert [run.recipe.max_duration for run in runs] == ['5ep', '5ep']
        assert [run.recipe.algorithms.get('sba', {}).get('fold') for run in runs] == [None, 3]

    def test_epochs_scale_multiplies_what_a_method_has(self) -> None:
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
    def test_the_hash_tells_models_apart_and_nothing_else(self, override: str, same: bool) -> None:
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
    def test_what_is_not_there_is_named(self, names: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=re.escape(said)):
            plan('rivals', YAMLS, **names)


class TestCost:
    def test_of_a_plain_step_is_that_of_its_products(self) -> None:
        """Of digits_net: forward, gradient of the weights, and gradient of the input but for the first layer's."""
        first = 2 * 64 * (3 * 9) * 32
        others = 2 * 64 * (32 * 9) * 64 + 2 * 16 * (64 * 9) * 128 + 2 * 128 * 10
        assert _cost('digits_baseline') == 2 * first + 3 * others

    def test_of_sba_is_that_of_the_tail(self) -> None:
        head, fold = 3 * 2 * 128 * 10, 8
        assert _cost('digits_sba') == pytest.approx(_cost('digits_baseline') + 0.5 * fold * head)
        above_conv2, fold = 3 * (2 * 16 * (64 * 9) * 128 + 2 * 128 * 10), 4
        assert _cost('digits_sba_conv') == pytest.approx(_cost('digits_baseline') + 0.5 * fold * above_conv2)

    def test_of_a_dense_basis_counts_the_projection(self) -> None:
        identity, normalized = (
            _cost('digits_sba', f'algorithms.sba.vicinity={{basis: {basis}}}') for basis in ('identity', 'normalized')
        )
        assert normalized - identity == pytest.approx(0.5 * 4 * 2 * 128**2)

    def test_of_several_layers_is_their_mean(self) -> None:
        of = {
            layers: _cost('digits_sba', f'algorithms.sba.layers={layers}')
            for layers in ('conv2', 'head', '[conv2,head]')
        }
        assert of['[conv2,head]'] == pytest.approx((of['conv2'] + of['head']) / 2)

    def test_of_rivals(self) -> None:
        plain = _cost('digits_baseline')
        assert _cost('digits_cutout_ba2') == 2 * plain
        assert flops_per_image(load([YAMLS / 'digits_baseline.yaml', YAMLS / 'methods/sam.yaml'])) == 1.1 * plain

    def test_of_a_whole_training(self) -> None:
        recipe = load([YAMLS / 'resnet44_cifar10_baseline.yaml', YAMLS / 'methods/twice.yaml'])
        assert training_flops(recipe) == 2 * 200 * 50_000 * flops_per_image(recipe)
        recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['train_dataset.subset=5000', 'max_duration=10ba'])
        assert training_flops(recipe) == pytest.approx(10 * 64 * flops_per_image(recipe), rel=0.02)
        recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=1000sp'])
        assert training_flops(recipe) == 1000 * flops_per_image(recipe)
        with pytest.raises(UserError, match="max_duration: expected epochs, batches or samples, got '100tok'"):
            training_flops(load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=100tok']))


class TestRuns:
    """Every command here runs in a folder of its own, as a user would run it."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def _study(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, '-m', 'composer_sba.study', *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def _finish(self, *arguments: str) -> tuple[int, str]:
        process = self._study(*arguments)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def test_a_failure_is_told_and_the_others_go_on(self, tmp_path: Path) -> None:
        recipes = tmp_path / 'recipes'
        (recipes / 'methods').mkdir(parents=True)
        (recipes / 'digits_baseline.yaml').write_text(f'extends: {YAMLS}/digits_baseline.yaml\nmax_duration: 1ep\n')
        (recipes / 'methods' / 'lost.yaml').write_text('train_dataset: {name: cifar10, local: nowhere}\n')
        (recipes / 'methods' / 'sba.yaml').write_text('algorithms: {sba: {}}\n')
        arguments = ['rivals', '--recipes', str(recipes), '--seeds', '1', '--jobs', '2', *IN_MEMORY]
        code, said = self._finish(*arguments)
        assert code == 1, said
        assert 'digits digits lost seed 17: FAILED with code 2' in said and 'nowhere does not exist' in said
        assert 'digits digits sba seed 17: ' in said and '% error in' in said
        assert {record['method'] for record in read(Path('results/rivals.jsonl'))} == {'baseline', 'sba'}

        code, said = self._finish(*arguments, '--methods', 'baseline', 'sba')
        assert code == 0 and '2 runs, 2 of them in results/rivals.jsonl' in said, said
        assert len(read(Path('results/rivals.jsonl'))) == 2

    def test_killed_and_started_again_it_goes_on_and_loses_nothing(self) -> None:
        arguments = ['rivals', *DIGITS, '--methods', 'sba', '--seeds', '1', '--epochs-scale', '0.5', *IN_MEMORY]
        process = self._study(*arguments)
        deadline = time.monotonic() + 120
        while not list(Path('runs/study').glob('*/ep2-*.pt')) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read(Path('results/rivals.jsonl')) == []
        code, said = self._finish(*arguments)
        assert code == 0, said
        code, said = self._finish(*arguments, '--results', 'unbroken')
        assert code == 0, said
        (resumed,), (unbroken,) = read(Path('results/rivals.jsonl')), read(Path('unbroken/rivals.jsonl'))
        assert len(unbroken['epochs']) == 6
        curves = [[(e['epoch'], e['accuracy'], e['loss']) for e in run['epochs']] for run in (resumed, unbroken)]
        assert curves[0] == curves[1]
        assert not list(Path('runs/study').glob('*/*.pt')), 'checkpoints of finished runs are left'

    def test_a_record_says_what_ran_and_holds_no_path(self) -> None:
        arguments = ['rivals', *DIGITS, '--methods', 'sba', '--seeds', '1', '--epochs-scale', '0.5', *IN_MEMORY]
        code, said = self._finish(*arguments)
        assert code == 0, said
        (record,) = read(Path('results/rivals.jsonl'))
        accuracies = sorted(epoch['accuracy'] for epoch in record['epochs'][-5:])
        assert record['accuracy'] == accuracies[2]
        assert record['train_samples'] == 1437 and record['seed'] == 17
        assert record['flops'] == pytest.approx(6 * 1437 * _cost('digits_sba'))
        assert record['images_per_second'] == pytest.approx(6 * 1437 / record['train_seconds'], rel=0.01)
        assert str(Path.cwd()) not in json.dumps(record) and 'runs/study' not in json.dumps(record)

    def test_dry_run_trains_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['table1', '--recipes', str(YAMLS), '--dry-run', '--device', 'gpu', '--tflops', '100']) == 0
        said = capsys.readouterr().out
        assert '87 runs, 0 of them' in said and 'resnet50' in said and 'given' in said
        assert not Path('runs').exists() and not Path('results').exists()

    def test_a_mistake_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(['rivals', '--networks', 'resnet9']) == 2
        assert capsys.readouterr().err.count('\n') == 1
        assert main(['rivals', *DIGITS, '--dry-run', '--set', 'load_path=x.pt']) == 2
        assert 'load_path: a study trains from the beginning' in capsys.readouterr().err

    @pytest.mark.parametrize('jobs', ['0', '-1', 'x'])
    def test_less_than_one_job_is_refused(self, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match='2'):
            main(['rivals', *DIGITS, '--dry-run', '--jobs', jobs])
        assert f"argument --jobs: expected an integer >= 1, got '{jobs}'" in capsys.readouterr().err

    def test_smoke(self) -> None:
        """``make study-smoke``: every method on the digits with two seeds, and the report."""
        target = (ROOT / 'Makefile').read_text().partition('study-smoke: $(INSTALLED)\n')[2].partition('\n\n')[0]
        commands = target.replace('\\\n', ' ').strip().splitlines()
        assert len(commands) == 2, commands
        for command in commands:
            arguments = command.split('composer_sba.study ')[1].split()
            code, said = self._finish(*arguments)
            assert code == 0, said
        runs = read(Path('runs/study-smoke/rivals.jsonl'))
        methods = {run['method'] for run in runs}
        assert methods >= {path.stem for path in (YAMLS / 'methods').glob('*.yaml')} | {'baseline', 'sba_conv'}
        assert len(runs) == 2 * len(methods)
        # Three epochs are enough to be far from chance, but for weights that are averaged over more than that
        worst = min((run for run in runs if run['method'] != 'ema'), key=lambda run: run['accuracy'])
        assert worst['accuracy'] > 0.5, f'{worst["method"]}: {100 * worst["accuracy"]:.1f} %'
        page = Path('runs/study-smoke/report.md').read_text()
        assert '| label smoothing |' in page and '95 %' in page
