"""Labels next to the points of a plot, placed to overlap neither points nor each other."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from composer_sba.study.style import MID_GREY

_DISTANCES = (7, 14, 24, 36, 50)  # of a label from its point, in typographic points (1/72 inch)
_LEADER = 12  # beyond this distance a line connects the label with its point
_SHARES = {'left': 0.0, 'bottom': 0.0, 'center': 0.5, 'right': 1.0, 'top': 1.0}  # of a label before its anchor
_COST_OF_DISTANCE = 4  # pixels² a typographic point
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
    inside = np.array(axes.get_window_extent().extents)
    taken = np.array([box for mark in marks for box in _mark_boxes(axes, mark)])
    for mark in sorted((mark for mark in marks if mark.text), key=lambda mark: (-mark.y, mark.x)):
        at = (mark.x, mark.y)
        halo = [withStroke(linewidth=2.5, foreground='white')]  # an error bar may still pass under the label
        label = axes.annotate(mark.text, at, (0, 0), textcoords='offset points', fontsize=9, path_effects=halo)
        label.set(horizontalalignment='left', verticalalignment='bottom')
        best, boxes = _best_position(label, taken, inside)
        taken = np.concatenate([taken, boxes])
        label.xyann = best.offset
        label.set(horizontalalignment=best.horizontal, verticalalignment=best.vertical)
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


def _best_position(label: Annotation, taken: np.ndarray, inside: np.ndarray) -> tuple[_Position, np.ndarray]:
    """Return the position with the least cost, and the boxes that a label and its line cover there."""
    assert label.axes is not None
    pixels = label.axes.figure.dpi / 72
    point = label.axes.transData.transform(label.xy)
    extent = label.get_window_extent()  # its lower left corner is at the point
    least, best = math.inf, None
    for position in _positions():
        if best and least <= _COST_OF_DISTANCE * position.distance:
            break  # this position and those after it cannot cost less
        boxes = _label_boxes(position, point, extent, pixels)
        if (cost := _cost(position, boxes, taken, inside)) < least:
            least, best = cost, (position, boxes)
    assert best
    return best


def _label_boxes(position: _Position, point: np.ndarray, extent: Bbox, pixels: float) -> np.ndarray:
    """Return the boxes of a label at a position, and of the line to its point, shape ``(boxes, 4)``. Unit: pixels.

    A box is left, low, right, high. A chain of small boxes stands for the line.
    """
    offset = pixels * np.array(position.offset)
    shares = _SHARES[position.horizontal], _SHARES[position.vertical]
    low = extent.min + offset - np.multiply(shares, extent.size)
    corners = [(*(low - 2), *(low + extent.size + 2))]
    if position.distance > _LEADER:
        line = [point + share / 10 * offset for share in range(3, 10)]
        corners += [(*(each - 3), *(each + 3)) for each in line]
    return np.array(corners)


def _cost(position: _Position, boxes: np.ndarray, taken: np.ndarray, inside: np.ndarray) -> float:
    """Return the overlap plus ten times the area outside the axes, in pixels²; the distance breaks ties."""
    width, height = boxes[0, 2:] - boxes[0, :2]
    outside = width * height - _overlaps(boxes[:1], inside[None]).sum()
    return float(_overlaps(boxes, taken).sum() + 10 * outside + _COST_OF_DISTANCE * position.distance)


def _mark_boxes(axes: Axes, mark: Mark) -> list[tuple[float, float, float, float]]:
    """Return the boxes that a point and its error bars cover. Unit: pixels."""
    x, y = axes.transData.transform((mark.x, mark.y))
    left, low = axes.transData.transform((mark.x - mark.x_bar, mark.y - mark.y_bar))
    right, high = axes.transData.transform((mark.x + mark.x_bar, mark.y + mark.y_bar))
    return [(x - 8, y - 8, x + 8, y + 8), (left, y - 1, right, y + 1), (x - 1, low, x + 1, high)]


def _overlaps(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the area that each of some boxes shares with each of the others."""
    low = np.maximum(some[:, None, :2], others[:, :2])
    high = np.minimum(some[:, None, 2:], others[:, 2:])
    return np.maximum(high - low, 0).prod(-1)
