"""Python programs in processes of their own, forked from a server that has imported what they use.

``start('train.py', '-f', ...)`` and ``start('-m', 'composer_sba.study', ...)`` run what ``python`` would, in a session
of their own: ``kill`` ends the program and all that it has started.
"""

import atexit
import faulthandler
import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from types import TracebackType

import PIL.Image
import torch
from composer.utils import collect_env

from composer_sba.latent.cut_survey import measure
from composer_sba.models import digits_net

# Composer's launcher and initialize_dist read these: a program must not inherit those of the test.
RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')

_server = multiprocessing.get_context('forkserver')


_spawn = util.spawnv_passfds  # starts a new Python


def start_server() -> None:
    """Fork the server from this process, which has run no test yet.

    A server that Python starts would import everything again. This one has also filled the caches that a small training
    spends half of its time on.
    """
    for name in ('commit_once', 'composer.algorithms', 'composer_sba.study.report', 'sklearn.datasets'):
        importlib.import_module(name)
    PIL.Image.init()
    collect_env.get_cpu_model()  # starts Python; each Trainer asks for it
    measure(digits_net(), 'head', (3, 8, 8))  # PyTorch's cache of operators on tensors without data
    resource_tracker.ensure_running()  # it also uses _spawn
    util.spawnv_passfds = _fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = _spawn


def _fork(executable: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    """Run the last argument, a program, in a copy of this process without what pytest has changed in it."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        util.spawnv_passfds = _spawn
        forkserver._forkserver._lock = threading.Lock()  # the other is locked at the moment
        with open(os.devnull, 'r+b') as nothing:  # else pytest's pipes would stay open after its worker has ended
            for descriptor in {*map(int, os.listdir('/proc/self/fd'))} - {0, 1, 2, nothing.fileno(), *descriptors}:
                os.dup2(nothing.fileno(), descriptor)
        sys.stdout = open(1, 'w', closefd=False)
        sys.stderr = open(2, 'w', closefd=False, buffering=1, errors='backslashreplace')
        faulthandler.enable(sys.stderr)
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        warnings.resetwarnings()  # those of pytest are errors
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter('ignore', kind)  # as Python does
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in [*getattr(logger, 'handlers', [])]:
                if type(handler).__module__.startswith('_pytest'):
                    logger.removeHandler(handler)
                elif type(handler) is logging.StreamHandler:  # a FileHandler would close the stream
                    handler.setStream(sys.stderr)
        logging.root.setLevel(logging.WARNING)
        exec(arguments[-1], {})
    except SystemExit:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Program:
    """A program that is running, or has ended; leaving its ``with`` block kills it.

    Args:
        arguments (Sequence[str]): What follows ``python`` on a command line: a file or ``-m module``, then arguments.
        output (Path): File that standard output and standard error are appended to.
        environment (Mapping): Variables beside those of the test.
    """

    def __init__(self, arguments: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        variables = {**inherited, 'OMP_NUM_THREADS': '1', **environment}
        self.output = output
        self.process = _server.Process(target=_run, args=([*arguments], output, variables, os.getcwd()))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Return the exit code, minus the signal for a program that was killed, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait for the exit code; a program that does not end in ``timeout`` seconds is killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.process), timeout, self.said)
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the program with all that it has started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # before it has a session of its own, or after everything has ended
        self.process.join()

    @property
    def said(self) -> str:
        """Text of its standard output and standard error so far."""
        return self.output.read_text() if self.output.exists() else ''

    def __enter__(self) -> 'Program':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()


def start(*arguments: str | Path, output: Path, **environment: str) -> Program:
    """Start a program in the current folder."""
    return Program([str(each) for each in arguments], output, environment)


def start_ranks(nproc: int, *arguments: str | Path, folder: Path, **environment: str) -> list[Program]:
    """Start a program on several ranks of this machine; rank r writes to ``folder/rank<r>.log``."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    programs = []
    for rank in range(nproc):
        output = folder / f'rank{rank}.log'
        output.unlink(missing_ok=True)
        variables = {'RANK': rank, 'LOCAL_RANK': rank, 'NODE_RANK': 0, 'WORLD_SIZE': nproc, 'LOCAL_WORLD_SIZE': nproc}
        variables |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        named = {name: str(value) for name, value in variables.items()}
        programs.append(start(*arguments, output=output, **named, **environment))
    return programs


def wait_for_ranks(programs: Sequence[Program], timeout: float) -> str:
    """Wait for all ranks and return what they wrote, rank after rank; the first that fails ends the others.

    Raises:
        AssertionError: If a rank fails or ``timeout`` seconds have passed; the message has what every rank wrote.
    """
    end = time.monotonic() + timeout
    try:
        while any(program.poll() is None for program in programs) and not any(program.poll() for program in programs):
            if time.monotonic() > end:
                break
            time.sleep(0.02)
        codes = [program.poll() for program in programs]
    finally:
        for program in programs:
            program.kill()
    said = [program.said for program in programs]
    assert codes == [0] * len(codes), f'exit codes {codes} within {timeout} s\n' + '\n'.join(said)
    return ''.join(said)


def _run(arguments: list[str], output: Path, environment: dict[str, str], folder: str) -> None:
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # read TMPDIR again
    os.chdir(folder)
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    multiprocessing.set_start_method('fork', force=True)  # Python's default on Linux, for the workers of DataLoaders
    # A fork server of its own, as a study starts one, would import Composer again
    context = multiprocessing.get_context('fork')
    multiprocessing.get_context = lambda method=None: context
    run_here(arguments)


def run_here(arguments: list[str]) -> None:
    """Run in this process, which has been forked, what ``python`` would run."""
    # A resource tracker of its own: that of the tests would later remove names that other programs use by then
    resource_tracker._resource_tracker._fd = None
    try:
        if arguments[0] == '-m':
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name='__main__')
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them, and shared memory would stay behind
        sys.stdout.flush()
