"""The page of results: a table and figures for each group of runs, between markers that prose may surround."""

import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path

from composer_sba.errors import UserError
from composer_sba.study import figures, paper
from composer_sba.study.groups import Group, group
from composer_sba.study.records import Record, read_records
from composer_sba.study.robustness_report import ROBUSTNESS_LEGEND, robustness_figures, robustness_tables
from composer_sba.study.tables import COST_LEGEND, LEGEND, group_table

SECTIONS = {  # study -> title of its section
    'table1': 'Table 1 of the paper',
    'eta': 'The weight η (Fig. 2)',
    'layers': 'The cut layer (Fig. 3)',
    'methods': 'Other methods',
    'search': 'Search for settings',
    'robustness': 'Robustness',
}
_NOTES = {
    **paper.CLAIMS,
    'search': 'The settings are sorted by the error that the table shows. This selection makes the errors of the first '
    'ones too low, and their differences are no evidence. Further runs with other seeds would be.',
}
_HEAD = f"""# Results

`python -m composer_sba.study report` writes the text between the markers `begin` and `end` in the source of this page
from the runs in `results/`, one line each.

{LEGEND}
"""


def report(results: Path, page: Path) -> list[Path]:
    """Write the results of all studies into a Markdown page and their figures into the folder ``figures/`` next to it.

    Args:
        results (Path): The folder of ``table1.jsonl``, ``eta.jsonl``, ``layers.jsonl``, ``methods.jsonl``,
            ``search.jsonl`` and ``robustness.jsonl``. Files that do not exist are skipped.
        page (Path): The page, created if necessary. The text between ``<!-- methods:begin -->`` and
            ``<!-- methods:end -->``, and likewise for the other studies, is replaced; the rest stays. A study that has
            runs but no markers gets a section at the end.

    Returns:
        list[Path]: The files written: the page, then the figures. The same records give the same page, to the byte.

    Raises:
        UserError: If a line is not a record, a file holds runs of another study, runs do not fit together, a study has
            one marker without the other, or no study has runs.
    """
    records = {study: _runs(results / f'{study}.jsonl') for study in SECTIONS}
    for path in sorted(results.glob('*.jsonl')):
        if path.stem not in SECTIONS:
            warnings.warn(f'{path}: left out, since no study is called {path.stem}', stacklevel=2)
    if not any(records.values()):
        raise UserError(f'{results} has no finished runs of {", ".join(SECTIONS)}: run a study first')
    groups = {study: group(runs) for study, runs in records.items()}
    text = page.read_text(encoding='utf-8') if page.exists() else _HEAD
    for study, title in SECTIONS.items():
        text = _with_markers(page, text, study, title if groups[study] else '')
    written = [page]
    for study, found in groups.items():
        begin, end = _markers(study)
        if begin in text:
            body, drawn = _body(found, page.parent / 'figures') if found else ('No finished runs.', [])
            text = f'{text.partition(begin)[0]}{begin}\n\n{body}\n\n{end}{text.partition(end)[2]}'
            written += drawn
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding='utf-8')
    return written


def _runs(path: Path) -> list[Record]:
    runs = read_records(path)
    for run in runs:
        if run['study'] != path.stem:
            problem = f"run {run['hash']} has the study '{run['study']}', expected '{path.stem}'"
            raise UserError(f'{path}: {problem}: move its line or correct it')
        if path.stem == 'robustness' and 'robustness' not in run:
            raise UserError(f'{path}: run {run["hash"]} lacks robustness: delete its line and run the study again')
    return runs


def _markers(study: str) -> tuple[str, str]:
    return f'<!-- {study}:begin -->', f'<!-- {study}:end -->'


def _with_markers(page: Path, text: str, study: str, title: str) -> str:
    """Return the page with a section at its end if the study has a title and no markers yet."""
    begin, end = _markers(study)
    if begin not in text and end not in text:
        return text if not title else f'{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n'
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f'{page}: expected {begin} once and {end} once after it: correct these lines')
    return text


def _body(groups: dict[Group, list[Record]], folder: Path) -> tuple[str, list[Path]]:
    """Write the text between the markers of a study, and draw its figures."""
    study = next(iter(groups)).study
    parts = [
        *([ROBUSTNESS_LEGEND] if study == 'robustness' else []),
        *([COST_LEGEND] if study == 'layers' else []),
        *([_NOTES[study]] if study in _NOTES else []),
    ]
    written: list[Path] = []
    titles = [each.title for each in groups]
    stems: set[str] = set()
    for each, runs in groups.items():
        unique = titles.count(each.title) == 1
        heading = f'### {each.title}' if unique else f'### {each.title}, {each.hardware}'
        table = robustness_tables if study == 'robustness' else group_table
        parts += [heading, table(each, runs)]
        stem = f'{study}-{each.network}-{each.dataset}-{each.train_samples}-{each.max_duration}'
        stem = next(name for name in chain([stem], (f'{stem}-{n}' for n in count(2))) if name not in stems)
        stems.add(stem)
        for kind, draw, caption in _figures(each, runs):
            path = folder / f'{stem}-{kind}.png'
            draw(path)
            parts += [f'![{caption.partition(":")[0]}]({folder.name}/{path.name})', f'*{caption}*']
            written.append(path)
    return '\n\n'.join(part for part in parts if part), written


def _figures(group: Group, runs: list[Record]) -> list[tuple[str, Callable[[Path], None], str]]:
    """Return the kind, the drawing function and the caption of each figure of a group."""
    if group.study == 'robustness':
        return robustness_figures(runs)
    varied = any(run['setting'] for run in runs)
    if group.study == 'search' or (group.study in ('eta', 'layers') and not varied):
        return []
    if group.study == 'eta':
        best = paper.BEST_ETA.get((group.dataset, group.network))
        caption = 'Error against η: mean and sd over seeds, with a dot for each seed. The baseline and its sd are grey.'
        return [('eta', lambda path: figures.error_against_eta(path, runs, best), caption)]
    if group.study == 'layers':
        caption = (
            'Cost ratio and error against the cut layer: left, a dot for each seed and a bar at their median; right, '
            'mean and sd over seeds, with a dot for each seed. The baseline and its sd are grey.'
        )
        return [('layers', lambda path: figures.error_and_cost_against_layer(path, runs), caption)]
    against = {
        'cost': ('flops', 'Error against operations'),
        'calibration': ('calibration_error', 'Error against calibration error'),
    }
    points = [
        (
            kind,
            partial(figures.error_against, quantity, runs=runs),
            f'{title}: mean and sd over seeds. Thin lines mark the baseline.',
        )
        for kind, (quantity, title) in against.items()
        if figures.rows_with(quantity, runs)
    ]
    curves = 'Learning curves: mean and sd over seeds, sorted by final error. The baseline is grey.'
    return [*points, ('curves', partial(figures.learning_curves, runs=runs), curves)]
