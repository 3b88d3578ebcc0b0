"""Tables and figures of the study of robustness."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from composer_sba.study.display_names import display_name
from composer_sba.study.figures import write_figure
from composer_sba.study.groups import Group, rows
from composer_sba.study.label_placement import Mark, place_labels
from composer_sba.study.recipe_index import BASELINE
from composer_sba.study.records import Record
from composer_sba.study.robustness import BETWEEN, COMPARED, STRONGER
from composer_sba.study.stats import paired_difference, paired_ratio, spread
from composer_sba.study.style import LIGHT_GREY, METHOD_STYLES, OTHER_STYLE
from composer_sba.study.tables import difference_cell, mean_cell, origin, ratio_cell

ROBUSTNESS_LEGEND = (
    'Errors are those of the weights at the end of training, in %. Noise has the standard deviation σ of the pixel '
    'range. Corruptions are the mean over those that the figure names, at severities 1, 3 and 5. The attack is '
    'projected gradient descent within an ℓ2 distance of 0.25, 10 steps. The tables give mean ± standard deviation '
    "over n seeds, and mean differences of runs with the same seed [Student's 95 % interval], bold if the interval "
    'excludes 0. '
    'The intervals describe the variation of training, not that of the test images, which are the same for all methods.'
)
_SAME_COST = 0.02  # relative difference of operations
_GAUSSIAN = ('gaussian_half', 'gaussian_half_longer', 'gaussian_half_twice')

_Row = Sequence[Record]


def _noise(sigma: float) -> Callable[[Record], float]:
    def error(run: Record) -> float:
        return next(100 * each['error'] for each in run['robustness']['noise'] if each['sigma'] == sigma)

    return error


QUANTITIES: dict[str, Callable[[Record], float]] = {
    'clean': lambda run: 100 * run['robustness']['clean']['error'],
    'σ = 0.1': _noise(0.1),
    'σ = 0.2': _noise(0.2),
    'corruptions': lambda run: 100 * run['robustness']['mean_corruption_error'],
    'attack': lambda run: 100 * run['robustness']['attacks'][0]['error'],
}


def robustness_tables(group: Group, runs: _Row) -> str:
    """Write the tables of a group: errors and cost, and the differences from its references.

    Args:
        group (Group): The facts that the runs share.
        runs (Sequence[Record]): The runs.

    Returns:
        str: Markdown. The references are the baseline, and Gaussian noise of up to three strengths on half of the
        images, each trained for as many epochs and for as many operations.
    """
    labelled = rows(runs)
    baseline = next((row for row in labelled.values() if row[0]['method'] == BASELINE), [])
    lines = [
        [
            label,
            str(len(row)),
            *(mean_cell([error(run) for run in row], 1) for error in QUANTITIES.values()),
            mean_cell([100 * run['robustness']['clean']['calibration_error'] for run in row], 1),
            ratio_cell(row, baseline, lambda run: run['flops']),
        ]
        for label, row in labelled.items()
    ]
    head = ['error, %', 'n', *QUANTITIES, 'calibration error', 'FLOP ÷ baseline']
    others = {label: row for label, row in labelled.items() if row[0]['method'] not in _GAUSSIAN}
    references: dict[str, dict[str, _Row]] = {
        'the baseline': {label: baseline for label, row in labelled.items() if row is not baseline},
    }
    for setting in ({}, BETWEEN, STRONGER):
        noise = 'Gaussian noise' + ''.join(f' of σ = {sigma}' for sigma in setting.values())
        references[f'{noise} on half of the images after the same number of epochs'] = {
            label: _after_the_epochs_of(row, labelled, setting) for label, row in others.items()
        }
        references[f'{noise} on half of the images at the same number of operations'] = {
            label: _at_the_cost_of(row, labelled, setting) for label, row in others.items()
        }
    parts = [_table(head, lines)]
    for name, compared in references.items():
        differences = [_differences(label, labelled[label], row) for label, row in compared.items() if row]
        if differences:
            parts += [f'Differences from {name}, in points:', _table(['method', 'n', *QUANTITIES], differences)]
    return '\n\n'.join([*parts, origin(runs)])


def robustness_figures(runs: _Row) -> list[tuple[str, Callable[[Path], None], str]]:
    """Return the kind, the drawing function and the caption of each figure of a group."""
    return [
        (
            'noise',
            lambda path: _error_against_noise(path, runs),
            'Error under noise: mean over seeds, one line a method.',
        ),
        (
            'corruptions',
            lambda path: _error_by_corruption(path, runs),
            'Error by corruption: mean over severities 1, 3 and 5 and over seeds, and one standard deviation.',
        ),
        (
            'cost',
            lambda path: _error_against_cost(path, runs),
            'Mean error under corruption against the operations of training: mean and standard deviation over seeds.',
        ),
    ]


def _at_the_cost_of(row: _Row, labelled: dict[str, list[Record]], setting: Mapping[str, float]) -> _Row:
    """Return the runs of a setting of Gaussian noise on half of the images that took as many operations, or none."""
    for other in labelled.values():
        own, theirs = ({run['seed']: run['flops'] or 0.0 for run in runs} for runs in (row, other))
        ratio = paired_ratio(own, theirs)
        of_the_kind = other[0]['method'] in _GAUSSIAN and other[0]['setting'] == setting
        if of_the_kind and ratio is not None and abs(ratio - 1) <= _SAME_COST:
            return other
    return []


def _after_the_epochs_of(row: _Row, labelled: dict[str, list[Record]], setting: Mapping[str, float]) -> _Row:
    """Return the runs of a setting of Gaussian noise on half of the images that took as many epochs, or none."""
    for other in labelled.values():
        of_the_kind = other[0]['method'] == _GAUSSIAN[0] and other[0]['setting'] == setting
        if of_the_kind and other[0]['epochs'][-1]['epoch'] == row[0]['epochs'][-1]['epoch']:
            return other
    return []


def _differences(label: str, row: _Row, reference: _Row) -> list[str]:
    cells = []
    shared = {run['seed'] for run in row} & {run['seed'] for run in reference}
    for error in QUANTITIES.values():
        own, theirs = ({run['seed']: error(run) for run in runs} for runs in (row, reference))
        found = paired_difference(own, theirs)
        cells.append('' if found is None else difference_cell(found))
    return [label, str(len(shared)), *cells]


def _table(head: list[str], lines: list[list[str]]) -> str:
    ruled = [head, ['---', *['---:'] * (len(head) - 1)], *lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in ruled)


def _shown(runs: _Row) -> dict[str, list[Record]]:
    """Return the rows of the compared methods and of stronger noise: lines of other forms would hide them."""
    return {
        label: row
        for label, row in rows(runs).items()
        if row[0]['method'] in COMPARED and row[0]['setting'] in ({}, STRONGER)
    }


def _style(row: _Row) -> tuple[str, str]:
    colour, marker = METHOD_STYLES.get(row[0]['method'], OTHER_STYLE)
    for setting, of_stronger_noise in ((BETWEEN, '*'), (STRONGER, 'X')):
        if row[0]['setting'] == setting:
            return colour, of_stronger_noise
    return colour, marker


def _error_against_noise(path: Path, runs: _Row) -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marks = []
        sigmas = [each['sigma'] for each in runs[0]['robustness']['noise']]
        for label, row in _shown(runs).items():
            colour, marker = _style(row)
            means = [spread([_noise(sigma)(run) for run in row]).mean for sigma in sigmas]
            line = '--' if row[0]['method'] in _GAUSSIAN[1:] else '-'  # the same colour, trained longer
            axes.plot(sigmas, means, color=colour, marker=marker, linestyle=line)
            marks += [Mark('', x, y) for x, y in zip(sigmas[:-1], means[:-1], strict=True)]
            marks.append(Mark(label, sigmas[-1], means[-1]))
        axes.set(xlabel='standard deviation of the noise (pixel range = 1)', ylabel='error, %')
        axes.set_xticks(sigmas)
        axes.set_xlim(right=1.65 * axes.get_xlim()[1])  # for the names of the lines
        place_labels(axes, marks)

    write_figure(path, (8, 5), draw)


def _error_by_corruption(path: Path, runs: _Row) -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(runs[0]['robustness']['corruptions'])
        shown = _shown(runs)
        for number, (label, row) in enumerate(shown.items()):
            colour, marker = _style(row)
            spreads = [spread([100 * _mean_error(run, name) for run in row]) for name in names]
            shift = 0.7 * (number / max(len(shown) - 1, 1) - 0.5)
            heights = [place + shift for place in range(len(names))]
            means, bars = [each.mean for each in spreads], [each.sd or 0 for each in spreads]
            axes.errorbar(
                means, heights, xerr=bars, color=colour, marker=marker, linestyle='', elinewidth=1, label=label
            )
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color=LIGHT_GREY, linewidth=0.7, zorder=0)
        axes.set_yticks(range(len(names)), [display_name(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel('error, %')
        figure.legend(loc='outside upper center', ncols=2, frameon=False)

    write_figure(path, (8, 8), draw)


def _mean_error(run: Record, corruption: str) -> float:
    errors = [each['error'] for each in run['robustness']['corruptions'][corruption]]
    return float(sum(errors) / len(errors))


def _error_against_cost(path: Path, runs: _Row) -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        baseline = next((row for row in rows(runs).values() if row[0]['method'] == BASELINE), [])
        costs = {run['seed']: run['flops'] or 0.0 for run in baseline}
        marks = []
        for label, row in rows(runs).items():
            cost = paired_ratio({run['seed']: run['flops'] or 0.0 for run in row}, costs)
            if cost is None:
                continue
            error = spread([QUANTITIES['corruptions'](run) for run in row])
            colour, marker = _style(row)
            axes.errorbar(cost, error.mean, error.sd, color=colour, alpha=0.4, linewidth=1, zorder=1)
            axes.plot(cost, error.mean, color=colour, marker=marker)
            marks.append(Mark(label, cost, error.mean, y_bar=error.sd or 0))
        axes.margins(0.15)
        axes.set(xlabel='operations ÷ baseline', ylabel='mean error under corruption, %')
        place_labels(axes, marks)

    write_figure(path, (8, 5), draw)
