"""What all tests share: one seed, one number of threads, the digits and a launcher of ranks."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import streaming.base.shared.memory
import torch
from sklearn.datasets import load_digits

from composer_sba.data.conversion import convert

# What Composer's launcher and initialize_dist read: a rank of a test must not inherit the test's own.
_RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Let each test draw the same numbers alone as in the suite, and sum them in the same order on any machine."""
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_memory_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streaming frees its shared memory when the process ends, six files a dataset: too many for a thousand tests."""
    ends: list[Callable[[], object]] = []
    monkeypatch.setattr(streaming.base.shared.memory, 'atexit', SimpleNamespace(register=ends.append))
    yield
    for end in ends:
        end()


@pytest.fixture(scope='session')
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's 1,797 digits: images ``(N, 3, 8, 8)``, float32 in [0, 1], and labels ``(N,)``, int64."""
    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return grey.repeat(1, 3, 1, 1), torch.from_numpy(labels)


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as a dataset that has been converted."""
    folder = tmp_path_factory.mktemp('data') / 'digits'
    convert('digits', None, folder)
    return folder


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., str]:
    """``run_ranks(script, nproc, *args, timeout=300)`` runs a script on CPU ranks under Composer's launcher.

    It returns the standard output of all ranks, in the order of their numbers. A rank that fails, or a run beyond
    ``timeout`` seconds, fails the test with everything that was said, and no process outlives the call.
    """

    def run(script: Path, nproc: int, *args: str, timeout: float = 300) -> str:
        logs = [tmp_path / f'rank{rank}.{kind}' for rank in range(1, nproc) for kind in ('stdout', 'stderr')]
        for log in logs:
            log.unlink(missing_ok=True)  # the launcher appends
        # The launcher chooses a free port.
        command = [sys.executable, '-m', 'composer.cli', '-n', str(nproc)]
        command += ['--stdout', str(tmp_path / 'rank{rank}.stdout'), '--stderr', str(tmp_path / 'rank{rank}.stderr')]
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        environment['OMP_NUM_THREADS'] = '1'
        process = subprocess.Popen(
            [*command, str(script), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # the ranks share the launcher's group, so that one signal ends them all
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            outcome = f'exited with code {process.returncode}'
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            outcome = f'did not end within {timeout} s'
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # nothing was left
        if outcome != 'exited with code 0':
            said = [stdout, stderr, *(f'{log.name}:\n{log.read_text()}' for log in logs if log.exists())]
            pytest.fail(f'{script.name} on {nproc} ranks {outcome}\n' + '\n'.join(said))
        return stdout + ''.join(log.read_text() for log in logs if log.suffix == '.stdout')

    return run
