"""The summary of a run: its evaluations, means of its losses, and the table that training ends with."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from rich.table import Table

TRAIN_LOSS = 'loss/train/total'
FEW_IMAGES = 1000  # of which one is 0.1 points or more
METRICS = {  # an evaluation's value -> Composer's name, title, factor, unit
    'accuracy': ('MulticlassAccuracy', 'accuracy', 100.0, '%'),
    'loss': ('CrossEntropy', 'cross-entropy', 1.0, 'nats'),
    'calibration_error': ('MulticlassCalibrationError', 'calibration error', 100.0, '%'),
}


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, 'image'), counted(2500, 'batch')
        ('1 image', '2,500 batches')
    """
    return f'{number:,} {noun}{"" if number == 1 else "es" if noun.endswith("tch") else "s"}'


class Summary(LoggerDestination):
    """The metrics of a run: every evaluation, and means of the train loss and of SBA's metrics.

    Runs on the logger's ``log_metrics``, on ``Event.EPOCH_START`` and on ``Event.EVAL_END``; changes nothing in
    ``State``. State saved: all of it, so a resumed run reports on all its steps.

    Attributes:
        evaluations (list[dict[str, Any]]): ``epoch``, ``seconds`` of training since the run began, ``accuracy``,
            ``loss`` (nats), ``calibration_error`` and ``train_loss`` (mean of the epoch so far; None if nothing was
            trained in it). The latest evaluation of each epoch.

    Example:
        >>> summary = Summary()
        >>> summary.log_metrics({'sba/augmented': 1, 'sba/kl': 0.25})
        >>> summary.log_metrics({'sba/augmented': 0})
        >>> summary.mean('sba/augmented'), summary.mean('sba/kl')
        (0.5, 0.25)
    """

    def __init__(self) -> None:
        self.evaluations: list[dict[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._begun = time.monotonic()
        self._earlier_seconds = 0.0
        self._eval_images: int | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds that the run has taken, with evaluation, over all processes that resumed it."""
        return self._earlier_seconds + time.monotonic() - self._begun

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add the train loss and SBA's metrics to their sums."""
        for name, value in metrics.items():
            if name == TRAIN_LOSS or name.startswith('sba/'):
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counts[name] = self._counts.get(name, 0) + 1

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Restart the mean of the train loss, which is reported for each epoch."""
        self._sums.pop(TRAIN_LOSS, None)
        self._counts.pop(TRAIN_LOSS, None)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the metrics of an evaluation; a second one in the same epoch replaces the first."""
        epoch = int(state.timestamp.epoch) + (int(state.timestamp.batch_in_epoch) > 0)
        self._eval_images = int(state.eval_timestamp.sample)
        evaluation = {
            'epoch': epoch,
            'seconds': state.timestamp.total_wct.total_seconds(),
            **{key: float(state.eval_metric_values[metric]) for key, (metric, *_) in METRICS.items()},
            'train_loss': self.mean(TRAIN_LOSS),
        }
        self.evaluations = [*(each for each in self.evaluations if each['epoch'] != epoch), evaluation]

    def mean(self, name: str) -> float | None:
        """Return the mean of a metric over the times it was logged, or None if it never was."""
        return self._sums[name] / self._counts[name] if self._counts.get(name) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the evaluations, the sums and the time as plain data."""
        sums = {'sums': self._sums, 'counts': self._counts}
        return {'epochs': self.evaluations, 'wall_seconds': self.wall_seconds, **sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of the run that is resumed; an older version saved only a part of it."""
        self._sums, self._counts = dict(state.get('sums', {})), dict(state.get('counts', {}))
        self.evaluations, self._earlier_seconds = list(state.get('epochs', [])), state.get('wall_seconds', 0.0)

    def table(self, state: State, rows: Iterable[tuple[str, str]] = ()) -> Table:
        """Return the summary as a table.

        Args:
            state (State): Composer's, after training.
            rows (Iterable[tuple[str, str]]): Further rows, each a title and a text, such as the checkpoint's path.

        Returns:
            Table: For a ``rich.console.Console`` to print.
        """
        title = f'{state.run_name}: {counted(int(state.timestamp.batch), "step")}'
        table = Table(title=title, title_justify='left', show_header=False)
        table.add_column(style='bold', no_wrap=True)
        table.add_column(overflow='fold')
        for title, text in [*self.rows(state), *rows]:
            table.add_row(title, text)
        return table

    def _count(self, share: float) -> str:
        """Return the number of images that a share stands for, if they are few enough to count."""
        images = self._eval_images
        return f' ({round(share * images)} of {images})' if images is not None and images <= FEW_IMAGES else ''

    def rows(self, state: State) -> Iterator[tuple[str, str]]:
        """Yield the titles and values of the table."""
        for evaluation in self.evaluations[-1:]:
            for key, (_, title, factor, unit) in METRICS.items():
                count = self._count(evaluation[key]) if key == 'accuracy' else ''
                yield f'eval {title}', f'{factor * evaluation[key]:.4g} {unit}{count}'
        if len(self.evaluations) > 1:
            best = max(self.evaluations, key=lambda each: each['accuracy'])
            yield (
                'best accuracy',
                f'{100 * best["accuracy"]:.4g} %{self._count(best["accuracy"])}, epoch {best["epoch"]}',
            )
        loss, share, kl = (self.mean(name) for name in (TRAIN_LOSS, 'sba/augmented', 'sba/kl'))
        if loss is not None:
            yield 'train loss', f'{loss:.4g} (mean of the last epoch, SBA term included)' if share else f'{loss:.4g}'
        if share is not None:
            yield 'SBA augmented', f'{100 * share:.1f} % of steps'
        if kl is not None:
            yield 'SBA KL', f'{kl:.4g} nats (mean over augmented steps)'
        seconds = state.timestamp.total_wct.total_seconds()  # Composer stops this clock during evaluation
        if seconds > 0 and loss is not None:
            yield 'training speed', f'{int(state.timestamp.sample) / seconds:,.0f} images/s'
        yield 'wall time', str(timedelta(seconds=round(self.wall_seconds)))
