"""Gaussian points at the head: what their noise does to the K logits is drawn there, not Q features for each point.

Names of tensors end in their shape: N raw samples, K classes, Q features.
"""

import torch
from torch import nn

from composer_sba.vicinity import Vicinity, clipped_moments, draw_basis

ROWS_A_CLASS = 2  # below so many points, what is computed once for all of them costs more than they do
_FEATURES_A_CLASS = 4  # below so many, K draws and a K × K factor cost as much as Q draws
_FEATURES_AT_FULL_CLIP = 64  # so many make logits Gaussian whose features' excess kurtosis is 1


def suits(linear: nn.Linear, vicinity: Vicinity) -> bool:
    """Tell whether Gaussian points at a linear layer may be drawn as noise of its outputs, and whether that pays.

    It pays if the points are at least ``ROWS_A_CLASS`` times the classes too.
    """
    _, kurtosis = clipped_moments(vicinity)
    return (
        type(linear).forward is nn.Linear.forward
        and linear.in_features >= _FEATURES_A_CLASS * linear.out_features
        and linear.in_features >= _FEATURES_AT_FULL_CLIP * abs(kurtosis)
    )


@torch.no_grad()
def draw_logit_noise(
    latent: torch.Tensor,
    weight: torch.Tensor,
    copies: int,
    vicinity: Vicinity,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Draw what the noise of Gaussian points does to the outputs of a linear layer.

    Virtual samples :math:`\mathbf{x} + \Sigma\,\mathrm{clip}(\varepsilon, \tau)`, Eq. (7) of `Li et al., 2020
    <https://arxiv.org/abs/2006.15284>`_, move the outputs by :math:`\mathbf{W}\Sigma\,\mathrm{clip}(\varepsilon,
    \tau)`: a sum over Q features of mean zero and covariance

    .. math::
        v\,\mathbf{A}\mathbf{A}^\top = \mathbf{L}\mathbf{L}^\top, \qquad \mathbf{A} = \mathbf{W}\Sigma

    where v is the variance of :math:`\mathrm{clip}(\varepsilon, \tau)`. Without a clip it is Gaussian, and K numbers
    :math:`\xi \sim \mathcal{N}(0, v I)` give the law exactly, as the noise :math:`\mathbf{B}\xi` of the features with
    :math:`\mathbf{W}\mathbf{B}\xi = \mathbf{L}\xi / \sqrt{v}`. With one, mean, covariance and third moments are exact
    and the excess kurtosis, which the clip gives each feature, is lost: of an output, that of a feature divided by some
    Q. What :math:`\mathbf{B}\xi` leaves out of :math:`\Sigma\,\mathrm{clip}(\varepsilon, \tau)` does not move the
    outputs and has mean zero, so that gradients are the same on average, and vary less.

    Args:
        latent (torch.Tensor): The raw latent batch, input of the layer. Shape ``(N, Q)``.
        weight (torch.Tensor): The layer's weight. Shape ``(K, Q)``.
        copies (int): p, Gaussian points of each raw sample.
        vicinity (Vicinity): Their law.
        generator (torch.Generator, optional): Where the noise comes from. Default: ``None``, the global generator.

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
    """Return B = Σ Aᵀ L⁻ᵀ, for which W B = L. Of an orthonormal Σ, Σ Σᵀ = I is all that counts."""
    basis_QQ = None
    if vicinity.basis == 'normalized':
        basis_QQ = draw_basis(vicinity.basis, weight.new_empty(0, weight.shape[1], dtype=dtype), generator)
    wide_KQ = weight.to(dtype)
    a_KQ = wide_KQ if basis_QQ is None else wide_KQ @ basis_QQ
    a_KQ = a_KQ.double()  # whose Gram matrix has the square of its condition number
    gram_KK = a_KQ @ a_KQ.T
    # Classes may weigh all features alike, or not at all.
    gram_KK.diagonal().add_(gram_KK.diagonal().mean() * 1e-9 + 1e-30)
    factor_KK, _ = torch.linalg.cholesky_ex(gram_KK)
    b_KQ = torch.linalg.solve_triangular(factor_KK, a_KQ, upper=False).to(dtype)
    return b_KQ.T if basis_QQ is None else basis_QQ @ b_KQ.T
