"""The figures of the report, drawn from records; the same records give the same file, to the byte.

Text names every point and line; colour is never the only distinction.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import offset_copy

from composer_sba.study.display_names import display_name
from composer_sba.study.groups import rows
from composer_sba.study.label_placement import Mark, place_labels
from composer_sba.study.recipe_index import BASELINE
from composer_sba.study.records import Record
from composer_sba.study.stats import Spread, cost_ratios, median_ratio, spread
from composer_sba.study.style import GREY, LIGHT_GREY, METHOD_STYLES, MID_GREY, OTHER_STYLE, RC_PARAMS, RED

QUANTITIES: dict[str, Callable[[Record], float | None]] = {
    'flops': lambda run: run['flops'],
    'calibration_error': lambda run: run['calibration_error'],
}


def rows_with(quantity: str, runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the rows of a group, by label, whose runs all have a quantity of :data:`QUANTITIES`."""
    value_of = QUANTITIES[quantity]
    return {label: row for label, row in rows(runs).items() if all(value_of(run) is not None for run in row)}


def error_against(quantity: str, path: Path, runs: Sequence[Record]) -> None:
    """Draw the mean error against the mean of a quantity, one point a method, with bars of one standard deviation.

    Args:
        quantity (str): ``'flops'``, the operations of the training, or ``'calibration_error'``. Methods with a run that
            lacks it are left out.
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group, at least one with the quantity.
    """
    value_of = QUANTITIES[quantity]
    known = rows_with(quantity, runs)
    reference = next((row for row in known.values() if row[0]['method'] == BASELINE), [])
    if quantity == 'calibration_error':
        scale, axis_label = 100.0, 'calibration error, %'
    elif reference:
        scale, axis_label = 1 / spread([value_of(run) or 0.0 for run in reference]).mean, 'operations ÷ baseline'
    else:
        scale, axis_label = 1e-15, 'operations, PFLOP'

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marks = []
        for label, row in known.items():
            error, value = _error(row), spread([(value_of(run) or 0.0) * scale for run in row])
            colour, marker = _style(row)
            if row is reference:
                axes.axhline(error.mean, color=LIGHT_GREY, linewidth=0.7, zorder=0)
                axes.axvline(value.mean, color=LIGHT_GREY, linewidth=0.7, zorder=0)
            axes.errorbar(value.mean, error.mean, error.sd, value.sd, color=colour, alpha=0.4, linewidth=1, zorder=1)
            axes.plot(value.mean, error.mean, color=colour, marker=marker)
            marks.append(Mark(label, value.mean, error.mean, value.sd or 0, error.sd or 0))
        values = [mark.x for mark in marks]
        if max(values) > 4 * min(values) > 0:
            axes.set_xscale('log')
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axes.margins(0.1)
        axes.set(xlabel=axis_label, ylabel='error, %')
        place_labels(axes, marks)

    write_figure(path, (8, 4.4), draw)


def learning_curves(path: Path, runs: Sequence[Record]) -> None:
    """Draw error against epoch, one panel a method, with the baseline: mean and one standard deviation over seeds.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group.
    """
    ranked = sorted(rows(runs).items(), key=lambda item: _error(item[1]).mean)
    baseline = [item for item in ranked if item[1][0]['method'] == BASELINE]
    panels = [item for item in ranked if item not in baseline] or baseline
    num_columns = min(4, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
        for axes, (label, row) in zip(grid.flat, panels, strict=False):
            for _, reference in baseline:
                _curve(axes, reference, MID_GREY)
            if panels != baseline:
                _curve(axes, row, _style(row)[0])
            axes.set_title(label)
            axes.set_xlim(0, max(each['epoch'] for run in row for each in run['epochs']))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 3, 5, 10]))
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        # The errors of the first epochs would compress the range of the last ones
        late = [100 - 100 * e['accuracy'] for run in runs for e in run['epochs'][len(run['epochs']) // 4 :]]
        margin = 0.05 * (max(late) - min(late) or 1)
        grid[0, 0].set_ylim(min(late) - margin, max(late) + margin)
        figure.supxlabel('epoch', fontsize=9.5)
        figure.supylabel('error, %', fontsize=9.5)

    write_figure(path, (8, 0.4 + 1.75 * num_rows), draw)


def error_against_eta(path: Path, runs: Sequence[Record], best: float | None = None) -> None:
    """Draw the error of SBA against η: mean and one standard deviation, a dot for each seed, the baseline as a band.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group of the study ``eta``.
        best (float, optional): The η to mark, which the paper finds best here. Default: ``None``.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        by_eta = {float(row[0]['setting']['eta']): row for row in rows(runs).values() if 'eta' in row[0]['setting']}
        etas = sorted(by_eta)
        smallest = min((eta for eta in etas if eta > 0), default=1.0)
        axes.set_xscale('symlog', linthresh=smallest, linscale=0.7)
        axes.set_xticks(etas, [f'{eta:g}' for eta in etas])
        axes.xaxis.set_minor_locator(NullLocator())
        marks = _series(axes, etas, [by_eta[eta] for eta in etas])
        axes.margins(x=0.1)
        if best is not None:
            axes.axvline(best, color=LIGHT_GREY, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
            axes.annotate("the paper's best", (best, 1), (4, -2), ('data', 'axes fraction'), 'offset points', va='top')
        axes.set(xlabel='η, weight of the KL term', ylabel='error, %')
        place_labels(axes, [*marks, *_band(axes, runs)])

    write_figure(path, (8, 4), draw)


def error_and_cost_against_layer(path: Path, runs: Sequence[Record]) -> None:
    """Draw Fig. 3: the cost ratio t1/t2 of latent BA to SBA against the cut layer, and the error of both.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group of the study ``layers``. Layers keep their order of appearance.
    """
    layers = list(dict.fromkeys(run['setting']['layer'] for run in runs if 'layer' in run['setting']))

    def runs_of(method: str, layer: str) -> list[Record]:
        return [run for run in runs if run['method'] == method and run['setting'].get('layer') == layer]

    def draw(figure: Figure) -> None:
        cost, error = figure.subplots(1, 2)
        for x, layer in enumerate(layers):
            ratios = list(cost_ratios(runs_of('latent_ba', layer), runs_of('sba', layer)).values())
            for ratio in ratios:
                marker, edge = ('.', 0.0) if ratio else ('x', 1.2)
                cost.plot(x, ratio, marker=marker, color=RED, alpha=0.5, markeredgewidth=edge, clip_on=False)
            if ratios:
                median = median_ratio(ratios)
                cost.plot(x, median, marker='_', markersize=18, color=RED, markeredgewidth=2, clip_on=False)
        cost.axhline(1, color=LIGHT_GREY, linewidth=0.7, zorder=0)
        cost.set_ylim(bottom=0)
        cost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}' if value else 'never'))
        cost.set_title('cost ratio t1/t2: above 1, SBA is faster')
        marks = []
        for method, shift in (('latent_ba', -0.12), ('sba', 0.16)):
            xs = [x for x, layer in enumerate(layers) if runs_of(method, layer)]
            marks += _series(error, [x + shift for x in xs], [runs_of(method, layers[x]) for x in xs])
        error.set_title('error, %')
        for axes in (cost, error):
            axes.set_xticks(range(len(layers)), layers)
            axes.set_xlim(-0.5, len(layers) - 0.5)
            axes.set_xlabel('cut layer')
        error.set_xlim(right=1.2 * len(layers) - 0.5)  # for the names of the lines
        place_labels(error, [*marks, *_band(error, runs)])

    write_figure(path, (8, 3.6), draw)


def _error(row: Sequence[Record]) -> Spread:
    """Return the spread of the error. Unit: per cent."""
    return spread([100 - 100 * run['accuracy'] for run in row])


def _style(row: Sequence[Record]) -> tuple[str, str]:
    """Return colour and marker."""
    return METHOD_STYLES.get(row[0]['method'], OTHER_STYLE)


def _curve(axes: Axes, row: Sequence[Record], colour: str) -> None:
    by_epoch: dict[int, list[float]] = {}
    for run in row:
        for evaluation in run['epochs']:
            by_epoch.setdefault(evaluation['epoch'], []).append(100 - 100 * evaluation['accuracy'])
    epochs = sorted(by_epoch)
    errors = [spread(by_epoch[epoch]) for epoch in epochs]
    low, high = ([each.mean + sign * (each.sd or 0) for each in errors] for sign in (-1, 1))
    axes.fill_between(epochs, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(epochs, [each.mean for each in errors], color=colour)


def _series(axes: Axes, xs: Sequence[float], points: Sequence[Sequence[Record]]) -> list[Mark]:
    """Draw the error at each x, mean and standard deviation, with a dot for each seed; label the last point."""
    marks = [Mark('', x, _error(row).mean, y_bar=_error(row).sd or 0) for x, row in zip(xs, points, strict=True)]
    if not marks:
        return []
    colour, marker = _style(points[0])
    for x, row in zip(xs, points, strict=True):
        errors = [100 - 100 * run['accuracy'] for run in row]
        shifted = offset_copy(axes.transData, axes.get_figure(root=True), -5, 0, 'points')
        axes.plot([x] * len(row), errors, '.', color=colour, alpha=0.4, markeredgewidth=0, transform=shifted)
        axes.update_datalim([(x, value) for value in errors])  # shifted points do not do so
    means, bars = [mark.y for mark in marks], [mark.y_bar for mark in marks]
    axes.errorbar(xs, means, bars, color=colour, marker=marker, elinewidth=1)
    return [*marks[:-1], marks[-1]._replace(text=display_name(points[0][0]['method']))]


def _band(axes: Axes, runs: Sequence[Record]) -> list[Mark]:
    """Draw the baseline's mean and standard deviation across the axes, whose limits are final; label the right end."""
    row = [run for run in runs if run['method'] == BASELINE]
    if not row:
        return []
    error = _error(row)
    axes.axhspan(error.mean - (error.sd or 0), error.mean + (error.sd or 0), color=GREY, alpha=0.13, linewidth=0)
    axes.axhline(error.mean, color=GREY, linewidth=0.9, zorder=0)
    return [Mark(BASELINE, axes.get_xlim()[1], error.mean)]


def write_figure(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Write a PNG in the style of all figures.

    Args:
        path (Path): The file. Its folder is created if necessary.
        size (tuple[float, float]): Width and height. Unit: inches of 150 pixels.
        draw (Callable): Draws into the figure that it receives.
    """
    with style.context(['default', RC_PARAMS], after_reset=True):
        figure = Figure(figsize=size, dpi=150, layout='constrained')
        FigureCanvasAgg(figure)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={'Software': None})  # by default it names the version of Matplotlib
