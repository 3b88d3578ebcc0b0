"""The layers of a network by name, as a user knows them, and the hooks that see what passes there."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError, check_layers

_WRAPPERS = {'_fsdp_wrapped_module', '_checkpoint_wrapped_module', '_orig_mod'}


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

    @property
    def linear(self) -> nn.Linear:
        """The ``nn.Linear`` of the cut ``'head'`` without its wrappers: inside FSDP's its weights are whole."""
        return [module for module in self.module.modules() if isinstance(module, nn.Linear)][-1]

    def hook_linear(self, see: Callable[[nn.Linear, tuple, torch.Tensor], torch.Tensor | None]) -> RemovableHandle:
        """Have ``see`` get :attr:`linear`, its arguments and its output; what it returns, unless None, replaces it."""
        # FSDP2 takes the weights away in a hook of its own.
        return self.linear.register_forward_hook(see, prepend=isinstance(self.linear, FSDPModule))


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
        ValueError: If there is no name.
    """
    known = named_layers(model)
    check_layers(layers)
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
