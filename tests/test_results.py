"""The pages of results, of robustness and of the digits compared with the runs in results/.

Run: pytest tests/test_results.py
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from composer_sba.study import __main__ as study_command
from composer_sba.study.records import Record, read_records
from composer_sba.study.report import report
from composer_sba.study.stats import difference
from composer_sba.study.tables import difference_cell, mean_cell, origin, ratio_cell

ROOT = Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'results.md'
ROBUSTNESS = ROOT / 'docs' / 'robustness_study.md'
DIGITS = ROOT / 'docs' / 'recipes' / 'digits.md'
RUNS = {PAGE: ROOT / 'results', ROBUSTNESS: ROOT / 'results' / 'robustness'}


def test_the_pages_are_the_reports_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, 'savefig', lambda self, path, **options: path.touch())  # test_report.py looks at pixels
    drawn = {'vicinity.png', 'corruptions.png'}  # for other pages
    for original, runs in RUNS.items():
        page = tmp_path / original.name
        shutil.copy(original, page)
        figures = {path.name for path in report(runs, page)[1:]}
        command = f'python -m composer_sba.study report --results {runs} --page {original}'
        assert page.read_text() == original.read_text(), command
        assert figures == set(re.findall(r'\(figures/([\w.-]+)\)', page.read_text()))
        drawn |= figures
    assert drawn == {path.name for path in (PAGE.parent / 'figures').glob('*.png')}


LABELS = {  # of README -> of a page
    'SBA()': 'SBA',
    '1.3 × the epochs': 'baseline, 31 epochs',
    'SBA.robust()': 'SBA at the input (M = 1)',
    'Gaussian noise on half of the images': 'Gaussian noise on half',
    'noise on half, 72 epochs': 'Gaussian noise on half, 72 epochs',
    'noise on half, 72 epochs, σ = 0.2': 'Gaussian noise on half, 72 epochs, σ = 0.2',
    **{f'SBA − noise, σ = {sigma}, equal cost': 'SBA at the input (M = 1)' for sigma in (0.1, 0.2)},
    **{f'SBA − noise, σ = {sigma}': 'SBA at the input (M = 1)' for sigma in (0.1, 0.15, 0.2)},
}


def test_the_figures_of_the_readme_are_those_of_the_pages() -> None:
    """Each row of README has means of a row of a page in the same order, or else differences; README rounds some."""

    def rows(text: str) -> list[tuple[str, list[str]]]:
        lines = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('|')]
        return [(line[0].rpartition(':')[2].strip(' `'), [cell.strip(' *') for cell in line[1:]]) for line in lines]

    def numbers(cells: list[str], sign: str) -> list[list[float]]:
        found = [re.findall(r'[-+]?\d+\.\d+', cell.replace('−', '-')) for cell in cells if sign in cell]
        return [[float(number) for number in each] for each in found]

    page = rows(PAGE.read_text()) + rows(ROBUSTNESS.read_text())
    shown = rows(re.search(r'^## What to expect\n(.*?)^## ', (ROOT / 'README.md').read_text(), re.M | re.S)[1])
    compared = 0
    for label, cells in shown:
        sign = '±' if any('±' in cell for cell in cells) else '['
        expected = numbers(cells, sign)
        compared += bool(expected)
        candidates = [iter(numbers(other, sign)) for name, other in page if name == LABELS.get(label, label)]
        matches = [
            all(any(each == pytest.approx(cell, abs=0.051) for each in found) for cell in expected)
            for found in candidates
        ]
        assert not expected or any(matches), f'no row of a page has {label} {expected}'
    assert compared == 20


def test_the_table_of_the_digits_has_the_figures_of_their_runs() -> None:
    runs: dict[str, list[Record]] = {}
    for run in read_records(ROOT / 'results' / 'digits' / 'methods.jsonl'):
        runs.setdefault(f'`digits_{run["method"]}.yaml`', []).append(run)
    page = DIGITS.read_text()
    shown = {}
    for line in re.findall(r'^\| (`digits_.*) \|$', page, re.MULTILINE):
        recipe, _, *cells = line.split(' | ')
        shown[recipe] = cells
    assert list(shown) == list(runs)
    baseline = runs['`digits_baseline.yaml`']
    for recipe, row in runs.items():
        accuracies, reference = ([100 * run['accuracy'] for run in each] for each in (row, baseline))
        measured = [
            f'{mean_cell(accuracies, 2)} %',
            '' if row is baseline else difference_cell(difference(accuracies, reference)),
            f'run, n = {len(row)}',
            ratio_cell(row, baseline, lambda run: run['flops']),
        ]
        assert shown[recipe] == measured, f'{recipe}: the page has {shown[recipe]}, the runs have {measured}'
    assert origin([run for row in runs.values() for run in row]) in ' '.join(page.split())


def test_every_run_names_its_origin() -> None:
    runs = [run for path in (ROOT / 'results').rglob('*.jsonl') for run in read_records(path)]
    assert runs
    for run in runs:
        assert re.fullmatch(r'[0-9a-f]{12}', run['commit']), f'{run["hash"]}: commit {run["commit"]}'
        assert run['hardware'] and run['versions']['torch'] and run['flops']
        assert not re.search(r'/(home|root|work|tmp)/', str(run)), f'{run["hash"]} names a path'


COMMANDS = [
    command
    for page in (PAGE, ROBUSTNESS, DIGITS)
    for command in re.findall(r'^    python -m composer_sba.study (.*)', page.read_text().replace('\\\n', ' '), re.M)
]


@pytest.mark.parametrize('command', COMMANDS)
def test_the_commands_of_the_pages_find_their_runs(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is recognized by its hash: with another one, an interrupted study would start again."""
    monkeypatch.chdir(ROOT)
    assert study_command.main([*shlex.split(command), '--recipes', 'yamls', '--dry-run']) == 0
    planned, found = re.findall(r'(\d+) (?:runs|of them)', capsys.readouterr().out)[:2]
    assert planned == found != '0', f'{found} of {planned} runs'
