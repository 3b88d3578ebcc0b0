"""Arguments of constructors that nobody means: taken, or refused in one line that names the argument and its value.

pytest tests/faults/test_argument_mutations.py; MUTATIONS=1000 for a campaign
"""

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import odd
from torch import nn

from composer_sba import SBA, BatchAugmentation, LatentExpander, MajorityVote, Vicinity
from composer_sba.algorithms.last_epochs_median import LastEpochsMedian
from composer_sba.algorithms.manifold_mixup import ManifoldMixup
from composer_sba.algorithms.r_drop import RDrop
from composer_sba.data.transforms import Cutout

MUTATIONS = int(os.environ.get('MUTATIONS', '0'))
_BUILDS: list[Callable[..., Any]] = [
    *(SBA, Vicinity, BatchAugmentation, MajorityVote, LatentExpander, ManifoldMixup, RDrop, Cutout),
    LastEpochsMedian,
]
_UNKNOWN_YET = ('model', 'input_key', 'target_key')  # the batch alone can say how it holds its labels


@pytest.mark.parametrize('build', _BUILDS, ids=lambda build: build.__name__)
@given(data=st.data())
@settings(
    max_examples=MUTATIONS // len(_BUILDS) or 40,
    derandomize=not MUTATIONS,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_an_odd_argument_is_taken_or_named(build: Callable[..., Any], data: st.DataObject) -> None:
    supplied = {'model': nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))} if 'model' in _names(build) else {}
    # How a batch holds its labels is known by the batch alone
    name = data.draw(
        st.sampled_from([each for each in _names(build) if each not in ('model', 'input_key', 'target_key')])
    )
    value = data.draw(odd())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a setting without effect
            build(**supplied, **{name: value})
    except ValueError as error:
        # Of a layer that is not there, its name says enough
        assert name in str(error) or repr(value) in str(error), f'{name}={value!r}: {error}'
        assert '\n' not in str(error), f'{name}={value!r}: {error}'


def _names(build: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(build).parameters)
