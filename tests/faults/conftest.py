"""What all tests of faults share: the digits as a dataset, and no trace of Trainers that were never finished."""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer_sba.convert import convert


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'digits'
    convert('digits', None, folder)
    return folder


@pytest.fixture(scope='module', autouse=True)
def _broken_trainers_end_with_the_module() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # temporary folders of Composer's
        gc.collect()
