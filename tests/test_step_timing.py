"""The step benchmark at tiny size: what it counts, compares and reports. Speed is not tested.

Run: pytest tests/test_step_timing.py
"""

import re
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from composer_sba.models import digits_net
from composer_sba.recipe.recipe import load
from composer_sba.study.__main__ import main
from composer_sba.study.arguments import STEP_KINDS
from composer_sba.study.flops import flops_per_image
from composer_sba.study.step_timing import PROFILE_PARTS, Steps, measure, profile_difference
from programs import start

ROOT = Path(__file__).parent.parent
YAMLS = ROOT / 'yamls'


def steps(layer: str, fold: int) -> Steps:
    return Steps(digits_net(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,)), layer, fold)


def test_the_ideal_is_the_count_of_the_studies() -> None:
    costs = {cost.kind: cost for cost in measure(steps('conv2', 4), STEP_KINDS, rounds=2)}
    plain, half = (
        flops_per_image(load(YAMLS / f'{name}.yaml')) for name in ('digits_baseline', 'digits_sba_conv')
    )  # the recipe augments every other step
    assert costs['sba'].ideal == pytest.approx(1 + 2 * (half / plain - 1))
    assert costs['latent_ba'].ideal == costs['sba'].ideal
    assert costs['naive'].ideal == pytest.approx(1 + costs['sba'].ideal)
    assert costs['ba'].ideal == 4
    assert costs['twice'].ideal == 2
    assert costs['unarmed'].ideal == 1
    assert all(cost.low <= cost.ratio <= cost.high for cost in costs.values())


def test_at_the_input_sba_is_compared_with_twice_the_rows() -> None:
    costs = {cost.kind: cost for cost in measure(steps('input', 1), ['sba', 'twice'], rounds=1)}
    assert costs['sba'].ideal == costs['twice'].ideal == 2
    assert 1.5 < costs['twice'].memory < 2.1, costs


def test_memory_grows_with_the_rows_above_the_cut() -> None:
    memory = {cost.kind: cost.memory for cost in measure(steps('conv1', 8), ['sba', 'unarmed', 'ba'], rounds=1)}
    assert memory['unarmed'] == pytest.approx(1, abs=0.01)
    assert 4 < memory['sba'] < memory['ba'] + 2, memory  # 9 times the rows above conv1, 8 times all rows


def test_a_plain_step_has_no_hooks() -> None:
    each = steps('conv2', 2)
    hooks = [module._forward_hooks for module in each.network.modules()]
    assert any(hooks)
    with each.hooked('plain'):
        assert not any(hooks)
    assert any(hooks)


def test_a_profile_names_the_parts() -> None:
    parts = profile_difference(steps('conv1', 8), 'sba', rounds=1)
    assert list(parts) == [*PROFILE_PARTS, 'other']
    # A plain step draws no noise; the differences of the other parts depend on the clock
    assert parts['noise and Σ'] > 0, parts


def test_the_command_writes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ['step', '--networks', 'digits', '--cuts', 'head', '--fold', '2', '--rounds', '1', '--batch', '8']
    command += ['--basis', 'hadamard']
    assert main([*command, '--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu']) == 0
    assert main([*command, '--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu', '--dtype', 'bf16']) == 0
    first, second = sorted(tmp_path.iterdir(), key=lambda path: len(path.name))
    assert str(second) in capsys.readouterr().out
    text = first.read_text()
    assert '| digits | 8 | 8 | head | 2 | sba |' in text and 'torch' in text and '; fp32, basis hadamard;' in text
    assert '; bf16, basis hadamard;' in second.read_text()


def test_a_network_without_a_recipe_of_its_own_has_the_method_s(tmp_path: Path) -> None:
    command = ['step', '--networks', 'resnet8', '--cuts', 'input', '--fold', '1', '--rounds', '1', '--batch', '4']
    command += ['--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu', '--kinds', 'sba', 'twice']
    assert main(command) == 0
    (report,) = tmp_path.iterdir()
    assert '| ResNet8, CIFAR-10 | 32 | 4 | input | 1 | twice |' in report.read_text()


def test_a_report_replaces_no_other(tmp_path: Path) -> None:
    stem = f'step-{datetime.now(timezone.utc).date()}-cpu'
    (tmp_path / f'{stem}-2.md').write_text('the second of two reports\n')
    command = ['step', '--networks', 'digits', '--cuts', 'head', '--fold', '1', '--rounds', '1', '--batch', '8']
    assert main([*command, '--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu', '--kinds', 'sba']) == 0
    assert (tmp_path / f'{stem}-2.md').read_text() == 'the second of two reports\n'
    assert (tmp_path / f'{stem}.md').exists()


def test_the_size_of_images_is_the_recipe_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'digits_flowers_baseline.yaml').touch()
    (tmp_path / 'digits_flowers_sba.yaml').write_text(
        f'extends: {YAMLS}/digits_sba.yaml\n'
        'train_dataset: {name: imagefolder, local: flowers, crop_size: 24}\neval_dataset: null\n'
    )
    command = ['step', '--recipes', str(tmp_path), '--out', str(tmp_path / 'reports'), '--device', 'cpu']
    command += ['--cuts', 'head', '--fold', '2', '--rounds', '1', '--batch', '8', '--kinds', 'sba']
    assert main(command) == 0, capsys.readouterr().err
    (report,) = (tmp_path / 'reports').iterdir()
    assert '| digits, flowers | 24 | 8 | head | 2 | sba |' in report.read_text()


def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert main(['step', '--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'gpu']) == 2
    assert capsys.readouterr().err == 'error: --device gpu: PyTorch finds no GPU on this machine\n'


@pytest.mark.parametrize('cuts', [['conv7'], ['head', 'conv7']])
def test_an_unknown_layer_is_one_line(cuts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ['step', '--networks', 'digits', '--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu']
    command += ['--fold', '1', '--rounds', '1', '--batch', '8', '--cuts', *cuts]
    assert main(command) == 2
    assert "The model has no layer 'conv7'" in capsys.readouterr().err


def test_a_layer_too_wide_for_its_basis_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('composer_sba.vicinity.MAX_DENSE_FEATURES', 128)  # the head's
    command = ['step', '--networks', 'digits', '--fold', '1', '--rounds', '1', '--batch', '8', '--basis', 'normalized']
    command += ['--recipes', str(YAMLS), '--out', str(tmp_path), '--device', 'cpu', '--cuts']
    assert main([*command, 'conv2', 'head']) == 0
    (report,) = tmp_path.iterdir()
    assert 'Left out: digits, conv2: basis' in report.read_text() and '| head | 1 | sba |' in report.read_text()
    capsys.readouterr()
    assert main([*command, 'conv2']) == 2
    assert 'error: Left out: digits, conv2: basis' in capsys.readouterr().err


def test_the_data_path_is_compared_with_other_loaders(tmp_path: Path) -> None:
    arguments = ['--images', '12', '--workers', '0', '--batch', '4', '--rounds', '2']
    with start(ROOT / 'benchmarks' / 'data_path.py', *arguments, output=tmp_path / 'report.md') as program:
        assert program.wait() == 0, program.said
    rows = re.findall(r'^\| (\w[^|]+) \| (\d+) \| ([\d.]+) \|', program.said, re.MULTILINE)
    names = {name for name, *_ in rows}
    ours = {'composer-sba', 'composer-sba, whole images decoded', 'composer-sba, --max-side 512'}
    assert ours | {'ImageFolder', 'ImageFolder, PIL draft', 'Streaming as in its documentation'} < names, program.said
    assert all(int(rate) > 0 and float(spent) > 0 for _, rate, spent in rows), program.said
    assert '12 JPEGs of 112 to 2,048 pixels a side, 514 by 432 in the mean' in program.said


def test_images_in_memory_are_compared_with_a_loader_of_tensors(tmp_path: Path) -> None:
    arguments = ['--images', '100', '--batch', '20', '--rounds', '2']
    with start(ROOT / 'benchmarks' / 'data_in_memory.py', *arguments, output=tmp_path / 'report.md') as program:
        assert program.wait() == 0, program.said
    rows = re.findall(r'^\| (\w[^|]+) \| (\d+) \|', program.said, re.MULTILINE)
    assert len(rows) == 2 and all(int(rate) > 0 for _, rate in rows), program.said


def test_the_overhead_of_an_epoch_is_measured_in_the_trainer(tmp_path: Path) -> None:
    arguments = ['--model', 'digits_net', '--rounds', '2', '--batch', '8', '--fold', '2']
    with start(ROOT / 'benchmarks' / 'step_overhead.py', *arguments, output=tmp_path / 'report.txt') as program:
        assert program.wait() == 0, program.said
    ratios = re.findall(r'augment_prob=([\d.]+): (\d\.\d{4})$', program.said, re.MULTILINE)
    assert [prob for prob, _ in ratios] == ['0.25', '0.5', '1.0'], program.said


@pytest.mark.parametrize('script', ['data_path', 'data_in_memory', 'step_overhead'])
@pytest.mark.parametrize('argument', ['--rounds=1', '--batch=0', '--round=5'])
def test_odd_numbers_are_refused_before_the_measurement(script: str, argument: str, tmp_path: Path) -> None:
    with start(ROOT / 'benchmarks' / f'{script}.py', argument, output=tmp_path / 'report.txt') as program:
        assert program.wait() == 2, program.said
    assert f'{script}.py: error: ' in program.said and argument.partition('=')[0] in program.said
