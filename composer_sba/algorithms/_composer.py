"""Composer's models, losses and clock as SBA meets them: what it refuses, how a term joins a loss of any kind."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms import GyroDropout
from composer.algorithms.warnings import NotIntendedUseWarning
from composer.core import Algorithm, Precision, State
from composer.core.precision import get_precision_context
from composer.models import ComposerClassifier, HuggingFaceModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_sba.errors import CutLayerError, NonFiniteError, UserError


def network_of(model: nn.Module) -> nn.Module:
    """The network whose layers users name and whose input is a tensor: the module of a ComposerClassifier."""
    return model.module if isinstance(model, ComposerClassifier) else model


def first_forward(state: State) -> Callable[[], torch.Tensor]:
    """Make the forward pass that proves the cuts, without DDP, which counts what passes through it."""
    model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    batch = state.batch
    if isinstance(model, ComposerClassifier) and isinstance(batch, list | tuple) and len(batch[0]) == 1:
        batch = (batch[0].expand(2, *batch[0].shape[1:]), *batch[1:])  # the proof needs two rows

    def forward() -> torch.Tensor:
        with get_precision_context(state.precision, state.precision_config):
            return model(batch)

    return forward


@contextmanager
def at_epoch_start(state: State) -> Iterator[None]:
    """Set the clock to the start of the epoch, for a scheduler that is asked once an epoch, also by a resumed run."""
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


def refuse_model(model: nn.Module, algorithms: Sequence[Algorithm], target: str) -> None:
    """Raise UserError for what cannot be trained with SBA, and warn of a loss that does not match a softmax."""
    if isinstance(model, HuggingFaceModel):
        raise CutLayerError(
            'SBA cannot cut a HuggingFaceModel, which computes its loss inside forward from labels of the raw rows. '
            'Wrap the network in a ComposerClassifier whose forward returns logits.',
        )
    if any(isinstance(algorithm, GyroDropout) for algorithm in algorithms):
        raise CutLayerError(
            'SBA and GyroDropout exclude each other: GyroDropout keeps masks by row over many batches. Use nn.Dropout.',
        )
    mixing = [type(algorithm).__name__ for algorithm in algorithms if getattr(algorithm, 'interpolate_loss', False)]
    if target == 'hard' and mixing:
        raise UserError(
            f"target='hard' needs the mixed labels of {mixing[0]} in the batch: give it interpolate_loss=False.",
        )
    loss_fn = getattr(model, '_loss_fn', None)
    name = getattr(loss_fn, '__name__', type(loss_fn).__name__).lower()
    if 'binary_cross_entropy' in name or name.startswith('bce'):
        warnings.warn(
            'SBA compares softmax distributions; this model is trained with binary cross-entropy, whose classes do not '
            'exclude each other.',
            NotIntendedUseWarning,
            stacklevel=2,
        )


def add_term(loss: Any, term: torch.Tensor | None) -> Any:
    """Add SBA's term, or None on a plain step, to a loss that stays what it is: a tensor, a sequence or a dict.

    A dict has the key ``'sba'`` at every step, since Composer reduces losses over ranks key by key. Composer trains on
    the key ``'total'`` of a dict, or on the sum of its values where there is none; of a sequence it takes the sum.
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


class BatchMeans:
    """Adds up means of microbatches, weighted by their rows.

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
        """Count the means of a microbatch of so many rows, without their graphs."""
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * rows
        self._rows += rows

    def values(self) -> dict[str, float]:
        """Return the means of the batch by name."""
        return {name: float(total) / self._rows for name, total in self._sums.items()}


MAX_OVERFLOWS = 10  # augmented batches in a row that a GradScaler may leave out


class FiniteGuard:
    """Looks at the divergence of each augmented batch, and counts those in a row that were lost."""

    def __init__(self) -> None:
        self._overflows = 0

    def check(self, kl: float, state: State, batch: int, cut: str) -> None:
        """Refuse a divergence that is NaN or infinite.

        Args:
            kl (float): The divergence, in nats.
            state (State): Of the Trainer; its outputs are the raw rows' predictions.
            batch (int): Index of the batch, for the message.
            cut (str): Name of the cut layer, for the message.

        Raises:
            NonFiniteError: If it is not finite; with ``amp_fp16`` a warning comes first, and the error after
                ``MAX_OVERFLOWS`` augmented batches in a row.
        """
        if math.isfinite(kl):
            self._overflows = 0
            return
        self._overflows += 1
        error = NonFiniteError(
            f'Expected a finite divergence, got {kl} in batch {batch} at layer {cut!r}; {_cause(state.outputs)}.'
        )
        if state.precision != Precision.AMP_FP16 or self._overflows >= MAX_OVERFLOWS:
            raise error
        if self._overflows == 1:
            warnings.warn(f'{error} The GradScaler leaves the update out.', RuntimeWarning, stacklevel=3)


def read_at_once(value: torch.Tensor) -> bool:
    """Tell whether a value is on the CPU: another device would have to be waited for."""
    return value.device.type == 'cpu'


def _cause(raw_logits: object) -> str:
    if isinstance(raw_logits, torch.Tensor) and bool(raw_logits.isfinite().all()):
        return 'the raw predictions are finite: lower the noise (sigma, dropout), or cut at a later layer'
    return 'so are the raw predictions, the network diverges: lower the learning rate, or clip gradients'
