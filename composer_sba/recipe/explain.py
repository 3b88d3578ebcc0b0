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
    """Make the exceptions of an algorithm, callback or logger carry the key of its entry in the recipe."""
    for name in _CALLED:
        if hasattr(component, name):
            setattr(component, name, marked(getattr(component, name), entry, arguments))


def marked(call: Callable[..., Any], entry: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Wrap a function of an entry: its exceptions carry the key of the entry, or of its argument, as ``recipe_key``."""

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            vars(error).setdefault('recipe_key', argument_key(entry, arguments, error))
            raise

    return wrapped


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
        begun (bool, optional): Whether a batch has been trained. From then on, an exception of a component is taken for
            a bug, unless it is a :class:`.UserError` or an OSError. Default: ``False``.

    Returns:
        RecipeError | None: None if the recipe is not to blame.
    """
    if isinstance(error, RecipeError):
        return error
    key, problem = vars(error).get('recipe_key'), problem_of(error)
    if _is_out_of_memory(error):
        remedy = 'lower global_train_batch_size, device_train_microbatch_size or the fold of an algorithm'
        return RecipeError(f'{sources.file}: the run does not fit into memory ({problem}): {remedy}')
    if key == 'save_folder' and isinstance(error, OSError | RuntimeError):
        reason = one_line(_system_error(error) or error)
        problem = f'a checkpoint cannot be written ({reason}): fix that and start again with autoresume=true'
        return sources.error(key, problem)
    if key is not None and (isinstance(error, UserError | OSError) or not begun):
        return sources.error(key, problem)
    return RecipeError(f'{sources.file}: {problem}') if isinstance(error, UserError) else None


@contextmanager
def explained(sources: Sources, begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raise what :func:`explain` returns for the exceptions of a block.

    Other exceptions keep their traceback. If a component of the recipe raised one, a line on stderr names its entry.
    """
    try:
        yield
    except Exception as error:
        explanation, key = explain(sources, error, begun=begun()), vars(error).get('recipe_key')
        if explanation is None and key is not None:
            print(f'error: {sources.error(key, "it failed in training, with the traceback below")}', file=sys.stderr)
        if explanation is None or explanation is error:
            raise
        raise explanation from error


def _dotted_keys(arguments: Mapping[str, Any], at: str = '') -> Iterator[str]:
    for key, value in arguments.items():
        yield from _dotted_keys(value, f'{at}{key}.') if isinstance(value, Mapping) else ()
        yield f'{at}{key}'


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _NO_MEMORY)


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the operating system's error that caused an exception, such as a RuntimeError of torch.save."""
    return error if error is None or isinstance(error, OSError) else _system_error(error.__context__)
