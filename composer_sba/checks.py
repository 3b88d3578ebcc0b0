"""Arguments that lie outside their range: one line that names the argument, what it may be and what came."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, get_args


def check_number(name: str, value: Any, expected: str, holds: Callable[[Any], bool], kind: type = Real) -> None:
    """Raise ValueError unless ``value`` is a number of ``kind`` for which ``holds``; a bool is no number here.

    Nor is an integer of more than 64 bits, which torch does not take.
    """
    unfit = isinstance(value, bool) or not isinstance(value, kind)
    if unfit or (isinstance(value, int) and not -(2**63) <= value < 2**63) or not holds(value):
        raise ValueError(f'Expected {name} to be {expected}, got {value!r}.')


def check_layers(layers: Any) -> None:
    """Raise ValueError unless ``layers`` is a name or a list of names."""
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'Expected layers to be a layer name or a list of them, got {layers!r}.')


def check_fold(fold: Any) -> None:
    """Raise ValueError unless ``fold`` is a number of virtual samples."""
    check_number('fold', fold, 'an integer >= 1', lambda value: value >= 1, Integral)


def check_seed(seed: Any) -> None:
    """Raise ValueError unless ``seed`` can seed a stream of random numbers."""
    check_number('seed', seed, 'an integer >= 0', lambda value: value >= 0, Integral)


def check_choice(name: str, value: Any, literal: Any) -> None:
    """Raise ValueError unless ``value`` is one of the values of a ``Literal`` type."""
    if value not in get_args(literal):
        raise ValueError(f'Expected {name} to be one of {", ".join(get_args(literal))}, got {value!r}.')


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f'Expected {name} to be true or false, got {value!r}.')
