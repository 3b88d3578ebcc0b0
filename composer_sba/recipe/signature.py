"""Arguments from a recipe, checked against the signature of the class or function that takes them."""

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal

from composer.core import Time

from composer_sba.errors import nearest

Build = Callable[..., Any]


def argument_errors(
    build: Build, arguments: Mapping[str, Any], supplied: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Find unknown keys, wrong types and missing arguments.

    Args:
        build (Callable): A class, a dataclass or a function.
        arguments (Mapping[str, Any]): Its keyword arguments, read from YAML. A mapping for a dataclass is compared with
            the dataclass's fields.
        supplied (Sequence[str]): Parameters that a recipe does not give, such as an optimizer's ``params``.

    Yields:
        tuple[str, str]: The dotted key of an argument, and what is wrong with it.

    Example:
        >>> from composer.algorithms import MixUp
        >>> list(argument_errors(MixUp, {'alhpa': 0.2}))
        [('alhpa', "unknown key; did you mean 'alpha'?")]
        >>> list(argument_errors(MixUp, {'alpha': 'high'}))
        [('alpha', "expected float, got 'high'")]
    """
    hints = annotations(build)
    parameters = {key: p for key, p in inspect.signature(build).parameters.items() if key not in supplied}
    named = [key for key, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        classes = (h for h in _options(hint) if isinstance(h, type) and is_dataclass(h))
        nested = next(classes, None) if isinstance(value, Mapping) else None
        if key not in named and not takes_any:
            deeper = [each for each in dotted_parameters(build) if each.endswith(f'.{key}')]
            deeper = [each for each in deeper if each.partition('.')[0] in named]
            yield f'{key}', f'unknown key{nearest(deeper[0] if deeper else f"{key}", [*named, *deeper])}'
        elif nested is not None:
            yield from ((f'{key}.{below}', problem) for below, problem in argument_errors(nested, value))
        elif not fits(hint, value):
            yield key, f'expected {describe(hint)}, got {as_yaml(value)}'
    for key in named:
        if parameters[key].default is inspect.Parameter.empty and key not in arguments:
            yield key, f'is required ({describe(hints[key])})' if key in hints else 'is required'


def with_defaults(build: Build, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments together with the defaults of those that are left out, as far as YAML can express them.

    Args:
        build (Callable): A class, a dataclass or a function.
        arguments (Mapping[str, Any]): Its keyword arguments, read from YAML. A mapping for a dataclass is completed
            too.

    Returns:
        dict[str, Any]: Plain data, in the order of the signature.

    Example:
        >>> from composer.algorithms import MixUp
        >>> with_defaults(MixUp, {'alpha': 0.5})
        {'alpha': 0.5, 'interpolate_loss': False, 'input_key': 0, 'target_key': 1}
    """
    hints, complete = annotations(build), {}
    for key, parameter in inspect.signature(build).parameters.items():
        value = arguments.get(key, parameter.default)
        if key not in arguments:
            value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            value = list(value) if isinstance(value, tuple) else value
            if not _is_plain(value) or not fits(hints.get(key, Any), value):
                continue
        classes = (h for h in _options(hints.get(key)) if isinstance(h, type) and is_dataclass(h))
        nested = next(classes, None) if isinstance(value, Mapping) else None
        complete[key] = value if nested is None else with_defaults(nested, value)
    return complete | {key: value for key, value in arguments.items() if key not in complete}


def dotted_parameters(build: Build) -> Iterator[str]:
    """Yield the names of a component's arguments, each followed by those of its dataclass, if it may be one."""
    hints = annotations(build)
    for key, parameter in inspect.signature(build).parameters.items():
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            yield key
            for option in _options(hints.get(key)):
                if isinstance(option, type) and is_dataclass(option):
                    yield from (f'{key}.{below}' for below in dotted_parameters(option))


def fits(hint: Any, value: Any) -> bool:
    """Return whether a value read from YAML has the annotated type.

    Every value fits an annotation that YAML cannot express.

    Example:
        >>> fits(int | Time, '5ep'), fits(int | Time, '5epp'), fits(float, 1), fits(int, True)
        (True, False, True, False)
    """
    options = _options(hint)
    if isinstance(value, str) and any((typing.get_origin(option) or option) is Time for option in options):
        options = tuple(option for option in options if option is not str)  # Composer annotates times as str | Time
    return any(_fits_one(option, value) for option in options)


def as_yaml(value: Any) -> str:
    """Return a value as YAML writes it: ``null`` and ``true`` rather than ``None`` and ``True``."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def describe(hint: Any) -> str:
    """Describe a type annotation for an error message.

    Example:
        >>> print(describe(int | str | Time | None))
        int or a time such as '5ep' or '100ba' or null
    """
    words = []
    options = _options(hint)
    is_time = any((typing.get_origin(option) or option) is Time for option in options)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is Literal:
            words += [repr(value) for value in typing.get_args(option)]
        elif kind is type(None):
            words.append('null')
        elif kind is Time:
            words.append("a time such as '5ep' or '100ba'")
        elif kind in (bool, int, float, str):
            words += [] if kind is str and is_time else [kind.__name__]
        elif inspect.isclass(kind) and (is_dataclass(kind) or issubclass(kind, Mapping)):
            words.append('a mapping')
        elif inspect.isclass(kind) and issubclass(kind, Sequence):
            items = typing.get_args(option)
            words.append(f'a list, each {describe(items[0])}' if items else 'a list')
    return ' or '.join(dict.fromkeys(words)) or 'something a recipe cannot hold'


@functools.cache
def annotations(build: Build) -> dict[str, Any]:
    """Return the annotations of a component's arguments, or ``{}`` if only a type checker can resolve them."""
    try:
        return typing.get_type_hints(build.__init__ if inspect.isclass(build) else build)
    except (NameError, TypeError):
        return {}


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits_one(option: Any, value: Any) -> bool:
    kind, inner = typing.get_origin(option) or option, typing.get_args(option)
    if kind is Any:
        return True
    if kind is Literal:
        return value in inner
    if isinstance(value, bool) or value is None:
        return kind is type(value)
    if kind is Time:
        return isinstance(value, str) and _is_time(value)
    if kind is float:
        return isinstance(value, float | int)
    if not inspect.isclass(kind):
        return True
    if isinstance(value, Mapping):
        return is_dataclass(kind) or issubclass(kind, Mapping)
    if isinstance(value, list):
        item = inner[0] if inner else Any
        return kind is not str and issubclass(kind, Sequence) and all(fits(item, each) for each in value)
    return isinstance(value, kind) or (isinstance(value, str) and issubclass(kind, PurePath | Enum))


def _is_plain(value: Any) -> bool:
    """Return whether a value is one that YAML holds."""
    if isinstance(value, list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (bool, int, float, str)


def _is_time(text: str) -> bool:
    try:
        # Composer reads '5' as 50 seconds; in a recipe a number without a unit is an int, never a string.
        return not text.strip().lstrip('-').isdigit() and Time.from_timestring(text).value >= 0
    except (ValueError, TypeError):
        return False
