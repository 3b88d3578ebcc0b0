"""The vicinity of a linear layer's input as a mixture of laws whose noise is independent from feature to feature.

Names of tensors end in their shape: N raw samples, K classes, Q features.
"""

import math
from typing import NamedTuple

import torch

from composer_sba.vicinity import Vicinity

# Up to so many features, dropout of the one that moves a row's predictions most is taken exactly: it is there or not.
# Where there are more, none rules alone, and their sum is nearly Gaussian.
MAX_BRANCHED_FEATURES = 128


class Noise(NamedTuple):
    """Independent noise of the features of each row, by its cumulants; the mean is zero.

    Attributes:
        scale: Standard deviation. Shape ``(N, Q)``.
        skewness: Third cumulant in units of ``scale`` cubed. Shape ``(N, 1)``.
        kurtosis: Fourth cumulant in units of its fourth power. Shape ``(N, 1)``.
        symmetric: Whether the skewness of all rows is zero, as of Gaussian points and of dropout of one half.
    """

    scale: torch.Tensor
    skewness: torch.Tensor
    kurtosis: torch.Tensor
    symmetric: bool = False


class Law(NamedTuple):
    """A part of the vicinity: its share of the whole, the mean of the logits, shape ``(N, K)``, and the noise."""

    share: float
    logits: torch.Tensor
    noise: Noise


def vicinity_laws(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logits: torch.Tensor,
    vicinity: Vicinity,
) -> list[Law]:
    """Take the vicinity apart: Gaussian points, and dropout points by what became of the feature that counts most.

    Args:
        latent (torch.Tensor): The raw latent batch, input of the linear layer. Shape ``(N, Q)``.
        weight (torch.Tensor): Its weight. Shape ``(K, Q)``.
        bias (torch.Tensor, optional): Its bias. Shape ``(K,)``.
        logits (torch.Tensor): Its output. Shape ``(N, K)``.
        vicinity (Vicinity): The law of the virtual samples.

    Returns:
        list[Law]: Their shares sum to one. Gradients flow to all tensors; the unit ``'rms'`` is a constant.

    Example:
        >>> latent, weight = torch.ones(1, 4), torch.ones(2, 4)
        >>> laws = vicinity_laws(latent, weight, None, latent @ weight.T, Vicinity(dropout=0.25))
        >>> [(law.share, round(law.logits[0, 0].item(), 4)) for law in laws]  # Gaussian; the feature dropped; kept
        [(0.5, 4.0), (0.125, 3.0), (0.375, 4.3333)]
    """
    laws = []
    if vicinity.gaussian_fraction > 0:
        laws.append(Law(vicinity.gaussian_fraction, logits, _gaussian_noise(latent, vicinity)))
    if vicinity.gaussian_fraction < 1:
        laws += _dropout_laws(latent, weight, bias, logits, vicinity)
    return laws


def clipped_moments(vicinity: Vicinity) -> tuple[float, float]:
    """Describe clip(ε, τ) of Eq. (7): its variance in units of σ², and its excess kurtosis.

    Example:
        >>> [round(value, 3) for value in clipped_moments(Vicinity(sigma=0.1))]  # clipped at 2 σ
        [0.921, -0.546]
    """
    tau = 2 * vicinity.sigma if vicinity.tau is None else vicinity.tau
    # Of a standard Gaussian clipped at ±bound; the share beyond 30 is zero in float64.
    bound = min(tau / vicinity.sigma, 30.0) if vicinity.sigma > 0 else 30.0
    beyond, density = math.erfc(bound / math.sqrt(2)) / 2, math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    variance = 1 - 2 * beyond - 2 * bound * density + 2 * bound**2 * beyond
    fourth = 3 * (1 - 2 * beyond) - 2 * (bound**3 + 3 * bound) * density + 2 * bound**4 * beyond
    return variance, fourth / variance**2 - 3 if variance > 0 else 0.0


def _gaussian_noise(latent: torch.Tensor, vicinity: Vicinity) -> Noise:
    """Describe Σ clip(ε, τ) of Eq. (7). Every basis gives this variance, and ``'identity'`` the clip's kurtosis."""
    variance, kurtosis = clipped_moments(vicinity)
    scale = vicinity.sigma * math.sqrt(variance) * vicinity.unit(latent.detach())
    return _noise(scale.expand_as(latent), 0.0, kurtosis if vicinity.basis == 'identity' else 0.0)


def _dropout_laws(
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    logits: torch.Tensor,
    vicinity: Vicinity,
) -> list[Law]:
    """Describe B ⊙ x of Eq. (8), for each of the two values that B may have at the feature that counts most."""
    share, rate = 1 - vicinity.gaussian_fraction, vicinity.dropout
    kept = 1 / (1 - rate) if vicinity.rescale else 1.0
    mean, variance = kept * (1 - rate), rate * (1 - rate)  # of B; the variance before it is rescaled
    if not vicinity.rescale:
        logits = logits - rate * (logits if bias is None else logits - bias)
    scale = latent * (kept * math.sqrt(variance))
    moments = ((2 * rate - 1) / math.sqrt(variance), 1 / variance - 6) if rate > 0 else (0.0, 0.0)
    if rate == 0 or latent.shape[1] > MAX_BRANCHED_FEATURES:
        return [Law(share, logits, _noise(scale, *moments))]
    index_N = _feature_that_counts(latent.detach(), weight.detach(), logits.detach())
    noise = _noise(scale.scatter(1, index_N[:, None], 0.0), *moments)
    value_N = latent[torch.arange(len(latent), device=latent.device), index_N]
    part_NK = value_N[:, None] * weight.T[index_N]
    dropped, present = logits - mean * part_NK, logits + (kept - mean) * part_NK
    return [Law(share * rate, dropped, noise), Law(share * (1 - rate), present, noise)]


def _feature_that_counts(latent: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Find the feature of each row whose loss would spread its predictions most. Shape ``(N,)``."""
    probs = (logits / 2).softmax(-1)  # flatter than the predictions: noise lifts the improbable classes
    spread = probs @ weight.square() - (probs @ weight).square()
    return (latent.square() * spread).argmax(-1)


def _noise(scale: torch.Tensor, skewness: float, kurtosis: float) -> Noise:
    third, fourth = (scale.new_full((len(scale), 1), value) for value in (skewness, kurtosis))
    return Noise(scale, third, fourth, skewness == 0)
