"""How groups of noisy logits depend on the noise: feature by feature, or by inner products alone.

Names of tensors end in their shape: N raw samples, K classes, Q features, C groups of classes (C = 2 P pairs of them).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from composer_sba.laws import Noise

_EPSILON = 1e-12  # for a row whose two first classes no noise tells apart


class Slopes:
    """What is linear in the noise, feature by feature: needed where the noise is skewed. Shape ``(N, C, Q)``."""

    def __init__(self, slope_NCQ: torch.Tensor) -> None:
        self.slope_NCQ = slope_NCQ

    def padded(self) -> 'Slopes':
        """Add a group without noise."""
        return Slopes(F.pad(self.slope_NCQ, (0, 0, 0, 1)))

    def power_sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum squares, cubes and fourth powers of b - a, for each pair of neighbours. Shape ``(N, P)``."""
        square, cube, fourth = _PowerSums.apply(self._differences())
        return square, cube, fourth

    def joined(self, first: torch.Tensor, curved: torch.Tensor) -> 'Slopes':
        """Give a + first (b - a) + curved (b - a)²."""
        slope_NPQ = self._differences()
        linear_NPQ = torch.addcmul(first[..., None], curved[..., None], slope_NPQ)
        return Slopes(torch.addcmul(self.slope_NCQ[:, ::2], slope_NPQ, linear_NPQ))

    def _differences(self) -> torch.Tensor:
        return self.slope_NCQ[:, 1::2] - self.slope_NCQ[:, ::2]


class Gram:
    """The same by its inner products, without features: as good where the noise is symmetric. Shape ``(N, C, C)``.

    Fourth powers are in proportion to squares of squares, as between the two most probable classes. Shape ``(N, 1)``.
    """

    def __init__(self, gram_NCC: torch.Tensor, tail_N1: torch.Tensor) -> None:
        self.gram_NCC, self.tail_N1 = gram_NCC, tail_N1

    @classmethod
    def of_classes(cls, weight_KQ: torch.Tensor, index_NC: torch.Tensor, noise: Noise) -> 'Gram':
        """Multiply the classes' weights, in the order of ``index_NC``, without a copy of them for each row."""
        rows = torch.arange(len(index_NC), device=index_NC.device)[:, None, None]
        products_QKK = weight_KQ.T[:, :, None] * weight_KQ.T[:, None]
        gram_NKK = (noise.scale.square() @ products_QKK.flatten(1)).unflatten(1, products_QKK.shape[1:])
        top_N2Q = weight_KQ.detach()[index_NC[:, :2]] * noise.scale.detach()[:, None]
        return cls(gram_NKK[rows, index_NC[:, :, None], index_NC[:, None]], _tail(top_N2Q))

    @classmethod
    def of_slopes(cls, slope_NCQ: torch.Tensor, noise: Noise) -> 'Gram':
        """Multiply slopes."""
        return cls(slope_NCQ @ slope_NCQ.mT, _tail(slope_NCQ[:, :2].detach()))

    def padded(self) -> 'Gram':
        """Add a group without noise."""
        return Gram(F.pad(self.gram_NCC, (0, 1, 0, 1)), self.tail_N1)

    def power_sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`Slopes.power_sums`; cubes, which symmetric noise does not need, are zero."""
        own_NC, across_NP = self.gram_NCC.diagonal(dim1=1, dim2=2), self.gram_NCC[:, ::2, 1::2].diagonal(dim1=1, dim2=2)
        square = (own_NC[:, ::2] + own_NC[:, 1::2] - 2 * across_NP).clamp_min(0)
        return square, torch.zeros_like(square), self.tail_N1 * square.square()

    def joined(self, first: torch.Tensor, curved: torch.Tensor) -> 'Gram':
        """Give a + first (b - a); ``curved`` is zero."""
        a_NPC, b_NPC = self.gram_NCC[:, ::2], self.gram_NCC[:, 1::2]
        half_NPC = torch.lerp(a_NPC, b_NPC, first[:, :, None])
        return Gram(torch.lerp(half_NPC[..., ::2], half_NPC[..., 1::2], first[:, None]), self.tail_N1)


def _tail(top_N2Q: torch.Tensor) -> torch.Tensor:
    square_NQ = (top_N2Q[:, -1] - top_N2Q[:, 0]).square_()  # of one class, none
    return square_NQ.square().sum(-1, keepdim=True) / (square_NQ.sum(-1, keepdim=True).square() + _EPSILON)


class _PowerSums(torch.autograd.Function):
    """Sums of squares, cubes and fourth powers; the gradient in one pass, since these tensors are the large ones."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(value)
        square = value * value
        return square.sum(-1), (square * value).sum(-1), square.square_().sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, square: torch.Tensor, cube: torch.Tensor, fourth: torch.Tensor) -> torch.Tensor:
        (value,) = ctx.saved_tensors
        gradient = torch.addcmul(3 * cube[..., None], 4 * fourth[..., None], value)
        return torch.addcmul(2 * square[..., None], gradient, value).mul_(value)
