"""Which layers of a network can be cut: names to modules, and the proof that rows above a cut stand on their own."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError

Forward = Callable[[], torch.Tensor]
_WRAPPERS = {'_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod'}
_TOLERANCE = 0.05  # of the largest logit: far above what bf16 does to a row, far below what a wrong row does


@dataclass(frozen=True)
class CutLayer:
    """A place where the latent batch can be multiplied: the output of a module, or its input.

    Attributes:
        name: The module's name in the unwrapped network, or ``'head'`` or ``'input'``.
        module: The module, its outermost wrapper where FSDP or activation checkpointing wrapped it.
        at_input: Whether the latent batch is what goes into the module instead of what comes out.
    """

    name: str
    module: nn.Module
    at_input: bool = False

    def hook(self, edit: Callable[[Any], torch.Tensor | None]) -> RemovableHandle:
        """Have ``edit`` see the value at the cut in every forward pass; what it returns, unless None, replaces it."""
        if self.at_input:
            return self.module.register_forward_pre_hook(partial(_edit_input, edit))
        return self.module.register_forward_hook(partial(_edit_output, edit))


def _edit_input(edit: Callable[[Any], torch.Tensor | None], module: nn.Module, args: tuple) -> torch.Tensor | None:
    return edit(args[0] if len(args) == 1 else args)


def _edit_output(
    edit: Callable[[Any], torch.Tensor | None], module: nn.Module, args: tuple, output: Any
) -> torch.Tensor | None:
    return edit(output)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Map every layer's name in the unwrapped network to its outermost module, in order of definition.

    Wrappers of DDP, FSDP, activation checkpointing and torch.compile leave no trace in the names, and neither does the
    ``module.`` that a ComposerClassifier or DDP puts in front.
    """
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        layers.setdefault(_plain(path), module)
    del layers['']
    return layers


def _plain(path: str) -> str:
    parts = [part for part in path.split('.') if part not in _WRAPPERS]
    while parts[:1] == ['module']:
        del parts[0]
    return '.'.join(parts)


def find_layers(model: nn.Module, layers: str | Sequence[str]) -> list[CutLayer]:
    """Resolve the set S of eligible layers.

    Args:
        model (torch.nn.Module): The network.
        layers (str | Sequence[str]): ``'head'``: the input of the last ``nn.Linear``; ``'input'``: the network's input;
            any other name: the output of the module of that name, with or without a leading ``module.``.

    Returns:
        list[CutLayer]: One for each name, in the order given.

    Raises:
        CutLayerError: If a name is no layer of the model, or stands there twice.
    """
    known = named_layers(model)
    cuts = [_find(model, known, name) for name in ([layers] if isinstance(layers, str) else layers)]
    for position, cut in enumerate(cuts):
        if any(cut.module is other.module and cut.at_input == other.at_input for other in cuts[:position]):
            raise CutLayerError(f'Layer {cut.name!r} is named twice in layers={list(layers)!r}.')
    return cuts


def _find(model: nn.Module, known: dict[str, nn.Module], name: str) -> CutLayer:
    if name == 'input':
        return CutLayer(name, model, at_input=True)
    if name == 'head':
        linears = [_plain(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise CutLayerError(
                f"layers='head' is the input of a model's last nn.Linear, and {type(model).__name__} has none. Name "
                f'the layer whose output is to be cut: {_some(known)}.',
            )
        return CutLayer(name, known[linears[-1]], at_input=True)
    if _plain(name) not in known:
        close = difflib.get_close_matches(_plain(name), known, n=3)
        raise CutLayerError(f'The model has no layer {name!r}; it has {_some(close or known)}.')
    return CutLayer(_plain(name), known[_plain(name)])


def _some(names: Any) -> str:
    top = [name for name in names if '.' not in name] or list(names)
    return ', '.join(repr(name) for name in top[:8]) + (', ...' if len(top) > 8 else '')


def check_cut(model: nn.Module, cut: CutLayer, forward: Forward) -> None:
    """Refuse a layer above which the rows of the batch are not independent of everything but the latent batch.

    The latent batch is doubled with its own rows, rotated by one. At a cut point the predictions must double the same
    way: a skip connection around the cut meets twice the rows it has, and rows that mix come out changed. The model
        runs in
    evaluation mode, without gradients, and the random state is put back.

    Args:
        model (torch.nn.Module): The model that ``forward`` runs.
        cut (CutLayer): The layer to check.
        forward (Callable): Runs the model on a batch of at least two rows and returns the logits, ``(N, K)``.

    Raises:
        CutLayerError: If the layer is no cut point; the message says why, and which layers next to it would do.
    """
    with _evaluation(model):
        reason = why_no_cut(cut, forward)
        if reason is not None:
            nearest = _nearest_cuts(model, cut, forward)
            remedy = f'Near it, {" and ".join(map(repr, nearest))} would do' if nearest else "Try layers='head'"
            raise CutLayerError(f'Layer {cut.name!r} is no cut point: {reason}. {remedy}.')


def why_no_cut(cut: CutLayer, forward: Forward) -> str | None:
    """Say why a layer is no cut point, or None if it is one; the model is in evaluation mode, as in `check_cut`."""
    seen: list[Any] = []
    with _hooked(cut, seen.append):
        logits = forward()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise CutLayerError(f'SBA needs a classifier whose output is one tensor of logits, (N, K); got {got}.')
    rows, classes = logits.shape
    if rows < 2:
        raise CutLayerError(f'Layer {cut.name!r} can only be checked on a batch of two rows or more, got {rows}.')
    if len(seen) != 1:
        return f'it runs {len(seen)} times in one forward pass'
    latent = seen[0]
    place = 'input' if cut.at_input else 'output'
    if not isinstance(latent, torch.Tensor):
        return f'its {place} is a {type(latent).__name__}, not one tensor'
    if not latent.is_floating_point():
        return f'its {place} is of {latent.dtype}, not floating'
    if latent.ndim == 0 or len(latent) != rows:
        return f'its {place} has shape {tuple(latent.shape)} for a batch of {rows} rows'
    if not cut.at_input and latent.shape == logits.shape and latent.data_ptr() == logits.data_ptr():
        return "it is the model's output, and no layer lies above it"
    if cut.name == 'head' and cut.module.out_features != classes:
        return (
            f'the last nn.Linear has {cut.module.out_features} outputs, the model {classes} logits: it is not the head'
        )
    try:
        with _hooked(cut, lambda value: torch.cat([value, value.roll(1, 0)])):
            doubled = forward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the layers above say of twice the rows is the reason
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
        return f'the layers above it cannot take more rows than entered below, as in a residual branch ({said})'
    if doubled.shape != (2 * rows, classes):
        return f'{len(doubled)} predictions came back for {2 * rows} rows'
    error_size = (doubled - torch.cat([logits, logits.roll(1, 0)])).abs().max()
    if not error_size <= _TOLERANCE * logits.abs().max():
        return 'predictions for the same rows changed when others joined them: the layers above it mix rows'
    return None


def _nearest_cuts(model: nn.Module, cut: CutLayer, forward: Forward) -> list[str]:
    """Find the cut points that run last before ``cut`` and first after it."""
    order: dict[str, nn.Module] = {}

    def note(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        order.setdefault(name, module)

    handles = [module.register_forward_hook(partial(note, name)) for name, module in named_layers(model).items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    names = list(order)
    at = names.index(cut.name) if cut.name in order else len(names)
    found = []
    for candidates in (names[:at][::-1], names[at + 1 :]):
        found += [name for name in candidates if why_no_cut(CutLayer(name, order[name]), forward) is None][:1]
    return found


@contextmanager
def _hooked(cut: CutLayer, edit: Callable[[Any], Any]) -> Iterator[None]:
    handle = cut.hook(edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random state are put back."""
    training = [module for module in model.modules() if module.training]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    # Eagerly: the check's row counts are no reason to compile anything.
    with torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance('force_eager'):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
