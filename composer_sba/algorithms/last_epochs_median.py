"""class LastEpochsMedian: the median of an evaluation metric over the last epochs, the paper's figure of merit."""

import math
import statistics
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from composer_sba.errors import check_number


def last_epochs_median(values: Mapping[int, float], num_epochs: int = 5) -> float:
    """Return the median of a metric over the evaluations of the last epochs.

    The last epoch is the latest one with a value. The median of an even number of values is the mean of the middle two.

    Args:
        values (Mapping[int, float]): Epoch -> the metric's value at its end. At least one.
        num_epochs (int, optional): How many epochs count, >= 1, with or without a value. Default: ``5``.

    Returns:
        float: The median, in the metric's unit; NaN if one of the values is.

    Example:
        >>> last_epochs_median({0: 0.10, 4: 0.93, 5: 0.91, 6: 0.95, 7: 0.94, 8: 0.20})
        0.93
    """
    last = [value for epoch, value in values.items() if epoch > max(values) - num_epochs]
    return math.nan if any(map(math.isnan, last)) else statistics.median(last)


class LastEpochsMedian(Callback):
    """A report of every evaluation metric as its median over the evaluations of the last epochs.

    The figure of merit of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, Sec. 4.1: "the median of the
    performance values obtained in the final 5 epochs". The latest of several evaluations in one epoch counts. An epoch
    without evaluation has no value, so a run for the paper's tables evaluates at the end of each of these epochs.

    Args:
        num_epochs (int, optional): How many epochs count, >= 1. Default: ``5``.

    Attributes:
        medians (dict[str, float]): ``'<evaluator's label>/<metric>'`` -> the median so far, in the metric's unit.

    Raises:
        ValueError: If ``num_epochs`` is not an integer >= 1.

    Note:
        Runs on EVAL_END of a fit's own evaluations, not of ``Trainer.eval()``, and on FIT_END, where it logs
        ``median_last5/<label>/<metric>`` (for ``num_epochs=5``). Composer evaluates once more after FIT_END if
        ``eval_interval`` does not divide the duration: that evaluation counts for the epoch that it follows, and all
        medians are logged again. Metrics that are not a single number are left out. The values are those that Composer
        computed, equal on all ranks. Nothing in ``State`` changes. State saved: the values of the last ``num_epochs``
        epochs, with which a resumed run reports the same medians.

    Example:
        >>> from composer import Trainer
        >>> median = LastEpochsMedian()
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=train, eval_dataloader=val, max_duration='164ep', callbacks=[median]
        ... )
        >>> trainer.fit()  # doctest: +SKIP
        >>> median.medians  # doctest: +SKIP
        {'eval/MulticlassAccuracy': 0.9312, 'eval/CrossEntropy': 0.2485}
    """

    def __init__(self, num_epochs: int = 5) -> None:
        expected = 'an integer >= 1'
        self.num_epochs: int = check_number('num_epochs', num_epochs, expected, lambda value: value >= 1, Integral)
        self._values: dict[str, dict[int, float]] = {}  # '<label>/<metric>' -> epoch -> value
        self._within_fit = False  # whether the evaluation that runs is one of a fit
        self._ended = False

    @property
    def medians(self) -> dict[str, float]:
        """The median so far, by ``'<label>/<metric>'``."""
        return {name: last_epochs_median(values, self.num_epochs) for name, values in self._values.items()}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start a fit, or continue after one."""
        self._ended = self._within_fit = False

    def eval_before_all(self, state: State, logger: Logger) -> None:
        """Expect evaluations of a fit: ``Trainer.eval()`` has no such event."""
        self._within_fit = True

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the values of one evaluator."""
        if not self._within_fit:
            return
        time, label = state.timestamp, state.dataloader_label
        assert label is not None
        epoch = time.epoch.value - (time.batch_in_epoch.value == 0)  # at EPOCH_END the clock is in the next one
        for metric in state.eval_metrics[label]:
            value: Any = state.eval_metric_values[metric]
            if isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1):
                seen = self._values.get(f'{label}/{metric}', {}) | {epoch: float(value)}
                recent = {at: each for at, each in seen.items() if epoch - self.num_epochs < at <= epoch}
                self._values[f'{label}/{metric}'] = recent

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Log the medians again after an evaluation that follows FIT_END."""
        self._within_fit = False
        if self._ended:
            self._log(logger)

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """Ignore ``Trainer.eval()``, also after an exception within an evaluation of a fit."""
        self._within_fit = False

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log the medians."""
        self._ended = True
        self._log(logger)

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the last epochs, as plain data."""
        return {'values': {name: dict(values) for name, values in self._values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values of the run that is resumed."""
        self._values = {name: dict(values) for name, values in state['values'].items()}

    def _log(self, logger: Logger) -> None:
        logger.log_metrics({f'median_last{self.num_epochs}/{name}': value for name, value in self.medians.items()})
