"""The command line of the studies: paths, numbers, repeated options and mistakes.

Run: pytest tests/test_study_command.py
"""

from functools import partial
from pathlib import Path
from typing import get_args

import pytest

from composer_sba.study.__main__ import main
from composer_sba.study.arguments import BASES, DTYPES, study_parser
from composer_sba.study.step_report import DTYPES as TIMED_DTYPES
from composer_sba.study.vicinity_figure import draw_vicinity
from composer_sba.vicinity import Basis
from invented_runs import RUNS, record, write

YAMLS = Path(__file__).parent.parent / 'yamls'
DIGITS = ['--datasets', 'digits', '--recipes', str(YAMLS)]
STEP = [
    'step',
    '--networks',
    'digits',
    '--cuts',
    'head',
    '--fold',
    '1',
    '--kinds',
    'sba',
    '--rounds',
    '1',
    '--batch',
    '8',
]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command = ['table1', '--recipes', str(YAMLS), '--networks', 'alexnet', 'resnet50', '--dry-run']
    assert main([*command, '--device', 'gpu', '--tflops', '100']) == 0
    output = capsys.readouterr().out
    assert '30 runs, 0 of them' in output and 'resnet50' in output and 'given' in output
    assert not Path('runs').exists() and not Path('results').exists()


@pytest.mark.parametrize(('gpu', 'rate'), [(True, '15 assumed'), (False, '0.05 assumed')])
def test_a_dry_run_assumes_the_device_that_would_train(
    gpu: bool, rate: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpu)
    assert main(['methods', *DIGITS, '--methods', 'baseline', '--dry-run']) == 0
    assert rate in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'written'),
    [
        (['methods', *DIGITS, '--methods', 'baseline', '--dry-run', '--results=~/other'], ''),
        (['methods', '--datasets', 'digits', '--methods', 'baseline', '--dry-run', '--recipes=~/yamls'], ''),
        (['report', '--results=~/results', '--page=~/pages/results.md'], 'pages/results.md'),
        ([*STEP, '--recipes', str(YAMLS), '--out=~/benchmarks'], 'benchmarks/step-*.md'),
        (['vicinity', '--out=~/vicinity.png'], 'vicinity.png'),
    ],
)
def test_a_tilde_is_the_home_folder(
    arguments: list[str], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands it only at the start of a word, not in ``--out=~/folder``."""
    home = tmp_path / 'home'
    write(home / 'results', *RUNS)
    (home / 'yamls').symlink_to(YAMLS)
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setattr('composer_sba.study.vicinity_figure.draw_vicinity', partial(draw_vicinity, steps=1))
    assert main(arguments) == 0
    assert not Path('~').exists()
    assert not written or list(home.glob(written)), [*home.iterdir()]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['methods', '--networks', 'resnet9'], "--networks: unknown 'resnet9'"),
        (['methods', *DIGITS, '--set', 'load_path=x.pt'], 'load_path: a study trains from scratch'),
        (['methods', *DIGITS, '--set', 'eval_dataset=null'], 'eval_dataset: a study needs one'),
        (['methods', *DIGITS, '--methods', 'baseline', '--epochs-scale', '0.01'], '12ep times 0.01 is less than 1'),
        (['methods', '--recipes', 'nowhere'], '--recipes: nowhere has no <network>_<dataset>_baseline.yaml'),
        (['report', '--results', 'nowhere'], 'nowhere has no finished runs'),
        (['report', '--results', 'results', '--page', 'results'], "Is a directory: 'results'"),
        (['step', '--networks', 'resnet9'], "--networks: unknown 'resnet9'"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path('results'), *RUNS)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and message in error


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        *((['--jobs', jobs], f"argument --jobs: expected an integer >= 1, got '{jobs}'") for jobs in ('0', '-1', 'x')),
        (['--seeds', '1.5'], "argument --seeds: expected an integer >= 1, got '1.5'"),
        *(
            ([f'{option}={number}'], f"argument {option}: must be positive and finite, got '{number}'")
            for option in ('--epochs-scale', '--tflops')
            for number in ('0', '-1', 'nan', 'inf', 'x')
        ),
        (['--seed', '18'], 'unrecognized arguments: --seed 18'),  # not 18 seeds
        (['--method', 'sba'], 'unrecognized arguments: --method sba'),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['methods', *DIGITS, '--dry-run', *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('study', 'option', 'name', 'values'),
    [
        ('methods', '--set', 'overrides', ['seed=1', 'max_duration=2ep']),
        ('methods', '--methods', 'methods', ['sba', 'baseline']),
        ('eta', '--networks', 'networks', ['resnet44', 'vgg16']),
        ('step', '--cuts', 'cuts', ['head', 'input']),
        ('step', '--kinds', 'kinds', ['sba', 'ba']),
        ('step', '--fold', 'folds', ['1', '4']),
    ],
)
def test_a_repeated_option_adds_to_the_first(study: str, option: str, name: str, values: list[str]) -> None:
    together = study_parser().parse_args([study, option, *values])
    repeated = study_parser().parse_args([study, option, values[0], option, values[1]])
    assert list(map(str, getattr(repeated, name))) == values == list(map(str, getattr(together, name)))
    assert getattr(study_parser().parse_args([study]), name) == []


def test_a_step_can_have_every_basis_and_dtype_that_there_is() -> None:
    assert get_args(Basis) == BASES
    assert tuple(TIMED_DTYPES) == DTYPES


@pytest.mark.parametrize(
    ('arguments', 'occupied'),
    [
        (['methods', *DIGITS, '--methods', 'baseline'], 'results'),
        (['methods', *DIGITS, '--methods', 'baseline'], 'runs'),
        ([*STEP, '--recipes', str(YAMLS), '--out', 'reports'], 'reports'),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str], occupied: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError('the work began')

    monkeypatch.setattr('composer_sba.study.runner._Pool', work)
    monkeypatch.setattr('composer_sba.study.step_report.measure', work)
    Path(occupied).write_text('a file\n')
    assert main(arguments) == 2
    assert f"'{occupied}" in capsys.readouterr().err


def test_hours_are_measured_rates_of_the_network_and_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    own = {'network': 'digits', 'dataset': 'digits', 'flops': 4e13}
    write(Path('results'), record(**own), record(seed=2, **own, device='gpu'), record(seed=3, flops=9e13))
    assert main(['methods', *DIGITS, '--methods', 'baseline', '--dry-run', '--device', 'cpu']) == 0
    assert '0.4 measured, n=1' in capsys.readouterr().out
