"""An exception from anywhere in a run -> the one line that names the key of the recipe that it is about."""

import inspect
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from composer.callbacks import CheckpointSaver

from composer_sba.errors import CutLayerError, NonFiniteError, RecipeError, UserError, one_line
from composer_sba.recipe.checkpoints import UNSAFE, holds_code
from composer_sba.recipe.merge import NAMED
from composer_sba.recipe.recipe import Recipe
from composer_sba.recipe.registry import components

_NO_MEMORY = ("can't allocate memory", 'out of memory')


def refusal(recipe: Recipe, error: BaseException, *, begun: bool = False) -> RecipeError | None:
    """Word an exception as a mistake in the recipe, if it is one.

    Args:
        recipe (Recipe): What is run.
        error (BaseException): What was raised as the Trainer was built or as it trained.
        begun (bool, optional): Whether a batch has been trained. From then on an exception of a component may be
            anything, and is not the recipe's. Default: ``False``.

    Returns:
        RecipeError | None: To be raised from ``error``; None if the recipe is not to blame.
    """
    told = one_line(error)
    if isinstance(error, RecipeError):
        return error
    if isinstance(error, CutLayerError):
        return recipe.sources.error(layers_key(recipe, error), told)
    if _has_no_memory(error):
        remedy = 'lower global_train_batch_size, device_train_microbatch_size or the fold of an algorithm'
        return RecipeError(f'{recipe.sources.file}: expected a run that fits into memory, got: {told}; {remedy}')
    if _is_of_loading(recipe, error):
        at = 'load_path' if recipe.load_path is not None else 'save_folder'
        return recipe.sources.error(at, f'expected a whole checkpoint of such a run, got {_checkpoint_fault(error)}')
    fault = _saving_fault(error)
    if fault is not None:
        problem = f'a checkpoint cannot be written ({fault}): see to that, and start again with autoresume=true'
        return recipe.sources.error('save_folder', problem)
    key = None if begun and not isinstance(error, UserError) else component_key(recipe, error)
    if key is not None:
        return recipe.sources.error(key, told)
    return RecipeError(f'{recipe.sources.file}: {told}') if isinstance(error, UserError) else None


def option_refusal(recipe: Recipe, error: BaseException) -> RecipeError:
    """Word what the Trainer refuses: of its option that the message names, else of the recipe."""
    told = one_line(error)
    named = [key for key in recipe.trainer_options() if re.search(rf'\b{key}\b', told, re.IGNORECASE)]
    return recipe.sources.error(max(named, key=len), told) if named else RecipeError(f'{recipe.sources.file}: {told}')


def component_key(recipe: Recipe, error: BaseException) -> str | None:
    """The key of the component in whose code an exception was raised, with that of the argument which it names."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        cls = type(frame.f_locals.get('self'))
        for section in NAMED:
            for name, arguments in getattr(recipe, section).items():
                if components(section)[name] is cls:
                    return argument_key(f'{section}.{name}', arguments, error)
        for section in ('optimizer', 'scheduler'):
            entry = getattr(recipe, section)
            if entry is not None and components(section)[entry['name']] is cls:
                return argument_key(section, entry, error)
    return None


def argument_key(at: str, arguments: Mapping[str, Any], error: BaseException) -> str:
    """The key of a component, or that of its argument which the message names."""
    if isinstance(error, NonFiniteError):  # it names some as remedies
        return at
    named = [key for key in _keys(arguments) if re.search(rf'\b{re.escape(key.rpartition(".")[2])}\b', str(error))]
    return '.'.join([at, *named[:1]])


def layers_key(recipe: Recipe, error: CutLayerError) -> str:
    """The key of the layers that an error is about: of the algorithms that cut, the one whose layer it names first."""

    def place(name: str) -> int:
        layers = recipe.algorithms[name].get('layers', 'head')
        found = [str(error).find(repr(layer)) for layer in ([layers] if isinstance(layers, str) else layers)]
        return min((each for each in found if each >= 0), default=len(str(error)))

    known = components('algorithms')
    cutting = [name for name in recipe.algorithms if 'layers' in inspect.signature(known[name]).parameters]
    return f'algorithms.{min(cutting, key=place)}.layers'


def _keys(arguments: Mapping[str, Any], at: str = '') -> Iterator[str]:
    """Dotted keys, the deepest first."""
    for key, value in arguments.items():
        yield from _keys(value, f'{at}{key}.') if isinstance(value, Mapping) else ()
        yield f'{at}{key}'


def _has_no_memory(error: BaseException) -> bool:
    told = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(each in told for each in _NO_MEMORY)
    )


def _is_of_loading(recipe: Recipe, error: BaseException) -> bool:
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return (recipe.load_path is not None or recipe.autoresume) and 'load_checkpoint' in names


def _checkpoint_fault(error: BaseException) -> str:
    code = holds_code(error)
    if code is None:
        return one_line(error)
    return f'{code}, which could run code as it is loaded; if you trust its author, set {UNSAFE}=1 in the environment'


def _saving_fault(error: BaseException) -> str | None:
    """Why a checkpoint could not be written; torch.save often says only that, in the wake of what the disk said."""
    frames = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not any(isinstance(each, CheckpointSaver) for each in frames):
        return None
    chain: list[BaseException] = []
    before: BaseException | None = error
    while before is not None and before not in chain:
        chain.append(before)
        before = before.__cause__ or before.__context__
    return next(
        (one_line(each) for each in chain if isinstance(each, OSError) or 'PytorchStreamWriter' in str(each)), None
    )
