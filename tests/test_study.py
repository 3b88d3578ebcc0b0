"""A study trains each of its runs once, whatever is killed, and says what it was.

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

import pytest

from composer_sba.recipe.recipe import load
from composer_sba.study import worker
from composer_sba.study.__main__ import main
from composer_sba.study.flops import flops_per_image
from composer_sba.study.records import read

ROOT = Path(__file__).parent.parent
YAMLS = ROOT / 'yamls'
DIGITS = ['--datasets', 'digits', '--recipes', str(YAMLS)]
IN_MEMORY = ['--set', 'train_dataset.in_memory=true', 'eval_dataset.in_memory=true']


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
        assert record['flops'] == pytest.approx(6 * 1437 * flops_per_image(load(YAMLS / 'digits_sba.yaml')))
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
