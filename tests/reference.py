"""Eq. 5-11 of Li et al., 2020 (arXiv 2006.15284), and batch normalization by raw rows, as slow loops over scalars.

Written from the equations, one row, one feature and one class at a time. The package is compared with it in float64.
"""

import math
from collections.abc import Sequence

import torch


def softmax(z: torch.Tensor) -> list[torch.Tensor]:
    exps = [torch.exp(z_k - z.max()) for z_k in z]
    return [e / sum(exps) for e in exps]


def kl_divergence(p: Sequence[torch.Tensor], q: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eq. (10): D_KL(p || q) = Σ_k p_k (log p_k - log q_k), in nats."""
    return sum(p_k * (torch.log(p_k) - torch.log(q_k)) for p_k, q_k in zip(p, q, strict=True))


def cross_entropy(label: int, q: Sequence[torch.Tensor]) -> torch.Tensor:
    """Eq. (9): CE(1_label, q), in nats."""
    return -torch.log(q[label])


def soft_loss(logits: torch.Tensor, virtual_logits: torch.Tensor, stop_gradient: bool) -> torch.Tensor:
    """The second sum of Eq. (11) over (M N), without η: logits (N, K), virtual_logits (M, N, K)."""
    fold, rows, _ = virtual_logits.shape
    total = torch.zeros((), dtype=logits.dtype)
    for i in range(rows):
        soft_label = softmax(logits[i].detach() if stop_gradient else logits[i])
        for j in range(fold):
            total = total + kl_divergence(soft_label, softmax(virtual_logits[j, i]))
    return total / (fold * rows)


def hard_loss(virtual_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    fold, rows, _ = virtual_logits.shape
    total = torch.zeros((), dtype=virtual_logits.dtype)
    for i in range(rows):
        for j in range(fold):
            total = total + cross_entropy(int(target[i]), softmax(virtual_logits[j, i]))
    return total / (fold * rows)


def sba_loss(
    logits: torch.Tensor, virtual_logits: torch.Tensor, target: torch.Tensor, eta: float, augmented: bool = True
) -> torch.Tensor:
    """Eq. (11), with the soft label as a constant."""
    rows = len(logits)
    first = sum(cross_entropy(int(target[i]), softmax(logits[i])) for i in range(rows)) / rows
    return first + eta * soft_loss(logits, virtual_logits, stop_gradient=True) if augmented else first


def gaussian_point(x: torch.Tensor, noise: torch.Tensor, tau: float, basis: torch.Tensor) -> torch.Tensor:
    """Eq. (7) for one row: x + Σ clip(ε, τ)."""
    clipped = [min(max(float(e), -tau), tau) for e in noise]
    width = len(x)
    return torch.stack([x[a] + sum(float(basis[a, b]) * clipped[b] for b in range(width)) for a in range(width)])


def dropout_point(x: torch.Tensor, keep: torch.Tensor, rate: float, rescale: bool) -> torch.Tensor:
    """Eq. (8) for one row: B ⊙ x, divided by 1 - rate to keep the mean."""
    scale = 1 / (1 - rate) if rescale else 1.0
    return torch.stack([x[a] * float(keep[a]) * scale for a in range(len(x))])


def root_mean_square(latent: torch.Tensor) -> float:
    return math.sqrt(sum(float(v) ** 2 for v in latent.flatten()) / latent.numel())


def normalized_basis(square: torch.Tensor) -> torch.Tensor:
    columns = [square[:, b] / math.sqrt(sum(float(v) ** 2 for v in square[:, b])) for b in range(square.shape[1])]
    return torch.stack(columns, dim=1)


def batch_norm_by_raw_rows(
    x: torch.Tensor, raw_rows: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Every row of x (R, C) with the mean and biased variance of its first ``raw_rows`` rows."""
    columns = []
    for c in range(x.shape[1]):
        mean = sum(x[i, c] for i in range(raw_rows)) / raw_rows
        variance = sum((x[i, c] - mean) ** 2 for i in range(raw_rows)) / raw_rows
        columns.append(
            torch.stack([(x[i, c] - mean) / torch.sqrt(variance + eps) * weight[c] + bias[c] for i in range(len(x))])
        )
    return torch.stack(columns, dim=1)
