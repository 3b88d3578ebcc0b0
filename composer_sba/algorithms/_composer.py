"""Composer's models, losses and schedules as the algorithms use them, and what they compute and check once a batch."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms import GyroDropout
from composer.algorithms.warnings import NotIntendedUseWarning
from composer.core import Algorithm, Precision, State
from composer.core.precision import get_precision_context
from composer.models import ComposerClassifier, HuggingFaceModel
from composer.utils import ensure_tuple
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from composer_sba.errors import CutLayerError, NonFiniteError, UserError
from composer_sba.latent.head import tensors_in
from composer_sba.latent.layers import is_head_alone

_IGNORED_LABEL = -100


def network_of(model: nn.Module) -> nn.Module:
    """Return the network whose layers users name: that of a ComposerClassifier or a HuggingFaceModel, or the model."""
    model = unwrap(model)
    if isinstance(model, HuggingFaceModel):
        return model.model
    return model.module if isinstance(model, ComposerClassifier) else model


def unwrap(model: nn.Module) -> Any:
    """Return the ComposerModel inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def forward_on_batch(state: State) -> Callable[[], Any]:
    """Return a function that runs the model on the current batch, without DDP, which counts forward passes.

    Each call gets a copy of the batch, which ``forward`` may change; a batch of one row is doubled, because the check
    of a cut needs two.
    """
    model = unwrap(state.model)

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim > 0 and len(value) == 1 else value.clone()

    def forward() -> Any:
        with get_precision_context(state.precision, state.precision_config):
            return model(tree_map(copy, state.batch))

    return forward


def image_shape(state: State) -> tuple[int, ...] | None:
    """Return the shape of an image of the current batch, ``(C, H, W)``, or None if it is no batch of images."""
    first = next(iter(state.batch), None) if isinstance(state.batch, list | tuple) else None
    return tuple(first.shape[1:]) if isinstance(first, torch.Tensor) and first.ndim == 4 else None


def check_model(
    model: nn.Module, algorithms: Sequence[Algorithm], layers: str | Sequence[str], target: str = 'soft'
) -> None:
    """Raise UserError for what cannot be trained with SBA; warn about a loss that does not match a softmax."""
    if isinstance(model, HuggingFaceModel) and not is_head_alone(layers):
        raise CutLayerError(
            'A HuggingFaceModel computes its loss inside forward, from labels of the raw rows: cut it at '
            f"layers='head', where virtual samples do not reach the loss, not at {layers!r}.",
        )
    if isinstance(model, HuggingFaceModel) and target == 'hard':
        raise UserError(
            "target='hard' needs a loss of virtual samples' logits, and a HuggingFaceModel computes its loss inside "
            "forward: use target='soft'.",
            'target',
        )
    if any(isinstance(algorithm, GyroDropout) for algorithm in algorithms):
        raise CutLayerError(
            'SBA and GyroDropout exclude each other: GyroDropout keeps masks by row over many batches. Use nn.Dropout.',
        )
    mixing = [type(algorithm).__name__ for algorithm in algorithms if getattr(algorithm, 'interpolate_loss', False)]
    if target == 'hard' and mixing:
        raise UserError(
            f"target='hard' needs the mixed labels of {mixing[0]} in the batch: give it interpolate_loss=False.",
            'target',
        )
    loss_fn = getattr(model, '_loss_fn', None)
    name = getattr(loss_fn, '__name__', type(loss_fn).__name__).lower()
    if target == 'soft' and ('binary_cross_entropy' in name or name.startswith('bce')):
        warnings.warn(
            'SBA compares softmax distributions; this model is trained with binary cross-entropy, whose classes do not '
            "exclude each other. target='hard' uses the model's own loss.",
            NotIntendedUseWarning,
            stacklevel=2,
        )


def counted_positions(state: State, logits: torch.Tensor) -> torch.Tensor | None:
    """Return which of the logits have a label that counts, if each row has several: a token of a sentence, for one.

    Args:
        state (State): The Trainer's state, whose batch may have labels, one for each position or none.
        logits (torch.Tensor): The head's output for the raw rows. Shape ``(N, *, K)``.

    Returns:
        torch.Tensor | None: Bool, shape ``(N, *)``: positions whose label is not the one that cross-entropy ignores,
        -100. None if the batch has no such labels, and every position counts.
    """
    if logits.ndim == 2:
        return None
    labels = state.batch.get('labels') if isinstance(state.batch, Mapping) else state.batch[1]
    if not isinstance(labels, torch.Tensor) or labels.shape != logits.shape[:-1]:
        return None
    return labels != _IGNORED_LABEL


def task_loss_of_copies(state: State, virtual_logits: torch.Tensor) -> torch.Tensor:
    """Return the model's own loss of virtual samples, averaged over the copies of the batch.

    The model sees one copy at a time, with the batch as it is. Class weights, ignored labels, label smoothing and the
    form of the labels are therefore those of the task.

    Args:
        state (State): The Trainer's state, whose batch holds the labels.
        virtual_logits (torch.Tensor): Predictions for the virtual samples. Shape ``(M, *)``, where ``*``
            is the shape of the model's output.

    Returns:
        torch.Tensor: The mean loss. Shape ``()``, float32 or wider.
    """
    with get_precision_context(state.precision, state.precision_config):
        # Copied, as the loss of the raw rows is: a loss may change its logits in place.
        losses = [total_loss(unwrap(state.model).loss(logits.clone(), state.batch)) for logits in virtual_logits]
    stacked = torch.stack(losses)
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mean()


def total_loss(loss: Any) -> torch.Tensor:
    """Return what Composer trains on: a dict's ``'total'``, or the sum of all losses.

    Example:
        >>> total_loss({'a': torch.tensor(1.0), 'b': torch.tensor([1.0, 3.0])})
        tensor(3.)
    """
    if isinstance(loss, dict) and 'total' in loss:
        return loss['total'].mean()
    return torch.stack([each.mean() for each in ensure_tuple(loss)]).sum()


def add_term(loss: Any, term: torch.Tensor | None) -> Any:
    """Add SBA's term, or None on a plain step, to a tensor, a sequence or a dict of losses, which keeps its type.

    A dict has the key ``'sba'`` on every step, since Composer reduces losses over ranks key by key. Composer trains on
    the key ``'total'`` of a dict, or on the sum of its values if it has none, and on the sum of a sequence.
    """
    if isinstance(loss, dict):
        if term is None:
            term = next(iter(loss.values())).new_zeros(())
        total = {'total': loss['total'] + term} if 'total' in loss else {}
        return {**loss, **total, 'sba': term}
    if term is None:
        return loss
    if isinstance(loss, list | tuple):
        losses = (loss[0] + term, *loss[1:])
        return type(loss)._make(losses) if hasattr(loss, '_make') else type(loss)(losses)
    return loss + term


def schedule_ratio(state: State) -> float:
    """Return the Trainer's ``scale_schedule_ratio``.

    Composer hands the ratio to its own schedulers alone, as ``ssr``, and keeps it nowhere else. With PyTorch's
    schedulers it cannot be known.
    """
    for scheduler in state.schedulers:
        for function in getattr(scheduler, 'lr_lambdas', ()):
            if getattr(function, '__module__', None) == 'composer.optim.scheduler':
                return inspect.getclosurevars(function).nonlocals['ssr']
    return 1.0


@contextmanager
def at_epoch_start(state: State) -> Iterator[None]:
    """Set the clock back to the start of the epoch, for a scheduler that a resumed run also asks once an epoch."""
    now = state.timestamp
    state.timestamp = now.copy(
        batch=now.batch - now.batch_in_epoch,
        sample=now.sample - now.sample_in_epoch,
        token=now.token - now.token_in_epoch,
        batch_in_epoch=0,
        sample_in_epoch=0,
        token_in_epoch=0,
    )
    try:
        yield
    finally:
        state.timestamp = now


class BatchMeans:
    """Means over the rows of a batch, from the means of its microbatches.

    Sums stay on the device until :meth:`values` is called: at the end of a batch the Trainer waits for it anyway.

    Example:
        >>> means = BatchMeans()
        >>> means.add(3, kl=torch.tensor(0.5))
        >>> means.add(1, kl=torch.tensor(0.1))
        >>> {name: round(value, 4) for name, value in means.values().items()}
        {'kl': 0.4}
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = 0

    def add(self, rows: int, **means: torch.Tensor) -> None:
        """Add the means of a microbatch of ``rows`` rows, without their graphs."""
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * rows
        self._rows += rows

    def values(self) -> dict[str, float]:
        """Return the means of the batch by name."""
        return {name: float(total) / self._rows for name, total in self._sums.items()}


MAX_OVERFLOWS = 10  # augmented batches in a row whose update a GradScaler may skip


class FiniteGuard:
    """A check that the loss of the virtual samples is finite, with a count of the batches in a row in which it is not.

    Args:
        loss (str): What the loss is, for the message.
    """

    def __init__(self, loss: str) -> None:
        self._loss = loss
        self._overflows = 0

    def check(self, value: float, state: State, batch: int, cut: str) -> None:
        """Raise NonFiniteError for a loss that is NaN or infinite.

        Args:
            value (float): The loss.
            state (State): The Trainer's state; its outputs hold the raw rows' predictions.
            batch (int): Index of the batch, for the message.
            cut (str): Name of the cut layer, for the message.

        Raises:
            NonFiniteError: If ``value`` is not finite. Under ``amp_fp16`` the first such batch warns, and the error
                comes after ``MAX_OVERFLOWS`` augmented batches in a row.
        """
        if math.isfinite(value):
            self._overflows = 0
            return
        self._overflows += 1
        outputs = tensors_in(state.outputs)
        finite = bool(outputs) and all(bool(tensor.isfinite().all()) for tensor in outputs)
        cause = (
            'the raw predictions are finite: lower the noise (sigma, dropout), or cut at a later layer'
            if finite
            else 'the raw predictions are not finite either: lower the learning rate, or clip gradients'
        )
        error = NonFiniteError(
            f'Expected a finite {self._loss}, got {value} in batch {batch} at layer {cut!r}; {cause}.'
        )
        if state.precision != Precision.AMP_FP16 or self._overflows >= MAX_OVERFLOWS:
            raise error
        if self._overflows == 1:
            warnings.warn(f'{error} The GradScaler skips the update.', RuntimeWarning, stacklevel=3)


def is_on_cpu(value: torch.Tensor) -> bool:
    """Return whether reading a value is immediate; on another device the process would wait for it."""
    return value.device.type == 'cpu'
