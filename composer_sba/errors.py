"""What a user can get wrong. Each message is one line that names the culprit; train.py prints it and exits with 2."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, get_args


class UserError(ValueError):
    """A mistake of the user, described in one line that says what to change.

    Args:
        message (str): The line.
        argument (str, optional): The argument that is wrong: a recipe's error names its key. Default: ``None``.
    """

    argument: str | None = None

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument or self.argument


class RecipeError(UserError):
    """A recipe, or an override of it, that cannot be trained: names the file and the key."""


class AlreadyTrainedError(RecipeError):
    """A run that is resumed and has its whole duration behind it."""


class DatasetError(UserError):
    """Data that is missing, half-written or corrupted: names the path and the command that makes it."""


class TooWideError(UserError):
    """A dense basis for a layer with more features than its matrix may have: names both, and what would do."""

    argument = 'basis'


class CutLayerError(UserError):
    """A layer that cannot be cut, or a model that has none: names the layer, the reason and what would do."""

    argument = 'layers'


class NonFiniteError(UserError):
    """A divergence that is NaN or infinite: names the batch, the layer and what to try."""


def one_line(error: BaseException) -> str:
    r"""Return what an exception says as one line; of a DataLoader worker's traceback, its last line.

    Example:
        >>> one_line(ValueError('Caught ValueError in worker 0.\nTraceback ...\nValueError: no such shard'))
        'no such shard'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if 'Traceback' in str(error):
        return re.sub(r'^[\w.]+: ', '', lines[-1])
    return ' '.join(lines)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, or all names if none is close.

    Example:
        >>> nearest('alhpa', ['alpha', 'beta']), nearest('x', ['alpha', 'beta'])
        ("; did you mean 'alpha'?", '; expected one of alpha, beta')
    """
    names = sorted(names)
    if not names:
        return '; there is none to give'
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f'; expected one of {", ".join(names)}'


def check_number(name: str, value: Any, expected: str, holds: Callable[[Any], bool], kind: type = Real) -> None:
    """Raise ValueError unless ``value`` is a number of ``kind`` for which ``holds``; a bool is no number here.

    Nor is an integer of more than 64 bits, which torch does not take.
    """
    unfit = isinstance(value, bool) or not isinstance(value, kind)
    if unfit or (isinstance(value, int) and not -(2**63) <= value < 2**63) or not holds(value):
        raise UserError(f'Expected {name} to be {expected}, got {value!r}.', name)


def check_layers(layers: Any) -> None:
    """Raise ValueError unless ``layers`` is a name or a list of names."""
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f'Expected layers to be a layer name or a list of them, got {layers!r}.', 'layers')


def check_fold(fold: Any) -> None:
    """Raise ValueError unless ``fold`` is a number of virtual samples."""
    check_number('fold', fold, 'an integer >= 1', lambda value: value >= 1, Integral)


def check_seed(seed: Any) -> None:
    """Raise ValueError unless ``seed`` can seed a stream of random numbers."""
    check_number('seed', seed, 'an integer >= 0', lambda value: value >= 0, Integral)


def check_choice(name: str, value: Any, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of the values of a ``Literal`` type."""
    if value not in get_args(literal):
        raise UserError(f'Expected {name} to be one of {", ".join(get_args(literal))}, got {value!r}.', name)


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise UserError(f'Expected {name} to be true or false, got {value!r}.', name)
