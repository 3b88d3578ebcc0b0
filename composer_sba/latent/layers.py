"""The layers of a network by name, as users know them, and the hooks at a cut."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError, check_layers
from composer_sba.latent.forward_window import network_in

_WRAPPERS = ('_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod')
_SPECIAL = ('input', 'head')


@dataclass(frozen=True)
class CutLayer:
    """A cut: the output of a module, or its input.

    Attributes:
        name: The module's name as :func:`named_layers` gives it, or ``'head'`` or ``'input'``.
        module: The module, or its outermost wrapper if FSDP or activation checkpointing wrapped it.
        at_input: Whether the latent batch is the input of the module instead of its output.
    """

    name: str
    module: nn.Module
    at_input: bool = False

    def hook(self, edit: Callable[[Any], torch.Tensor | None]) -> RemovableHandle:
        """Call ``edit`` with the latent batch of every forward pass and replace the batch by what it returns.

        None leaves the batch as it is. At an input, the batch is the only tensor among the arguments; if there is not
        exactly one, ``edit`` gets all arguments.
        """
        if self.at_input:
            return self.module.register_forward_pre_hook(partial(_edit_input, edit), with_kwargs=True)
        return self.module.register_forward_hook(partial(_edit_output, edit))


def _edit_input(
    edit: Callable[[Any], torch.Tensor | None], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    values = (*args, *kwargs.values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) != 1:
        edit(values[0] if len(values) == 1 else values)
        return None
    edited = edit(tensors[0])
    return None if edited is None else replace_tensor(args, kwargs, edited)


def _edit_output(
    edit: Callable[[Any], torch.Tensor | None], module: nn.Module, args: tuple, output: Any
) -> torch.Tensor | None:
    return edit(output)


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the first tensor among the arguments of a module, which may be given by position or by name."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def replace_tensor(args: tuple, kwargs: dict[str, Any], tensor: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments of a module with another tensor instead of the first."""
    values = [*args, *kwargs.values()]
    index = next(index for index, value in enumerate(values) if isinstance(value, torch.Tensor))
    values[index] = tensor
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of FSDP, activation checkpointing and torch.compile."""
    while inner := [child for name, child in module.named_children() if name in _WRAPPERS]:
        module = inner[0]
    return module


def forget_compiled_code(model: nn.Module) -> None:
    """Make torch.compile compile a model again if any part is compiled, since earlier code bypasses new hooks."""
    for module in model.modules():
        forward = vars(module).get('forward')
        compiled = module._compiled_call_impl is not None or hasattr(forward, '_torchdynamo_orig_callable')
        if compiled or isinstance(module, OptimizedModule):
            torch._dynamo.reset()
            return


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Map the names by which layers can be cut to modules, in order of definition.

    A name is a path in the network. Wrappers of DDP, FSDP, activation checkpointing and torch.compile leave no trace in
    it; the module is then the outermost wrapper. The ``module.`` of a ComposerClassifier or DDP is left out too, unless
    two layers would then share a name. A module with several paths has several names. ``'input'`` and
    ``'head'`` are reserved, so a layer that is called ``input`` or ``head`` has the name ``'module.input'`` or
    ``'module.head'``.

    Example:
        >>> list(named_layers(nn.ModuleDict({'stem': nn.Flatten(), 'head': nn.Linear(4, 2)})))
        ['stem', 'module.head']
    """
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        layers.setdefault('.'.join(part for part in path.split('.') if part not in _WRAPPERS), module)
    del layers['']
    while any(name.startswith('module.') for name in layers):
        # A wrapper that holds another one is no layer.
        paths = [name for name in layers if not (name == 'module' and 'module.module' in layers)]
        shorter = {name.removeprefix('module.'): layers[name] for name in paths}
        if len(shorter) < len(paths):
            break
        layers = shorter
    for name in _SPECIAL:
        if name in layers and f'module.{name}' not in layers:
            layers = {f'module.{name}' if each == name else each: module for each, module in layers.items()}
    return layers


def find_layers(model: nn.Module, layers: str | Sequence[str]) -> list[CutLayer]:
    """Resolve the set S of eligible layers.

    Args:
        model (torch.nn.Module): The network.
        layers (str | Sequence[str]): ``'head'``: the input of the last ``nn.Linear``, together with an adapter around
            it; ``'input'``: the network's input; any other name of :func:`named_layers`, with or without ``module.`` in
            front: the output of that module.

    Returns:
        list[CutLayer]: One for each name, in the order given.

    Raises:
        CutLayerError: If the model has no layer of that name, or two names mean the same layer.
        ValueError: If ``layers`` is empty or holds something other than names.
    """
    check_layers(layers)
    known = named_layers(model)
    cuts = [_find(model, known, name) for name in ([layers] if isinstance(layers, str) else layers)]
    for position, cut in enumerate(cuts):
        if any(cut.module is other.module and cut.at_input == other.at_input for other in cuts[:position]):
            raise CutLayerError(f'Layer {cut.name!r} is named twice in layers={list(layers)!r}.')
    return cuts


def is_head_alone(layers: str | Sequence[str]) -> bool:
    """Return whether the head is the only eligible layer.

    Example:
        >>> is_head_alone('head'), is_head_alone(('head',)), is_head_alone(['input', 'head'])
        (True, True, False)
    """
    return layers == 'head' or (not isinstance(layers, str) and [*layers] == ['head'])


def _find(model: nn.Module, known: dict[str, nn.Module], name: str) -> CutLayer:
    if name == 'input':
        return CutLayer(name, network_in(model), at_input=True)
    if name == 'head':
        return CutLayer(name, known[_head(model, known)], at_input=True)
    path = name
    while path not in known and path.startswith('module.'):
        path = path.removeprefix('module.')
    if path in known:
        return CutLayer(path, known[path])
    close = difflib.get_close_matches(path, known, n=3)
    raise CutLayerError(f'The model has no layer {name!r}; it has {_list(close or known)}.')


def _head(model: nn.Module, known: dict[str, nn.Module]) -> str:
    linears = [name for name, module in known.items() if isinstance(unwrap(module), nn.Linear)]
    if not linears:
        raise CutLayerError(
            f"layers='head' is the input of a model's last nn.Linear, and {type(unwrap(model)).__name__} has none. "
            f'Name the layer whose output is to be cut: {_list(known)}.',
        )
    head = linears[-1]
    while (adapter := head.rpartition('.')[0]) in known and _is_adapter(unwrap(known[adapter])):
        head = adapter
    return head


def _is_adapter(module: nn.Module) -> bool:
    """Return whether a module wraps a linear layer that it replaces, as LoRA's modules do."""
    shape = getattr(module, 'in_features', None), getattr(module, 'out_features', None)
    return any(
        isinstance(each, nn.Linear) and shape == (each.in_features, each.out_features) for each in module.modules()
    )


def _list(names: Iterable[str]) -> str:
    names = list(names)
    top = [name for name in names if '.' not in name] or names
    return ', '.join(repr(name) for name in top[:8]) + (', ...' if len(top) > 8 else '')
