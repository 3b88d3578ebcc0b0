"""Composer's models and losses as SBA meets them: which it refuses, and how a term joins a loss of any kind."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from composer.algorithms import GyroDropout
from composer.algorithms.warnings import NotIntendedUseWarning
from composer.core import Algorithm
from composer.models import HuggingFaceModel
from torch import nn

from composer_sba.errors import CutLayerError


def refuse_model(model: nn.Module, algorithms: Sequence[Algorithm]) -> None:
    """Raise CutLayerError for a model that cannot be cut, and warn of one whose loss does not match a softmax."""
    if isinstance(model, HuggingFaceModel):
        raise CutLayerError(
            'SBA cannot cut a HuggingFaceModel, which computes its loss inside forward from labels of the raw rows. '
            'Wrap the network in a ComposerClassifier whose forward returns logits.',
        )
    if any(isinstance(algorithm, GyroDropout) for algorithm in algorithms):
        raise CutLayerError(
            'SBA and GyroDropout exclude each other: GyroDropout keeps masks by row over many batches. Use nn.Dropout.',
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
        return type(loss)((loss[0] + term, *loss[1:]))
    return loss + term
