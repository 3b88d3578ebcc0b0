"""The runs of a study, so many at a time, each in a process of its own, with a live display."""

import atexit
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
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

from composer_sba.algorithms.last_epochs_median import last_epochs_median
from composer_sba.errors import AlreadyTrainedError, UserError
from composer_sba.recipe.redact import redact
from composer_sba.study.flops import flops_per_image
from composer_sba.study.plan import Run
from composer_sba.study.records import append, read
from composer_sba.train import METRICS, Summary, train


def run_all(runs: Sequence[Run], flops: Sequence[float], results: Path, jobs: int, scratch: Path) -> int:
    """Train runs and append each one's record to the results as it is finished.

    A run that fails is reported with the end of what it printed, and the others go on.

    Args:
        runs (Sequence[Run]): In the order to start them.
        flops (Sequence[float]): What each costs, for the time left; unit: floating-point operations.
        results (Path): The file of the study.
        jobs (int): How many to train at a time, on one device.
        scratch (Path): Where checkpoints and logs of unfinished runs go.

    Returns:
        int: How many failed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault('OMP_NUM_THREADS', str(max(len(os.sched_getaffinity(0)) // jobs, 1)))
    shared = shared_facts(jobs)
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
                    process = context.Process(target=work, args=(run, results, shared, scratch, sender), name=run.name)
                    process.start()
                    sender.close()  # the process has its own end; this one would keep the pipe open
                    pool.add(receiver, _Active(run, cost, process, display.add_task(run.name, total=1.0)))
                pool.listen(scratch)
        finally:
            pool.stop()
    return pool.failed


class _Active:
    def __init__(self, run: Run, cost: float, process: BaseProcess, task: TaskID) -> None:
        self.run, self.cost, self.process, self.task = run, cost, process, task
        self.share = 0.0
        self.record: dict[str, Any] | None = None


class _Pool:
    """The runs in progress and the lines about them."""

    def __init__(self, display: Progress, total: float) -> None:
        self.display = display
        self.active: dict[Connection, _Active] = {}
        self.total = total
        self.finished = 0.0  # operations of runs that are over
        self.failed = 0
        self.begun = time.monotonic()
        self.task = display.add_task('all', total=total)

    def add(self, receiver: Connection, active: _Active) -> None:
        self.active[receiver] = active

    def listen(self, scratch: Path) -> None:
        """Wait for news of any run."""
        for receiver in wait(list(self.active)):
            assert isinstance(receiver, Connection)
            active = self.active[receiver]
            try:
                news = receiver.recv()
            except (EOFError, OSError):  # the process is over, one way or the other, maybe in the middle of its news
                self._end(receiver, active, scratch)
                continue
            if isinstance(news, float):
                active.share = news
                self.display.update(active.task, completed=news)
            else:
                active.record = news
        done = self.finished + sum(active.cost * active.share for active in self.active.values())
        self.display.update(self.task, completed=done, description=f'all, {self._left(done)} left')

    def stop(self) -> None:
        """Break off what is still running; its checkpoints are there to be resumed."""
        for active in self.active.values():
            active.process.terminate()
        for active in self.active.values():
            active.process.join(10)
            active.process.kill()

    def _end(self, receiver: Connection, active: _Active, scratch: Path) -> None:
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
            said = [line for line in log.read_text().splitlines() if line.strip()] if log.exists() else []
            last = said[-1] if said else 'it said nothing'
            outcome = f'FAILED with code {active.process.exitcode}, see {log}: {last}'
        self.display.console.print(f'{active.run.name}: {outcome}; {self._left(self.finished)} left', soft_wrap=True)

    def _left(self, done: float) -> str:
        """The time left, if what is to come runs at the rate of what is done."""
        if not done:
            return '?'
        elapsed = time.monotonic() - self.begun
        return str(timedelta(seconds=round(elapsed * (self.total - done) / done)))


def _display() -> Progress:
    columns = (TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(highlight=False, markup=False))


PACKAGES = ('composer-sba', 'mosaicml', 'mosaicml-streaming', 'torch', 'torchvision')


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


def work(run: Run, results: Path, shared: Mapping[str, Any], scratch: Path, told: Connection) -> None:
    """Train a run, append its record and leave; this is the main function of a process.

    Args:
        run (Run): What to train; its checkpoints go to ``scratch/<hash>`` until the record is written.
        results (Path): The file of the study.
        shared (Mapping[str, Any]): What the records of all runs of this study hold, as :func:`shared_facts` gives it.
        scratch (Path): Where checkpoints and ``<hash>.log``, all that the run prints, go.
        told (Connection): Gets the share that is done, now and then, and the record in the end.
    """
    # A tracker of shared memory of its own: Streaming's would otherwise pile up in the parent's until the study is over
    tracker: Any = resource_tracker._resource_tracker  # there is no public way
    tracker._fd = tracker._pid = None
    log = os.open(scratch / f'{run.hash}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    # A study that was killed leaves its runs behind until they next tell it something, and this may be one of them
    with FileLock(scratch / f'{run.hash}.lock'):
        record = next((dict(each) for each in read(results) if each['hash'] == run.hash), None)
        if record is None:
            record = {**_train(run, Curve(told.send), scratch), **shared}
            append(results, record)
        shutil.rmtree(scratch / run.hash, ignore_errors=True)
    told.send(record)
    atexit._run_exitfuncs()  # a forked process leaves without them, and Streaming's shared memory would stay behind


def _train(run: Run, curve: Curve, scratch: Path) -> dict[str, Any]:
    try:
        trainer = _unless_trained(run, curve)
        if trainer is None:  # it ended before it could write its record
            shutil.rmtree(scratch / run.hash)
            trainer = train(run.recipe, summary=curve)
    except UserError as error:
        print(f'error: {redact(str(error))}', file=sys.stderr, flush=True)
        sys.exit(2)
    return make_record(run, trainer, curve)


def _unless_trained(run: Run, curve: Curve) -> Trainer | None:
    try:
        return train(run.recipe, summary=curve)
    except AlreadyTrainedError:
        return None


def make_record(run: Run, trainer: Trainer, curve: Summary) -> dict[str, Any]:
    """Sum up a finished run: what was trained, on what, and what came out."""
    state, evaluations = trainer.state, curve.evaluations
    images, epochs = int(state.timestamp.sample), int(state.timestamp.epoch)
    seconds = state.timestamp.total_wct.total_seconds()
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
        'train_samples': round(images / max(epochs, 1)),
        'epochs': [{k: v and round(v, 5) for k, v in evaluation.items()} for evaluation in evaluations],
        **{key: round(last_epochs_median({each['epoch']: each[key] for each in evaluations}), 5) for key in METRICS},
        'train_seconds': round(seconds, 2),
        'wall_seconds': round(curve.wall_seconds, 2),
        'images_per_second': round(images / seconds, 1),
        'flops': flops_per_image(run.recipe) * images,
    }


def shared_facts(jobs: int) -> dict[str, Any]:
    """What is the same for all runs that one command trains, ``jobs`` at a time: code and versions, as it starts."""
    versions = {package: version(package) for package in PACKAGES}
    return {'commit': commit(), 'jobs': jobs, 'versions': {**versions, 'python': platform.python_version()}}


def commit() -> str:
    """The commit of the code, with a ``+`` if files that git knows differ from it; 'unknown' outside a checkout."""
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True, check=True)
        code = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', ':/*.py', ':/*.yaml'], check=False)
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return name.stdout.strip() + ('+' if code.returncode else '')


def hardware(device: str) -> str:
    """The device that a run is trained on, in words."""
    if device == 'gpu':
        return f'1 {torch.cuda.get_device_name()}'
    cores = len(os.sched_getaffinity(0))
    names = [line.partition(':')[2].strip() for line in _cpuinfo() if line.startswith('model name')]
    return f'{names[0] if names else platform.machine()}, {torch.get_num_threads()} of {cores} cores'


def _cpuinfo() -> list[str]:
    path = Path('/proc/cpuinfo')
    return path.read_text().splitlines() if path.exists() else []
