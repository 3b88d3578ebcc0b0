"""A study trains each of its runs once, even after a kill, and each record says what was trained.

Run: pytest tests/test_study.py
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from composer_sba import provenance
from composer_sba.recipe.recipe import load
from composer_sba.study.__main__ import main
from composer_sba.study.flops import flops_per_image
from composer_sba.study.plan import plan
from composer_sba.study.records import read_records
from composer_sba.study.runner import Curve, run_all
from composer_sba.study.runs import Run
from composer_sba.train import train
from programs import start

ROOT = Path(__file__).parent.parent
YAMLS = ROOT / 'yamls'
DIGITS = ['--datasets', 'digits', '--recipes', str(YAMLS)]
IN_MEMORY = ['--set', 'train_dataset.in_memory=true', 'eval_dataset.in_memory=true', 'train_dataset.subset=640']
SBA = ['methods', *DIGITS, '--methods', 'sba', '--seeds', '1', '--epochs-scale', '0.5', *IN_MEMORY]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command in an empty folder, with one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')


class TestCommit:
    """The commit in a record is that of the code, or unknown."""

    FILES = ('package/provenance.py', 'package/study/report.py', 'yamls/recipe.yaml', 'results/runs.jsonl')

    @pytest.fixture(autouse=True)
    def _repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in self.FILES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text('one\n')
        self._git('init', '-q')
        monkeypatch.setattr(provenance, '__file__', str(tmp_path / self.FILES[0]))

    def _git(self, *arguments: str) -> None:
        subprocess.run(['git', *arguments], check=True)

    def _commit(self, *files: str) -> None:
        self._git('add', *files)
        self._git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'one')

    @pytest.mark.parametrize('changed', FILES[:3])
    def test_a_plus_marks_code_that_differs_from_it(self, changed: str) -> None:
        self._commit('.')
        Path('results/runs.jsonl').write_text('two\n')
        assert re.fullmatch('[0-9a-f]{12}', provenance.commit())
        Path(changed).write_text('two\n')
        assert re.fullmatch(r'[0-9a-f]{12}\+', provenance.commit()), changed

    def test_it_is_unknown_inside_the_repository_of_another_project(self) -> None:
        self._commit('results/runs.jsonl')  # as with an environment in a project's checkout
        assert provenance.commit() == 'unknown'


@pytest.fixture
def converted(_folder: None, tmp_path: Path, digits_folder: Path) -> None:
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'digits').symlink_to(digits_folder)


def _fail(run: Run, results: Path, shared: object, scratch: Path, folder: Path, *_: object) -> None:
    os.chdir(folder)
    (scratch / f'{run.hash}.log').write_bytes(b'bytes \xff of s3://me:hunter2@host/data\n\n')
    sys.exit(3)


@pytest.mark.usefixtures('converted')
class TestRuns:
    """Studies of a few epochs on the digits."""

    def _run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
        code = main(arguments)
        return code, ''.join(capsys.readouterr())

    def test_a_failure_is_reported_and_the_others_continue(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipes = tmp_path / 'recipes'
        (recipes / 'methods').mkdir(parents=True)
        (recipes / 'digits_baseline.yaml').write_text(f'extends: {YAMLS}/digits_baseline.yaml\nmax_duration: 1ep\n')
        (recipes / 'methods' / 'lost.yaml').write_text('train_dataset: {name: cifar10, local: nowhere}\n')
        (recipes / 'methods' / 'sba.yaml').write_text('algorithms: {sba: {}}\n')
        arguments = ['methods', '--recipes', str(recipes), '--seeds', '1', '--jobs', '2', *IN_MEMORY]
        code, output = self._run(capsys, *arguments)
        assert code == 1, output
        assert 'digits digits lost seed 17: FAILED with code 2' in output and 'nowhere does not exist' in output
        assert 'digits digits sba seed 17: ' in output and '% error in' in output
        assert {record['method'] for record in read_records(Path('results/methods.jsonl'))} == {'baseline', 'sba'}

        code, output = self._run(capsys, *arguments, '--methods', 'baseline', 'sba')
        assert code == 0 and '2 runs, 2 of them in results/methods.jsonl' in output, output
        assert len(read_records(Path('results/methods.jsonl'))) == 2

    def test_a_killed_study_continues_and_loses_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with start('-m', 'composer_sba.study', *SBA, output=tmp_path / 'killed.log') as killed:
            deadline = time.monotonic() + 120
            while not list(Path('runs/study').glob('*/ep2-*.pt')) and time.monotonic() < deadline:
                time.sleep(0.05)
        assert list(Path('runs/study').glob('*/ep*-*.pt')), killed.said
        assert read_records(Path('results/methods.jsonl')) == []
        code, output = self._run(capsys, *SBA)
        assert code == 0, output
        code, output = self._run(capsys, *SBA, '--results', 'uninterrupted')
        assert code == 0, output
        (resumed,) = read_records(Path('results/methods.jsonl'))
        (uninterrupted,) = read_records(Path('uninterrupted/methods.jsonl'))
        assert len(uninterrupted['epochs']) == 6
        curves = [[(e['epoch'], e['accuracy'], e['loss']) for e in run['epochs']] for run in (resumed, uninterrupted)]
        assert curves[0] == curves[1]
        assert not list(Path('runs/study').glob('*/*.pt')), 'checkpoints of finished runs are left'

        # The record describes the run and holds no path
        accuracies = sorted(epoch['accuracy'] for epoch in resumed['epochs'][-5:])
        assert resumed['accuracy'] == accuracies[2]
        assert resumed['train_samples'] == 640 and resumed['seed'] == 17
        assert resumed['flops'] == pytest.approx(6 * 640 * flops_per_image(load(YAMLS / 'digits_sba.yaml')))
        assert resumed['images_per_second'] == pytest.approx(6 * 640 / resumed['train_seconds'], rel=0.01)
        assert str(tmp_path) not in json.dumps(resumed) and 'runs/study' not in json.dumps(resumed)

    def test_the_output_of_a_failure_may_be_anything(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr('composer_sba.study.runner.train_run', _fail)
        code, output = self._run(capsys, *SBA)
        assert code == 1, output
        assert re.search(r'FAILED with code 3, see runs/study/\w+\.log: bytes . of s3://me:<hidden>@host/data;', output)

    @pytest.mark.parametrize(('given', 'threads'), [('3', 3), ('3,2', 3), ('', None), ('0', None), ('many', None)])
    def test_each_run_has_the_given_threads_or_its_share_of_the_cores(
        self, given: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv('OMP_NUM_THREADS', given)
        assert run_all([], [], Path('results/methods.jsonl'), jobs=1, scratch=Path('runs')) == 0
        assert int(os.environ['OMP_NUM_THREADS']) == (threads or len(os.sched_getaffinity(0)))

    # Composer, of the run that has nothing left to train
    @pytest.mark.filterwarnings('ignore:The ``compute`` method of metric')
    @pytest.mark.parametrize('evaluated', [True, False])
    def test_a_run_that_was_killed_before_its_record_is_recorded(
        self, evaluated: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It is trained again only if its last checkpoint came before its last evaluation."""
        overrides = ['progress_bar=false', *IN_MEMORY[1:]]
        (run,) = plan(
            'methods', YAMLS, datasets=['digits'], methods=['sba'], seeds=1, epochs_scale=0.1, overrides=overrides
        )
        curve = Curve(lambda share: None)
        curve.load_state_dict({'wall_seconds': 1000.0})
        train(run.recipe, summary=curve)
        checkpoint = Path('runs/study', run.hash, 'latest-rank0.pt').resolve()
        saved = torch.load(checkpoint, weights_only=False)
        saved['state']['callbacks']['Curve']['epochs'] *= evaluated
        torch.save(saved, checkpoint)
        code, output = self._run(capsys, *SBA, '--epochs-scale', '0.1')
        assert code == 0, output
        (record,) = read_records(Path('results/methods.jsonl'))
        assert record['hash'] == run.hash and len(record['epochs']) == 1
        assert (record['wall_seconds'] > 1000) == evaluated, record['wall_seconds']

    def test_a_record_has_the_images_of_a_whole_epoch(self, capsys: pytest.CaptureFixture[str]) -> None:
        overrides = [*IN_MEMORY[:3], 'train_dataset.subset=128', 'max_duration=5ba', 'eval_interval=5ba']
        code, output = self._run(capsys, 'methods', *DIGITS, '--methods', 'sba', '--seeds', '1', *overrides)
        assert code == 0, output
        (record,) = read_records(Path('results/methods.jsonl'))
        assert record['train_samples'] == 128, record

    @pytest.mark.nightly
    def test_smoke(self, capsys: pytest.CaptureFixture[str]) -> None:
        """``make study-smoke``: every method on the digits with two seeds, and the report."""
        target = (ROOT / 'Makefile').read_text().partition('study-smoke: $(INSTALLED)\n')[2].partition('\n\n')[0]
        commands = target.replace('\\\n', ' ').strip().splitlines()
        assert len(commands) == 2, commands
        for command in commands:
            code, output = self._run(capsys, *command.split('composer_sba.study ')[1].split())
            assert code == 0, output
        runs = read_records(Path('runs/study-smoke/methods.jsonl'))
        methods = {run['method'] for run in runs}
        assert methods >= {path.stem for path in (YAMLS / 'methods').glob('*.yaml')} | {'baseline', 'sba_conv'}
        assert len(runs) == 2 * len(methods)
        # Three epochs suffice to exceed chance by far, except for an average of the weights over a longer time
        worst = min((run for run in runs if run['method'] != 'ema'), key=lambda run: run['accuracy'])
        assert worst['accuracy'] > 0.5, f'{worst["method"]}: {100 * worst["accuracy"]:.1f} %'
        page = Path('runs/study-smoke/report.md').read_text()
        assert '| label smoothing |' in page and '95 %' in page
