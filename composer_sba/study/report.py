"""The page of results: for each group of runs a table and its figures, between markers that prose may surround."""

from collections.abc import Callable
from pathlib import Path

from composer_sba.errors import UserError
from composer_sba.study import figures, paper
from composer_sba.study.groups import Group, group
from composer_sba.study.records import Record, read
from composer_sba.study.tables import COST_LEGEND, LEGEND, table

SECTIONS = {  # study -> title of its section
    'table1': 'Table 1 of the paper',
    'eta': 'The weight η (Fig. 2)',
    'layers': 'The cut layer (Fig. 3)',
    'rivals': 'Other methods',
    'search': 'Search for settings',
}
_NOTES = {
    **paper.CLAIMS,
    'search': 'The order is by the error that is shown, so the errors of the first settings are too low, and their '
    'differences no evidence: only further runs with other seeds are.',
}
_HEAD = """# Results

What stands between the markers `begin` and `end` in the source of this page is written by
`python -m composer_sba.study report` from the runs in `results/`, one a line.
"""


def report(results: Path, page: Path) -> list[Path]:
    """Write the results of all studies into a Markdown page, and their figures into ``figures/`` beside it.

    Args:
        results (Path): The folder of ``table1.jsonl``, ``eta.jsonl``, ``layers.jsonl``, ``rivals.jsonl`` and
            ``search.jsonl``, as far as they exist.
        page (Path): The page, made if need be. What it has between ``<!-- rivals:begin -->`` and
            ``<!-- rivals:end -->``, and so for each study, is replaced, the rest stays. A study that has runs but no
            markers gets a section at the end.

    Returns:
        list[Path]: What was written: the page, then the figures. The same records give the same page, to the byte.

    Raises:
        UserError: If a line is no record, runs do not fit together, a study has one marker without the other, or no
            study has runs.
    """
    records = {study: read(results / f'{study}.jsonl') for study in SECTIONS}
    if not any(records.values()):
        raise UserError(f'{results} has no finished runs of {", ".join(SECTIONS)}: run a study first')
    groups = {study: group(runs) for study, runs in records.items()}
    text = page.read_text(encoding='utf-8') if page.exists() else _HEAD
    for study, title in SECTIONS.items():
        text = _with_markers(page, text, study, title if groups[study] else None)
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


def _markers(study: str) -> tuple[str, str]:
    return f'<!-- {study}:begin -->', f'<!-- {study}:end -->'


def _with_markers(page: Path, text: str, study: str, title: str | None) -> str:
    """The page, with a section at its end for a study that has a title to give and no markers yet."""
    begin, end = _markers(study)
    if begin not in text and end not in text:
        return text if title is None else f'{text.rstrip()}\n\n## {title}\n\n{begin}\n{end}\n'
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise UserError(f'{page}: expected {begin} once and {end} once after it: correct these lines')
    return text


def _body(groups: dict[Group, list[Record]], folder: Path) -> tuple[str, list[Path]]:
    """What stands between the markers of a study, and the figures drawn for it."""
    study = next(iter(groups)).study
    parts = [
        LEGEND,
        *([COST_LEGEND] if study == 'layers' else []),
        *([_NOTES[study]] if study in _NOTES else []),
    ]
    written: list[Path] = []
    titles = [each.title for each in groups]
    stems: set[str] = set()
    for each, runs in groups.items():
        alone = titles.count(each.title) == 1
        parts += [f'### {each.title}' if alone else f'### {each.title}, {each.hardware}', table(each, runs)]
        stem = f'{study}-{each.network}-{each.dataset}-{each.train_samples}-{each.max_duration}'
        stem = next(name for name in (stem, *(f'{stem}-{n}' for n in range(2, 99))) if name not in stems)
        stems.add(stem)
        for kind, draw, caption in _figures(each, runs):
            path = folder / f'{stem}-{kind}.png'
            draw(path)
            parts += [f'![{caption.partition(":")[0]}]({folder.name}/{path.name})', f'*{caption}*']
            written.append(path)
    return '\n\n'.join(part for part in parts if part), written


def _figures(group: Group, runs: list[Record]) -> list[tuple[str, Callable[[Path], None], str]]:
    """Kind, how to draw it, and caption of the figures that belong to a study."""
    varied = any(run['setting'] for run in runs)
    if group.study == 'search' or (group.study in ('eta', 'layers') and not varied):
        return []
    if group.study == 'eta':
        best = paper.BEST_ETA.get((group.dataset, group.network))
        caption = 'Error against η: mean and sd over seeds, each seed a dot; grey, the baseline with its sd.'
        return [('eta', lambda path: figures.error_against_eta(path, runs, best), caption)]
    if group.study == 'layers':
        caption = (
            'Cost ratio and error against the cut layer: left, each seed a dot, the bar their median; right, mean and '
            'sd over seeds, each seed a dot; grey, the baseline with its sd.'
        )
        return [('layers', lambda path: figures.error_and_cost_against_layer(path, runs), caption)]
    time = 'Error against training time: mean and sd over seeds; the thin lines are those of the baseline.'
    curves = 'Learning curves: mean and sd over seeds, the least final error first; grey, the baseline.'
    return [
        ('time', lambda path: figures.error_against_time(path, runs), time),
        ('curves', lambda path: figures.learning_curves(path, runs), curves),
    ]
