"""Means, intervals and ratios compared with hand computations.

Run: pytest tests/test_stats.py
"""

import math

import numpy as np
import pytest

from composer_sba.study.stats import cost_ratios, difference, median_ratio, paired_ratio, spread, time_to
from invented_runs import record


def test_welch_by_hand():
    values, baseline = [31.0, 33.0, 32.0, 36.0], [35.0, 35.5]
    found = difference(values, baseline)
    a, b = np.var(values, ddof=1) / 4, np.var(baseline, ddof=1) / 2
    freedom = (a + b) ** 2 / (a**2 / 3 + b**2 / 1)
    t = (found.high - found.mean) / math.sqrt(a + b)
    # Student's t with these degrees of freedom must have 95 % of its probability within ±t: integrate its density
    grid = np.linspace(-t, t, 200_001)
    density = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    share = np.trapezoid(density * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2), grid)
    assert found.mean == pytest.approx(-2.25)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert share == pytest.approx(0.95, abs=1e-6), f'{found}, {freedom} degrees of freedom'


def test_no_interval_without_spread():
    assert spread([30.0]) == (30.0, None, 1)
    assert difference([30.0], [31.0, 33.0]) == (-2.0, None, None)
    assert difference([30.0, 30.0], [31.0, 31.0]) == (-1.0, None, None)
    assert difference([0.83, 0.83, 0.83], [1.2, 0.9, 1.3]).excludes_zero is False  # only one side varies
    assert not difference([30.0], [31.0, 33.0]).excludes_zero


def test_ratios_pair_the_seeds():
    assert paired_ratio({1: 20.0, 2: 60.0}, {2: 30.0, 3: 1.0}) == 2.0
    assert paired_ratio({1: 20.0}, {2: 30.0}) is None


def test_time_to_accuracy_and_cost_ratio():
    ba = [record('latent_ba', s, 0.60, 400.0, study='layers') for s in (1, 2, 3)]
    sba = [record('sba', s, accuracy, 200.0, study='layers') for s, accuracy in ((1, 0.62), (2, 0.60), (3, 0.59))]
    assert time_to(ba[0], 0.595) == 240.0  # the sixth of ten epochs
    assert time_to(sba[0], 0.595) == 120.0
    assert time_to(sba[2], 0.595) is None
    assert cost_ratios(ba, sba) == {1: 2.0, 2: 2.0, 3: 0.0}
    assert cost_ratios(ba[:1], sba[1:]) == {}
    assert median_ratio([2.0, 0.0]) == 0.0  # half of the seeds never reach it
    assert median_ratio([2.0, 3.0]) == 2.5
