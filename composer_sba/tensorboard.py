"""Composer's TensorboardLogger with one file for each run."""

from pathlib import Path

from composer import loggers
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist


class TensorboardLogger(loggers.TensorboardLogger):
    """A TensorboardLogger that writes one event file for each rank that logs.

    Composer's logger starts another file at each flush and at each evaluation: 28 files for 12 epochs. This logger
    flushes without closing the file. It writes the hyperparameters and the last metrics once, when the Trainer is
    closed.

    Args:
        log_dir, flush_interval, rank_zero_only: Those of Composer's.
    """

    def eval_end(self, state: State, logger: Logger) -> None:
        """Flush."""
        self._flush(logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Flush."""
        self._flush(logger)

    def close(self, state: State, logger: Logger) -> None:
        """Write the hyperparameters and metrics that TensorBoard compares between runs, and close the file."""
        from torch.utils.tensorboard.summary import hparams

        if self.writer is not None and self._writes_here:
            values = {f'hparams/{k}': v for k, v in self.current_metrics.items() if 'metric' in k or 'loss' in k}
            for each in hparams(self.hyperparameters, values):
                self.writer._get_file_writer().add_summary(each)
            for name, value in values.items():
                self.writer.add_scalar(name, value)
        self._flush(logger)
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    @property
    def _writes_here(self) -> bool:
        return not self.rank_zero_only or dist.get_global_rank() == 0

    def _flush(self, logger: Logger) -> None:
        if self.writer is None or not self._writes_here:
            return
        self.writer.flush()
        path = Path(self.writer._get_file_writer().event_writer._file_name)
        name = f'tensorboard_logs/{{run_name}}/{path.stem}-{dist.get_global_rank()}'
        logger.upload_file(remote_file_name=name, file_path=path, overwrite=True)
