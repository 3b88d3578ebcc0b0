"""Figures of invented runs of any length, and of studies with too few runs for a figure.

Run: pytest tests/test_figures.py
"""

import pytest

from composer_sba.study.report import report
from invented_runs import record, write


@pytest.mark.parametrize('seconds', [0.5, 5.0, 500.0, 50_000.0])
def test_runs_of_any_length_can_be_drawn(tmp_path, seconds):
    write(tmp_path, record('baseline', 1, seconds=seconds), record('sba', 1, seconds=2 * seconds))
    assert 'time.png' in str(report(tmp_path, tmp_path / 'results.md'))


@pytest.mark.parametrize('study', ['eta', 'layers'])
def test_a_study_without_varied_settings_has_no_figure(tmp_path, study):
    write(tmp_path, record(study=study))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 1
    write(tmp_path, record('sba', study=study, setting={'eta': 0.1} if study == 'eta' else {'layer': 'head'}))
    assert len(report(tmp_path, tmp_path / 'results.md')) == 2
