"""class RDrop: a penalty on the difference of two passes through dropout (Liang et al.), as a Composer algorithm."""

import math
from collections.abc import Callable
from numbers import Real

import torch
from composer.core import State
from composer.loggers import Logger
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from composer_sba import functional as sbaf
from composer_sba.algorithms._attachment import RowMultiplier
from composer_sba.algorithms._composer import BatchMeans
from composer_sba.algorithms.batch_augmentation import batch_augment
from composer_sba.errors import UserError, check_number


def two_pass_kl(logits: torch.Tensor) -> torch.Tensor:
    r"""Compute the divergence between the two predictions for every row.

    The regularizer of `Liang et al., 2021 <https://arxiv.org/abs/2106.14448>`_, averaged over rows:

    .. math::
        \frac{1}{2N} \sum_i (D_{KL}(P_{1i} \parallel P_{2i}) + D_{KL}(P_{2i} \parallel P_{1i}))

    where :math:`P_{1i}` and :math:`P_{2i}` are the softmax of logits 2i and 2i + 1.

    Args:
        logits (torch.Tensor): Both predictions for a row are adjacent. Shape ``(2 * N, K)``, unnormalized.

    Returns:
        torch.Tensor: The mean divergence in nats. Shape ``()``, float32, or float64 for float64 logits. Gradients flow
        through both predictions.

    Raises:
        ValueError: If the shape is not ``(2 * N, K)``.

    Example:
        >>> two_pass_kl(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor(0.3808)
    """
    if logits.ndim != 2 or len(logits) % 2:
        raise ValueError(f'Expected logits of shape (2 * N, K), got {tuple(logits.shape)}.')
    first, second = logits[0::2], logits[1::2]
    first_to_second = sbaf.soft_label_kl(first, second[None], stop_gradient=False)
    second_to_first = sbaf.soft_label_kl(second, first[None], stop_gradient=False)
    return (first_to_second + second_to_first) / 2


def dropout_rate(module: nn.Module) -> float:
    """Return a module's dropout rate: ``p`` of dropout layers, ``dropout`` of attention and RNNs, 0 of others.

    Example:
        >>> [dropout_rate(layer) for layer in (nn.Dropout(0.3), nn.LSTM(4, 4, 2, dropout=0.1), nn.Linear(4, 4))]
        [0.3, 0.1, 0.0]
    """
    rate = module.p if isinstance(module, _DropoutNd | StochasticDepth) else getattr(module, 'dropout', 0.0)
    return float(rate) if isinstance(rate, Real) else 0.0


class RDrop(RowMultiplier):
    r"""A regularizer: every row passes the network's dropout twice, and the two predictions are pulled together.

    Implements `Liang et al., 2021 <https://arxiv.org/abs/2106.14448>`_, in the convention of the `authors' README
    <https://github.com/dropreg/R-Drop>`_:

    .. math::
        L = \frac{1}{2N} \sum_i (CE(y_i, P_{1i}) + CE(y_i, P_{2i}))
          + \frac{\alpha}{2N} \sum_i (D_{KL}(P_{1i} \parallel P_{2i}) + D_{KL}(P_{2i} \parallel P_{1i}))

    where :math:`P_{1i}` and :math:`P_{2i}` are the predictions for row i under two dropout masks. Gradients flow
    through both. The paper adds the two cross-entropies; this class takes their mean, which keeps the loss and the
    learning rate of plain training. The paper's α is therefore twice this one, and its loss twice this loss. A step
    costs about two plain steps.

    Args:
        alpha (float, optional): α >= 0, the weight of the divergence; 0 doubles the batch and adds nothing. The
            authors' code for images adds :math:`0.3 (D_{KL} + D_{KL})` to the sum of the cross-entropies, which is
            α = 0.3 here, but sums the divergences over the batch. Default: ``0.3``.
        input_key (str | int | Callable, optional): Where a batch holds its inputs. Default: ``0``.
        target_key (str | int | Callable, optional): Where a batch holds its labels. Default: ``1``.

    Raises:
        ValueError: If ``alpha`` is not a finite number >= 0.
        UserError: When the Trainer is built, if its list of algorithms has two RDrop. At the start of a fit, if the
            model has no dropout, since the term would be 0. At a batch, if a microbatch separates the two passes of a
            row, or if the logits or the loss are not one tensor.

    Note:
        Runs on FIT_START (dropout is looked for), BATCH_START (rows are doubled; the two passes of a row are adjacent),
        AFTER_FORWARD (the divergence, in float32), BEFORE_BACKWARD (``state.loss`` gains the term), BATCH_END (logs
        ``r_drop/kl``, in nats, this rank's mean) and FIT_END. ``device_train_microbatch_size`` counts inputs, not
        passes, whether it is a number or ``'auto'``; ``'auto'`` may halve it to an odd number of rows, unless the batch
        size is a power of two. Train metrics see both passes. Time strings count inputs. RDrop draws no random numbers:
        the masks are dropout's. Algorithms that pair rows with others before the forward pass, as MixUp does, would
        separate the passes. State saved: none.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=dataloader, max_duration='1ep', algorithms=[RDrop()]
        ... )
    """

    instead_of_two = 'give one the sum of both alphas'
    rows_per_input = 2

    def __init__(
        self, alpha: float = 0.3, input_key: str | int | Callable = 0, target_key: str | int | Callable = 1
    ) -> None:
        self.alpha = check_number('alpha', alpha, 'a finite number >= 0', lambda value: 0 <= value < math.inf)
        self.input_key = input_key
        self.target_key = target_key
        self._kl = torch.zeros(())
        self._means = BatchMeans()

    def __repr__(self) -> str:
        return f'RDrop(alpha={self.alpha})'

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse a model without dropout."""
        rates = [dropout_rate(module) for module in state.model.modules()]
        if not any(rates):
            raise UserError(
                f'RDrop compares two passes through dropout, and none of the {len(rates)} modules of '
                f'{type(state.model).__name__} has a rate > 0: give the network an nn.Dropout(0.1) or leave RDrop out.',
            )
        self.attach(state)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Double the batch, after every algorithm that changes its rows on AFTER_DATALOADER."""
        inputs, target = state.batch_get_item(self.input_key), state.batch_get_item(self.target_key)
        inputs, target = batch_augment(torch.stack([inputs, inputs], dim=1), target)
        state.batch_set_item(self.input_key, inputs)
        state.batch_set_item(self.target_key, target)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begin the batch's mean, again if the batch is tried again after running out of memory."""
        super().before_train_batch(state, logger)
        self._means = BatchMeans()
        self._kl = torch.zeros(())  # free the graph of the failed attempt

    def after_forward(self, state: State, logger: Logger) -> None:
        """Compare the two passes, before a loss can change the logits in place."""
        outputs = state.outputs
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) % 2:
            got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise UserError(
                f'RDrop needs logits of two passes of every input, (2 * N, K), got {got}; the microbatch size, here '
                f'{state.device_train_microbatch_size} rows, must be even.',
            )
        self._kl = two_pass_kl(outputs)
        self._means.add(len(outputs), kl=self._kl)

    def before_backward(self, state: State, logger: Logger) -> None:
        """Add the second term."""
        if not isinstance(state.loss, torch.Tensor):
            raise UserError(f'RDrop adds its term to a loss that is one tensor, got {type(state.loss).__name__}.')
        state.loss = state.loss + self.alpha * self._kl

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the divergence, once."""
        logger.log_metrics({f'r_drop/{name}': mean for name, mean in self._means.values().items()})
