"""Labels next to the points of a plot, placed to overlap neither points nor each other."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from composer_sba.study.style import MID_GREY

_DISTANCES = (7, 14, 24, 36, 50)  # of a label from its point, in typographic points (1/72 inch)
_LEADER = 12  # beyond this distance a line connects the label with its point
_ANGLES = (0, 30, -30, 180, 150, -150, 60, -60, 120, -120, 90, -90)  # degrees, to the right first


class Mark(NamedTuple):
    """A point in data coordinates, the half lengths of its error bars, and its label; ``''`` means no label."""

    text: str
    x: float
    y: float
    x_bar: float = 0.0
    y_bar: float = 0.0


class _Position(NamedTuple):
    """A possible position of a label: distance and offset from the point, in typographic points, and alignment."""

    distance: float
    offset: tuple[float, float]
    horizontal: Literal['left', 'center', 'right']
    vertical: Literal['bottom', 'center', 'top']


def place_labels(axes: Axes, marks: Sequence[Mark]) -> None:
    """Label each point at the nearest free position, or at the one with the least overlap if none is free.

    Args:
        axes (Axes): Complete except for the labels, which avoid what is drawn when this function is called.
        marks (Sequence[Mark]): The points to label and to avoid.
    """
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # settles limits and layout
    taken = [box for mark in marks for box in _mark_boxes(axes, mark)]
    for mark in sorted((mark for mark in marks if mark.text), key=lambda mark: (-mark.y, mark.x)):
        at = (mark.x, mark.y)
        halo = [withStroke(linewidth=2.5, foreground='white')]  # an error bar may still pass under the label
        label = axes.annotate(mark.text, at, (0, 0), textcoords='offset points', fontsize=9, path_effects=halo)
        costs = {position: _cost(label, position, taken) for position in _positions()}
        best = min(costs, key=costs.__getitem__)
        taken += [_move(label, best), *_leader_boxes(label, best)]
        if best.distance > _LEADER:
            line = {'arrowstyle': '-', 'color': MID_GREY, 'linewidth': 0.6, 'shrinkA': 0, 'shrinkB': 4}
            axes.annotate('', at, best.offset, textcoords='offset points', arrowprops=line)


def _positions() -> Iterator[_Position]:
    for distance in _DISTANCES:
        for angle in _ANGLES:
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            horizontal: Literal['left', 'center', 'right'] = 'left' if x > 0.1 else 'right' if x < -0.1 else 'center'
            vertical: Literal['bottom', 'center', 'top'] = 'bottom' if y > 0.6 else 'top' if y < -0.6 else 'center'
            yield _Position(distance, (distance * x, distance * y), horizontal, vertical)


def _move(label: Annotation, position: _Position) -> Bbox:
    """Move a label and return the box that it then covers. Unit: pixels."""
    label.xyann = position.offset
    label.set(horizontalalignment=position.horizontal, verticalalignment=position.vertical)
    return label.get_window_extent().padded(2)


def _leader_boxes(label: Annotation, position: _Position) -> list[Bbox]:
    """Return a chain of small boxes along the line from a point to its label. Unit: pixels."""
    if position.distance <= _LEADER:
        return []
    assert label.axes is not None
    x, y = label.axes.transData.transform(label.xy)
    pixels = label.axes.figure.dpi / 72
    shares = [share / 10 for share in range(3, 10)]
    line = [(x + share * position.offset[0] * pixels, y + share * position.offset[1] * pixels) for share in shares]
    return [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in line]


def _cost(label: Annotation, position: _Position, taken: Sequence[Bbox]) -> float:
    """Return the overlap plus ten times the area outside the axes, in pixels²; the distance breaks ties."""
    box = _move(label, position)
    assert label.axes is not None
    outside = box.width * box.height - _overlap(box, label.axes.get_window_extent())
    covered = sum(_overlap(each, other) for each in (box, *_leader_boxes(label, position)) for other in taken)
    return covered + 10 * outside + 4 * position.distance


def _mark_boxes(axes: Axes, mark: Mark) -> list[Bbox]:
    """Return the boxes that a point and its error bars cover. Unit: pixels."""
    x, y = axes.transData.transform((mark.x, mark.y))
    left, low = axes.transData.transform((mark.x - mark.x_bar, mark.y - mark.y_bar))
    right, high = axes.transData.transform((mark.x + mark.x_bar, mark.y + mark.y_bar))
    corners = [(x - 8, y - 8, x + 8, y + 8), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]
    return [Bbox.from_extents(*each) for each in corners]


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
