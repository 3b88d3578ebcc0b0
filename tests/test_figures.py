"""Figures of invented runs of any cost, and of studies with too few runs for a figure.

Run: pytest tests/test_figures.py
"""

import pytest

from composer_sba.study.report import report
from invented_runs import record, write


@pytest.mark.parametrize('flops', [1e3, 1e14, 1e20])
def test_runs_of_any_cost_can_be_drawn(tmp_path, flops):
    runs = [record('baseline', 1, flops=flops), record('sba', 1, flops=20 * flops), record('cutout', 1, flops=None)]
    write(tmp_path, *runs)
    assert 'cost.png' in str(report(tmp_path, tmp_path / 'results.md'))


def test_figures_of_methods_do_not_depend_on_the_time_of_a_run(tmp_path):
    """On a busy machine, a longer training can take less time than a shorter one."""
    drawn = []
    for seconds in (1.0, 1000.0):
        folder = tmp_path / str(seconds)
        folder.mkdir()
        write(folder, record('baseline', 1), record('sba', 1, seconds=seconds))
        drawn.append({path.name: path.read_bytes() for path in report(folder, folder / 'results.md')[1:]})
    assert drawn[0].keys() == drawn[1].keys() and all(drawn[0][name] == drawn[1][name] for name in drawn[0])


@pytest.mark.parametrize('lacking', ['flops', 'calibration_error'])
def test_a_figure_of_a_quantity_that_no_run_has_is_left_out(tmp_path, lacking):
    write(tmp_path, record('baseline', 1, **{lacking: None}))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 3


@pytest.mark.parametrize('study', ['eta', 'layers'])
def test_a_study_without_varied_settings_has_no_figure(tmp_path, study):
    write(tmp_path, record(study=study))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 1
    write(tmp_path, record('sba', study=study, setting={'eta': 0.1} if study == 'eta' else {'layer': 'head'}))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 2
