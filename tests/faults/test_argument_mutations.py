"""Odd arguments of constructors are taken, or refused in one line that names the argument or its value.

pytest tests/faults/test_argument_mutations.py. For a campaign, add --campaign 1200 --hypothesis-seed=1
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import odd
from torch import nn

from composer_sba import SBA, BatchAugmentation, LatentExpander, MajorityVote, Vicinity
from composer_sba.algorithms.last_epochs_median import LastEpochsMedian
from composer_sba.algorithms.manifold_mixup import ManifoldMixup
from composer_sba.algorithms.r_drop import RDrop
from composer_sba.data.transforms import Cutout

_BUILDS: list[Callable[..., Any]] = [
    *(SBA, Vicinity, BatchAugmentation, MajorityVote, LatentExpander, ManifoldMixup, RDrop, Cutout),
    LastEpochsMedian,
]
_NOT_CHECKED = ('model', 'input_key', 'target_key')  # only a batch shows how it holds its labels


@pytest.mark.parametrize('build', _BUILDS, ids=lambda build: build.__name__)
@given(data=st.data())
def test_an_odd_argument_is_taken_or_named(build: Callable[..., Any], data: st.DataObject) -> None:
    supplied = {'model': nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))} if 'model' in _names(build) else {}
    name = data.draw(st.sampled_from([each for each in _names(build) if each not in _NOT_CHECKED]))
    value = data.draw(odd())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a setting without effect
            build(**supplied, **{name: value})
    except ValueError as error:
        # The message about a missing layer names the layer
        assert name in str(error) or repr(value) in str(error), f'{name}={value!r}: {error}'
        assert '\n' not in str(error), f'{name}={value!r}: {error}'


def _names(build: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(build).parameters)
