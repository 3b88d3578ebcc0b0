"""The Markdown table of a group of runs, with a line about the origin of its numbers."""

from collections.abc import Callable, Iterable, Sequence

from composer_sba.study import paper
from composer_sba.study.display_names import display_name
from composer_sba.study.groups import Group, rows
from composer_sba.study.recipe_index import BASELINE
from composer_sba.study.records import Record
from composer_sba.study.stats import TOLERANCE, Difference, cost_ratios, difference, median_ratio, paired_ratio, spread
from composer_sba.summary import counted

LEGEND = (
    'Error, NLL and calibration error of a run are medians over the evaluations of its last five epochs. The table '
    "gives mean ± standard deviation over n seeds. Differences have Welch's 95 % interval and are bold if it excludes "
    '0, which happens by chance in one of twenty. Ratios of training time (without evaluation) and of FLOP are medians '
    'over pairs of runs with the same seed.'
)
COST_LEGEND = (
    f't1 is the training time until an evaluation of latent BA first reaches its final accuracy less '
    f'{100 * TOLERANCE:g} points. t2 is the training time until an evaluation of SBA reaches the same accuracy. The '
    'table gives the median over seeds [least, greatest]. t2 is infinite if SBA never reaches that accuracy.'
)

_Row = Sequence[Record]


def group_table(group: Group, runs: _Row) -> str:
    """Write the table of a group and the origin of its numbers.

    Args:
        group (Group): The facts that the runs share.
        runs (Sequence[Record]): The runs.

    Returns:
        str: Markdown: the table, the doubts about the cells of the paper that it shows, hardware, versions, dates,
        commits and seeds. Empty columns are left out.
    """
    labels, ordered = zip(*_ordered(group, rows(runs)), strict=True)
    baseline: _Row = next((row for row in ordered if row[0]['method'] == BASELINE), [])

    def column(cell: Callable[[_Row], str]) -> list[str]:
        return [cell(row) for row in ordered]

    columns = {
        'method': list(labels),
        'error, %': column(lambda row: mean_cell(errors(row), 2)),
        'n': column(lambda row: str(len(row))),
        'difference from the baseline, points': column(lambda row: _difference(row, baseline)),
        't1 / t2': column(lambda row: _cost_ratio(row, runs)),
        'NLL, nats': column(lambda row: mean_cell([run['loss'] for run in row], 3)),
        'calibration error, %': column(lambda row: mean_cell(_percent(run['calibration_error'] for run in row), 1)),
        'time ÷ baseline': column(lambda row: ratio_cell(row, baseline, lambda run: run['train_seconds'])),
        'FLOP ÷ baseline': column(lambda row: ratio_cell(row, baseline, lambda run: run['flops'])),
        "paper's error, %": column(_paper_error),
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cells)}
    lines = [list(shown), ['---', *['---:'] * (len(shown) - 1)], *zip(*shown.values(), strict=True)]
    parts = ['\n'.join(f'| {" | ".join(line)} |' for line in lines)]
    if not baseline:
        parts.append('The baseline has no run, which leaves nothing to compare with.')
    cells = [(row[0]['method'], _paper_cell(row)) for row in ordered]
    parts += [f'† {display_name(method)} in the paper: {cell.doubt}.' for method, cell in cells if cell and cell.doubt]
    return '\n\n'.join([*parts, origin(runs)])


def errors(row: _Row) -> list[float]:
    """Return the error of each run. Unit: per cent."""
    return [100 - 100 * run['accuracy'] for run in row]


def _ordered(group: Group, labelled: dict[str, list[Record]]) -> list[tuple[str, list[Record]]]:
    """Sort rows: the baseline first, then by the setting that the study varies, or else by error."""
    layers = list(dict.fromkeys(row[0]['setting'].get('layer') for row in labelled.values()))

    def key(item: tuple[str, list[Record]]) -> tuple[float, ...]:
        first = item[1][0]
        by_study = {
            'eta': (float(first['setting'].get('eta', 0)),),
            'layers': (layers.index(first['setting'].get('layer')), first['method'] == 'sba'),
        }
        return (first['method'] != BASELINE, *by_study.get(group.study, (spread(errors(item[1])).mean,)))

    return sorted(labelled.items(), key=key)


def _percent(values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else 100 * value for value in values]


def mean_cell(values: Sequence[float | None], digits: int) -> str:
    """Write mean and standard deviation; nothing if a value is missing."""
    given = [value for value in values if value is not None]
    if len(given) < len(values):  # the mean over some seeds would look like the mean over all n
        return ''
    mean, sd, _ = spread(given)
    return f'{mean:.{digits}f}' if sd is None else f'{mean:.{digits}f} ± {sd:.{digits}f}'


def _difference(row: _Row, baseline: _Row) -> str:
    return '' if not baseline or row is baseline else difference_cell(difference(errors(row), errors(baseline)))


def difference_cell(found: Difference) -> str:
    """Write a difference in points with its interval, bold if that excludes 0."""
    if found.low is None or found.high is None:
        return _signed(found.mean)
    text = f'{_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}]'
    return f'**{text}**' if found.excludes_zero else text


def _signed(value: float) -> str:
    return f'{round(value, 2) + 0.0:+.2f}'.replace('-', '−')  # adding 0 turns -0.0 into 0.0


def ratio_cell(row: _Row, baseline: _Row, cost: Callable[[Record], float | None]) -> str:
    """Write the median ratio of costs over pairs of runs with the same seed; nothing if a cost is missing."""
    own, reference = ({run['seed']: cost(run) or 0.0 for run in runs} for runs in (row, baseline))
    ratio = paired_ratio(own, reference) if all(own.values()) else None
    return '' if ratio is None else f'{ratio:.2f}'


def _cost_ratio(row: _Row, runs: _Row) -> str:
    if row[0]['method'] != 'sba' or 'layer' not in row[0]['setting']:
        return ''
    ba = [run for run in runs if run['method'] == 'latent_ba' and run['setting'] == row[0]['setting']]
    ratios = list(cost_ratios(ba, row).values())
    if not ratios:
        return ''
    middle, least, greatest = (
        f'{ratio:.2f}' if ratio else 'never' for ratio in (median_ratio(ratios), min(ratios), max(ratios))
    )
    reached = sum(ratio > 0 for ratio in ratios)
    text = middle if least == greatest else f'{middle} [{least}, {greatest}]'
    return text if reached == len(ratios) else f'{text}, reached with {reached} of {len(ratios)} seeds'


def _paper_cell(row: _Row) -> paper.Cell | None:
    first = row[0]
    if first['study'] not in ('table1', 'methods'):  # the other studies vary settings that Table 1 does not have
        return None
    return paper.cell(first['dataset'], first['network'], first['method'])


def _paper_error(row: _Row) -> str:
    cell = _paper_cell(row)
    if cell is None:
        return ''
    return f'{cell.error:.2f}{f" (M = {cell.fold})" if cell.fold else ""}{" †" if cell.doubt else ""}'


def origin(runs: _Row) -> str:
    """Describe where the numbers come from; if the runs differ, list every value that occurs."""
    jobs = _listed(f'{run["jobs"]}' for run in runs)
    packages = dict.fromkeys(package for run in runs for package in run['versions'])
    versions = ', '.join(
        f'{package} {_listed(run["versions"].get(package, "unknown") for run in runs)}' for package in packages
    )
    dates = sorted(run['date'][:10] for run in runs)
    dated = dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'
    commits = _listed(run['commit'] for run in runs)
    seeds = sorted({run['seed'] for run in runs})
    contiguous = len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1))
    seeded = f'{seeds[0]} to {seeds[-1]}' if contiguous else _listed(map(str, seeds))
    devices = _listed(run['device'] for run in runs)
    described = f'{counted(len(runs), "run")}, seed{"s" if len(seeds) > 1 else ""} {seeded}'
    measured = f'Measured on {_listed(run["hardware"] for run in runs)} ({devices}), {jobs} at a time'
    return f'{measured}; {versions}; {dated}; commit {commits}; {described}.'


def _listed(values: Iterable[str]) -> str:
    return ' and '.join(dict.fromkeys(values))
