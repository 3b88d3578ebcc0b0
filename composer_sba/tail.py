"""Layers above the cut that look at the whole batch: they see the raw rows, as in a step without SBA.

Batch normalization computes its statistics from the raw rows, and every row is normalized with them; running statistics
see raw rows only. Dropout draws the raw rows' mask from the global random stream, as it would without SBA, and the
virtual rows' from the generator of the vicinity. Either way the module itself runs on the raw rows, so for them nothing
has changed.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Window(Protocol):
    """What the layers above the cut need to know of the augmented batch that is passing."""

    fold: int
    raw_rows: int | None  # N between the cut and the end of the step, else None

    def generator(self, device: torch.device, stream: int) -> torch.Generator:
        """Return the same fresh generator whenever one microbatch asks for one stream."""


def keep_raw_rows(model: nn.Module, window: Window, norm_stats: str) -> list[RemovableHandle]:
    """Hook dropout and, under ``norm_stats='raw'``, every normalization that computes statistics over the batch."""
    handles = []
    for stream, (name, module) in enumerate(model.named_modules(), start=1):
        layer: _RawRows | None = None
        if isinstance(module, _DROPOUT):
            layer = _RawRows(name, window, partial(_dropout, window, stream))
        elif norm_stats == 'raw' and isinstance(module, _BatchNorm):
            layer = _RawRows(name, window, _batch_norm)
        elif norm_stats == 'raw' and isinstance(module, _InstanceNorm):
            layer = _RawRows(name, window, _instance_norm)
        if layer is not None:
            handles += [module.register_forward_pre_hook(layer.take), module.register_forward_hook(layer.give)]
    return handles


class _RawRows:
    """Sends the raw rows through one module, the virtual rows through ``rule``, and puts them together again."""

    def __init__(self, name: str, window: Window, rule: Callable[..., torch.Tensor]) -> None:
        self.name = name
        self.window = window
        self.rule = rule
        self.virtual: torch.Tensor | None = None

    def take(self, module: nn.Module, args: tuple) -> tuple | None:
        if self.window.raw_rows is None or not _depends_on_batch(module):
            return None
        return self._take(module, args)

    def give(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        return None if self.virtual is None else self._give(module, args, output)

    @torch.compiler.disable
    def _take(self, module: nn.Module, args: tuple) -> tuple | None:
        rows, raw_rows = len(args[0]), self.window.raw_rows
        assert raw_rows is not None
        if rows == raw_rows:  # below the cut, run again by activation checkpointing
            return None
        if rows != (1 + self.window.fold) * raw_rows:
            raise CutLayerError(
                f"norm_stats='raw' cannot tell the raw rows in {self.name!r}: it sees {rows} rows, not "
                f"{(1 + self.window.fold) * raw_rows}. Use norm_stats='all', or a cut above this layer.",
            )
        if isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            raise CutLayerError(
                f"norm_stats='raw' does not reach over the ranks of the SyncBatchNorm {self.name!r}. Use "
                f"norm_stats='all', or a cut above this layer.",
            )
        self.virtual = args[0][raw_rows:]
        return (args[0][:raw_rows], *args[1:])

    @torch.compiler.disable
    def _give(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        virtual, self.virtual = self.virtual, None
        return torch.cat([output, self.rule(module, args[0], virtual)])


def _depends_on_batch(module: nn.Module) -> bool:
    if isinstance(module, _DROPOUT):
        return module.training and module.p > 0
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    return module.training or module.running_mean is None


def _batch_norm(module: _BatchNorm, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
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


def _instance_norm(module: _InstanceNorm, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(virtual, weight=module.weight, bias=module.bias, eps=module.eps)


def _dropout(window: Window, stream: int, module: _DropoutNd, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    features = virtual.shape[1:] if type(module) is nn.Dropout else (virtual.shape[1], *[1] * (virtual.ndim - 2))
    generator = window.generator(virtual.device, stream)
    mask = torch.empty(len(virtual), *features, device=virtual.device).bernoulli_(1 - module.p, generator=generator)
    return virtual * (mask / (1 - module.p)).to(virtual.dtype) if module.p < 1 else torch.zeros_like(virtual)
