"""Layers above the cut that depend on the whole batch: the raw rows pass them as in a step without SBA.

Each such module runs as it is on the raw rows alone. Normalization: virtual rows are normalized with the raw rows'
batch statistics, and running statistics see raw rows only. Dropout and its kin: the raw rows' mask comes from the
global random stream, as it would without SBA, and the virtual rows' from a stream of their own. Randomness that is no
module of these (``F.dropout``, attention's) cannot be told apart by row.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle
from torchvision.ops import StochasticDepth

from composer_sba.errors import CutLayerError
from composer_sba.latent.forward_window import in_backward

_RANDOM = (_DropoutNd, nn.RReLU, StochasticDepth)
_NORM = (_BatchNorm, _InstanceNorm)
_KNOWN_FORWARDS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)


class Window(Protocol):
    """What the layers above the cut need to know of the augmented batch that is passing."""

    fold: int

    @property
    def raw_rows(self) -> int | None:
        """N between the cut and the end of the forward pass, and in the backward pass; else None."""

    def seed(self, stream: int) -> int:
        """Return the seed of one stream of random numbers in this microbatch."""


class RawRows:
    """Sends the raw rows through a module, the virtual rows past it by a rule of ours, and joins them again.

    Args:
        name (str): The module's name, for messages.
        module (torch.nn.Module): Dropout, or a normalization over rows.
        window (Window): The augmented batch.
    """

    def __init__(self, name: str, module: nn.Module, window: Window) -> None:
        self.name = name
        self.module = module
        self.window = window
        self.virtual: torch.Tensor | None = None
        # FSDP2 takes the parameters away in its own hook. (Elsewhere torch.compile cannot guard a hook put first.)
        first = isinstance(module, FSDPModule)
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.take),
            module.register_forward_hook(self.give, prepend=first),
        ]

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self.handles:
            handle.remove()

    def take(self, module: nn.Module, args: tuple) -> tuple | None:
        """Let the raw rows alone pass, if there are others."""
        return None if self.window.raw_rows is None else self._take(module, args)

    def give(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Put the virtual rows below the raw ones."""
        return None if self.virtual is None else self._give(module, args, output)

    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        rows, raw_rows = len(args[0]), self.window.raw_rows
        assert raw_rows is not None
        below_the_cut = rows == raw_rows and in_backward()
        expected = (1 + self.window.fold) * raw_rows
        if below_the_cut or (rows != expected and isinstance(module, _RANDOM)):
            return None
        if isinstance(module, _NORM):
            self._refuse(module, rows, expected)
        if not _depends_on_batch(module):
            return None
        self.virtual = args[0][raw_rows:]
        return (args[0][:raw_rows], *args[1:])

    def _give(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        virtual, self.virtual = self.virtual, None
        assert virtual is not None
        rule: Callable[..., torch.Tensor] = _random
        if isinstance(module, _NORM):
            rule = _batch_norm if isinstance(module, _BatchNorm) else _instance_norm
        return torch.cat([output, rule(self.window, module, args[0], virtual)])

    def _refuse(self, module: nn.Module, rows: int, expected: int) -> None:
        problem = None
        if rows != expected:
            problem = f'it sees {rows} rows, not {expected}'
        elif type(module).forward not in _KNOWN_FORWARDS:
            problem = f'{type(module).__name__} does more than normalize'
        elif isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            if torch.distributed.get_world_size(module.process_group) > 1:
                problem = 'its statistics are those of all ranks'
        if problem is not None:
            raise CutLayerError(
                f"norm_stats='raw' cannot be had in {self.name!r}: {problem}. Use norm_stats='all', or a cut above it.",
            )


def keep_raw_rows(model: nn.Module, window: Window, norm_stats: str) -> list[RawRows]:
    """Hook dropout and its kin and, under ``norm_stats='raw'``, every normalization over the rows of a batch."""
    kinds = (*_RANDOM, *_NORM) if norm_stats == 'raw' else _RANDOM
    return [RawRows(name, module, window) for name, module in model.named_modules() if isinstance(module, kinds)]


def run_below(tail: list[RawRows], window: Window, forward: Callable[[], object]) -> set[RawRows]:
    """Run an armed forward pass, and find the layers that ran in it before the cut and not after it."""
    ran: set[tuple[RawRows, bool]] = set()

    def note(layer: RawRows, module: nn.Module, args: tuple) -> None:
        ran.add((layer, window.raw_rows is None))

    handles = [layer.module.register_forward_pre_hook(partial(note, layer)) for layer in tail]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    # A layer that did not run at all, such as one for training alone, may be above the cut when it does.
    return {layer for layer, below in ran if below and (layer, False) not in ran}


def _depends_on_batch(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and getattr(module, 'p', 1) > 0


def _batch_norm(window: Window, module: _BatchNorm, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    """Normalize virtual rows with the raw rows' mean and biased variance; gradients flow through both."""
    rows_and_space = [dim for dim in range(raw.ndim) if dim != 1]
    wide = torch.promote_types(raw.dtype, torch.float32)
    variance, mean = torch.var_mean(raw.to(wide), rows_and_space, correction=0)
    scale = torch.rsqrt(variance + module.eps)
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale if module.bias is None else module.bias - mean * scale
    per_channel = (-1, *[1] * (raw.ndim - 2))
    return torch.addcmul(shift.view(per_channel), virtual.to(wide), scale.view(per_channel)).to(virtual.dtype)


def _instance_norm(window: Window, module: _InstanceNorm, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(virtual, weight=module.weight, bias=module.bias, eps=module.eps)


@torch.compiler.disable
def _random(window: Window, module: nn.Module, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    """Run the module on the virtual rows, on a stream that differs from call to call and is the same when repeated."""
    cuda = virtual.device.type == 'cuda'
    state = torch.cuda.get_rng_state(virtual.device) if cuda else torch.get_rng_state()
    # Where the raw rows' draw left the global stream tells this call from others; checkpointing puts it back.
    call = int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest(), 'little')
    with torch.random.fork_rng([virtual.device] if cuda else []):
        if cuda:
            torch.cuda.manual_seed(window.seed(call))
        else:
            torch.default_generator.manual_seed(window.seed(call))
        return module.forward(virtual)
