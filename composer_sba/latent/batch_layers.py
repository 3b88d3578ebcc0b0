"""Layers above the cut that depend on the whole batch: raw rows pass them as in a step without SBA.

Each such module runs unchanged on the raw rows alone. Normalization: virtual rows are normalized with the batch
statistics of the raw rows, and running statistics see raw rows only. Dropout, RReLU and stochastic depth: the masks of
the raw rows come from the global random stream, as they do without SBA, and those of the virtual rows from a separate
stream. Random functions that are not modules, such as ``F.dropout`` or the dropout of attention, draw for all rows.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle
from torchvision.ops import StochasticDepth

from composer_sba.errors import CutLayerError
from composer_sba.latent.forward_window import in_backward
from composer_sba.latent.layers import first_tensor, replace_tensor

_RANDOM = (_DropoutNd, nn.RReLU, StochasticDepth)
_NORM = (_BatchNorm, _InstanceNorm)
_KNOWN_FORWARDS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)


class AugmentedBatch(Protocol):
    """What the layers above the cut need to know about the augmented batch that passes them."""

    fold: int

    @property
    def raw_rows(self) -> int | None:
        """N between the cut and the end of the forward pass, and in the backward pass; else None."""

    def seed(self, stream: int) -> int:
        """Return the seed of one stream of random numbers in this microbatch."""


class BatchLayer:
    """The hooks that let only raw rows through a module, and compute the virtual rows by a rule of their own.

    Args:
        name (str): The module's name, for messages.
        module (torch.nn.Module): Dropout, or a normalization over rows.
        batch (AugmentedBatch): The augmented batch.
    """

    def __init__(self, name: str, module: nn.Module, batch: AugmentedBatch) -> None:
        self.name = name
        self.module = module
        self.batch = batch
        self.virtual: torch.Tensor | None = None
        # FSDP2 takes the parameters away in its own hook. (Elsewhere torch.compile cannot guard a hook put first.)
        first = isinstance(module, FSDPModule)
        self.handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self.keep_raw, with_kwargs=True),
            module.register_forward_hook(self.append_virtual, prepend=first, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def keep_raw(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Set the virtual rows aside and pass the raw rows on, if the batch is augmented."""
        return None if self.batch.raw_rows is None else self._keep_raw(module, args, kwargs)

    def append_virtual(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Append the virtual rows to the raw ones."""
        return None if self.virtual is None else self._append_virtual(module, args, kwargs, output)

    def _keep_raw(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given, raw_rows = first_tensor(args, kwargs), self.batch.raw_rows
        assert raw_rows is not None
        rows, expected = len(given), (1 + self.batch.fold) * raw_rows
        below_the_cut = rows == raw_rows and in_backward()
        if below_the_cut or (rows != expected and isinstance(module, _RANDOM)):
            return None
        if isinstance(module, _NORM):
            self._refuse(module, rows, expected)
        if not _depends_on_batch(module):
            return None
        self.virtual = given[raw_rows:]
        return replace_tensor(args, kwargs, given[:raw_rows])

    def _append_virtual(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        virtual, self.virtual = self.virtual, None
        assert virtual is not None
        rule: Callable[..., torch.Tensor] = _random
        if isinstance(module, _NORM):
            rule = _batch_norm if isinstance(module, _BatchNorm) else _instance_norm
        return torch.cat([output, rule(self.batch, module, first_tensor(args, kwargs), virtual)])

    def _refuse(self, module: nn.Module, rows: int, expected: int) -> None:
        problem = None
        if rows != expected:
            problem = f'it sees {rows} rows, not {expected}'
        elif type(module).forward not in _KNOWN_FORWARDS or is_parametrized(module):
            problem = f'{type(module).__name__} does more than normalize'
        elif isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            if torch.distributed.get_world_size(module.process_group) > 1:
                problem = 'its statistics are those of all ranks'
        if problem is not None:
            raise CutLayerError(
                f"norm_stats='raw' is not possible in {self.name!r}: {problem}. Use norm_stats='all', or a cut above "
                'it.',
            )


def hook_batch_layers(model: nn.Module, batch: AugmentedBatch, norm_stats: str) -> list[BatchLayer]:
    """Hook dropout, RReLU and stochastic depth and, under ``norm_stats='raw'``, every normalization over rows."""
    kinds = (*_RANDOM, *_NORM) if norm_stats == 'raw' else _RANDOM
    return [BatchLayer(name, module, batch) for name, module in model.named_modules() if isinstance(module, kinds)]


def find_below(layers: list[BatchLayer], batch: AugmentedBatch, forward: Callable[[], object]) -> set[BatchLayer]:
    """Run an armed forward pass and return the layers that ran before the cut and not after it."""
    ran: set[tuple[BatchLayer, bool]] = set()

    def record(layer: BatchLayer, module: nn.Module, args: tuple) -> None:
        ran.add((layer, batch.raw_rows is None))

    handles = [layer.module.register_forward_pre_hook(partial(record, layer)) for layer in layers]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    # A layer that did not run at all, such as one that only runs in training, may be above the cut when it does.
    return {layer for layer, below in ran if below and (layer, False) not in ran}


@contextmanager
def batch_layers_by_row(model: nn.Module) -> Iterator[None]:
    """Let batch normalization, dropout, RReLU and stochastic depth treat every row by itself, without draws.

    What then still mixes rows is a layer that :class:`BatchLayer` does not handle.
    """
    layers = [module for module in model.modules() if isinstance(module, (_BatchNorm, *_RANDOM))]
    own = [vars(module).get('forward') for module in layers]  # of a module whose forward somebody replaced
    for module in layers:
        vars(module)['forward'] = _scale_rows if isinstance(module, _BatchNorm) else nn.Identity()
    try:
        yield
    finally:
        for module, forward in zip(layers, own, strict=True):
            if forward is None:
                del vars(module)['forward']
            else:
                vars(module)['forward'] = forward


def _scale_rows(input: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(input, input.shape[1:])


def _depends_on_batch(module: nn.Module) -> bool:
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    if isinstance(module, _BatchNorm):
        return module.training or module.running_mean is None
    return module.training and getattr(module, 'p', 1) > 0


def _batch_norm(batch: AugmentedBatch, module: _BatchNorm, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
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


def _instance_norm(
    batch: AugmentedBatch, module: _InstanceNorm, raw: torch.Tensor, virtual: torch.Tensor
) -> torch.Tensor:
    return F.instance_norm(virtual, weight=module.weight, bias=module.bias, eps=module.eps)


@torch.compiler.disable
def _random(batch: AugmentedBatch, module: nn.Module, raw: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
    """Run the module on the virtual rows with a stream that differs between calls and repeats when a call does."""
    cuda = virtual.device.type == 'cuda'
    state = torch.cuda.get_rng_state(virtual.device) if cuda else torch.get_rng_state()
    # The state of the global stream after the raw rows' draw identifies the call; checkpointing puts it back.
    call = int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest(), 'little')
    with torch.random.fork_rng([virtual.device] if cuda else []):
        if cuda:
            torch.cuda.manual_seed(batch.seed(call))
        else:
            torch.default_generator.manual_seed(batch.seed(call))
        return module.forward(virtual)
