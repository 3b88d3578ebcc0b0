"""Layers above the cut that depend on the whole batch: raw rows pass them as in a step without SBA.

Normalization: all rows are normalized with the batch statistics of the raw rows, and running statistics see raw rows
only. Dropout, RReLU and stochastic depth: the masks of the raw rows come from the global random stream, as they do
without SBA, and those of the virtual rows from a separate stream. Random functions that are not modules, such as
``F.dropout`` or the dropout of attention, draw for all rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import StochasticDepth

from composer_sba.errors import CutLayerError
from composer_sba.latent.batch_norm import normalize
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
    """A module's forward pass that treats raw rows as without SBA, and virtual rows by a rule.

    It replaces the module's ``forward`` until :meth:`remove`. Hooks would not do: they cannot skip the module's own
    pass, and would run before or after those that gather the parameters under FSDP2.

    Args:
        name (str): The module's name, for messages.
        module (torch.nn.Module): Dropout, or a normalization over rows.
        batch (AugmentedBatch): The augmented batch.
    """

    def __init__(self, name: str, module: nn.Module, batch: AugmentedBatch) -> None:
        self.name = name
        self.module = module
        self.batch = batch
        # The replacement that was there before, by another expander or by the owner of the network.
        self.replaced: Callable[..., torch.Tensor] | None = vars(module).get('forward')
        self.forward = partial(_forward, self)  # not a method: torch.compile cannot follow those of an instance here
        vars(module)['forward'] = self.forward

    def remove(self) -> None:
        """Restore the module's forward pass, even if another one has replaced this one since."""
        forward, above = vars(self.module).get('forward'), None
        while forward is not self.forward:
            above = _owner(forward)
            if above is None:
                return  # another replacement calls this one, which now does nothing
            forward = above.replaced
        if above is not None:
            above.replaced = self.replaced
        elif self.replaced is not None:
            vars(self.module)['forward'] = self.replaced
        else:
            del vars(self.module)['forward']

    def run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the module on the raw rows and the rule on the virtual ones, if the batch is augmented."""
        raw_rows = self.batch.raw_rows
        if raw_rows is None or not self._separates(first_tensor(args, kwargs), raw_rows):
            return self._run(*args, **kwargs)
        rows = first_tensor(args, kwargs)
        if isinstance(self.module, _BatchNorm):
            return normalize(self.module, rows, raw_rows)
        args, kwargs = replace_tensor(args, kwargs, rows[:raw_rows])
        rule: Callable[..., torch.Tensor] = _instance_norm if isinstance(self.module, _InstanceNorm) else _random
        return torch.cat([self._run(*args, **kwargs), rule(self.batch, self.module, rows[raw_rows:])])

    def _run(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the module as without SBA."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _separates(self, rows: torch.Tensor, raw_rows: int) -> bool:
        """Return whether the module treats raw and virtual rows apart; raise CutLayerError if it should but cannot."""
        count, expected = len(rows), (1 + self.batch.fold) * raw_rows
        below_the_cut = count == raw_rows and in_backward()
        if below_the_cut or (count != expected and isinstance(self.module, _RANDOM)):
            return False
        if not _depends_on_batch(self.module):
            return False
        if isinstance(self.module, _NORM):
            self._refuse(self.module, count, expected)
        return True

    def _refuse(self, module: nn.Module, rows: int, expected: int) -> None:
        problem = None
        if rows != expected:
            problem = f'it sees {rows} rows, not {expected}'
        elif type(module).forward not in _KNOWN_FORWARDS or is_parametrized(module) or _is_foreign(self.replaced):
            problem = f'{type(module).__name__} does more than normalize'
        elif isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            if torch.distributed.get_world_size(module.process_group) > 1:
                problem = 'its statistics are those of all ranks'
        if problem is not None:
            raise CutLayerError(
                f"norm_stats='raw' is not possible in {self.name!r}: {problem}. Use norm_stats='all', or a cut above "
                'it.',
            )


def _is_foreign(forward: Callable[..., torch.Tensor] | None) -> bool:
    """Return whether code other than an expander replaced a module's forward pass by ``forward``."""
    owner = _owner(forward)
    return forward is not None and (owner is None or _is_foreign(owner.replaced))


def _forward(layer: BatchLayer, *args: Any, **kwargs: Any) -> torch.Tensor:
    return layer.run(*args, **kwargs)


def _owner(forward: Callable[..., torch.Tensor] | None) -> BatchLayer | None:
    """Return the batch layer whose forward pass this is, if any."""
    return forward.args[0] if isinstance(forward, partial) and forward.func is _forward else None


def hook_batch_layers(model: nn.Module, batch: AugmentedBatch, norm_stats: str) -> list[BatchLayer]:
    """Attach to dropout, RReLU and stochastic depth and, under ``norm_stats='raw'``, to normalization over rows."""
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

    A layer that still mixes rows is one that :class:`BatchLayer` does not handle.
    """
    layers = [module for module in model.modules() if isinstance(module, (_BatchNorm, *_RANDOM))]
    own = [vars(module).get('forward') for module in layers]  # of a module whose forward was replaced
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


def _instance_norm(batch: AugmentedBatch, module: _InstanceNorm, virtual: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(virtual, weight=module.weight, bias=module.bias, eps=module.eps)


@torch.compiler.disable
def _random(batch: AugmentedBatch, module: nn.Module, virtual: torch.Tensor) -> torch.Tensor:
    """Run the module on the virtual rows with draws that differ between calls and repeat when a call does."""
    device = virtual.device
    seed = batch.seed(_position(device))
    if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
        generator = torch.Generator(device).manual_seed(seed)
        kept = torch.empty_like(virtual, dtype=torch.bool).bernoulli_(1 - module.p, generator=generator)
        return virtual * kept * (1 / (1 - module.p) if module.p < 1 else 0.0)
    # The functions of the others take no generator.
    with torch.random.fork_rng([device] if device.type == 'cuda' else []):
        if device.type == 'cuda':
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        return type(module).forward(module, virtual)


def _position(device: torch.device) -> int:
    """Return where the global random stream is after the raw rows' draw, which checkpointing repeats with the draw.

    A count of the module's calls would not do: segments of a network are run again in the reverse order.
    """
    if device.type == 'cuda':
        return int.from_bytes(torch.cuda.get_rng_state(device).numpy().tobytes(), 'little')  # its seed and offset
    # The Mersenne Twister's: how many of its 624 words are left, and the first two of them.
    return int.from_bytes(torch.get_rng_state().numpy()[8:40].tobytes(), 'little')
