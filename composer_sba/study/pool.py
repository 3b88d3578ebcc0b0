"""The runs of a study, so many at a time, each in a process of its own, with a live display."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from composer_sba.study.plan import Run
from composer_sba.study.worker import shared_facts, work


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
    context.set_forkserver_preload(['composer_sba.study.worker'])
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
