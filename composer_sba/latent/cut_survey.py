"""All layers of a network that can be cut, and the cost of each cut: operations and memory above it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from composer_sba.errors import CutLayerError, one_line
from composer_sba.latent.cut_check import check_logits, repeatable, why_no_cut
from composer_sba.latent.head import tensors_in
from composer_sba.latent.layers import CutLayer, find_layers, named_layers
from composer_sba.latent.modes import in_mode

_ROWS = 2
_SIDES = (32, 64, 128)  # pixels at which a network is tried, if it takes them

_Tensor = tuple[int, int]  # which tensor, and how often it had been changed in place


@dataclass(frozen=True)
class Cut:
    """A cut, and what it costs.

    Attributes:
        names: The names of the cut in ``layers``; several if modules return their input unchanged.
        shape: One row of the latent batch, without the dimension of rows.
        share: The fraction of a plain training step's operations that is above the cut; convolutions and matrix
            products count. None if it is unknown.
        memory: Bytes for one row: the latent batch, and what the layers above keep for the backward pass. None if it is
            unknown.
        why_unknown: Why the cost is unknown, or None.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    share: float | None
    memory: float | None
    why_unknown: str | None = None

    def ratio(self, fold: int) -> float | None:
        """Return the operations of an augmented step ÷ those of a plain one, 1 + M · share."""
        return None if self.share is None else 1 + fold * self.share


def survey(network: nn.Module, shape: Sequence[int]) -> list[Cut]:
    """Find the layers that can be cut and count the operations and the memory above each.

    A block that contains a bypass, such as a residual block, is listed as a whole. Each layer is checked in training
    mode as SBA checks its layers on the first batch, on random images, which are small if the network takes them.
    Operations and memory are counted for images of ``shape``, by a training step on shapes alone. The cost is unknown
    if the forward pass needs the values of the images.

    Args:
        network (torch.nn.Module): A classifier that takes a batch of images and returns logits ``(N, K)``. If it
            returns them in another form, only its head can be cut.
        shape (Sequence[int]): An image's shape, ``(C, H, W)``.

    Returns:
        list[Cut]: In the order in which the layers run.

    Raises:
        CutLayerError: If the network takes no such images, or its output is not one tensor of logits and it has no
            head.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 2))
        >>> for cut in survey(net, (3, 2, 2)):
        ...     print(cut.names, cut.shape, round(cut.share, 3))
        ('input',) (3, 2, 2) 1.0
        ('0',) (12,) 1.0
        ('1',) (30,) 0.2
        ('2', 'head') (30,) 0.2
    """
    layers = {name: CutLayer(name, module) for name, module in named_layers(network).items()}
    special = ['input', 'head'] if any(isinstance(module, nn.Linear) for module in network.modules()) else ['input']
    layers |= {cut.name: cut for cut in find_layers(network, special)}
    with in_mode(network, training=True), repeatable(network) as run:
        try:
            _, passages = run(partial(_count, network, layers, shape))
        except CutLayerError:
            raise
        except Exception as error:  # whatever the network does that cannot be done without values
            passages = run(
                partial(_pass, network, layers, shape, f'forward needs values, not shapes alone: {one_line(error)}')
            )
        images = _small_images(network, shape, run)
        valid = _valid(network, {name: cut for name, cut in layers.items() if name in passages}, images)
    cuts: dict[_Tensor, Cut] = {}
    for name, (tensor, cut) in passages.items():
        if name in valid:
            names = (*cuts[tensor].names, name) if tensor in cuts else (name,)
            cuts[tensor] = replace(cut, names=tuple(sorted(names, key=lambda each: each.count('.'))))
    return list(cuts.values())


def measure(
    network: nn.Module, layers: str | Sequence[str], shape: Sequence[int]
) -> tuple[float | None, dict[str, Cut]]:
    """Count the operations of a plain training step, and the width and the cost of some cuts, without checking them.

    Args:
        network (torch.nn.Module): As for :func:`survey`.
        layers (str | Sequence[str]): As in :class:`.SBA`; ``()`` for none.
        shape (Sequence[int]): An image's shape, ``(C, H, W)``.

    Returns:
        tuple[float | None, dict[str, Cut]]: Floating-point operations of one row, and cuts by name; None and no cuts if
        the network does not run on shapes alone, as in the parts of FSDP.

    Example:
        >>> operations, cuts = measure(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 'head', (3, 2, 2))
        >>> operations, cuts['head'].shape, cuts['head'].ratio(fold=4)
        (96.0, (12,), 5.0)
    """
    if any(isinstance(module, FullyShardedDataParallel | FSDPModule) for module in network.modules()):
        return None, {}  # which would keep shapes without values for the training
    watched = {cut.name: cut for cut in find_layers(network, layers)} if layers else {}
    with in_mode(network, training=True), repeatable(network) as run:
        try:
            operations, passages = run(partial(_count, network, watched, shape))
        except Exception:  # as in survey: whatever cannot be done without values, on this device or in parts
            return None, {}
    return operations, {name: cut for name, (_, cut) in passages.items()}


def _valid(network: nn.Module, layers: Mapping[str, CutLayer], images: torch.Tensor) -> set[str]:
    """Check layers, each module before those in it."""
    reasons: dict[tuple[int, bool], str | None] = {}
    valid: set[str] = set()
    closed: set[str] = set()
    for name, cut in layers.items():
        if any(name.startswith(f'{module}.') for module in closed):
            continue
        module = id(cut.module), cut.at_input  # which may have several names
        if module not in reasons:
            reasons[module] = why_no_cut(network, cut, partial(network, images))
        reason = reasons[module]
        if reason is None:
            valid.add(name)
        elif 'the layers above it' in reason:
            # What bypasses a module bypasses all modules in it, and makes the module around it a block.
            closed |= {name, name.rpartition('.')[0]} & (valid | {name})
    return valid


def _count(
    network: nn.Module, layers: Mapping[str, CutLayer], shape: Sequence[int]
) -> tuple[float, dict[str, tuple[_Tensor, Cut]]]:
    """Run a training step on tensors without data and count what has been done and kept when each layer has run.

    Returns:
        tuple: Operations of one row, and what passed at each layer.
    """
    left: dict[str, int] = {}  # operations by the time the gradient at a layer was known
    kept: list[torch.Tensor] = []

    def measure(name: str, value: torch.Tensor) -> tuple[int, int]:
        if value.requires_grad:
            value.register_hook(lambda gradient: left.update({name: counter.get_total_flops()}))
        return counter.get_total_flops(), len(kept)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    state = dict(network.named_parameters()) | dict(network.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in state.items()
    }
    with torch.enable_grad(), mode, FlopCounterMode(display=False) as counter:
        like = _like(network)
        images = torch.empty(_ROWS, *shape, device=like.device, dtype=like.dtype)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs, passed = _watch(layers, partial(torch.func.functional_call, network, fakes, images), measure)
        torch.stack([tensor.sum() for tensor in tensors_in(outputs) if tensor.requires_grad]).sum().backward()
        total = counter.get_total_flops()
    weights = {_storage(tensor) for tensor in fakes.values()}
    cuts = {
        name: (
            (id(tensor), version),
            Cut(
                (name,),
                tuple(tensor.shape[1:]),
                (left.get(name, total) - done) / (total or 1),
                _memory(tensor, kept[index:], weights) / _ROWS,
            ),
        )
        for name, (tensor, version, (done, index)) in passed.items()
    }
    return total / _ROWS, cuts


def _pass(
    network: nn.Module, layers: Mapping[str, CutLayer], shape: Sequence[int], why_unknown: str
) -> dict[str, tuple[_Tensor, Cut]]:
    """Run the network on images and count nothing."""
    images = torch.randn(_ROWS, *shape).to(_like(network))
    try:
        _, passed = _watch(layers, partial(network, images))
    except CutLayerError:
        raise
    except Exception as error:  # what the network says about such images is the reason
        raise CutLayerError(f'The network takes no images of shape {tuple(shape)}: {one_line(error)}') from error
    return {
        name: ((id(tensor), version), Cut((name,), tuple(tensor.shape[1:]), None, None, why_unknown))
        for name, (tensor, version, _) in passed.items()
    }


def _watch(
    layers: Mapping[str, CutLayer],
    forward: Callable[[], Any],
    measure: Callable[[str, torch.Tensor], Any] = lambda name, value: None,
) -> tuple[Any, dict[str, tuple[torch.Tensor, int, Any]]]:
    """Run a forward pass; return the outputs, and what passed at each layer that ran once, with its measure."""
    passed: dict[str, tuple[torch.Tensor, int, Any]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, value: Any) -> None:
        calls[name] += 1
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (_ROWS,):
            passed[name] = value, value._version, measure(name, value)

    handles = [cut.hook(partial(record, name)) for name, cut in layers.items()]
    try:
        outputs = forward()
    finally:
        for handle in handles:
            handle.remove()
    if layers and 'head' not in layers:
        check_logits(outputs, 'training')
    elif not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
        passed = {name: each for name, each in passed.items() if name == 'head'}  # the only layer that can be cut
    return outputs, {name: each for name, each in passed.items() if calls[name] == 1}


def _memory(latent: torch.Tensor, kept: Sequence[torch.Tensor], weights: set[int]) -> int:
    """Return the bytes of all rows, each tensor once; tensors of fewer than two dimensions belong to channels."""
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept if tensor.ndim > 1}
    sizes[_storage(latent)] = latent.nbytes  # multiplied by itself, even where the plain one is a part of another
    return sum(size for storage, size in sizes.items() if storage not in weights)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _small_images(network: nn.Module, shape: Sequence[int], run: Callable[..., Any]) -> torch.Tensor:
    """Return random images, small if the network takes them: only its layers decide what can be cut."""
    stream, like = torch.Generator().manual_seed(0), _like(network)
    for side in _SIDES:
        images = torch.randn(_ROWS, shape[0], side, side, generator=stream).to(like)
        with suppress(Exception):
            if side < min(shape[1:]) and run(partial(network, images)).isfinite().all():
                return images
    return torch.randn(_ROWS, *shape, generator=stream).to(like)


def _like(network: nn.Module) -> torch.Tensor:
    """Return a tensor of the device and the dtype of a network's images: those of its parameters."""
    return next((each for each in network.parameters() if each.is_floating_point()), torch.empty(0))
