"""The figures of the report, drawn from records; the same records give the same file, to the byte.

Words name every point and line, so that nothing hangs on colour alone.
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

from composer_sba.study.display_names import name
from composer_sba.study.groups import rows
from composer_sba.study.labels import Mark, place
from composer_sba.study.records import Record
from composer_sba.study.stats import Spread, cost_ratios, median_ratio, spread
from composer_sba.study.style import GREY, LOOKS, OTHER, PALE, PALER, RED, STYLE


def error_against_time(path: Path, runs: Sequence[Record]) -> None:
    """Draw a point for each method: mean error against mean training time, bars of one sd over seeds on both.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        longest = max(run['train_seconds'] for run in runs)
        unit, word = (3600, 'hours') if longest > 10_000 else (60, 'minutes') if longest > 180 else (1, 'seconds')
        marks = []
        for title, row in rows(runs).items():
            error, time = _error(row), spread([run['train_seconds'] / unit for run in row])
            colour, marker = _look(row)
            if row[0]['method'] == 'baseline':
                axes.axhline(error.mean, color=PALE, linewidth=0.7, zorder=0)
                axes.axvline(time.mean, color=PALE, linewidth=0.7, zorder=0)
            axes.errorbar(time.mean, error.mean, error.sd, time.sd, color=colour, alpha=0.4, linewidth=1, zorder=1)
            axes.plot(time.mean, error.mean, color=colour, marker=marker)
            marks.append(Mark(title, time.mean, error.mean, time.sd or 0, error.sd or 0))
        times = [mark.x for mark in marks]
        if max(times) > 4 * min(times):
            axes.set_xscale('log')
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axes.margins(0.1)
        axes.set(xlabel=f'training time, {word}', ylabel='error, %')
        place(axes, marks)

    write(path, (8, 5), draw)


def learning_curves(path: Path, runs: Sequence[Record]) -> None:
    """Draw a panel for each method: error against epoch, beside the baseline's, mean and one sd over seeds.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group.
    """
    ranked = sorted(rows(runs).items(), key=lambda item: _error(item[1]).mean)
    baseline = [item for item in ranked if item[1][0]['method'] == 'baseline']
    panels = [item for item in ranked if item not in baseline] or baseline
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for axes, (title, row) in zip(grid.flat, panels, strict=False):
            for _, reference in baseline:
                _curve(axes, reference, PALER)
            if panels != baseline:
                _curve(axes, row, _look(row)[0])
            axes.set_title(title)
            axes.set_xlim(0, max(each['epoch'] for run in row for each in run['epochs']))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 3, 5, 10]))
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        # The first epochs would press together what the last ones have to say
        late = [100 - 100 * e['accuracy'] for run in runs for e in run['epochs'][len(run['epochs']) // 4 :]]
        room = 0.05 * (max(late) - min(late) or 1)
        grid[0, 0].set_ylim(min(late) - room, max(late) + room)
        figure.supxlabel('epoch', fontsize=9.5)
        figure.supylabel('error, %', fontsize=9.5)

    write(path, (8, 0.4 + 1.75 * down), draw)


def error_against_eta(path: Path, runs: Sequence[Record], best: float | None = None) -> None:
    """Draw the error of SBA against η with one sd over seeds, each seed as a dot, over the band of the baseline.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group of the study ``eta``.
        best (float, optional): The η that the paper finds best here, to be marked. Default: ``None``.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        of_eta = {float(row[0]['setting']['eta']): row for row in rows(runs).values() if 'eta' in row[0]['setting']}
        etas = sorted(of_eta)
        smallest = min((eta for eta in etas if eta > 0), default=1.0)
        axes.set_xscale('symlog', linthresh=smallest, linscale=0.7)
        axes.set_xticks(etas, [f'{eta:g}' for eta in etas])
        axes.xaxis.set_minor_locator(NullLocator())
        marks = _series(axes, etas, [of_eta[eta] for eta in etas])
        axes.margins(x=0.1)
        if best is not None:
            axes.axvline(best, color=PALE, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
            axes.annotate("the paper's best", (best, 1), (4, -2), ('data', 'axes fraction'), 'offset points', va='top')
        axes.set(xlabel='η, weight of the KL term', ylabel='error, %')
        place(axes, [*marks, *_band(axes, runs)])

    write(path, (8, 4), draw)


def error_and_cost_against_layer(path: Path, runs: Sequence[Record]) -> None:
    """Draw Fig. 3: the cost ratio t1/t2 of latent BA to SBA against the cut layer, and the error of both.

    Args:
        path (Path): The PNG to write.
        runs (Sequence[Record]): The runs of a group of the study ``layers``; layers stand in their order of appearance.
    """
    layers = list(dict.fromkeys(run['setting']['layer'] for run in runs if 'layer' in run['setting']))

    def of(method: str, layer: str) -> list[Record]:
        return [run for run in runs if run['method'] == method and run['setting'].get('layer') == layer]

    def draw(figure: Figure) -> None:
        cost, error = figure.subplots(1, 2)
        for x, layer in enumerate(layers):
            ratios = list(cost_ratios(of('latent_ba', layer), of('sba', layer)).values())
            for ratio in ratios:
                marker, edge = ('.', 0.0) if ratio else ('x', 1.2)
                cost.plot(x, ratio, marker=marker, color=RED, alpha=0.5, markeredgewidth=edge, clip_on=False)
            if ratios:
                median = median_ratio(ratios)
                cost.plot(x, median, marker='_', markersize=18, color=RED, markeredgewidth=2, clip_on=False)
        cost.axhline(1, color=PALE, linewidth=0.7, zorder=0)
        cost.set_ylim(bottom=0)
        cost.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}' if value else 'never'))
        cost.set_title('cost ratio t1/t2: above 1, SBA is faster')
        marks = []
        for method, shift in (('latent_ba', -0.12), ('sba', 0.16)):
            there = [x for x, layer in enumerate(layers) if of(method, layer)]
            marks += _series(error, [x + shift for x in there], [of(method, layers[x]) for x in there])
        error.set_title('error, %')
        for axes in (cost, error):
            axes.set_xticks(range(len(layers)), layers)
            axes.set_xlim(-0.5, len(layers) - 0.5)
            axes.set_xlabel('cut layer')
        error.set_xlim(right=1.2 * len(layers) - 0.5)  # room for the names of the lines
        place(error, [*marks, *_band(error, runs)])

    write(path, (8, 3.6), draw)


def _error(row: Sequence[Record]) -> Spread:
    """In per cent."""
    return spread([100 - 100 * run['accuracy'] for run in row])


def _look(row: Sequence[Record]) -> tuple[str, str]:
    return LOOKS.get(row[0]['method'], OTHER)


def _curve(axes: Axes, row: Sequence[Record], colour: str) -> None:
    of_epoch: dict[int, list[float]] = {}
    for run in row:
        for evaluation in run['epochs']:
            of_epoch.setdefault(evaluation['epoch'], []).append(100 - 100 * evaluation['accuracy'])
    epochs = sorted(of_epoch)
    errors = [spread(of_epoch[epoch]) for epoch in epochs]
    low, high = ([each.mean + sign * (each.sd or 0) for each in errors] for sign in (-1, 1))
    axes.fill_between(epochs, low, high, color=colour, alpha=0.22, linewidth=0)
    axes.plot(epochs, [each.mean for each in errors], color=colour)


def _series(axes: Axes, xs: Sequence[float], points: Sequence[Sequence[Record]]) -> list[Mark]:
    """Draw mean and sd of the error at each x and each seed as a dot; the method's name belongs to the last point."""
    marks = [Mark('', x, _error(row).mean, y_bar=_error(row).sd or 0) for x, row in zip(xs, points, strict=True)]
    if not marks:
        return []
    colour, marker = _look(points[0])
    for x, row in zip(xs, points, strict=True):
        errors = [100 - 100 * run['accuracy'] for run in row]
        beside = offset_copy(axes.transData, axes.get_figure(root=True), -5, 0, 'points')
        axes.plot([x] * len(row), errors, '.', color=colour, alpha=0.4, markeredgewidth=0, transform=beside)
        axes.update_datalim([(x, value) for value in errors])  # which shifted points do not do
    means, bars = [mark.y for mark in marks], [mark.y_bar for mark in marks]
    axes.errorbar(xs, means, bars, color=colour, marker=marker, elinewidth=1)
    return [*marks[:-1], marks[-1]._replace(text=name(points[0][0]['method']))]


def _band(axes: Axes, runs: Sequence[Record]) -> list[Mark]:
    """Draw the baseline's mean and sd across the axes, whose limits are final; its name belongs to the right end."""
    row = [run for run in runs if run['method'] == 'baseline']
    if not row:
        return []
    error = _error(row)
    axes.axhspan(error.mean - (error.sd or 0), error.mean + (error.sd or 0), color=GREY, alpha=0.13, linewidth=0)
    axes.axhline(error.mean, color=GREY, linewidth=0.9, zorder=0)
    return [Mark('baseline', axes.get_xlim()[1], error.mean)]


def write(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Write a PNG in the style of all figures.

    Args:
        path (Path): Where; folders are made.
        size (tuple[float, float]): Width and height. Unit: inches, of 150 pixels.
        draw (Callable): Draws into the figure it is given.
    """
    with style.context(['default', STYLE], after_reset=True):
        figure = Figure(figsize=size, dpi=150, layout='constrained')
        FigureCanvasAgg(figure)
        draw(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={'Software': None})  # it would name the version of matplotlib
