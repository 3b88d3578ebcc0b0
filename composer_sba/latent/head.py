"""Gaussian points at the head, drawn as noise of the K logits instead of noise of Q features for each point.

Names of tensors end in their shape: N raw samples, K classes, Q features.
"""

import torch
from torch import nn

from composer_sba.vicinity import Vicinity, clipped_moments, draw_basis

MIN_POINTS_PER_CLASS = 2  # with fewer points, what is computed once for all of them costs more than they do
_MIN_FEATURES_PER_CLASS = 4  # with fewer features, K draws and a K × K factor cost as much as Q draws
_MIN_FEATURES_PER_KURTOSIS = 64  # so many features of excess kurtosis 1 make logits that are nearly Gaussian


def can_draw_logits(linear: nn.Linear, vicinity: Vicinity) -> bool:
    """Return whether Gaussian points at the head may be drawn as noise of its outputs, and whether that can pay.

    It pays if there are also ``MIN_POINTS_PER_CLASS`` points for each class. The head must be linear, and its weight a
    parameter: to read a weight that a parametrization computes can change it, as with spectral normalization.
    """
    _, kurtosis = clipped_moments(vicinity)
    return (
        type(linear).forward is nn.Linear.forward
        and 'weight' in linear._parameters
        and linear.in_features >= _MIN_FEATURES_PER_CLASS * linear.out_features
        and linear.in_features >= _MIN_FEATURES_PER_KURTOSIS * abs(kurtosis)
    )


@torch.no_grad()
def draw_logit_noise(
    latent: torch.Tensor,
    weight: torch.Tensor,
    copies: int,
    vicinity: Vicinity,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Draw the noise of a linear layer's outputs that belongs to Gaussian points at its input.

    Virtual samples :math:`\mathbf{x} + \Sigma\,\mathrm{clip}(\varepsilon, \tau)`, Eq. (7) of `Li et al., 2020
    <https://arxiv.org/abs/2006.15284>`_, move the outputs by :math:`\mathbf{W}\Sigma\,\mathrm{clip}(\varepsilon,
    \tau)`: a sum over Q features with mean zero and covariance

    .. math::
        v\,\mathbf{A}\mathbf{A}^\top = \mathbf{L}\mathbf{L}^\top, \qquad \mathbf{A} = \mathbf{W}\Sigma

    where v is the variance of :math:`\mathrm{clip}(\varepsilon, \tau)`. Without a clip the sum is Gaussian, and K
    numbers :math:`\xi \sim \mathcal{N}(0, v I)` have exactly its distribution, as the noise :math:`\mathbf{B}\xi` of
    the features with :math:`\mathbf{W}\mathbf{B}\xi = \mathbf{L}\xi / \sqrt{v}`. With a clip, mean, covariance and
    third moments are exact. The excess kurtosis is lost; for an output it is that of a feature divided by about Q. The
    part of :math:`\Sigma\,\mathrm{clip}(\varepsilon, \tau)` that :math:`\mathbf{B}\xi` omits does not move the outputs
    and has mean zero. Gradients are therefore the same on average, and vary less.

    Args:
        latent (torch.Tensor): The raw latent batch, input of the layer. Shape ``(N, Q)``.
        weight (torch.Tensor): The layer's weight. Shape ``(K, Q)``.
        copies (int): p, the number of Gaussian points of each raw sample.
        vicinity (Vicinity): The distribution of the points.
        generator (torch.Generator, optional): The source of the noise. Default: ``None``, the global generator.

    Returns:
        tuple: :math:`\xi`, shape ``(p, N, K)``, and :math:`\mathbf{B}`, shape ``(Q, K)``; float32 or wider. The
        outputs move by ``xi @ (weight @ directions).T``. No gradient flows through either.

    Example:
        >>> latent, weight = torch.ones(8, 64), torch.randn(3, 64)
        >>> xi, directions = draw_logit_noise(latent, weight, 5, Vicinity(sigma=0.2))
        >>> (xi @ (weight @ directions).T).shape
        torch.Size([5, 8, 3])
    """
    dtype = torch.promote_types(latent.dtype, torch.float32)
    with torch.autocast(latent.device.type, enabled=False):
        directions = _directions(weight, vicinity, dtype, generator)
        variance, _ = clipped_moments(vicinity)
        xi = torch.empty(copies, len(latent), len(weight), dtype=dtype, device=latent.device)
        xi.normal_(0, vicinity.sigma * variance**0.5, generator=generator)
        return xi.mul_(vicinity.unit(latent)), directions


def _directions(
    weight: torch.Tensor, vicinity: Vicinity, dtype: torch.dtype, generator: torch.Generator | None
) -> torch.Tensor:
    """Return B = Σ Aᵀ L⁻ᵀ, for which W B = L. An orthonormal Σ enters only as Σ Σᵀ = I and is not drawn."""
    basis_QQ = None
    if vicinity.basis == 'normalized':
        basis_QQ = draw_basis(vicinity.basis, weight.new_empty(0, weight.shape[1], dtype=dtype), generator)
    wide_KQ = weight.to(dtype)
    a_KQ = wide_KQ if basis_QQ is None else wide_KQ @ basis_QQ
    a_KQ = a_KQ.double()  # the condition number of the Gram matrix is the square of its own
    gram_KK = a_KQ @ a_KQ.T
    # The weights of two classes may be equal, or zero.
    gram_KK.diagonal().add_(gram_KK.diagonal().mean() * 1e-9 + 1e-30)
    factor_KK, _ = torch.linalg.cholesky_ex(gram_KK)
    b_KQ = torch.linalg.solve_triangular(factor_KK, a_KQ, upper=False).to(dtype)
    return b_KQ.T if basis_QQ is None else basis_QQ @ b_KQ.T
