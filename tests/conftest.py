"""Shared by all tests: one seed, one number of threads, the digits and a launcher of ranks.

Fixtures import what they use: pytest-xdist reads this file before it starts workers, and the imports take 15 seconds.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, settings
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    import torch

os.environ['TRITON_INTERPRET'] = '1'  # test_kernels.py runs kernels on the CPU; read when triton is imported
os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '1'  # else the compiler starts two processes that import PyTorch

# Workers take files in this order, then the others, so that none is left with a long one at the end
LONG = ('train', 'distributed', 'resume', 'docs', 'libraries', 'study', 'composition', 'data', 'cut_survey', 'recipe')


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
    gc.disable()  # imports leave no garbage, and half a million objects to look at
    campaign = config.getoption('--campaign')
    options = {'deadline': None, 'database': None, 'suppress_health_check': list(HealthCheck)}
    settings.register_profile(
        'ours', max_examples=campaign or 40, derandomize=not campaign, phases=[Phase.generate], **options
    )
    settings.load_profile('ours')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first in a worker of pytest-xdist."""
    if hasattr(config, 'workerinput'):
        order = {f'test_{name}': place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, less often than Python does, and not among what was imported."""
    gc.freeze()
    gc.set_threshold(10_000)  # with Python's, 700 new objects, collections took 4 s of a run
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Start the server of programs before the first test, if any test uses it."""
    if not session.config.option.collectonly and any(map(_starts_programs, session.items)):
        importlib.import_module('programs').start_server()


def _starts_programs(item: pytest.Item) -> bool:
    names = vars(item.module).values() if isinstance(item, pytest.Function) else ()
    is_used = any(getattr(each, '__module__', None) == 'programs' for each in names)
    return is_used or 'run_ranks' in getattr(item, 'fixturenames', ())


WITH = {  # file -> another that the same worker runs
    'test_shared_memory.py': 'test_resume.py',  # its made-up blocks must not meet the runs that the other kills
    'test_robustness_study.py': 'test_study.py',  # both start runs from one server of processes
    'test_hugging_face.py': 'test_libraries.py',  # both import many modules of transformers
    'test_operators.py': 'test_compiled_networks.py',  # both import the compiler
}


class FileScheduling(LoadFileScheduling):
    """One worker runs all tests of a file, and those of its pair in :data:`WITH`.

    The marks of ``--dist loadgroup`` have no effect with pytest 9.2 and pytest-xdist 3.8.
    """

    def _split_scope(self, nodeid: str) -> str:
        folder, slash, name = super()._split_scope(nodeid).rpartition('/')
        return f'{folder}{slash}{WITH.get(name, name)}'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileScheduling:
    """Distribute whole files."""
    return FileScheduling(config, log)


@pytest.fixture(scope='session')
def only_worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fail if another worker of pytest-xdist has run a test that asks for this."""
    if hasattr(request.config, 'workerinput'):
        worker = request.config.workerinput['workerid']
        first = tmp_path_factory.getbasetemp().parent / 'only_worker'
        with contextlib.suppress(FileExistsError), first.open('x') as file:
            file.write(worker)
        assert first.read_text() == worker


@pytest.fixture(scope='session', autouse=True)
def _temporary_files_end_with_the_session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Streaming leaves two files for each dataset; pytest removes its folders after three sessions.

    Workers share the folder, as Streaming uses no number again that has such files.
    """
    folder = tmp_path_factory.getbasetemp()
    tempfile.tempdir = str(folder.parent if hasattr(request.config, 'workerinput') else folder)
    os.environ['TMPDIR'] = tempfile.tempdir


@pytest.fixture(scope='session', autouse=True)
def _composer_reads_its_commit_once() -> None:
    importlib.import_module('commit_once')


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> int:
    """``--campaign``, 0 if it was not given."""
    return int(request.config.getoption('--campaign'))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Let each test draw the same numbers alone as in the suite, and sum them in the same order on any machine."""
    import numpy
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for each absent device


@pytest.fixture(autouse=True)
def _shared_memory_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streaming frees its shared memory when the process ends, six files a dataset: too many for a thousand tests."""
    import streaming.base.shared.memory

    ends: list[Callable[[], object]] = []
    monkeypatch.setattr(streaming.base.shared.memory, 'atexit', SimpleNamespace(register=ends.append))
    yield
    for end in ends:
        end()


@pytest.fixture(autouse=True)
def _workers_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's garbage collector closes the queue of a worker before PyTorch asks it to end, and then waits for 5 s.

    It collects DataLoaders in a reference cycle: those of Composer's Trainer, and those that a traceback refers to.
    """
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    begin, started = _MultiProcessingDataLoaderIter.__init__, []

    def begun(self: _MultiProcessingDataLoaderIter, loader: torch.utils.data.DataLoader) -> None:
        begin(self, loader)
        started.append(weakref.ref(self))

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, '__init__', begun)
    yield
    for reference in started:
        if (iterator := reference()) is not None:
            iterator._shutdown_workers()


@pytest.fixture(scope='session')
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Scikit-learn's 1,797 digits: images ``(N, 3, 8, 8)``, float32 in [0, 1], and labels ``(N,)``, int64."""
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    return grey.repeat(1, 3, 1, 1), torch.from_numpy(labels)


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's digits as a dataset that has been converted."""
    from composer_sba.data.conversion import convert

    folder = tmp_path_factory.mktemp('data') / 'digits'
    convert('digits', None, folder)
    return folder


@pytest.fixture(scope='session')
def few_digits(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 190 images to train on and 40 others of ``digits_folder``, as a dataset that has been converted."""
    from streaming import MDSWriter
    from streaming.base.format.mds import MDSReader

    folder = tmp_path_factory.mktemp('data') / 'few_digits'
    for split, size in (('train', 190), ('val', 40)):
        index = json.loads((digits_folder / split / 'index.json').read_text())
        (shard,) = index.pop('shards')
        columns = dict(zip(shard['column_names'], shard['column_encodings'], strict=True))
        source = MDSReader.from_json(str(digits_folder), split, shard)
        with MDSWriter(columns=columns, out=str(folder / split), hashes=list(shard['raw_data']['hashes'])) as out:
            for i in range(size):
                out.write(source[i])
        path = folder / split / 'index.json'
        path.write_text(json.dumps(index | json.loads(path.read_text())))  # with the names of the classes
    return folder


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., str]:
    """``run_ranks(script, nproc, *args, timeout=300)`` runs a script on CPU ranks and returns what they write.

    A rank that fails, or a run beyond ``timeout`` seconds, fails the test with what every rank wrote. No process
    outlives the call.
    """
    from programs import start_ranks, wait_for_ranks

    def run(script: Path, nproc: int, *args: str, timeout: float = 300) -> str:
        return wait_for_ranks(start_ranks(nproc, script, *args, folder=tmp_path), timeout)

    return run
