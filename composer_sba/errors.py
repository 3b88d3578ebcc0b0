"""Exceptions for mistakes in what the user supplies, helpers for their messages, and checks of arguments.

Each message is one line that names the argument, key or path at fault. The commands print it and exit with code 2.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, get_args

# Exceptions


class UserError(ValueError):
    """A mistake in what the user supplied; the message says in one line what to change.

    Args:
        message (str): The line.
        argument (str, optional): The argument that is wrong; a recipe's error names its key. Default: ``None``.
    """

    argument: str | None = None

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument or self.argument


class RecipeError(UserError):
    """A recipe, or an override of one, that cannot be trained; the message names the file and the key."""


class AlreadyTrainedError(RecipeError):
    """A resumed run whose whole duration has been trained.

    Attributes:
        trainer (composer.Trainer): It has the trained model and the state of the callbacks.
    """

    def __init__(self, message: str, trainer: Any) -> None:
        super().__init__(message)
        self.trainer = trainer


class DatasetError(UserError):
    """A missing, incomplete or corrupt dataset; the message names the path and the command that makes it."""


class TooWideError(UserError):
    """A dense basis for a layer with too many features; the message names both numbers and an alternative."""

    argument = 'basis'


class CutLayerError(UserError):
    """A layer, or a model, that cannot be cut; the message names the layer, the reason and layers that can be cut."""

    argument = 'layers'


class NonFiniteError(UserError):
    """A loss of the virtual samples that is NaN or infinite; the message names the batch, the layer and what to try."""


# Messages


def one_line(error: BaseException) -> str:
    r"""Return an exception's message as one line; of the traceback of a DataLoader worker, its last line.

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

    A close name with the same letters comes first:

        >>> nearest('sab', ['sam', 'sba', 'swa'])
        "; did you mean 'sba'?"
    """
    names = sorted(set(names))
    if not names:
        return '; no name is accepted here'
    close = sorted(difflib.get_close_matches(name, names), key=lambda each: sorted(each) != sorted(name))
    return f"; did you mean '{close[0]}'?" if close else f'; expected one of {", ".join(names)}'


# Checks of arguments


def check_number(name: str, value: Any, expected: str, holds: Callable[[Any], bool], kind: type = Real) -> Any:
    """Return a number as Python's int or float, which every library can log, save and compare.

    Args:
        name (str): The argument's name, for the message.
        value (Any): The number, Python's or NumPy's.
        expected (str): What the number must be, for the message.
        holds (Callable): Whether a number is in its range.
        kind (type, optional): ``numbers.Real`` or ``numbers.Integral``. Default: ``numbers.Real``.

    Returns:
        int | float: ``value``.

    Raises:
        UserError: If ``value`` is out of range, not a number of this kind, a bool, or an integer of more than 64 bits.

    Example:
        >>> check_number('eta', 0.5, 'a number >= 0', lambda value: value >= 0)
        0.5
    """
    if not isinstance(value, bool) and isinstance(value, Real) and isinstance(value, kind):
        value = int(value) if isinstance(value, Integral) else float(value)
        if (isinstance(value, float) or -(2**63) <= value < 2**63) and holds(value):
            return value
    raise UserError(f'Expected {name} to be {expected}, got {value!r}.', name)


def check_fold(fold: Any) -> int:
    """Return the number of virtual samples as an int; raise UserError unless it is an integer >= 1."""
    return check_number('fold', fold, 'an integer >= 1', lambda value: value >= 1, Integral)


def check_seed(seed: Any) -> int:
    """Return a seed as an int; raise UserError unless it is an integer >= 0."""
    return check_number('seed', seed, 'an integer >= 0', lambda value: value >= 0, Integral)


def check_layers(layers: Any) -> None:
    """Raise UserError unless ``layers`` is a layer name or a list of names."""
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f'Expected layers to be a layer name or a list of them, got {layers!r}.', 'layers')


def check_choice(name: str, value: Any, literal: Any) -> None:
    """Raise UserError unless ``value`` is one of the values of a ``Literal`` type."""
    if value not in get_args(literal):
        raise UserError(f'Expected {name} to be one of {", ".join(get_args(literal))}, got {value!r}.', name)


def check_flag(name: str, value: Any) -> None:
    """Raise UserError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise UserError(f'Expected {name} to be true or false, got {value!r}.', name)
