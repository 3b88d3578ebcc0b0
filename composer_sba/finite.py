"""A divergence that is no number ends the fit, or costs one update where a GradScaler leaves that out."""

import math
import warnings

import torch
from composer.core import Precision, State

from composer_sba.errors import NonFiniteError

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
