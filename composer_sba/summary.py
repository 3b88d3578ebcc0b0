"""The table that closes a run: final metrics, what SBA did, speed, and where the results lie."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from rich.table import Table

TRAIN_LOSS = 'loss/train/total'
_EVAL = 'metrics/eval/'
_METRICS = {  # metric -> row title, factor, unit
    'MulticlassAccuracy': ('accuracy', 100.0, '%'),
    'CrossEntropy': ('cross-entropy', 1.0, 'nats'),
    'MulticlassCalibrationError': ('calibration error', 100.0, '%'),
}


class Summary(LoggerDestination):
    """Collect what the summary of a run needs from the metrics it logs.

    Runs on the logger's ``log_metrics`` and on ``Event.EPOCH_START``; changes nothing in ``State``. It keeps sums, no
    history, so memory does not grow. State saved: the sums, so that a resumed run reports on all its steps.

    Example:
        >>> summary = Summary()
        >>> summary.log_metrics({'sba/augmented': 1, 'sba/kl': 0.25})
        >>> summary.log_metrics({'sba/augmented': 0})
        >>> summary.mean('sba/augmented'), summary.mean('sba/kl')
        (0.5, 0.25)
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last_evaluation: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add to the sums of train loss and SBA metrics, keep the latest of each evaluation metric."""
        for name, value in metrics.items():
            if name.startswith(_EVAL):
                self._last_evaluation[name.removeprefix(_EVAL)] = float(value)
            elif name == TRAIN_LOSS or name.startswith('sba/'):
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counts[name] = self._counts.get(name, 0) + 1

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Begin the mean of the train loss anew: the mean over a whole run tells nobody anything."""
        self._sums.pop(TRAIN_LOSS, None)
        self._counts.pop(TRAIN_LOSS, None)

    def mean(self, name: str) -> float | None:
        """The mean of a metric over the times it was logged; None if it never was."""
        return self._sums[name] / self._counts[name] if self._counts.get(name) else None

    def state_dict(self) -> dict[str, Any]:
        """The sums, as plain data."""
        return {'sums': self._sums, 'counts': self._counts, 'last_evaluation': self._last_evaluation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the sums of the run that is resumed."""
        self._sums, self._counts = dict(state['sums']), dict(state['counts'])
        self._last_evaluation = dict(state['last_evaluation'])

    def table(self, state: State, places: Iterable[tuple[str, str]] = ()) -> Table:
        """Lay out the summary.

        Args:
            state (State): Composer's, when training has ended.
            places (Iterable[tuple[str, str]]): Further rows, such as where the checkpoint lies.

        Returns:
            Table: To be printed by a ``rich.console.Console``.
        """
        title = f'{state.run_name}: {int(state.timestamp.batch)} steps'
        table = Table(title=title, title_justify='left', show_header=False)
        table.add_column(style='bold', no_wrap=True)
        table.add_column(overflow='fold')
        for title, text in [*self._rows(state), *places]:
            table.add_row(title, text)
        return table

    def _rows(self, state: State) -> Iterator[tuple[str, str]]:
        for name, value in self._last_evaluation.items():
            title, factor, unit = _METRICS.get(name, (name, 1.0, ''))
            yield f'eval {title}', f'{factor * value:.4g} {unit}'.rstrip()
        loss, share, kl = (self.mean(name) for name in (TRAIN_LOSS, 'sba/augmented', 'sba/kl'))
        if loss is not None:
            yield 'train loss', f'{loss:.4g} (mean of the last epoch, SBA term included)' if share else f'{loss:.4g}'
        if share is not None:
            yield 'SBA augmented', f'{100 * share:.1f} % of steps'
        if kl is not None:
            yield 'SBA KL', f'{kl:.4g} nats (mean over augmented steps)'
        seconds = state.timestamp.total_wct.total_seconds()  # Composer's training clock stands still in evaluation
        if seconds > 0:
            yield 'training speed', f'{int(state.timestamp.sample) / seconds:,.0f} images/s'
        yield 'wall time', str(timedelta(seconds=round(time.monotonic() - self._begun)))
