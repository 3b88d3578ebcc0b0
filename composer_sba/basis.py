"""The projection Σ that gives Gaussian noise its directions (Sec. 3.3 of Li et al., 2020)."""

import math
from typing import Literal

import torch

from composer_sba.errors import TooWideError

Basis = Literal['identity', 'normalized', 'orthogonal', 'hadamard']

MAX_DENSE_FEATURES = 8192  # a dense Σ of this width holds 256 MiB in float32


def rotate(noise: torch.Tensor, generator: torch.Generator | None) -> None:
    """Multiply rows with Σ = H D / √Q in place: random signs D, then the Walsh-Hadamard matrix H, Q a power of two."""
    width = noise.shape[1]
    signs = noise.new_empty(width).bernoulli_(generator=generator).mul_(2).sub_(1)
    noise *= signs / math.sqrt(width)
    for stage in range(width.bit_length() - 1):
        first, second = noise.view(len(noise), -1, 2, 2**stage).unbind(2)
        first += second
        torch.sub(first, second, alpha=2, out=second)  # the difference, now that the sum has the place of ``first``


def draw_basis(basis: Basis, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw the Q × Q projection Σ, one for the whole batch (Sec. 3.3)."""
    width = rows.shape[1]
    if width > MAX_DENSE_FEATURES:
        raise TooWideError(
            f'basis={basis!r} needs a {width} × {width} matrix; dense bases end at {MAX_DENSE_FEATURES} features. Use '
            f"basis='hadamard', random orthonormal directions without a matrix, or cut a narrower layer.",
        )
    square = torch.empty(width, width, dtype=rows.dtype, device=rows.device).normal_(generator=generator)
    if basis == 'normalized':
        return square.div_(torch.linalg.vector_norm(square, dim=0))  # in place: it can be the largest tensor of a step
    factor, triangle = torch.linalg.qr(square)
    return factor.mul_(triangle.diagonal().sign())  # without these signs QR does not draw uniformly
