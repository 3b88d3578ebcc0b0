"""The expected log-sum-exp of noisy logits in closed form: what M virtual samples tend to as M grows.

Names of tensors end in their shape: N raw samples, K classes, Q features, C groups of classes (C = 2 P pairs of them),
J points of a grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from composer_sba.laws import Noise
from composer_sba.slopes import Gram, Slopes

MAX_GROUPS = 32  # classes, by probability, that have a group of their own; the others share the last one
_NEVER = -1e4  # log-probability of a class that is not there
_EPSILON = 1e-12  # variance that keeps the square root differentiable where there is no noise


class _Groups(NamedTuple):
    """Log-sum-exps of groups of noisy logits: linear in the features' noise, and a remainder that is not."""

    slopes: Slopes | Gram  # the linear part
    mean_NC: torch.Tensor
    variance_NC: torch.Tensor
    remainder_NC: torch.Tensor  # the remainder's variance
    third_NC: torch.Tensor  # its third cumulant


def expected_logsumexp_gain(logits: torch.Tensor, weight: torch.Tensor, noise: Noise) -> torch.Tensor:
    r"""Compute what noise in the features of a linear layer adds to the log-sum-exp of its outputs, on average.

    .. math:: \mathbb{E} \log \sum_k e^{z_k + \mathbf{w}_k \cdot \delta} - \log \sum_k e^{z_k}

    where :math:`z` are the logits, :math:`\mathbf{w}_k` the rows of ``weight`` and :math:`\delta` the noise. Classes
    are joined two by two, :math:`\log(e^a + e^b) = a + \mathrm{softplus}(b - a)`, until one group is left: `Clark's
    scheme <https://doi.org/10.1287/opre.9.2.145>`_ for the maximum of Gaussians, as Schwartz and Yeh have it for sums
    of lognormals. The difference b - a is a scalar whose first four cumulants are known, so that its softplus is
    averaged on a grid of 15 points. Stein's lemma tells what of the joined group is linear in the noise; the rest has
    a variance and a third cumulant. A series in powers of the noise diverges for logits whose noise is above 1 or so;
    this stays positive and grows as it should however large the noise.

    Args:
        logits (torch.Tensor): :math:`z`. Shape ``(N, K)``, float32 or float64.
        weight (torch.Tensor): Shape ``(K, Q)``.
        noise (Noise): The law of :math:`\delta`.

    Returns:
        torch.Tensor: One gain per row, in nats; >= 0 up to rounding. Shape ``(N,)``.

    Note:
        For symmetric noise and up to ``MAX_GROUPS`` classes memory is O(N K² + Q K²), and time that of one product (N,
        Q) × (Q, K²); else memory is O(N min(K, MAX_GROUPS) Q), and more classes cost three products (N, Q) × (Q, K).
        Differentiable once.

    Example:
        >>> noise = Noise(torch.ones(1, 2), torch.zeros(1, 1), torch.zeros(1, 1))
        >>> expected_logsumexp_gain(torch.zeros(1, 2), torch.eye(2), noise)  # E log cosh(x / √2) for x ~ N(0, 1)
        tensor([0.2095])
    """
    groups = _first_groups(F.log_softmax(logits, dim=-1), weight, noise)
    grid = _Grid(logits)
    while groups.mean_NC.shape[1] > 1:
        groups = _join_neighbours(groups, noise, grid)
    return groups.mean_NC[:, 0]  # the log-sum-exp of log-probabilities is zero


def _first_groups(log_probs_NK: torch.Tensor, weight_KQ: torch.Tensor, noise: Noise) -> _Groups:
    """Give each class a group, the most probable first; beyond ``MAX_GROUPS`` classes the improbable ones share one."""
    classes = log_probs_NK.shape[1]
    own = classes if classes <= MAX_GROUPS else MAX_GROUPS - 1
    # Neighbours are joined first, and groups of like probability are as nearly Gaussian as may be.
    mean_NC, index_NC = log_probs_NK.topk(own, dim=-1)
    zero_NC = torch.zeros_like(mean_NC)
    if noise.symmetric and own == classes:
        gram = Gram.of_classes(weight_KQ, index_NC, noise)
        return _Groups(gram, mean_NC, gram.gram_NCC.diagonal(dim1=1, dim2=2), zero_NC, zero_NC)
    slope_NCQ = weight_KQ[index_NC] * noise.scale[:, None]
    parts = [mean_NC, (slope_NCQ * slope_NCQ).sum(-1), zero_NC, zero_NC]
    if own < classes:
        slope_N1Q, *rest = _as_one_group(log_probs_NK.scatter(1, index_NC, _NEVER), weight_KQ, noise)
        slope_NCQ = torch.cat([slope_NCQ, slope_N1Q], dim=1)
        parts = [torch.cat(pair, dim=1) for pair in zip(parts, rest, strict=True)]
    return _Groups(Gram.of_slopes(slope_NCQ, noise) if noise.symmetric else Slopes(slope_NCQ), *parts)


def _as_one_group(log_probs_NK: torch.Tensor, weight_KQ: torch.Tensor, noise: Noise) -> tuple[torch.Tensor, ...]:
    """Take the sum over many classes for lognormal: their noise has a part in common, and parts of their own.

    Returns the slope, the mean, the variance, and variance and third cumulant of the remainder of one group.
    """
    centre_NQ = log_probs_NK.softmax(-1) @ weight_KQ
    power_NQ = noise.scale.square()
    common_N1 = (power_NQ * centre_NQ.square()).sum(-1, keepdim=True)
    own_NK = power_NQ @ weight_KQ.square().T - 2 * (power_NQ * centre_NQ) @ weight_KQ.T + common_N1
    own_NK = own_NK.clamp(0, 60)  # beyond 60 the exponential leaves float32
    tilted_NK = log_probs_NK + own_NK / 2
    remainder_N1 = (tilted_NK.softmax(-1).square() * own_NK.expm1()).sum(-1, keepdim=True).log1p()
    mean_N1 = tilted_NK.logsumexp(-1, keepdim=True) - remainder_N1 / 2
    slope_N1Q = (centre_NQ * noise.scale)[:, None]
    return slope_N1Q, mean_N1, common_N1 + remainder_N1, remainder_N1, torch.zeros_like(mean_N1)


def _join_neighbours(groups: _Groups, noise: Noise, grid: '_Grid') -> _Groups:
    """Describe log(exp a + exp b) = a + softplus(y), y = b - a, for each group a and its neighbour b."""
    slopes, *values = groups
    if groups.mean_NC.shape[1] % 2:
        slopes = slopes.padded()
        values = [F.pad(value, (0, 1), value=_NEVER if value is groups.mean_NC else 0.0) for value in values]
    pairs = [value.unflatten(1, (-1, 2)).unbind(2) for value in values]
    a, b = (_Groups(slopes, *each) for each in zip(*pairs, strict=True))
    square, cube, fourth = slopes.power_sums()  # of y's slope, per standard deviation of each feature's noise
    total = square + a.remainder_NC + b.remainder_NC
    third = noise.skewness * cube + b.third_NC - a.third_NC
    deviation_JNP = grid.points(total, third, noise.kurtosis * fourth)
    y_JNP = b.mean_NC - a.mean_NC + deviation_JNP

    soft_JNP, sigma_JNP = F.softplus(y_JNP), torch.sigmoid(y_JNP)
    bend_JNP = sigma_JNP - sigma_JNP * sigma_JNP
    mean, first, second, mixed = grid.averages(soft_JNP, sigma_JNP, bend_JNP, sigma_JNP * bend_JNP)
    if mean.shape[1] == 1:  # the last pair: its mean is all that is asked for
        return groups._replace(mean_NC=a.mean_NC + mean)
    # What of softplus(y) is linear in the features' noise ξ: first slope + curved slope², by Stein's lemma
    # E[f ξ] = E f' + skewness / 2 E f'' + ...
    curved = noise.skewness * second / 2
    linear = first * (first * total + 2 * curved * cube) + curved * curved * fourth

    # How much of a goes with y, without which neither the variance nor the skewness of the sum can be told.
    along = (b.variance_NC - a.variance_NC - total) / (2 * total + _EPSILON)
    rest_JNP = soft_JNP - mean
    both_JNP = torch.addcmul(rest_JNP, along, deviation_JNP)
    spread, together, cubed = grid.averages(
        rest_JNP * rest_JNP, rest_JNP * deviation_JNP, both_JNP * both_JNP * both_JNP
    )
    share_a = 1 - first
    kept_a, kept_b, gone = share_a * share_a, first * first, along + first
    left = spread - linear + kept_a * a.remainder_NC + kept_b * b.remainder_NC
    left = left + a.third_NC * (second - mixed) + b.third_NC * mixed
    return _Groups(
        slopes.joined(first, curved),
        a.mean_NC + mean,
        a.variance_NC + 2 * along * together + spread,
        left.clamp_min(0),
        cubed - gone * gone * gone * third + kept_a * share_a * a.third_NC + kept_b * first * b.third_NC,
    )


class _Grid:
    """Averages over a law of which a few cumulants are known, by Cornish and Fisher's expansion."""

    def __init__(self, like: torch.Tensor) -> None:
        x_J = torch.arange(-5.25, 5.5, 0.75, dtype=like.dtype, device=like.device)
        self.weight_J = (x_J * x_J / -2).softmax(0)
        square_J, cube_J = x_J * x_J, x_J * x_J * x_J
        basis = [x_J, (square_J - 1) / 6, (cube_J - 3 * x_J) / 24, (5 * x_J - 2 * cube_J) / 36]
        self.basis_J4 = torch.stack(basis, dim=1)

    def points(self, variance: torch.Tensor, third: torch.Tensor, fourth: torch.Tensor) -> torch.Tensor:
        """Place the points of laws with mean zero and these cumulants. Shape ``(N, P)`` -> ``(J, N, P)``."""
        rate = (variance + _EPSILON).rsqrt()
        power = rate * rate
        skewness, kurtosis = third * power * rate, fourth * power * power
        coefficients = torch.stack([torch.ones_like(rate), skewness, kurtosis, skewness * skewness])
        points_JNP = (self.basis_J4 @ coefficients.flatten(1)).unflatten(1, rate.shape)
        (square,) = self.averages(points_JNP * points_JNP)
        return points_JNP * (square * power).rsqrt()

    def averages(self, *values_JNP: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Average values at the points. Shapes ``(J, N, P)`` -> ``(N, P)``."""
        values = torch.stack(values_JNP, dim=1)
        return (self.weight_J @ values.flatten(1)).unflatten(0, values.shape[1:]).unbind()
