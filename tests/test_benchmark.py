"""The step benchmark, at tiny size: that it counts, compares and reports; speed is for its reports to show.

pytest tests/test_benchmark.py
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from composer_sba.models import digits_net
from composer_sba.recipe.recipe import load
from composer_sba.study.__main__ import main
from composer_sba.study.flops import flops_per_image
from composer_sba.study.step_timing import KINDS, PARTS, Steps, measure, profiled

YAMLS = Path(__file__).parent.parent / 'yamls'


def steps(layer: str, fold: int) -> Steps:
    return Steps(digits_net(), torch.randn(16, 3, 8, 8), torch.randint(10, (16,)), layer, fold)


def test_ideal_is_what_the_study_counts() -> None:
    costs = {cost.kind: cost for cost in measure(steps('conv2', 4), KINDS, rounds=2)}
    plain, half = (
        flops_per_image(load(YAMLS / f'{name}.yaml')) for name in ('digits_baseline', 'digits_sba_conv')
    )  # the recipe augments every other step
    assert costs['sba'].ideal == pytest.approx(1 + 2 * (half / plain - 1))
    assert costs['latent_ba'].ideal == costs['sba'].ideal
    assert costs['naive'].ideal == pytest.approx(1 + costs['sba'].ideal)
    assert costs['ba'].ideal == 4
    assert costs['unarmed'].ideal == 1
    assert all(cost.low <= cost.ratio <= cost.high for cost in costs.values())


def test_memory_is_that_of_the_rows_above_the_cut() -> None:
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
    parts = profiled(steps('conv1', 8), 'sba', rounds=1)
    assert list(parts) == [*PARTS, 'other']
    # A plain step has none; what other parts differ by is at the mercy of the clock
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


@pytest.mark.parametrize('cuts', [['conv7'], ['head', 'conv7']])
def test_a_layer_that_is_not_there_is_one_line(
    cuts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_the_data_path_is_compared_with_the_usual_one() -> None:
    script = YAMLS.parent / 'benchmarks' / 'data_path.py'
    arguments = ['--images', '12', '--workers', '0', '--batch', '4', '--rounds', '2']
    said = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r'^\| (\w[^|]+) \| (\d+) \|', said, re.MULTILINE)
    assert [name for name, _ in rows if ',' not in name] == ['ImageFolder', 'composer-sba']
    assert len(rows) == 6 and all(int(rate) > 0 for _, rate in rows), said
    assert '12 JPEGs of 500 by 375 pixels' in said and '| composer-sba: decode |' in said
