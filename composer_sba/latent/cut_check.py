"""Which layers can be cut: the proof that predictions depend on their own rows of the latent batch alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from composer_sba.errors import CutLayerError, one_line
from composer_sba.latent.layers import CutLayer, named_layers

Forward = Callable[[], torch.Tensor]


def check_cut(model: nn.Module, cut: CutLayer, forward: Forward) -> None:
    """Refuse a layer above which rows depend on anything but their own row of the latent batch.

    The model predicts for the latent batch, for another one, and for both together, which must change nothing. A skip
    connection around the cut meets twice the rows it has; layers that mix rows give other predictions. Call it within
    :func:`evaluation`.

    Args:
        model (torch.nn.Module): The model that ``forward`` runs.
        cut (CutLayer): The layer to check.
        forward (Callable): Runs the model on a batch of at least two rows and returns the logits, ``(N, K)``.

    Raises:
        CutLayerError: If the layer is no cut point; the message says why, and which layers next to it would do.
    """
    reason = why_no_cut(cut, forward)
    if reason is not None:
        nearest = _nearest_cuts(model, cut, forward)
        remedy = f'Near it, {" and ".join(map(repr, nearest))} would do' if nearest else 'No layer near it would do'
        raise CutLayerError(f'Layer {cut.name!r} is no cut point: {reason}. {remedy}.')


def why_no_cut(cut: CutLayer, forward: Forward) -> str | None:
    """Say why a layer is no cut point, or None if it is one."""
    seen: list[Any] = []
    with _hooked(cut, seen.append):
        logits = forward()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise CutLayerError(f'SBA needs a classifier whose output is one tensor of logits, (N, K); got {got}.')
    rows, classes = logits.shape
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
    latent = seen[0]
    place = 'input' if cut.at_input else 'output'
    if not isinstance(latent, torch.Tensor):
        return f'its {place} is a {type(latent).__name__}, not one tensor'
    if not latent.is_floating_point():
        return f'its {place} is of {latent.dtype}, not floating'
    if latent.ndim == 0 or len(latent) != rows:
        return f'its {place} has shape {tuple(latent.shape)} for a batch of {rows} rows'
    if not cut.at_input and latent.numel() == logits.numel() and latent.data_ptr() == logits.data_ptr():
        return "it is the model's output, and no layer lies above it"
    if cut.name == 'head' and cut.module.out_features != classes:
        outputs = cut.module.out_features
        return f'the last nn.Linear has {outputs} outputs, the model {classes} logits: it is not the head'
    return _why_rows_differ(cut, forward, latent, logits)


def _why_rows_differ(cut: CutLayer, forward: Forward, latent: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Compare predictions for two latent batches alone and together."""
    # Far from the batch in scale: a fresh network may say nearly the same of all its rows, and rows that had the
    # batch's own mean and variance would not show that layers above normalize over rows.
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
    other = latent + 3 * latent.float().square().mean().sqrt().to(latent.dtype) * noise
    try:
        with _hooked(cut, lambda value: torch.cat([value, other])):
            together = forward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the layers above say of twice the rows is the reason
        said = one_line(error).rstrip('.')
        return f'the layers above it cannot take more rows than entered below, as in a residual branch ({said})'
    with _hooked(cut, lambda value: other):
        alone = torch.cat([logits, forward()])
    if together.shape != alone.shape:
        return f'{len(together)} predictions came back for {len(alone)} rows'
    # The row count may choose another kernel, whose rounding shows in TF32 and half precision.
    exact = latent.device.type == 'cpu' and latent.dtype in (torch.float32, torch.float64)
    if (together - alone).abs().max() > (1e-4 if exact else 2e-2) * alone.abs().max():
        return 'predictions for the same rows change when others join them: the layers above it mix rows'
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
    found = [
        next((name for name in candidates if why_no_cut(CutLayer(name, order[name]), forward) is None), None)
        for candidates in (names[:at][::-1], names[at + 1 :])
    ]
    return [name for name in found if name is not None]


@contextmanager
def _hooked(cut: CutLayer, edit: Callable[[Any], Any]) -> Iterator[None]:
    handle = cut.hook(edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, eager and without gradients; every module's mode and the random state are put back."""
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
