"""What tests of faults share: no trace of Trainers that were never finished, and a folder to be in."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope='module', autouse=True)
def _broken_trainers_end_with_the_module() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # temporary folders of Composer's
        gc.collect()


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
