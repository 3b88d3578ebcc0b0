"""The page of results: what it shows is what the report makes of the runs in results/, and its figures are there.

pytest tests/test_results.py
"""

import re
import shutil
from pathlib import Path

from composer_sba.study.records import read
from composer_sba.study.report import SECTIONS, report

ROOT = Path(__file__).parent.parent
PAGE = ROOT / 'docs' / 'results.md'


def test_the_page_is_what_the_report_makes_of_the_runs(tmp_path: Path) -> None:
    page = tmp_path / 'results.md'
    shutil.copy(PAGE, page)
    written = report(ROOT / 'results', page)
    assert page.read_text() == PAGE.read_text(), 'python -m composer_sba.study report'
    figures = {path.name for path in written[1:]}
    own = {'vicinity.png'}  # of `study vicinity`, on another page
    assert figures | own == {path.name for path in (PAGE.parent / 'figures').glob('*.png')}
    assert figures == set(re.findall(r'\(figures/([\w.-]+)\)', PAGE.read_text()))


def test_every_run_tells_where_it_comes_from() -> None:
    runs = [run for study in SECTIONS for run in read(ROOT / 'results' / f'{study}.jsonl')]
    assert runs
    for run in runs:
        assert re.fullmatch(r'[0-9a-f]{12}', run['commit']), f'{run["hash"]}: commit {run["commit"]}'
        assert run['hardware'] and run['versions']['torch'] and run['flops']
        assert not re.search(r'/(home|root|work|tmp)/', str(run)), f'{run["hash"]} names a path'
