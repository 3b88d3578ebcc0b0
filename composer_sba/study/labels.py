"""Labels beside the points of a plot, placed so that they cover neither points nor each other."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

_REACHES = (7, 14, 24, 36, 50)  # how far a label may go from its point, in points (1/72 inch)
_LEADER = 12  # beyond this a line leads from the point to its label
_ANGLES = (0, 30, -30, 180, 150, -150, 60, -60, 120, -120, 90, -90)  # degrees, to the right first

_Across = Literal['left', 'center', 'right']
_Along = Literal['bottom', 'center', 'top']


class Mark(NamedTuple):
    """A point in data coordinates, the half lengths of its error bars, and its label; ``''`` for none."""

    text: str
    x: float
    y: float
    x_bar: float = 0.0
    y_bar: float = 0.0


class _Position(NamedTuple):
    """Where a label may stand: distance and shift from the point, in points, and alignment."""

    reach: float
    shift: tuple[float, float]
    across: _Across
    along: _Along


def place(axes: Axes, marks: Sequence[Mark]) -> None:
    """Write a label beside each point, at the nearest position that is free, else at the one that covers least.

    Args:
        axes (Axes): Complete but for the labels, since they keep clear of what is where now.
        marks (Sequence[Mark]): What to label, and what to keep clear of.
    """
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # settles limits and layout
    taken = [box for mark in marks for box in _covered(axes, mark)]
    for mark in sorted((mark for mark in marks if mark.text), key=lambda mark: (-mark.y, mark.x)):
        at = (mark.x, mark.y)
        halo = [withStroke(linewidth=2.5, foreground='white')]  # an error bar may still run beneath
        label = axes.annotate(mark.text, at, (0, 0), textcoords='offset points', fontsize=9, path_effects=halo)
        costs = {position: _cost(label, position, taken) for position in _positions()}
        best = min(costs, key=costs.__getitem__)
        taken += [_put(label, best), *_leader(label, best)]
        if best.reach > _LEADER:
            line = {'arrowstyle': '-', 'color': '#8c8c8c', 'linewidth': 0.6, 'shrinkA': 0, 'shrinkB': 4}
            axes.annotate('', at, best.shift, textcoords='offset points', arrowprops=line)


def _positions() -> Iterator[_Position]:
    for reach in _REACHES:
        for angle in _ANGLES:
            x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            across: _Across = 'left' if x > 0.1 else 'right' if x < -0.1 else 'center'
            along: _Along = 'bottom' if y > 0.6 else 'top' if y < -0.6 else 'center'
            yield _Position(reach, (reach * x, reach * y), across, along)


def _put(label: Annotation, position: _Position) -> Bbox:
    """Move a label and tell what it then covers, in pixels."""
    label.xyann = position.shift
    label.set(horizontalalignment=position.across, verticalalignment=position.along)
    return label.get_window_extent().padded(2)


def _leader(label: Annotation, position: _Position) -> list[Bbox]:
    """What the line to a label covers beyond its point, as a chain of small boxes in pixels."""
    if position.reach <= _LEADER:
        return []
    assert label.axes is not None
    x, y = label.axes.transData.transform(label.xy)
    pixels = label.axes.figure.dpi / 72
    shares = [share / 10 for share in range(3, 10)]
    along = [(x + share * position.shift[0] * pixels, y + share * position.shift[1] * pixels) for share in shares]
    return [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in along]


def _cost(label: Annotation, position: _Position, taken: Sequence[Bbox]) -> float:
    """Area covered twice, and ten times that outside the axes, in pixels²; the distance decides between equals."""
    box = _put(label, position)
    assert label.axes is not None
    outside = box.width * box.height - _overlap(box, label.axes.get_window_extent())
    covered = sum(_overlap(each, other) for each in (box, *_leader(label, position)) for other in taken)
    return covered + 10 * outside + 4 * position.reach


def _covered(axes: Axes, mark: Mark) -> list[Bbox]:
    """What a point and its error bars cover, in pixels."""
    x, y = axes.transData.transform((mark.x, mark.y))
    left, low = axes.transData.transform((mark.x - mark.x_bar, mark.y - mark.y_bar))
    right, high = axes.transData.transform((mark.x + mark.x_bar, mark.y + mark.y_bar))
    corners = [(x - 8, y - 8, x + 8, y + 8), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]
    return [Bbox.from_extents(*each) for each in corners]


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
