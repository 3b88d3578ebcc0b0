"""Errors of a run, described in one line that names the key of the recipe."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from composer_sba.errors import RecipeError, UserError, one_line
from composer_sba.recipe.merge import Sources

_CALLED = ('match', 'apply', 'run_event', 'log_metrics', 'log_hyperparameters')  # what Composer calls of a component
_NO_MEMORY = ("can't allocate memory", 'out of memory')  # on the CPU, PyTorch raises a RuntimeError with this text


def mark(component: Any, entry: str, arguments: Mapping[str, Any]) -> None:
    """Make the exceptions of a component carry the key of the recipe that they are about.

    Args:
        component (Any): An algorithm, callback or logger, which is changed in place.
        entry (str): The key of its entry, such as ``'algorithms.sba'``.
        arguments (Mapping[str, Any]): The arguments that the entry gives.
    """
    for name in _CALLED:
        if hasattr(component, name):
            setattr(component, name, marked(getattr(component, name), entry, arguments))


def marked(call: Callable[..., Any], entry: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Wrap a function: its exceptions carry a key of the recipe as ``recipe_key``. The arguments are :func:`mark`'s."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if recipe_key(error) is None:
                vars(error)['recipe_key'] = argument_key(entry, arguments, error)
            raise

    return wrapped


def recipe_key(error: BaseException) -> str | None:
    """Return the key of the recipe that an exception carries."""
    return vars(error).get('recipe_key')


def argument_key(entry: str, arguments: Mapping[str, Any], error: BaseException) -> str:
    """Return the key of an entry, or of its argument if the error names one.

    Example:
        >>> argument_key('algorithms.sba', {'vicinity': {'tau': -1}}, UserError('Expected tau ...', 'tau'))
        'algorithms.sba.vicinity.tau'
    """
    argument = error.argument if isinstance(error, UserError) else None
    if argument is None:
        return entry
    given = [key for key in _dotted_keys(arguments) if key.rpartition('.')[2] == argument]
    return f'{entry}.{[*given, argument][0]}'


def problem_of(error: BaseException) -> str:
    """Return what an exception says as one line, with its type where the text alone says too little."""
    return f'{type(error).__name__}: {one_line(error)}' if isinstance(error, LookupError) else one_line(error)


def explain(sources: Sources, error: BaseException, *, begun: bool = False) -> RecipeError | None:
    """Describe an exception as a mistake in the recipe.

    Args:
        sources (Sources): Those of the recipe that is run.
        error (BaseException): What was raised.
        begun (bool, optional): Whether a batch has been trained. From then on, other exceptions than
            :class:`.UserError` are taken for bugs. Default: ``False``.

    Returns:
        RecipeError | None: None if the recipe is not to blame.
    """
    key, problem = recipe_key(error), problem_of(error)
    if isinstance(error, RecipeError):
        return error
    if _is_out_of_memory(error):
        remedy = 'lower global_train_batch_size, device_train_microbatch_size or the fold of an algorithm'
        return RecipeError(f'{sources.file}: the run does not fit into memory ({problem}): {remedy}')
    if key is not None and (isinstance(error, UserError) or not begun):
        return sources.error(key, problem)
    return RecipeError(f'{sources.file}: {problem}') if isinstance(error, UserError) else None


@contextmanager
def explained(sources: Sources, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise a RecipeError for the exceptions of a block that :func:`explain` describes.

    Other exceptions keep their traceback. If a component of the recipe raised one, a line on stderr names its entry.

    Args:
        sources (Sources): Those of the recipe that is run.
        begun (Callable, optional): Tells whether a batch has been trained when the exception is raised.
    """
    try:
        yield
    except Exception as error:
        explanation = explain(sources, error, begun=begun())
        if explanation is error:
            raise
        if explanation is not None:
            raise explanation from error
        key = recipe_key(error)
        if key is not None:
            print(f'error: {sources.error(key, "it failed in training, with the traceback below")}', file=sys.stderr)
        raise


def _dotted_keys(arguments: Mapping[str, Any], at: str = '') -> Iterator[str]:
    for key, value in arguments.items():
        yield from _dotted_keys(value, f'{at}{key}.') if isinstance(value, Mapping) else ()
        yield f'{at}{key}'


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)
