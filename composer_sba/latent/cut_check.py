"""The test of whether a layer can be cut: each prediction depends on its own row of the latent batch only."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from composer_sba.errors import CutLayerError, one_line
from composer_sba.latent.batch_layers import batch_layers_by_row
from composer_sba.latent.forward_window import ForwardWindow, only
from composer_sba.latent.head import returned_positions, tensors_in
from composer_sba.latent.layers import CutLayer, first_tensor, named_layers
from composer_sba.schedule import seeded

Forward = Callable[[], Any]

_TRIALS = 8  # of layers that draw: MixStyle, for one, acts on half of the batches


def check_cut(model: nn.Module, cut: CutLayer, forward: Forward, *, rows_may_mix: bool = False) -> None:
    """Raise CutLayerError if the predictions depend on anything but their own row of the latent batch.

    The network runs in the mode in which it is, training or evaluation, since a layer may mix rows in one of them only.
    It predicts for the latent batch, and for the latent batch joined with others. Predictions for rows that stay the
    same must not change. Random streams start from the same seed in each pass, so that draws of the network are no
    obstacle. Batch normalization and dropout modules, which ``composer_sba.latent.batch_layers`` handles, are left
    out. A skip connection around the cut fails because it has only half as many rows.

    At ``'head'``, virtual samples pass the head alone. The check is that the head makes the model's logits.

    The check leaves buffers, modes, numbers that are attributes of modules, and random streams as they were.

    Args:
        model (torch.nn.Module): The model that ``forward`` runs.
        cut (CutLayer): The layer to check.
        forward (Callable): Runs the model on a batch of at least two rows and returns the logits, ``(N, K)``; if the
            head is cut, anything that holds them.
        rows_may_mix (bool, optional): Accept layers above the cut that mix rows. Default: ``False``.

    Raises:
        CutLayerError: If the layer cannot be cut; the message gives the reason and the nearest layers that can.
    """
    reason = why_no_cut(model, cut, forward, rows_may_mix=rows_may_mix)
    if reason is not None:
        nearest = ' or '.join(map(repr, _nearest_cuts(model, cut, forward, rows_may_mix)))
        remedy = f'Use {nearest}, the nearest that can be cut' if nearest else 'No layer near it can be cut'
        raise CutLayerError(f'Layer {cut.name!r} cannot be cut: {reason}. {remedy}.')


def why_no_cut(model: nn.Module, cut: CutLayer, forward: Forward, *, rows_may_mix: bool = False) -> str | None:
    """Return the reason why a layer cannot be cut, or None if it can; arguments as for :func:`check_cut`."""
    if cut.name == 'head' and not rows_may_mix:
        return why_no_head(model, cut, forward)
    with repeatable(model) as run, batch_layers_by_row(model):
        seen: list[Any] = []

        def record(value: Any) -> None:  # as it is here: layers above may change it in place
            seen.append((value, value.clone() if isinstance(value, torch.Tensor) else value))

        with _hooked(cut, record):
            logits = run(forward)
        mode = 'training' if model.training else 'evaluation'
        check_logits(logits, mode)
        rows = len(logits)
        if rows < 2:
            raise CutLayerError(
                f'Layer {cut.name!r} is checked on the first batch, which needs two rows or more; got {rows}.'
            )
        if not logits.isfinite().all():
            raise CutLayerError(
                f'Layer {cut.name!r} cannot be checked: the predictions for the first batch are not finite.'
            )
        if len(seen) != 1:
            return f'it runs {len(seen)} times in one forward pass'
        [(value, latent)] = seen
        end = 'input' if cut.at_input else 'output'
        if not isinstance(latent, torch.Tensor):
            return f'its {end} is a {type(latent).__name__}, not one tensor'
        if not latent.is_floating_point():
            return f'its {end} is of {latent.dtype}, not floating'
        if latent.ndim == 0 or len(latent) != rows:
            return f'its {end} has shape {tuple(latent.shape)} for a batch of {rows} rows'
        if not cut.at_input and value.numel() == logits.numel() and value.data_ptr() == logits.data_ptr():
            return "it is the model's output, with no layer above it"
        return _why_rows_differ(model, cut, forward, run, latent, logits, mode, rows_may_mix)


def why_no_head(model: nn.Module, cut: CutLayer, forward: Callable[[], Any]) -> str | None:
    """Return the reason why a model's last linear layer is not its head, or None if its output is the model's logits.

    The model may return them in any structure, shifted by a constant for each row, as by a softmax, or those of one
    position of each row, as classifiers made of language models do.
    """
    seen: list[tuple[Any, Any]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((first_tensor(args, kwargs), output.clone() if isinstance(output, torch.Tensor) else output))

    # First: a hook that changes the output afterwards changes what virtual samples do not pass.
    handle = cut.module.register_forward_hook(record, prepend=True, with_kwargs=True)
    try:
        with repeatable(model) as run:
            outputs = run(forward)
    finally:
        handle.remove()
    if len(seen) != 1:
        return f'the last nn.Linear runs {len(seen)} times in one forward pass'
    [(latent, logits)] = seen
    for name, value in ('input', latent), ('output', logits):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
            got = f'{value.dtype}, {tuple(value.shape)}' if isinstance(value, torch.Tensor) else type(value).__name__
            return f"the last nn.Linear's {name} must be a floating-point tensor of shape (N, ..., features), got {got}"
    if not logits.isfinite().all():
        raise CutLayerError("Layer 'head' cannot be checked: the logits for the first batch are not finite.")
    tensors = tensors_in(outputs)
    for tensor in tensors:
        if tensor.numel() == logits.numel() and tensor.shape[-1:] == logits.shape[-1:]:
            shift = (tensor - logits.view_as(tensor)).float()
            if shift.shape[-1] > 1:  # with one logit a constant matters
                shift = shift - shift[..., :1]
            if shift.abs().max() <= 1e-2 * logits.abs().max():
                return None
    if returned_positions(logits, outputs) is not None:
        return None
    shapes = ', '.join(str(tuple(tensor.shape)) for tensor in tensors)
    return (
        f"the last nn.Linear makes {tuple(logits.shape)}, which is not among the model's outputs, {shapes}: it is not "
        'the head'
    )


def check_logits(logits: Any, mode: str) -> None:
    """Raise CutLayerError unless a network returned one tensor of logits in a mode, training or evaluation."""
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise CutLayerError(
            f'A cut below the head needs a classifier whose output is one tensor of logits, (N, K); got {got} in '
            f"{mode} mode. Cut it at layers='head', turn auxiliary outputs off, or wrap the network in a module that "
            'returns the logits alone.'
        )


def _why_rows_differ(
    model: nn.Module,
    cut: CutLayer,
    forward: Forward,
    run: Callable[..., Any],
    latent: torch.Tensor,
    logits: torch.Tensor,
    mode: str,
    rows_may_mix: bool,
) -> str | None:
    """Compare predictions for rows of latent batches that stay the same while others change."""
    rows, drew = len(latent), False

    def predict(first: torch.Tensor, second: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Return the predictions for both batches in one pass."""
        nonlocal drew
        streams: list[Any] = []

        def join(_: torch.Tensor) -> torch.Tensor:
            streams.append(_streams(model))
            return torch.cat([first, second])

        with _hooked(cut, join):
            together, end = run(lambda: (forward(), _streams(model)), seed)
        drew |= streams[0] != end
        return together.split([rows, len(together) - rows])

    # Far from the batch in scale: a fresh network may predict nearly the same for all its rows, and rows that had the
    # batch's own mean and variance would not show that layers above normalize over rows.
    generator = torch.Generator().manual_seed(0)
    scale = 3 * latent.float().square().mean().sqrt().to(latent.dtype)
    one, two, three = (latent + scale * torch.randn(latent.shape, generator=generator).to(latent) for _ in range(3))
    try:
        raw, virtual = predict(latent, one)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what the layers above say about twice the rows is the reason
        reason = one_line(error).rstrip('.')
        return f'the layers above it cannot take more rows than entered below, as in a residual branch ({reason})'
    if raw.shape != logits.shape or virtual.shape != logits.shape:
        return f'{len(raw) + len(virtual)} predictions came back for {2 * rows} rows'
    if rows_may_mix:
        return None
    differ = partial(_differ, exact=latent.device.type == 'cpu' and latent.dtype in (torch.float32, torch.float64))
    mixed = differ(virtual, predict(three, one)[1]) or (not drew and differ(raw, logits))
    for seed in range(_TRIALS if drew else 1):
        expected = predict(latent, one, seed)[0] if seed else raw
        mixed = mixed or differ(expected, predict(latent, two, seed)[0])
    if not mixed:
        return None
    if any(map(differ, predict(latent, one), (raw, virtual))):
        return (
            f'two equal passes in {mode} mode give different predictions, so the check fails: let modules draw from '
            'the global random streams or a torch.Generator that is an attribute, and keep other state in buffers'
        )
    return f'in {mode} mode, predictions for the same rows change when others do: the layers above it mix rows'


def _differ(expected: torch.Tensor, got: torch.Tensor, exact: bool) -> bool:
    # The row count may choose another kernel, whose rounding shows in TF32 and half precision.
    scale = expected.where(expected.isfinite(), 0).abs().max().item()
    return not torch.allclose(expected, got, rtol=0, atol=(1e-4 if exact else 2e-2) * scale, equal_nan=True)


def _streams(model: nn.Module) -> tuple[Any, ...]:
    """Return the states of the global random streams and of the model's own, for a comparison."""
    states = [generator.get_state() for generator in _generators(model)]
    states += [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    _, numbers, *position = np.random.get_state()
    return [state.tolist() for state in states], random.getstate(), list(numbers), position


def _nearest_cuts(model: nn.Module, cut: CutLayer, forward: Forward, rows_may_mix: bool) -> list[str]:
    """Find the cut points that run last before ``cut`` and first after it."""
    order: dict[str, nn.Module] = {}

    def record(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        order.setdefault(name, module)

    handles = [module.register_forward_hook(partial(record, name)) for name, module in named_layers(model).items()]
    try:
        with repeatable(model) as run:
            logits = run(forward)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        return []  # only the head can be cut
    names = list(order)
    at = names.index(cut.name) if cut.name in order else len(names)
    found = []
    for candidates in (names[:at][::-1], names[at + 1 :]):
        for name in candidates:
            if why_no_cut(model, CutLayer(name, order[name]), forward, rows_may_mix=rows_may_mix) is None:
                found.append(name)
                break
    return found


@contextmanager
def _hooked(cut: CutLayer, edit: Callable[[Any], Any]) -> Iterator[None]:
    handle = cut.hook(edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def repeatable(model: nn.Module, window: ForwardWindow | None = None) -> Iterator[Callable[..., Any]]:
    """Yield ``run(forward, seed=0)`` for trial passes of a model, which start from one state and restore it.

    They are eager and without gradients. Buffers, flags and numbers that are attributes of modules,
    ``torch.Generator`` attributes and the global random streams are restored after each pass. Hooks that are
    armed for the next pass stay armed, but only those of ``window`` act in a trial pass.
    """
    put_back = _remember(model)
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []

    def run(forward: Callable[[], Any], seed: int = 0) -> Any:
        if devices:
            torch.cuda.manual_seed(seed)
        with seeded(seed):
            try:
                return forward()
            finally:
                put_back()

    # Eager: the row counts of trial passes are no reason to compile anything.
    with only(window), torch.no_grad(), torch.random.fork_rng(devices), torch.compiler.set_stance('force_eager'):
        yield run


def _remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the state of modules, except for their parameters."""
    modules = [module for module in model.modules() if not isinstance(module, FullyShardedDataParallel)]
    buffers = [
        (module._buffers, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    numbers = [
        (vars(module), name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, int | float)
    ]
    generators = [(generator, generator.get_state()) for generator in _generators(model)]

    def put_back() -> None:
        for owner, name, buffer, value in buffers:
            owner[name] = buffer if torch.equal(buffer, value.to(buffer)) else buffer.copy_(value)
        for attributes, name, number in numbers:
            attributes[name] = number
        for generator, state in generators:
            generator.set_state(state)

    return put_back


def _generators(model: nn.Module) -> list[torch.Generator]:
    values = [value for module in model.modules() for value in vars(module).values()]
    return [value for value in values if isinstance(value, torch.Generator)]
