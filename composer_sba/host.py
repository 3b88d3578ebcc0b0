"""Composer's models, losses and clock as SBA meets them: what it refuses, how a term joins a loss of any kind."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms import GyroDropout
from composer.algorithms.warnings import NotIntendedUseWarning
from composer.core import Algorithm, State
from composer.core.precision import get_precision_context
from composer.models import ComposerClassifier, HuggingFaceModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_sba.errors import CutLayerError, UserError


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
