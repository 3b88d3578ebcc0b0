"""The command: exit codes, what it prints and what it leaves behind, in process and under Composer's launcher.

pytest tests/test_train.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load, to_yaml
from composer_sba.study.runner import Curve
from composer_sba.summary import Summary
from composer_sba.train import main, train
from programs import start

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
EVALUATIONS = [
    {'epoch': epoch, 'seconds': 1.0, 'accuracy': 0.5, 'loss': 1.0, 'calibration_error': 0.1, 'train_loss': 2.0}
    for epoch in (-2, -1)  # a run of two batches evaluates in epoch 1
]
SHORT = ['max_duration=2ba', 'global_train_batch_size=32', 'eval_subset_num_batches=1', 'progress_bar=false']


@pytest.fixture(autouse=True)
def _elsewhere(few_digits: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where data/digits has a few digits."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'data').mkdir()
    (folder / 'data' / 'digits').symlink_to(few_digits)
    monkeypatch.chdir(folder)


def test_a_run_leaves_checkpoint_recipe_and_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / 'run'
    loggers = f'loggers={{file: {{filename: {tmp_path}/log.txt}}, tensorboard: {{log_dir: {tmp_path}/tb}}}}'
    assert main(['-f', RECIPE, *SHORT, f'save_folder={folder}', 'algorithms.sba.augment_prob=1', loggers]) == 0
    assert (folder / 'latest-rank0.pt').exists()
    assert load(folder / 'recipe.yaml').max_duration == '2ba'
    assert 'sba/kl' in (tmp_path / 'log.txt').read_text()
    assert any((tmp_path / 'tb').rglob('events.*'))
    output = capsys.readouterr()
    rows = ['eval accuracy', 'eval cross-entropy', 'eval calibration error', 'train loss', 'images/s', 'wall time']
    for row in [*rows, '100.0 % of steps', 'SBA KL']:
        assert row in output.out
    assert output.err == ''


def test_an_evaluation_belongs_to_the_epoch_in_which_it_ran(tmp_path: Path) -> None:
    epochs = ['max_duration=2ep', 'train_subset_num_batches=4', 'eval_interval=2ba', *SHORT[1:]]
    summary = Summary()
    train(load(RECIPE, [*epochs, f'save_folder={tmp_path}/epochs']), summary=summary)
    assert [each['epoch'] for each in summary.evaluations] == [1, 2]


def test_the_last_batch_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, ended = [], Summary.eval_end
    monkeypatch.setattr(Summary, 'eval_end', lambda *args: (batches.append(int(args[1].timestamp.batch)), ended(*args)))
    given = ['max_duration=5ba', 'eval_interval=2ba', 'eval_last_epochs=5', *SHORT[1:]]
    train(load(RECIPE, [*given, f'save_folder={tmp_path}/odd']))
    train(load(RECIPE, [*given, f'save_folder={tmp_path}/even', 'max_duration=4ba']))
    assert batches == [2, 4, 5, 2, 4]


class Store:
    """An object store that holds some files and cannot be written."""

    def __init__(self, *files: str) -> None:
        self.files = files

    def get_object_size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(name)
        return 1

    def upload_object(self, *names: str) -> None:
        raise RuntimeError('no credentials')


def test_a_run_in_an_object_store_is_not_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load(RECIPE, [*SHORT, 'save_folder=s3://bucket/run'])
    monkeypatch.setattr('composer_sba.train.maybe_create_object_store_from_uri', lambda uri: Store('run/recipe.yaml'))
    with pytest.raises(UserError, match='save_folder: s3://bucket/run holds a run: choose another run_name'):
        train(recipe)
    monkeypatch.setattr('composer_sba.train.maybe_create_object_store_from_uri', lambda uri: Store())
    monkeypatch.setattr('composer_sba.train.build_trainer', lambda *args: pytest.fail('nothing is in the way'))
    with pytest.raises(pytest.fail.Exception, match='nothing is in the way'):
        train(recipe)


def test_files_that_an_object_store_refuses_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('composer_sba.train.maybe_create_object_store_from_uri', lambda uri: Store())
    assert main(['-f', RECIPE, *SHORT, f'save_folder={tmp_path}/run']) == 2
    error = capsys.readouterr().err
    assert 'recipe.yaml cannot be written: no credentials' in error and error.count('\n') == 1, error


def test_a_model_card_with_an_odd_name_does_not_spoil_a_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr('composer_sba.train.model_card', lambda *args: 'caf\udce9')  # a folder that is not UTF-8
    assert main(['-f', RECIPE, *SHORT, f'save_folder={tmp_path}/run']) == 0
    assert (tmp_path / 'run' / 'model_card.md').read_text(encoding='utf-8') == 'caf?'


def test_the_model_card_describes_the_run(few_digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = [f'{section}.local={few_digits}' for section in ('train_dataset', 'eval_dataset')]
    assert main(['-f', RECIPE, *SHORT, *data, f'save_folder={tmp_path}', 'run_name=two|steps']) == 0
    printed, card = capsys.readouterr().out, (tmp_path / 'model_card.md').read_text()
    _, front, text = card.split('---\n', 2)
    matter = OmegaConf.create(front)
    assert matter.license is None and matter.pipeline_tag == 'image-classification'
    assert '\n# two|steps\n' in text and 'trained with sba by composer-sba' in text
    assert 'predict --checkpoint latest-rank0.pt FOLDER' in text
    assert '| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |' in text and '8x8 pixels' in text
    assert '| train_dataset | digits, train, 190 images |' in text and 'digits, val, 40 images' in text
    for row in evaluation_rows(printed):
        title, value = (cell.strip() for cell in row.strip('│').split('│'))
        assert f'| {title} | {value} |' in text
    assert f'| torch | {version("torch")} |' in text
    (tmp_path / 'card.yaml').write_text(text.split('```yaml\n')[1].split('```')[0])
    assert load(tmp_path / 'card.yaml') == load(tmp_path / 'recipe.yaml')


def test_the_demo_learns_the_digits(digits_folder: Path) -> None:
    """In half of the demo's epochs; the demo itself promises 95 %."""
    keys = [f'local={digits_folder}', 'in_memory=true']
    data = [f'{section}.{key}' for section in ('train_dataset', 'eval_dataset') for key in keys]
    trainer = train(load(RECIPE, [*data, 'max_duration=6ep', 'progress_bar=false', 'save_folder=null']))
    accuracy = trainer.state.eval_metric_values['MulticlassAccuracy'].item()
    assert accuracy >= 0.95, f'{100 * accuracy:.1f} %'


def test_the_saved_recipe_trains_again_beside_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f'save_folder={tmp_path}/${{run_name}}', f'loggers.file.filename="{tmp_path}/${{run_name}}/log.txt"']
    assert main(['-f', RECIPE, *SHORT, 'run_name=first', *keys]) == 0
    first, second = tmp_path / 'first', tmp_path / 'second'
    before = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert main(['-f', str(first / 'recipe.yaml')]) == 2
    assert f'{first} holds a run: choose another run_name' in capsys.readouterr().err
    assert main(['-f', str(first / 'recipe.yaml'), 'run_name=second']) == 0
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == before
    weights = [
        torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model'] for folder in (first, second)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    recipes = [(folder / 'recipe.yaml').read_text() for folder in (first, second)]
    assert recipes[0].replace('run_name: first', 'run_name: second') == recipes[1]
    assert {path.name for path in second.iterdir()} == {path.name for path in first.iterdir()}


def test_overrides_do_not_replace_a_run_of_the_same_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ['-f', RECIPE, *SHORT, f'save_folder={tmp_path}/${{run_name}}']
    assert main(again) == 0
    saved = (tmp_path / 'digits_sba' / 'latest-rank0.pt').stat().st_mtime_ns
    assert main([*again, 'algorithms.sba.eta=1']) == 2
    assert 'digits_sba holds a run: choose another run_name' in capsys.readouterr().err
    assert (tmp_path / 'digits_sba' / 'latest-rank0.pt').stat().st_mtime_ns == saved
    assert main([*again, 'algorithms.sba.eta=1', 'run_name=eta1']) == 0
    assert main([*again, 'algorithms.sba.eta=1', 'save_overwrite=true']) == 0
    assert (tmp_path / 'digits_sba' / 'latest-rank0.pt').stat().st_mtime_ns > saved


def test_autoresume_resumes_a_run_and_never_restarts_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    again = ['-f', RECIPE, *SHORT, f'save_folder={tmp_path / "run"}', 'save_overwrite=false']
    assert main(again) == 0
    assert main(again) == 2
    assert 'holds a run' in capsys.readouterr().err
    assert main([*again, 'autoresume=true', 'max_duration=4ba', 'save_interval=1ba']) == 0
    assert main([*again, 'autoresume=true', 'max_duration=4ba']) == 2
    assert 'has reached 4ba' in capsys.readouterr().err
    saved = torch.load(tmp_path / 'run' / 'latest-rank0.pt', weights_only=False)['state']['timestamp']
    assert saved['Timestamp']['batch'] == 4


@pytest.mark.parametrize('duration', ['0ba', '0ep'])
def test_a_run_of_no_steps_evaluates_what_it_would_start_from(
    duration: str, few_digits: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a schedule that divides by the duration, a moving average of the weights, and no training data left."""
    folder, data = tmp_path / 'run', [f'eval_dataset.local={few_digits}', 'algorithms.ema={half_life: 1ba}']
    schedule = 'scheduler={name: cosine_annealing_with_warmup, t_warmup: 1ba}'
    train_data = f'train_dataset.local={few_digits}'
    assert main(['-f', RECIPE, 'max_duration=2ba', *data, train_data, schedule, f'save_folder={folder}']) == 0
    trained = evaluation_rows(capsys.readouterr().out)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = ['-f', RECIPE, f'max_duration={duration}', *data, schedule, 'train_dataset.local=nowhere']
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)  # training then chooses the number of threads
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    resumed = [f'save_folder={folder}', 'save_overwrite=false', 'autoresume=true']
    for more in (resumed, [f'load_path={folder}/latest-rank0.pt'], [f'load_path={folder}/ep0-ba2-rank0.pt']):
        assert main([*again, *more]) == 0
        printed = capsys.readouterr().out
        assert evaluation_rows(printed) == trained and 'digits_sba: 2 steps' in printed
        assert not re.search('train loss|SBA|training speed', printed), printed  # of the training before
        assert f'{folder}/' in printed.replace('\n', '').replace('│', '').replace(' ', '')
    named = [*again, *resumed, f'load_path={folder}/ep0-ba2-rank0.pt']  # not the latest one
    assert main(named) == 0
    assert 'ep0-ba2-rank0.pt' in capsys.readouterr().out.replace('\n', '').replace('│', '').replace(' ', '')
    assert main([*named, 'load_path=nowhere.pt']) == 2
    assert 'load_path: cannot load the checkpoint nowhere.pt' in capsys.readouterr().err
    assert main([*again, f'save_folder={tmp_path}/new']) == 0
    printed = capsys.readouterr().out
    assert 'untrained' in printed and 'digits_sba: 0 steps' in printed and evaluation_rows(printed) != trained
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not (tmp_path / 'new').exists()


def evaluation_rows(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if '│ eval ' in line]


@pytest.mark.parametrize(
    ('override', 'line'),
    [
        ('model.num_classes=11', 'command line: model.num_classes: expected 10, as train_dataset digits has, got 11'),
        ('train_dataset.name=cifar10', 'command line: train_dataset: data/cifar10 does not exist'),
        ('algorithms.sba.layers=hed', "command line: algorithms.sba.layers: The model has no layer 'hed'"),
        (
            'algorithms.manifold_mixup.layers=hed',
            "command line: algorithms.manifold_mixup.layers: The model has no layer 'hed'",
        ),
        ('precision=amp_bf16', 'command line: precision: expected fp32, which is all that a CPU has, got amp_bf16'),
        ('scale_schedule_ratio=0.001', 'command line: scale_schedule_ratio: 0.001 shortens max_duration'),
        ('device=gpu', 'command line: device: expected a device of this machine, got gpu (DeviceGPU cannot be created'),
        ('device=gpu', '): remove the key, or set device=cpu'),
        ('python_log_level=loud', "digits_sba.yaml: Composer's Trainer: Unknown level: 'LOUD'"),
    ],
)
def test_a_mistake_found_while_building(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, line: str
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['-f', RECIPE, *SHORT, 'device=cpu', 'save_folder=null', override]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and line in error and '\n' not in error


def test_a_batch_that_does_not_divide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('composer_sba.recipe.build.dist.get_world_size', lambda: 3)
    assert main(['-f', RECIPE, 'save_folder=null']) == 2
    assert 'global_train_batch_size: expected a multiple of the 3 devices, got 64' in capsys.readouterr().err


def test_dry_run_prints_the_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(['-f', RECIPE, '--dry-run', 'seed=5']) == 0
    printed = capsys.readouterr().out
    for line in ('seed: 5', 'norm_stats: raw', 'noise_scale: rms', 'nesterov: false', 't_max: 1dur', 'augment: true'):
        assert f'{line}\n' in printed, line  # of the recipe, SBA, its vicinity, optimizer, scheduler and dataset
    (tmp_path / 'again.yaml').write_text(printed)
    assert to_yaml(load(tmp_path / 'again.yaml')) == printed


def test_a_traceback_for_who_asks_for_it_among_the_overrides() -> None:
    with pytest.raises(UserError, match='sede: unknown key'):
        main(['-f', RECIPE, 'max_duration=2ba', '--traceback', 'sede=3'])


def test_under_the_launcher(tmp_path: Path) -> None:
    """As a user types it: the only test in which Python itself starts, once for the launcher and once for the rank."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith(('RANK', 'WORLD_SIZE'))}
    command = [Path(sys.executable).with_name('composer'), ROOT / 'train.py', '-f', RECIPE, *SHORT]
    command += [f'save_folder={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, 'digits_sba: loading PyTorch and Composer ...\n')
    assert 'eval accuracy' in done.stdout and (tmp_path / 'recipe.yaml').exists()


def test_a_mistake_under_the_launcher(tmp_path: Path) -> None:
    arguments = ['-n', '1', ROOT / 'train.py', '-f', RECIPE, 'algorithms.sba.fold=0']
    with start(ROOT / 'tests' / 'forked_launcher.py', *arguments, output=tmp_path / 'log') as program:
        assert program.wait() == 2, program.said
    before = ('ERROR:composer.cli', 'Waiting up to 30 seconds', 'Global rank 0', 'digits_sba: loading')
    assert [line for line in program.said.splitlines() if not line.startswith(before)] == [
        'error: command line: algorithms.sba.fold: Expected fold to be an integer >= 1, got 0.'
    ]


@pytest.mark.parametrize(
    ('name', 'make', 'state'),
    [
        (
            'Summary',
            Summary,
            {'sums': {'sba/kl': 6.0}, 'counts': {'sba/kl': 2}, 'last_evaluation': {'CrossEntropy': 1.0}},
        ),
        ('Curve', lambda: Curve(lambda share: None), {'epochs': EVALUATIONS, 'losses': [], 'wall_seconds': 100.0}),
    ],
)
def test_a_checkpoint_of_before_one_summary_resumes(
    name: str, make: Callable[[], Summary], state: dict[str, Any], tmp_path: Path
) -> None:
    again = [*SHORT, f'save_folder={tmp_path}', 'save_overwrite=false', 'algorithms.sba.augment_prob=1']
    train(load(RECIPE, again), summary=make())
    path = (tmp_path / 'latest-rank0.pt').resolve()
    saved = torch.load(path, weights_only=False)
    assert name in saved['state']['callbacks']
    saved['state']['callbacks'][name] = state
    torch.save(saved, path)
    resumed = make()
    train(load(RECIPE, [*again, 'autoresume=true', 'max_duration=3ba']), summary=resumed)
    kl = resumed.mean('sba/kl')
    assert kl == pytest.approx(2, abs=0.5) if name == 'Summary' else kl is not None and kl < 1, kl
    assert [each['epoch'] for each in resumed.evaluations] == ([1] if name == 'Summary' else [-2, -1, 1])
    assert (resumed.wall_seconds > 100) == (name == 'Curve'), resumed.wall_seconds
