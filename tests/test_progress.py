"""What training says: facts, lines and bars, resumed and interrupted runs, the summary, threads and TensorBoard's file.

Run: pytest tests/test_progress.py
"""

import io
import logging
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from composer_sba import SBA, progress
from composer_sba.progress import EpochLines
from composer_sba.train import main
from small_training import logged, make_trainer

DIGITS = str(Path(__file__).parent.parent / 'yamls' / 'digits_sba.yaml')
LINE = r'epoch \d/2 loss [\d.]+ accuracy [\d.]+ % [\d,]+ img/s augmented 100 % KL [\d.]+'


@pytest.fixture
def run(few_digits: Path, tmp_path: Path):
    """Run the command on 190 images, three batches an epoch, each augmented; return its exit code."""
    data = [f'{section}_dataset.{key}' for section in ('train', 'eval') for key in (f'local={few_digits}',)]
    data += ['train_dataset.in_memory=true', 'eval_dataset.in_memory=true', 'algorithms.sba.augment_prob=1']
    return lambda *keys: main(['-f', DIGITS, f'save_folder={tmp_path}/${{run_name}}', *data, *keys])


@pytest.mark.parametrize('terminal', [True, False])
def test_an_epoch_leaves_one_line_and_on_a_terminal_shows_a_bar(
    terminal: bool, run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: terminal)
    monkeypatch.setattr(progress, 'tqdm', partial(progress.tqdm, mininterval=0))  # a fast machine would skip the last
    with progress.tqdm(total=1, file=io.StringIO()):  # such as that of an earlier run that has failed
        assert run('max_duration=2ep', 'save_folder=null') == 0
    shown = re.split(r'[\r\n]+', capfd.readouterr().err.strip())
    lines = [each.strip() for each in shown if 'img/s' in each]
    assert len(lines) == 2 and all(re.fullmatch(LINE, line) for line in lines), lines
    assert all(len(each.rstrip()) <= 80 for each in shown), max(shown, key=len)
    bars = [each for each in shown if re.search(r'epoch [12]/2 +\d+%\|.* 3/3 .*loss [\d.e-]+, accuracy [\d.]+ %', each)]
    assert bool(bars) == terminal, shown
    assert len(shown) == 2 or terminal, shown


def test_labels_that_were_mixed_give_no_warning(run) -> None:
    """Warnings are errors here; Composer warns if rounded probabilities add up to less than 1."""
    assert run('max_duration=4ep', 'save_folder=null', 'algorithms.manifold_mixup={}') == 0


def test_a_line_has_no_value_of_an_earlier_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = make_trainer([SBA(augment_prob=lambda state: float(state.timestamp.epoch == 0))])
    lines = EpochLines(bar=False)
    trainer.logger.destinations = (*trainer.logger.destinations, lines)
    trainer.state.callbacks.append(lines)
    trainer.fit()
    first, second = capsys.readouterr().err.splitlines()
    assert re.search(r'epoch 1/2 .* augmented 100 % KL [\d.]+$', first), first
    assert re.search(r'epoch 2/2 .* augmented 0 %$', second), second


@pytest.mark.parametrize('evaluates', [True, False])
def test_each_fit_of_a_trainer_has_its_lines(evaluates: bool, capsys: pytest.CaptureFixture[str]) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)
    options = {'eval_dataloader': torch.utils.data.DataLoader(data, 8), 'eval_interval': '9ep' if evaluates else 0}
    trainer, log = make_trainer([], max_duration=None, **options)
    lines = EpochLines(bar=False)
    trainer.logger.destinations = (*trainer.logger.destinations, lines)
    trainer.state.callbacks.append(lines)
    for _ in range(2):
        trainer.fit(duration='1ep')
    trainer.close()
    said = capsys.readouterr().err.splitlines()
    losses = logged(log, 'loss/train/total')
    means = [f'{sum(each) / 3:.3g}' for each in (losses[:3], losses[3:])]
    kind = 'accuracy' if evaluates else 'train'
    assert [line.split(' ')[:5] for line in said] == [
        ['epoch', f'{epoch}/{epoch}', 'loss', mean, kind] for epoch, mean in enumerate(means, 1)
    ], said


def test_a_run_that_ends_within_an_epoch_has_its_line(run, capfd: pytest.CaptureFixture[str]) -> None:
    assert run('max_duration=4ba') == 0
    said = capfd.readouterr().err.splitlines()
    assert [re.match(r'epoch \d loss .* accuracy ', line) is not None for line in said] == [True, True], said


@pytest.mark.parametrize(
    ('keys', 'evaluated'),
    [
        (['max_duration=3ep', 'eval_interval=2ep'], [False, True, True]),  # epoch 3 when training has ended
        (['max_duration=2ep', 'eval_interval=4ba'], [False, True]),  # within epoch 2, and when training has ended
        (['max_duration=2ep', 'eval_dataset=null'], [False, False]),
    ],
)
def test_the_line_of_the_last_epoch_has_the_last_evaluation(
    keys: list[str], evaluated: list[bool], run, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(*keys) == 0
    out, err = capfd.readouterr()
    lines = [re.match(r'epoch (\d)/\d loss [\d.]+ (train|accuracy) ([\d.]+) % ', line) for line in err.splitlines()]
    assert [(match[1], match[2] == 'accuracy') for match in lines] == [
        (str(epoch), each) for epoch, each in enumerate(evaluated, 1)
    ], err
    final = re.search(r'eval accuracy +│ ([\d.]+) %', out)
    assert not evaluated[-1] or float(lines[-1][3]) == pytest.approx(float(final[1]), abs=0.01), (err, out)


def test_the_facts_come_first_and_the_summary_last(run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run('max_duration=2ep', 'algorithms.channels_last={}') == 0
    said = capsys.readouterr().out
    block = said.partition('digits_sba: 6 steps')[0].splitlines()
    assert max(map(len, block)) <= 80 and '         p = 1, η = 0.1; an augmented step' in said, block
    commands = [line for line in said.replace('\\\n', '').splitlines() if line.startswith('  composer-sba')]
    said = ' '.join(said.split())
    for fact in (
        'digits_sba network digits_net: 94,986 parameters',
        'data digits: 190 images to train, 40 to evaluate, 8x8 pixels, 10 classes',
        'device CPU (1 thread), fp32',
        'steps 6: 2 epochs of 3 batches of 64 images',
        'SBA cuts head (128 features), M = 8 (4 Gaussian, 4 dropout), p = 1, η = 0.1; an augmented step costs 1.00',
        'also channels_last',
    ):
        assert fact in said, (fact, said)
    assert said.index('also channels_last') < said.index('digits_sba: 6 steps')
    summary = said[said.index('digits_sba: 6 steps') :]
    assert re.search(r'eval accuracy │ [\d.]+ % \(\d+ of 40\)', summary), summary
    assert re.search(r'best accuracy │ [\d.]+ % \(\d+ of 40\), epoch [12] │', summary), summary
    assert '│ device │ CPU (1 thread) │' in summary
    folder = str(tmp_path / 'digits_sba')
    assert [shlex.split(each) for each in commands] == [
        ['composer-sba', 'predict', '--checkpoint', f'{folder}/latest-rank0.pt', 'FOLDER'],
        ['composer-sba', 'evaluate', '--checkpoint', f'{folder}/latest-rank0.pt'],
        [
            *('composer-sba', 'train', '-f', f'{folder}/recipe.yaml', 'algorithms.sba=null'),
            'run_name=digits_sba_baseline',
        ],
    ]


def test_the_line_of_many_cuts_is_folded_between_its_facts(run, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = 'algorithms.sba.layers=[conv1,conv2,conv3,head]'
    assert run('max_duration=1ba', 'save_folder=null', cuts, 'algorithms.sba.fold=16') == 0
    _, _, block = capsys.readouterr().out.partition('SBA      ')
    folded = [line.strip() for line in block.partition('digits_sba: ')[0].splitlines()]
    assert len(folded) > 3 and max(map(len, folded)) <= 71, folded
    assert all(a[-1] in ',;' or b.startswith('or ') for a, b in zip(folded, folded[1:], strict=False)), folded
    assert any('M = 16 (8 Gaussian, 8 dropout),' in line for line in folded), folded
    assert any(line.startswith('p = 1, η = 0.1; ') for line in folded), folded


def test_a_resumed_run_says_where_it_goes_on(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run('max_duration=4ba', 'save_interval=1ba') == 0
    assert 'resumed from' not in capsys.readouterr().out
    assert run('max_duration=6ba', 'save_interval=1ba', 'autoresume=true') == 0
    said = capsys.readouterr().out
    assert said.startswith('digits_sba: resumed from epoch 2, batch 1\n'), said
    assert re.search(r'│ resumed +│ resumed from epoch 2, batch 1 ', said), said


def test_a_run_that_resumes_between_epochs_says_so(run, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a warning, which is an error here, that the checkpoint has no state of the lines."""
    assert run('max_duration=1ep', 'progress_bar=false') == 0
    assert run('max_duration=2ep', 'autoresume=true') == 0
    said = capsys.readouterr().out
    assert '\ndigits_sba: resumed after epoch 1\n' in said
    assert re.search(r'^steps +3: 1 epoch of 3 batches of 64 images', said, re.MULTILINE), said


@pytest.mark.parametrize(
    ('keys', 'said'),
    [
        (['autoresume=true'], 'interrupted in epoch 2: the same command resumes it'),
        ([], 'interrupted in epoch 2: the same command with autoresume=true resumes it'),
        (['save_folder=null'], 'interrupted in epoch 2'),
    ],
)
def test_an_interrupted_run_says_how_it_goes_on(
    keys: list[str], said: str, run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self, state, logger) -> None:
        if state.timestamp.batch == 4:
            sys.exit(130)  # as Composer does on Ctrl-C

    monkeypatch.setattr(EpochLines, 'batch_end', stop)
    assert run('max_duration=2ep', *keys) == 130
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_what_is_said_changes_nothing(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations are counted without a trace in random numbers, weights or statistics."""
    keys = ['max_duration=3ba', 'model.dropout=0.3', 'algorithms.sba.augment_prob=0.5']
    assert run(*keys, 'run_name=said') == 0
    monkeypatch.setattr('composer_sba.train.facts', lambda *_: '')
    monkeypatch.setattr('composer_sba.train.operations_of_step', lambda *_: None)
    assert run(*keys, 'run_name=unsaid', 'progress_bar=false') == 0
    assert 'parameters' not in capsys.readouterr().out.partition('unsaid')[2]
    said, unsaid = (
        torch.load(tmp_path / name / 'latest-rank0.pt', weights_only=False)['state']['model']
        for name in ('said', 'unsaid')
    )
    assert all(torch.equal(said[name], unsaid[name]) for name in said)


def test_a_small_network_is_trained_on_one_thread(
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert run('max_duration=1ba', 'save_folder=null') == 0
    assert 'CPU (2 threads), fp32' in capsys.readouterr().out
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert run('max_duration=1ba', 'save_folder=null') == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert 'CPU (1 of 2 threads, enough for 0.9 GFLOP a step), fp32' in said, said
    assert 'digits_sba: 1 step ' in said, said
    assert torch.get_num_threads() == 2
    model = 'model={name: resnet_cifar, depth: 44, num_classes: 10}'
    assert run('max_duration=1ba', 'save_folder=null', model, 'global_train_batch_size=128') == 0
    assert 'CPU (2 threads), fp32' in capsys.readouterr().out


def test_tensorboard_has_one_file_with_everything(run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run('max_duration=2ep', 'progress_bar=false', f'loggers.tensorboard.log_dir={tmp_path}/tb') == 0
    (file,) = (path for path in (tmp_path / 'tb').rglob('*') if path.is_file())
    events = EventAccumulator(str(file))
    events.Reload()
    assert len(events.Scalars('sba/kl')) == 6 and len(events.Scalars('metrics/eval/MulticlassAccuracy')) == 2
    assert events.SummaryMetadata('_hparams_/session_start_info').plugin_data.plugin_name == 'hparams'


def test_a_script_has_one_line_of_the_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger='composer_sba.sba'):
        make_trainer([SBA(['block', 'head'], fold=3, augment_prob=0.25)])[0].fit()
    messages = [record.getMessage() for record in caplog.records if record.name == 'composer_sba.sba']
    assert len(messages) == 1, messages
    assert re.fullmatch(
        r'SBA cuts block \(128 features\) or head \(8 features\), M = 3 \(2 Gaussian, 1 dropout\), p = 0.25, η = 0.1; '
        r'an augmented step costs 1[\d.]+ plain ones',
        messages[0],
    ), messages
