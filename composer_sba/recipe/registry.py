"""The components that a recipe can name: Composer's, found by introspection, and this package's own.

A recipe can name nothing else, which keeps a YAML file data: it holds no class path and no code.
"""

import contextlib
import functools
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.optim
from composer import algorithms, callbacks, loggers, optim
from composer.core import Algorithm, AlgorithmPass, Callback
from composer.loggers import LoggerDestination
from composer.utils import MissingConditionalImportError

from composer_sba.errors import UserError, nearest
from composer_sba.recipe.signature import Build, annotations, argument_errors, dotted_parameters, with_defaults

# Imported when they are used: the registry depends on no component.
_OWN = {
    'algorithms': (
        'composer_sba.sba:SBA',
        'composer_sba.algorithms:BatchAugmentation',
        'composer_sba.algorithms:MajorityVote',
        'composer_sba.algorithms:ManifoldMixup',
        'composer_sba.algorithms:RDrop',
    ),
    'callbacks': ('composer_sba.algorithms:LastEpochsMedian',),
    'loggers': ('composer_sba.tensorboard:TensorboardLogger',),
    'model': ('composer_sba.models:MODELS',),
    'optimizer': ('torch.optim:SGD', 'torch.optim:Adam', 'torch.optim:AdamW'),
}
_PASSES = ('composer_sba.sba:sort_sba_last', 'composer_sba.algorithms.seed_each_batch:sort_seed_first')
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
    """Return the components that a section of a recipe can name.

    Args:
        section (str): ``'model'``, ``'optimizer'``, ``'scheduler'``, ``'algorithms'``, ``'callbacks'`` or
            ``'loggers'``.

    Returns:
        dict[str, Callable]: The class or function that builds a component, by its name.

    Example:
        >>> components('algorithms')['mixup'].__name__
        'MixUp'
    """
    own = [pkgutil.resolve_name(path) for path in _OWN.get(section, ())]
    if section == 'model':
        return {name: build for models in own for name, build in models.items()}
    module, base = _COMPOSER[section]
    return {_list_name(cls): cls for cls in [*_public(module, base), *own]}  # ours replaces Composer's of its name


def find(section: str, name: str) -> Build:
    """Return what builds a component.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it, or a model of a library, such as ``'timm/resnet18'``.

    Returns:
        Callable: The class or function.

    Raises:
        UserError: If a library, or its model, does not exist or is not installed.
    """
    return _library_model(name).build if _is_of_library(section, name) else components(section)[name]


def canonical(section: str, name: str) -> str | None:
    """Return the name that :func:`components` lists for a name as a user writes it.

    Case, underscores and a trailing Logger, Scheduler or Callback do not matter.

    Args:
        section (str): As in :func:`components`.
        name (str): The user's name.

    Returns:
        str | None: The listed name, or that of a library's model as it is; None if no component has it.

    Raises:
        UserError: If a name with a library is not known to it, or the library is missing.

    Example:
        >>> canonical('algorithms', 'MixUp'), canonical('loggers', 'wandb_logger'), canonical('algorithms', 'mixpu')
        ('mixup', 'wandb', None)
    """
    if _is_of_library(section, name):
        find(section, name)
        return name
    listed = {_letters(each): each for each in components(section)}
    return listed.get(_letters(name)) or listed.get(_SUFFIX.sub('', _letters(name)))


def component_errors(section: str, name: str, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find what is wrong with a component's arguments.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.
        arguments (Mapping[str, Any]): Its keyword arguments.

    Yields:
        tuple[str, str]: The dotted key of an argument, and what is wrong with it.
    """
    build = find(section, name)
    others = dict(arguments)
    for key in _scheduled(build, arguments):
        scheduler = others.pop(key)
        given = str(scheduler['name'])
        listed = canonical('scheduler', given)
        if listed is None:
            yield f'{key}.name', f"unknown scheduler '{given}'{nearest(given, components('scheduler'))}"
        else:
            below = component_errors('scheduler', listed, _without_name(scheduler))
            yield from ((f'{key}.{inner}', problem) for inner, problem in below)
    yield from argument_errors(build, others, supplied=['params'] if section == 'optimizer' else [])


def complete(section: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component's arguments together with the defaults of those that are left out.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.
        arguments (Mapping[str, Any]): Its keyword arguments.

    Returns:
        dict[str, Any]: As :func:`composer_sba.recipe.signature.with_defaults` returns them.

    Example:
        >>> complete('algorithms', 'sba', {'eta': 1})['vicinity']['sigma']
        0.1
    """
    build = find(section, name)
    values = with_defaults(build, arguments)
    for key in _scheduled(build, arguments):
        listed = str(canonical('scheduler', str(arguments[key]['name'])))
        values[key] = {'name': listed, **complete('scheduler', listed, _without_name(arguments[key]))}
    return values


def parameters(section: str, name: str) -> list[str]:
    """Return the names of a component's arguments, and with dots those of the dataclasses among them.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.

    Returns:
        list[str]: In the order of the signature.

    Example:
        >>> parameters('algorithms', 'majority_vote')[:4]
        ['layers', 'fold', 'vicinity', 'vicinity.gaussian_fraction']
    """
    return list(dotted_parameters(find(section, name)))


def in_library(name: str) -> str | None:
    """Return the name of a model with its library, given the model's alone; None if no installed library has it.

    Example:
        >>> in_library('resnet18')
        'torchvision/resnet18'
    """
    for library in ('torchvision', 'timm'):
        with contextlib.suppress(UserError):
            find('model', f'{library}/{name}')
            return f'{library}/{name}'
    return None


def construct(section: str, name: str, arguments: Mapping[str, Any], *supplied: Any) -> Any:
    """Build a component from checked arguments.

    Args:
        section (str): As in :func:`components`.
        name (str): As :func:`components` lists it.
        arguments (Mapping[str, Any]): Its keyword arguments. A mapping with a ``name`` builds the Composer scheduler of
            that name if the argument may be a scheduler.
        *supplied (Any): Positional arguments that a recipe does not give, such as an optimizer's parameter groups.

    Returns:
        Any: The component.

    Raises:
        ValueError: If the component refuses a value.
        ImportError: If the component needs a library that is not installed; the message is one line.
    """
    build, given = find(section, name), dict(arguments)
    for key in _scheduled(build, arguments):
        listed = str(canonical('scheduler', str(given[key]['name'])))
        given[key] = construct('scheduler', listed, _without_name(given[key]))
    try:
        return build(*supplied, **given)
    except MissingConditionalImportError as error:
        group = re.search(r'mosaicml\[([\w,]+)\]', str(error))
        package = f"'mosaicml[{group.group(1)}]'" if group else name
        raise ImportError(f'needs a library that is not installed: pip install {package}') from error


def data_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a recipe's dataset that follow from its model.

    Args:
        model (Mapping[str, Any]): The section of the model: its name and arguments.

    Returns:
        dict[str, Any]: ``mean``, ``std``, ``crop_size`` and ``resize_size`` as the library of the model gives them; a
        model of this package has none.

    Raises:
        UserError: If the configuration of the model cannot be read.

    Example:
        >>> data_config({'name': 'torchvision/resnet18', 'pretrained': True})['resize_size']
        256
    """
    return _library_model(model['name']).data_config(model) if _is_of_library('model', model['name']) else {}


def algorithm_passes() -> list[AlgorithmPass]:
    """Return the passes that put this package's algorithms in their order, for Composer's Trainer."""
    return [pkgutil.resolve_name(path) for path in _PASSES]


def _scheduled(build: Build, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments that name a scheduler and whose annotation admits a function of time."""
    named = [key for key, value in arguments.items() if isinstance(value, Mapping) and 'name' in value]
    hints = {key: typing.get_args(annotations(build).get(key)) for key in named}
    return [key for key in named if any(typing.get_origin(hint) is Callable for hint in hints[key])]


def _without_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != 'name'}


def _is_of_library(section: str, name: str) -> bool:
    return section == 'model' and '/' in name


def _library_model(name: str) -> Any:
    return pkgutil.resolve_name('composer_sba.libraries:find')(name)


def _letters(name: str) -> str:
    return name.replace('_', '').replace('-', '').lower()


def _list_name(cls: type) -> str:
    """Return the name to list for a class: its module's if that has the same letters (``mixup``), else snake_case."""
    module, name = cls.__module__.rpartition('.')[2], cls.__name__
    return _SUFFIX.sub('', module if _letters(module) == _letters(name) else _WORDS.sub('_', name).lower())


def _public(module: types.ModuleType, base: type) -> list[type]:
    named = (getattr(module, name) for name in module.__all__)
    return [cls for cls in named if inspect.isclass(cls) and issubclass(cls, base) and cls is not base]
