"""Shared by all tests: one seed, one number of threads, the digits and a launcher of ranks."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import streaming.base.shared.memory
import torch
from hypothesis import HealthCheck, Phase, settings
from sklearn.datasets import load_digits

from composer_sba.data.conversion import convert
from programs import start_ranks, wait_for_ranks


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--campaign``."""
    parser.addoption(
        '--campaign',
        type=int,
        default=0,
        metavar='N',
        help='size of the campaigns: N kills of a run that resumes, N odd recipes, N odd values of each argument',
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw the same few examples in each run, or as many new ones as a campaign asks for."""
    campaign = config.getoption('--campaign')
    options = {'deadline': None, 'database': None, 'suppress_health_check': list(HealthCheck)}
    settings.register_profile(
        'ours', max_examples=campaign or 40, derandomize=not campaign, phases=[Phase.generate], **options
    )
    settings.load_profile('ours')


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> int:
    """``--campaign``, 0 if it was not given."""
    return int(request.config.getoption('--campaign'))


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
    """``run_ranks(script, nproc, *args, timeout=300)`` runs a script on CPU ranks and returns what they write.

    A rank that fails, or a run beyond ``timeout`` seconds, fails the test with what every rank wrote. No process
    outlives the call.
    """

    def run(script: Path, nproc: int, *args: str, timeout: float = 300) -> str:
        return wait_for_ranks(start_ranks(nproc, script, *args, folder=tmp_path), timeout)

    return run
