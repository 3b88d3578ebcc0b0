"""Training the runs of a study: several at a time, each in its own process, with a live display.

:func:`run_all` runs in the process of the command, :func:`train_run` in the process of a run.
"""

import atexit
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import State
from composer.loggers import Logger
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from composer_sba.algorithms._composer import network_of
from composer_sba.algorithms.last_epochs_median import last_epochs_median
from composer_sba.errors import AlreadyTrainedError, UserError
from composer_sba.provenance import commit, hardware, versions
from composer_sba.recipe.redact import redact
from composer_sba.study.flops import flops_per_image
from composer_sba.study.records import append_record, read_records
from composer_sba.study.robustness import measure
from composer_sba.study.runs import Run
from composer_sba.summary import METRICS, Summary
from composer_sba.train import train


def run_all(runs: Sequence[Run], flops: Sequence[float], results: Path, jobs: int, scratch: Path) -> int:
    """Train runs and append the record of each to the results when it has finished.

    A run that fails is reported with the last line of its output, and the others continue.

    Args:
        runs (Sequence[Run]): In the order to start them.
        flops (Sequence[float]): The cost of each, for the estimate of the time left. Unit: floating-point operations.
        results (Path): The file of the study.
        jobs (int): The number of runs to train at the same time, all on one device.
        scratch (Path): The folder for checkpoints and logs of unfinished runs.

    Returns:
        int: The number of runs that failed.

    Raises:
        OSError: If a folder or the file of the study cannot be written.
    """
    for folder in (scratch, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    results.open('ab').close()  # a file that cannot be written should not cost a training first
    given, *_ = os.environ.get('OMP_NUM_THREADS', '').split(',')  # further numbers are for nested regions
    threads = (int(given) if given.isdecimal() else 0) or max(len(os.sched_getaffinity(0)) // jobs, 1)
    os.environ['OMP_NUM_THREADS'] = str(threads)
    shared = {'commit': commit(), 'jobs': jobs, 'versions': versions()}
    # A server process imports PyTorch and Composer once, and a fork of it trains each run
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['composer_sba.study.runner'])
    with _display() as display:
        pool = _Pool(display, sum(flops))
        waiting = list(zip(runs, flops, strict=True))
        try:
            while waiting or pool.active:
                while waiting and len(pool.active) < jobs:
                    run, cost = waiting.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    arguments = (run, results, shared, scratch, Path.cwd(), threads, sender)
                    process = context.Process(target=train_run, args=arguments, name=run.name)
                    process.start()
                    sender.close()  # the process has its own end; this one would keep the pipe open
                    pool.active[receiver] = _ActiveRun(run, cost, process, display.add_task(run.name, total=1.0))
                pool.wait(scratch)
        finally:
            pool.stop()
    return pool.failed


class _ActiveRun:
    """A run in progress: its process, its line in the display, the share that is done and, in the end, its record."""

    def __init__(self, run: Run, cost: float, process: BaseProcess, task: TaskID) -> None:
        self.run, self.cost, self.process, self.task = run, cost, process, task
        self.share = 0.0
        self.record: dict[str, Any] | None = None


class _Pool:
    """The runs in progress and the display of their progress."""

    def __init__(self, display: Progress, total: float) -> None:
        self.display = display
        self.active: dict[Connection, _ActiveRun] = {}
        self.total = total
        self.finished = 0.0  # operations of the runs that have ended
        self.failed = 0
        self.begun = time.monotonic()
        self.task = display.add_task('all', total=total)

    def wait(self, scratch: Path) -> None:
        """Wait for a message of any run, and handle all that have arrived."""
        for receiver in wait(list(self.active)):
            assert isinstance(receiver, Connection)
            active = self.active[receiver]
            try:
                message = receiver.recv()
            except (EOFError, OSError):  # the process has ended, perhaps in the middle of a message
                self._finish(receiver, active, scratch)
                continue
            if isinstance(message, float):
                active.share = message
                self.display.update(active.task, completed=message)
            else:
                active.record = message
        done = self.finished + sum(active.cost * active.share for active in self.active.values())
        self.display.update(self.task, completed=done, description=f'all, {self._time_left(done)} left')

    def stop(self) -> None:
        """Terminate the runs in progress; they can resume from their checkpoints."""
        for active in self.active.values():
            active.process.terminate()
        for active in self.active.values():
            active.process.join(10)
            active.process.kill()

    def _finish(self, receiver: Connection, active: _ActiveRun, scratch: Path) -> None:
        receiver.close()
        active.process.join()
        del self.active[receiver]
        self.display.remove_task(active.task)
        self.finished += active.cost
        if active.record is not None:
            error, seconds = 100 * (1 - active.record['accuracy']), round(active.record['wall_seconds'])
            outcome = f'{error:.2f} % error in {timedelta(seconds=seconds)}'
        else:
            self.failed += 1
            log = scratch / f'{active.run.hash}.log'
            output = log.read_text(errors='replace') if log.exists() else ''
            last = next((line for line in reversed(output.splitlines()) if line.strip()), 'no output')
            outcome = f'FAILED with code {active.process.exitcode}, see {log}: {redact(last)}'
        left = self._time_left(self.finished)
        self.display.console.print(f'{active.run.name}: {outcome}; {left} left', soft_wrap=True)

    def _time_left(self, done: float) -> str:
        """Estimate the time left from the mean rate so far."""
        if not done:
            return '?'
        elapsed = time.monotonic() - self.begun
        return str(timedelta(seconds=round(elapsed * (self.total - done) / done)))


def _display() -> Progress:
    columns = (TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(highlight=False, markup=False))


def train_run(
    run: Run,
    results: Path,
    shared: Mapping[str, Any],
    scratch: Path,
    folder: Path,
    threads: int,
    messages: Connection,
) -> None:
    """Train a run and append its record. This is the main function of the process of a run.

    Args:
        run (Run): The run to train. Its checkpoints are in ``scratch/<hash>`` until the record is written.
        results (Path): The file of the study.
        shared (Mapping[str, Any]): The part of the record that all runs of a command share: commit, jobs and versions.
        scratch (Path): The folder of the checkpoints and of ``<hash>.log``, which receives all output of the run.
        folder (Path): The working folder of the command; a forked process starts in that of its server.
        threads (int): The number of threads of PyTorch.
        messages (Connection): Receives the share that is done, at most once a second, and the record at the end.
    """
    os.chdir(folder)
    # This process needs its own tracker of shared memory; Streaming's blocks would pile up in the parent's
    tracker: Any = resource_tracker._resource_tracker  # there is no public way
    tracker._fd = tracker._pid = None
    log = os.open(scratch / f'{run.hash}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    # The runs of a study that was killed continue until their next message, and this run may be among them
    with FileLock(scratch / f'{run.hash}.lock'):
        record = next((dict(each) for each in read_records(results) if each['hash'] == run.hash), None)
        if record is None:
            record = {**_train(run, scratch, messages.send), **shared}
            append_record(results, record)
        shutil.rmtree(scratch / run.hash, ignore_errors=True)
    messages.send(record)
    atexit._run_exitfuncs()  # a forked process skips them at its end, which would leave Streaming's shared memory


class Curve(Summary):
    """The summary of a run, which also reports how far training has come.

    Runs on ``Event.BATCH_END`` too. Checkpoints hold its state under the name of the class.

    Args:
        report (Callable[[float], None]): Called with the share of the training that is done, in [0, 1], at most once a
            second.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        super().__init__()
        self._report = report
        self._reported = time.monotonic()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Report the share that is done."""
        if time.monotonic() - self._reported > 1:
            self._reported = time.monotonic()
            elapsed = state.get_elapsed_duration()
            self._report(float(elapsed) if elapsed is not None else 0.0)


def _train(run: Run, scratch: Path, report: Callable[[float], None]) -> dict[str, Any]:
    """Train a run and return its record, except for the part that all runs of a command share."""
    try:
        curve = Curve(report)
        try:
            return _record(run, curve, train(run.recipe, summary=curve))
        except AlreadyTrainedError as error:  # a kill, or a failure of the measurement, came before the record
            epochs = int(error.trainer.state.timestamp.epoch)
            if curve.evaluations and curve.evaluations[-1]['epoch'] == epochs:
                return _record(run, curve, error.trainer)
        shutil.rmtree(scratch / run.hash)  # the last checkpoint came before the last evaluation
        return _record(run, curve := Curve(report), train(run.recipe, summary=curve))
    except UserError as error:
        print(f'error: {redact(str(error))}', file=sys.stderr, flush=True)
        sys.exit(2)


def _record(run: Run, summary: Summary, trainer: Trainer) -> dict[str, Any]:
    state, evaluations = trainer.state, summary.evaluations
    images, epochs = int(state.timestamp.sample), int(state.timestamp.epoch)
    seconds = state.timestamp.total_wct.total_seconds()
    found, wall_seconds = {}, summary.wall_seconds
    if run.study == 'robustness':
        device = torch.device(state.device.tensor_to_device(torch.empty(0)).device)
        found['robustness'] = measure(run.recipe, network_of(state.model), device)
    return {
        'study': run.study,
        'network': run.network,
        'dataset': run.dataset,
        'method': run.method,
        'setting': run.setting,
        'seed': run.recipe.seed,
        'hash': run.hash,
        'recipe': redact(run.facts),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'device': 'gpu' if state.device.name == 'gpu' else 'cpu',
        'hardware': hardware(state.device.name),
        'train_samples': round((images - int(state.timestamp.sample_in_epoch)) / epochs) if epochs else images,
        'epochs': [{k: v and round(v, 5) for k, v in evaluation.items()} for evaluation in evaluations],
        **{key: round(last_epochs_median({each['epoch']: each[key] for each in evaluations}), 5) for key in METRICS},
        'train_seconds': round(seconds, 2),
        'wall_seconds': round(wall_seconds, 2),
        'images_per_second': round(images / seconds, 1),
        'flops': flops_per_image(run.recipe) * images,
        **found,
    }
