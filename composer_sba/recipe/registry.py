"""Names in a recipe -> what they build: Composer's components by introspection, our own beside them.

A recipe can name only what is listed here, so a YAML file stays data: no class path, no code.
"""

import functools
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch.optim
from composer import algorithms, callbacks, loggers, optim
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.utils import MissingConditionalImportError

from composer_sba.errors import nearest
from composer_sba.recipe.signature import Build, faults

# Imported on use, so that the registry depends on no component.
_OWN = {
    'algorithms': (
        'composer_sba.sba:SBA',
        'composer_sba.algorithms:BatchAugmentation',
        'composer_sba.algorithms:MajorityVote',
        'composer_sba.algorithms:ManifoldMixup',
        'composer_sba.algorithms:RDrop',
    ),
    'callbacks': ('composer_sba.algorithms:LastEpochsMedian',),
    'model': ('composer_sba.models:MODELS',),
    'optimizer': ('torch.optim:SGD', 'torch.optim:Adam', 'torch.optim:AdamW'),
}
_COMPOSER: dict[str, tuple[types.ModuleType, type]] = {
    'algorithms': (algorithms, Algorithm),
    'callbacks': (callbacks, Callback),
    'loggers': (loggers, LoggerDestination),
    'scheduler': (optim, optim.ComposerScheduler),
    'optimizer': (optim, torch.optim.Optimizer),
}
_SUFFIX = re.compile(r'_?(logger|scheduler|callback)$')
_WORDS = re.compile(r'(?<=[a-z0-9])(?=[A-Z].)|(?<=[A-Z])(?=[A-Z][a-z])')


@functools.cache
def components(section: str) -> dict[str, Build]:
    """What a section of a recipe can name.

    Args:
        section (str): ``'model'``, ``'optimizer'``, ``'scheduler'``, ``'algorithms'``, ``'callbacks'`` or
            ``'loggers'``.

    Returns:
        dict[str, Callable]: Name as a reader is shown it -> the class or function that builds it.

    Example:
        >>> components('algorithms')['mixup'].__name__
        'MixUp'
    """
    own = [pkgutil.resolve_name(path) for path in _OWN.get(section, ())]
    if section == 'model':
        return {name: build for models in own for name, build in models.items()}
    module, base = _COMPOSER[section]
    return {_spelling(cls): cls for cls in [*own, *_public(module, base)]}


def canonical(section: str, name: str) -> str | None:
    """The listed spelling of a name; case, underscores and a trailing Logger, Scheduler or Callback do not matter.

    Args:
        section (str): As in :func:`components`.
        name (str): The name as a user wrote it.

    Returns:
        str | None: The name as :func:`components` lists it, None if nothing answers to it.

    Example:
        >>> canonical('algorithms', 'MixUp'), canonical('loggers', 'wandb_logger'), canonical('algorithms', 'mixpu')
        ('mixup', 'wandb', None)
    """
    listed = {_plain(each): each for each in components(section)}
    return listed.get(_plain(name)) or listed.get(_SUFFIX.sub('', _plain(name)))


def component_faults(section: str, name: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a component's arguments, as :func:`composer_sba.recipe.signature.faults` tells it.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.
        arguments (Mapping[str, Any]): Its keyword arguments.

    Yields:
        tuple[str, str]: Dotted key of the argument, and what is wrong with it.
    """
    plain = dict(arguments)
    for key in [key for key, value in arguments.items() if section == 'algorithms' and _is_scheduler(value)]:
        scheduler = plain.pop(key)
        given = str(scheduler['name'])
        known = canonical('scheduler', given)
        if known is None:
            yield f'{key}.name', f"unknown scheduler '{given}'{nearest(given, components('scheduler'))}"
        else:
            below = component_faults('scheduler', known, _without_name(scheduler))
            yield from ((f'{key}.{inner}', problem) for inner, problem in below)
    yield from faults(components(section)[name], plain, supplied=['params'] if section == 'optimizer' else [])


def construct(section: str, name: str, arguments: Mapping[str, Any], *supplied: Any) -> Any:
    """Build a component from checked arguments.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.
        arguments (Mapping[str, Any]): Its keyword arguments. In ``algorithms``, a mapping that has a ``name`` stands
            for the Composer scheduler of that name.
        *supplied (Any): Positional arguments that a recipe does not hold, such as an optimizer's parameter groups.

    Returns:
        Any: The component.

    Raises:
        ValueError: From the component, on a value it refuses.
        ImportError: If the component needs a library that is not installed; the message is one line.
    """
    given = dict(arguments)
    for key, value in arguments.items():
        if section == 'algorithms' and _is_scheduler(value):
            given[key] = construct('scheduler', str(canonical('scheduler', value['name'])), _without_name(value))
    try:
        return components(section)[name](*supplied, **given)
    except MissingConditionalImportError as error:
        group = re.search(r'mosaicml\[([\w,]+)\]', str(error))
        package = f"'mosaicml[{group.group(1)}]'" if group else name
        raise ImportError(f'needs a library that is not installed: pip install {package}') from error


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, Mapping) and 'name' in value


def _without_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != 'name'}


def _plain(name: str) -> str:
    return name.replace('_', '').replace('-', '').lower()


def _spelling(cls: type) -> str:
    """The name shown for a class: its module's where that spells the class (``mixup``), else snake_case."""
    module = cls.__module__.rpartition('.')[2]
    return _SUFFIX.sub('', module if _plain(module) == _plain(cls.__name__) else _WORDS.sub('_', cls.__name__).lower())


def _public(module: types.ModuleType, base: type) -> list[type]:
    named = (getattr(module, name) for name in module.__all__)
    return [cls for cls in named if inspect.isclass(cls) and issubclass(cls, base) and cls is not base]
