"""What runs of several seeds say: means with their spread, differences with an interval, ratios seed by seed."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy.stats import ttest_ind

from composer_sba.study.records import Record

LEVEL = 0.95  # of the intervals
TOLERANCE = 0.005  # how far below its final accuracy a run counts as converged, as a fraction


class Spread(NamedTuple):
    """Mean and sample standard deviation of ``n`` values; no standard deviation where n = 1."""

    mean: float
    sd: float | None
    n: int


class Difference(NamedTuple):
    """A difference of two means and its 95 % interval, where there is one."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; False where there is none."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    Args:
        values (Sequence[float]): One for each seed, at least one.

    Returns:
        Spread: In the values' unit.

    Example:
        >>> spread([30.0, 32.0, 34.0])
        Spread(mean=32.0, sd=2.0, n=3)
        >>> spread([30.0]).sd is None
        True
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, None, 1)
    # A diverged run has no finite loss, which statistics.stdev does not take
    return Spread(mean, statistics.stdev(values) if math.isfinite(mean) else math.nan, len(values))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Difference of the means with Welch's interval, which does not take the two variances to be equal.

    Args:
        values (Sequence[float]): One for each seed.
        baseline (Sequence[float]): What to subtract, one for each seed.

    Returns:
        Difference: ``values`` minus ``baseline``, in their unit. No interval where a side has one value only, or
        neither side varies: nothing then says how far chance goes.

    Example:
        >>> tuple(round(number, 3) for number in difference([4.0, 6.0], [1.0, 2.0, 3.0]))
        (3.0, -2.977, 8.977)
    """
    mean = spread(values).mean - spread(baseline).mean
    if min(len(values), len(baseline)) < 2 or spread(values).sd == spread(baseline).sd == 0:
        return Difference(mean)
    with warnings.catch_warnings():
        # Seeds that agree to the last digit are what SciPy takes for a loss of digits
        warnings.filterwarnings('ignore', message='Precision loss occurred', category=RuntimeWarning)
        interval = ttest_ind(values, baseline, equal_var=False).confidence_interval(LEVEL)
    return Difference(mean, float(interval.low), float(interval.high))


def paired_ratio(values: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """Median over the seeds of the ratio of a run to the baseline's run of the same seed.

    Args:
        values (Mapping[int, float]): Seed -> value.
        baseline (Mapping[int, float]): Seed -> what to divide by.

    Returns:
        float | None: None if no seed has both.

    Example:
        >>> paired_ratio({1: 20.0, 2: 33.0, 3: 9.0}, {1: 10.0, 2: 30.0})
        1.55
    """
    ratios = [value / baseline[seed] for seed, value in values.items() if baseline.get(seed)]
    return statistics.median(ratios) if ratios else None


def time_to(run: Record, accuracy: float) -> float | None:
    """Training time until an evaluation first shows an accuracy.

    Args:
        run (Record): The run.
        accuracy (float): As a fraction.

    Returns:
        float | None: Seconds, evaluations left out; None if no evaluation showed it.
    """
    return next((each['seconds'] for each in run['epochs'] if each['accuracy'] >= accuracy), None)


def cost_ratios(ba: Sequence[Record], sba: Sequence[Record]) -> dict[int, float]:
    """Fig. 3's cost ratio t1/t2: how many times longer BA takes to its converged accuracy than SBA to the same one.

    BA counts as converged when an evaluation first shows its final accuracy, the median over its last five epochs,
    less ``TOLERANCE``. t1 is the training time until then, t2 that until SBA first shows the same accuracy.

    Args:
        ba (Sequence[Record]): Runs of BA.
        sba (Sequence[Record]): Runs of SBA.

    Returns:
        dict[int, float]: Seed -> ratio, for the seeds that both have; 0 where SBA never reached that accuracy, its t2
        being infinite.
    """
    of_seed = {run['seed']: run for run in ba}
    ratios = {}
    for run in sba:
        if run['seed'] in of_seed:
            target = of_seed[run['seed']]['accuracy'] - TOLERANCE
            t1, t2 = time_to(of_seed[run['seed']], target), time_to(run, target)
            if t1 is not None:  # the evaluations of a record may not be all there were
                ratios[run['seed']] = t1 / t2 if t2 else 0.0
    return ratios


def median_ratio(ratios: Sequence[float]) -> float:
    """Median of :func:`cost_ratios`, in which 0 stands for never: the lower of two middle ones where one is never."""
    return (statistics.median if all(ratios) else statistics.median_low)(ratios)
