"""Statistics over the seeds of a method: means, differences with an interval, and ratios of paired runs."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import ttest_1samp, ttest_ind

from composer_sba.study.records import Record

LEVEL = 0.95  # of the confidence intervals
TOLERANCE = 0.005  # a run has converged within this distance of its final accuracy; a fraction of 1


class Spread(NamedTuple):
    """Mean and sample standard deviation of ``n`` values; the standard deviation is None if n = 1."""

    mean: float
    sd: float | None
    n: int


class Difference(NamedTuple):
    """A difference of two means and its 95 % confidence interval, if there is one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False if there is no interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Compute the mean and the sample standard deviation.

    Args:
        values (Sequence[float]): One value for each seed, at least one.

    Returns:
        Spread: In the unit of the values.

    Example:
        >>> spread([30.0, 32.0, 34.0])
        Spread(mean=32.0, sd=2.0, n=3)
        >>> spread([30.0]).sd is None
        True
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    # A diverged run has no finite loss, which statistics.stdev refuses
    return Spread(mean, statistics.stdev(values) if math.isfinite(mean) else math.nan, len(values))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Compute the difference of two means with Welch's interval, which allows unequal variances.

    Args:
        values (Sequence[float]): One value for each seed.
        baseline (Sequence[float]): The values to subtract, one for each seed.

    Returns:
        Difference: ``values`` minus ``baseline``, in their unit. It has no interval if one side has a single value or
        if neither side varies, since nothing then measures the effect of chance.

    Example:
        >>> tuple(round(number, 3) for number in difference([4.0, 6.0], [1.0, 2.0, 3.0]))
        (3.0, -2.977, 8.977)
    """
    mean = spread(values).mean - spread(baseline).mean
    if min(len(values), len(baseline)) < 2 or spread(values).sd == spread(baseline).sd == 0:
        return Difference(mean)
    with warnings.catch_warnings():
        # SciPy warns of lost digits if the seeds of one side agree
        warnings.filterwarnings('ignore', message='Precision loss occurred', category=RuntimeWarning)
        interval = ttest_ind(values, baseline, equal_var=False).confidence_interval(LEVEL)
    return Difference(mean, float(interval.low), float(interval.high))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compute the mean, over the seeds that both have, of a run's value minus that of the other run of the same seed.

    Args:
        values (Mapping[int, float]): Seed -> value.
        baseline (Mapping[int, float]): Seed -> the value to subtract.

    Returns:
        Difference | None: With Student's interval for the mean of the differences if there are two seeds or more whose
        differences vary. None if the two sides have no seed in common.

    Example:
        >>> tuple(round(number, 2) for number in paired_difference({1: 5.0, 2: 6.0, 3: 9.0}, {1: 4.0, 2: 4.0, 3: 6.0}))
        (2.0, -0.48, 4.48)
    """
    pairs = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not pairs:
        return None
    found = spread(pairs)
    if not found.sd or math.isclose(min(pairs), max(pairs)):  # equal but for rounding
        return Difference(found.mean)
    interval = ttest_1samp(pairs, 0).confidence_interval(LEVEL)
    return Difference(found.mean, float(interval.low), float(interval.high))


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Compute the median, over the seeds, of a run's value divided by that of the baseline's run of the same seed.

    Args:
        values (Mapping[int, float]): Seed -> value.
        baseline (Mapping[int, float]): Seed -> divisor.

    Returns:
        float | None: None if the two sides have no seed in common.

    Example:
        >>> paired_ratio({1: 20.0, 2: 33.0, 3: 9.0}, {1: 10.0, 2: 30.0})
        1.55
    """
    ratios = [value / baseline[seed] for seed, value in values.items() if baseline.get(seed)]
    return statistics.median(ratios) if ratios else None


def time_to(run: Record, accuracy: float) -> float | None:
    """Return the training time until an evaluation first reaches an accuracy.

    Args:
        run (Record): The run.
        accuracy (float): A fraction of 1.

    Returns:
        float | None: Unit: seconds, without evaluation. None if no evaluation reaches the accuracy.
    """
    return next((each['seconds'] for each in run['epochs'] if each['accuracy'] >= accuracy), None)


def cost_ratios(ba: Sequence[Record], sba: Sequence[Record]) -> dict[int, float]:
    """Compute the cost ratio t1/t2 of Fig. 3: the time BA takes to converge divided by the time SBA takes to match it.

    BA has converged when an evaluation first reaches its final accuracy (the median over its last five epochs) less
    ``TOLERANCE``. t1 is the training time until then. t2 is the training time until SBA first reaches that accuracy.

    Args:
        ba (Sequence[Record]): Runs of BA.
        sba (Sequence[Record]): Runs of SBA.

    Returns:
        dict[int, float]: Seed -> ratio, for the seeds that both have. The ratio is 0 if SBA never reaches the accuracy,
        which makes t2 infinite.
    """
    ba_of_seed = {run['seed']: run for run in ba}
    ratios = {}
    for run in sba:
        if run['seed'] in ba_of_seed:
            target = ba_of_seed[run['seed']]['accuracy'] - TOLERANCE
            t1, t2 = time_to(ba_of_seed[run['seed']], target), time_to(run, target)
            if t1 is not None:  # a record may hold fewer evaluations than the run made
                ratios[run['seed']] = t1 / t2 if t2 else 0.0
    return ratios


def median_ratio(ratios: Sequence[float]) -> float:
    """Return the median of :func:`cost_ratios`, in which 0 stands for never.

    If one of them is 0, an even number of ratios gives the lower of the two middle ones instead of their mean.
    """
    return (statistics.median if all(ratios) else statistics.median_low)(ratios)
