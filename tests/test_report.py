"""The page of results of invented runs: sections and figures, and edits by hand.

Run: pytest tests/test_report.py
"""

import matplotlib.image
import pytest

from composer_sba.errors import UserError
from composer_sba.study.report import report
from invented_runs import RUNS, eta_study, layers_study, record, write


def test_all_sections_and_figures(tmp_path):
    write(tmp_path, *RUNS, *eta_study(), *layers_study(), *(run | {'study': 'table1'} for run in RUNS))
    write(tmp_path, record('sba', accuracy=0.63, study='search', setting={'fold': 1}))
    page = tmp_path / 'docs' / 'results.md'
    written = report(tmp_path, page)
    assert [path.relative_to(page.parent).as_posix() for path in written] == [
        'results.md',
        *(f'figures/table1-resnet44-cifar10-5000-10ep-{kind}.png' for kind in ('cost', 'calibration', 'curves')),
        'figures/eta-resnet44-cifar10-5000-10ep-eta.png',
        'figures/layers-resnet44-cifar10-5000-10ep-layers.png',
        *(f'figures/methods-resnet44-cifar10-5000-10ep-{kind}.png' for kind in ('cost', 'calibration', 'curves')),
    ]
    text = page.read_text()
    assert [line for line in text.splitlines() if line.startswith('## ')] == [
        '## Table 1 of the paper',
        '## The weight η (Fig. 2)',
        '## The cut layer (Fig. 3)',
        '## Other methods',
        '## Search for settings',
    ]
    for figure in written[1:]:
        assert f'](figures/{figure.name})' in text
        pixels = matplotlib.image.imread(figure)
        assert pixels.shape[1] == 1200, f'{figure.name} is {pixels.shape}'
        drawn = (pixels[..., :3] < 0.9).any(axis=-1).mean()
        assert 0.005 < drawn < 0.5, f'{figure.name} is covered to {drawn:.3f}'


def test_a_second_report_changes_nothing(tmp_path):
    write(tmp_path, *RUNS, *layers_study())
    page = tmp_path / 'results.md'
    first = {path: path.read_bytes() for path in report(tmp_path, page)}
    assert {path: path.read_bytes() for path in report(tmp_path, page)} == first


def test_text_around_the_markers_stays(tmp_path):
    page = tmp_path / 'results.md'
    write(tmp_path, *RUNS)
    report(tmp_path, page)
    generated = page.read_text().partition('<!-- methods:begin -->')[2].partition('<!-- methods:end -->')[0]
    page.write_text('Before.\n\n<!-- methods:begin -->\nstale\n<!-- methods:end -->\n\nAfter.\n')
    write(tmp_path, *eta_study())
    report(tmp_path, page)
    text = page.read_text()
    assert text.startswith(
        f'Before.\n\n<!-- methods:begin -->{generated}<!-- methods:end -->\n\nAfter.\n\n## The weight η'
    )
    (tmp_path / 'eta.jsonl').unlink()
    report(tmp_path, page)
    assert '<!-- eta:begin -->\n\nNo finished runs.\n\n<!-- eta:end -->' in page.read_text()


@pytest.mark.parametrize('text', ['<!-- methods:begin -->', '<!-- methods:end -->\n<!-- methods:begin -->'])
def test_half_a_pair_of_markers_is_refused(tmp_path, text):
    write(tmp_path, *RUNS)
    (tmp_path / 'results.md').write_text(text)
    with pytest.raises(UserError, match='expected <!-- methods:begin --> once and <!-- methods:end --> once after it'):
        report(tmp_path, tmp_path / 'results.md')
    assert (tmp_path / 'results.md').read_text() == text


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match='has no finished runs of table1, eta, layers, methods, search'):
        report(tmp_path, tmp_path / 'results.md')


def test_groups_that_differ_in_hardware_have_headings_and_figures_of_their_own(tmp_path):
    write(tmp_path, record(), record(hardware='H200'))
    written = report(tmp_path, tmp_path / 'results.md')
    assert len(set(written)) == 7
    assert '10 epochs, H200\n' in written[0].read_text() and '10 epochs, Xeon, 1 of 2 cores\n' in written[0].read_text()


@pytest.mark.parametrize(
    ('name', 'study'),
    [('table1', 'methods'), ('methods', 'rivals')],  # a line in the wrong file, and one of an older version
)
def test_a_run_of_another_study_is_refused(tmp_path, name, study):
    write(tmp_path, record(study=study))
    (tmp_path / f'{study}.jsonl').rename(tmp_path / f'{name}.jsonl')
    with pytest.raises(UserError, match=f"{name}.jsonl: run baselineNone1 has the study '{study}', expected '{name}'"):
        report(tmp_path, tmp_path / 'results.md')
    assert not (tmp_path / 'results.md').exists()


def test_a_file_that_no_study_is_called_after_is_left_out_with_a_warning(tmp_path):
    write(tmp_path, *RUNS, record(study='rivals'))
    with pytest.warns(UserWarning, match='rivals.jsonl: left out, since no study is called rivals'):
        report(tmp_path, tmp_path / 'results.md')


def test_any_number_of_groups_have_figures(tmp_path):
    write(tmp_path, *(record('sba', study='eta', setting={'eta': 0.1}, hardware=f'GPU {n}') for n in range(3)))
    assert [path.name for path in report(tmp_path, tmp_path / 'results.md')[1:]] == [
        f'eta-resnet44-cifar10-5000-10ep{end}-eta.png' for end in ('', '-2', '-3')
    ]
