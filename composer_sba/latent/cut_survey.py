"""All layers of a network that can be cut, and what each cut asks for: operations and memory above it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from composer_sba.errors import CutLayerError, one_line
from composer_sba.latent.cut_check import evaluation, why_no_cut
from composer_sba.latent.layers import CutLayer, find_layers, named_layers

_ROWS = 2
_SIDES = (32, 64, 128)  # pixels at which a network is tried, if it takes them


@dataclass(frozen=True)
class Cut:
    """A place to cut, and what lies above it.

    Attributes:
        names: What ``layers`` calls it; several where modules pass on one tensor as it is.
        shape: One row of the latent batch, without the dimension of rows.
        share: Of a plain training step's operations, those above the cut; convolutions and matrix products count.
        memory: Of one row, the latent batch and what the layers above keep for the backward pass. Unit: bytes.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    share: float
    memory: float

    def ratio(self, fold: int) -> float:
        """Operations of an augmented step ÷ those of a plain one, 1 + M · share."""
        return 1 + fold * self.share


def survey(network: nn.Module, shape: Sequence[int]) -> list[Cut]:
    """Find the layers that can be cut and count what lies above each.

    A block that has a bypass within, such as a residual one, is taken as a whole. Each layer is put to the test that
    SBA makes of its layers on the first batch, here on small random images if the network takes them. Operations and
    memory are counted for images of ``shape``, on shapes alone, in training.

    Args:
        network (torch.nn.Module): A classifier that takes a batch of images, and returns logits ``(N, K)``.
        shape (Sequence[int]): An image's shape, ``(C, H, W)``.

    Returns:
        list[Cut]: In the order in which the layers run.

    Raises:
        CutLayerError: If the network takes no such images or its output is no tensor of logits.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 2))
        >>> for cut in survey(net, (3, 2, 2)):
        ...     print(cut.names, cut.shape, round(cut.share, 3))
        ('input',) (3, 2, 2) 1.0
        ('0',) (12,) 1.0
        ('1',) (30,) 0.2
        ('2', 'head') (30,) 0.2
    """
    places = _places(network)
    passed = _count(network, places, shape)
    valid: set[str] = set()
    closed: set[str] = set()
    with evaluation(network):
        images = _images(network, shape)
        for name, cut in places.items():  # a module before those in it
            if name not in passed or any(name.startswith(f'{module}.') for module in closed):
                continue
            reason = why_no_cut(cut, partial(network, images))
            if reason is None:
                valid.add(name)
            elif 'the layers above it' in reason:
                # What passes by a module passes by all that is in it, and makes the module around it a block.
                closed |= {name, name.rpartition('.')[0]} & (valid | {name})
    cuts: dict[tuple[int, int], Cut] = {}
    for name, seen in passed.items():
        if name in valid:
            names = (*cuts[seen.tensor].names, name) if seen.tensor in cuts else (name,)
            outermost = tuple(sorted(names, key=lambda each: each.count('.')))
            cuts[seen.tensor] = Cut(outermost, seen.shape, seen.share, seen.memory)
    return list(cuts.values())


@dataclass(frozen=True)
class _Seen:
    tensor: tuple[int, int]  # which one passed, and how often it had been changed in place
    shape: tuple[int, ...]
    share: float
    memory: float


def _places(network: nn.Module) -> dict[str, CutLayer]:
    places = {'input': CutLayer('input', network, at_input=True)}
    places |= {name: CutLayer(name, module) for name, module in named_layers(network).items()}
    if any(isinstance(module, nn.Linear) for module in network.modules()):
        places['head'] = find_layers(network, 'head')[0]
    return places


def _count(network: nn.Module, places: dict[str, CutLayer], shape: Sequence[int]) -> dict[str, _Seen]:
    """Run a training step on tensors without data, and note at each place what has been done and kept by then."""
    passed: dict[str, tuple[torch.Tensor, int, int, int]] = {}
    calls: Counter[str] = Counter()
    left: dict[str, int] = {}  # operations by the time the gradient at a place was known
    kept: list[torch.Tensor] = []

    def note(name: str, value: Any) -> None:
        calls[name] += 1
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (_ROWS,):
            passed[name] = (value, value._version, counter.get_total_flops(), len(kept))
            if value.requires_grad:
                value.register_hook(lambda gradient: left.update({name: counter.get_total_flops()}))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    state = dict(network.named_parameters()) | dict(network.named_buffers())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor, static_shapes=True) for name, tensor in state.items()
    }
    handles = [cut.hook(partial(note, name)) for name, cut in places.items()]
    try:
        with _training(network), mode, FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logits = _logits(partial(torch.func.functional_call, network, fakes), torch.empty(_ROWS, *shape))
            logits.sum().backward()
            total = counter.get_total_flops()
    finally:
        for handle in handles:
            handle.remove()
    weights = {_storage(tensor) for tensor in fakes.values()}
    return {
        name: _Seen(
            (id(tensor), version),
            tuple(tensor.shape[1:]),
            (left.get(name, total) - done) / total,
            _memory(tensor, kept[index:], weights) / _ROWS,
        )
        for name, (tensor, version, done, index) in passed.items()
        if calls[name] == 1
    }


def _logits(forward: Callable[..., Any], images: torch.Tensor) -> torch.Tensor:
    try:
        logits = forward(images)
    except Exception as error:  # whatever the network says of such images is the reason
        shape = tuple(images.shape[1:])
        raise CutLayerError(f'The network takes no images of shape {shape}: {one_line(error)}') from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise CutLayerError(f'SBA needs a classifier whose output is one tensor of logits, (N, K); got {got}.')
    return logits


def _memory(latent: torch.Tensor, kept: Sequence[torch.Tensor], weights: set[int]) -> int:
    """Bytes of all rows, each tensor once; what has one dimension or none belongs to channels."""
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept if tensor.ndim > 1}
    sizes[_storage(latent)] = latent.nbytes  # multiplied by itself, where the plain one may be a part of another
    return sum(size for storage, size in sizes.items() if storage not in weights)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _images(network: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Random images, small if the network takes them: what can be cut is a matter of its layers alone."""
    stream = torch.Generator().manual_seed(0)
    for side in _SIDES:
        images = torch.randn(_ROWS, shape[0], side, side, generator=stream)
        with suppress(CutLayerError):
            if side < min(shape[1:]) and _logits(network, images).isfinite().all():
                return images
    return torch.randn(_ROWS, *shape, generator=stream)


@contextmanager
def _training(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    network.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
