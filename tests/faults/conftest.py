"""What all tests of faults share: no trace of Trainers that were never finished."""

import gc
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope='module', autouse=True)
def _broken_trainers_end_with_the_module() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # temporary folders of Composer's
        gc.collect()
