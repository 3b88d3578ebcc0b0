"""The equations of SBA as pure functions. Equation numbers are those of Li et al., 2020, arXiv 2006.15284.

Names of tensors end in their shape: N raw samples, M virtual samples of each (the fold), K classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from composer_sba import kernels
from composer_sba.schedule import bernoulli_prob, choose_layer, should_augment
from composer_sba.vicinity import at_least_float32

__all__ = [
    'bernoulli_prob',
    'choose_layer',
    'hard_label_loss',
    'majority_vote',
    'should_augment',
    'soft_label_kl',
]


def soft_label_kl(
    logits: torch.Tensor,
    virtual_logits: torch.Tensor,
    *,
    stop_gradient: bool = True,
) -> torch.Tensor:
    r"""Compute the dynamic soft label regularizer, the mean divergence of virtual predictions from raw ones.

    The second term of Eq. (11) of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, without η:

    .. math:: \frac{1}{M N} \sum_{i=1}^{N} \sum_{j=1}^{M} D_{KL}(Y_i \parallel Y_{ij})

    where :math:`Y_i` is the softmax of a raw sample (the soft label, from ``logits``) and :math:`Y_{ij}` that of its
    j-th virtual sample (the trained side, from ``virtual_logits``).

    Args:
        logits (torch.Tensor): Predictions for the raw samples. Shape ``(N, K)``, unnormalized.
        virtual_logits (torch.Tensor): Predictions for their virtual samples. Shape ``(M, N, K)``, unnormalized.
        stop_gradient (bool, optional): Treat the soft label as a constant: no gradient flows through ``logits``.
            Default: ``True``.

    Returns:
        torch.Tensor: The mean divergence in nats. Shape ``()``, float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> soft_label_kl(logits, torch.zeros(1, 1, 2))
        tensor(0.3278)
    """
    _check_shapes(logits.shape, virtual_logits.shape[1:], f'(N, K) = {tuple(logits.shape)}', virtual_logits)
    if stop_gradient and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        return _SoftLabelKL.apply(logits, virtual_logits)
    soft_NK = _log_softmax(logits.detach() if stop_gradient else logits)
    virtual_MNK = _log_softmax(virtual_logits)
    total = F.kl_div(virtual_MNK, soft_NK.expand_as(virtual_MNK), reduction='sum', log_target=True)
    return total / max(virtual_MNK.shape[:2].numel(), 1)


def hard_label_loss(virtual_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Compute the hard loss of virtual samples, cross-entropy with the label of the raw sample.

    Eq. (9) of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, averaged as Eq. (11) averages the soft loss. This
    is the loss of Bamboo (Yang et al., 2018) and, if every batch is augmented, of batch augmentation in latent space:

    .. math:: \frac{1}{M N} \sum_{i=1}^{N} \sum_{j=1}^{M} CE(\mathbf{1}_{Y_i}, Y_{ij})

    Args:
        virtual_logits (torch.Tensor): Predictions for the virtual samples. Shape ``(M, N, K)``, unnormalized.
        target (torch.Tensor): Class indices of the raw samples, shape ``(N,)``, or their label distributions (smoothed
            or mixed labels), shape ``(N, K)``.

    Returns:
        torch.Tensor: The mean cross-entropy in nats. Shape ``()``, float32, or float64 for float64 logits.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> hard_label_loss(torch.zeros(4, 1, 10), torch.tensor([3]))
        tensor(2.3026)
    """
    expected = virtual_logits.shape[1 : 1 + target.ndim]
    _check_shapes(target.shape, expected, f'the target {tuple(target.shape)}', virtual_logits)
    target_MN = target.expand(len(virtual_logits), *target.shape)
    return F.cross_entropy(_at_least_float32(virtual_logits).flatten(0, 1), target_MN.flatten(0, 1))


def majority_vote(logits: torch.Tensor) -> torch.Tensor:
    r"""Compute the vote of the predictions for a raw sample and its virtual samples on its class.

    Sec. 3.4 of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_. If :math:`v_k` of the 1 + M predictions vote for
    class k, and their mean probability of it is :math:`\bar{Y}_k`, the outcome is the distribution

    .. math:: \frac{v_k + \bar{Y}_k}{2 + M}

    Its most probable class has the most votes. Among classes with equal votes, the highest mean probability wins.

    Args:
        logits (torch.Tensor): Raw predictions first, then virtual ones. Shape ``(1 + M, N, K)``, unnormalized.

    Returns:
        torch.Tensor: Log-probabilities, which cross-entropy accepts as logits. Shape ``(N, K)``, float32, or float64
        for float64 logits.

    Raises:
        ValueError: If ``logits`` does not have three dimensions.

    Example:
        >>> votes = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])  # one vote against two
        >>> majority_vote(votes).argmax(-1)
        tensor([1])
    """
    if logits.ndim != 3:
        raise ValueError(f'Expected logits of shape (1 + M, N, K), got {tuple(logits.shape)}.')
    log_probs = _log_softmax(logits)
    votes_NK = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0).to(log_probs.dtype)
    log_mean_NK = log_probs.logsumexp(0) - math.log(len(logits))
    return torch.logaddexp(votes_NK.log(), log_mean_NK) - math.log(len(logits) + 1)


class _SoftLabelKL(torch.autograd.Function):
    """The loss with a constant soft label, and its gradient by virtual logits, (their softmax - soft label) / (M N)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, virtual_logits: torch.Tensor) -> torch.Tensor:
        gradient = None
        if kernels.are_usable_on(virtual_logits) and logits.shape[1] <= kernels.MAX_CLASSES:
            kl, gradient = kernels.soft_label_kl(logits, virtual_logits)
        else:
            pairs = max(virtual_logits.shape[:2].numel(), 1)
            log_soft_NK, log_virtual_MNK = _log_softmax(logits), _log_softmax(virtual_logits)
            soft_NK = log_soft_NK.exp()
            kl = (log_soft_NK - log_virtual_MNK).mul_(soft_NK).sum() / pairs
            if ctx.needs_input_grad[1]:
                gradient = log_virtual_MNK.exp_().sub_(soft_NK).div_(pairs)
        ctx.save_for_backward(logits, virtual_logits, gradient)
        return kl

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        logits, virtual_logits, unscaled = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        if not torch.is_grad_enabled():
            return None, unscaled * gradient
        with torch.enable_grad():  # the same, of which there is a second derivative
            soft_NK, virtual_MNK = (_at_least_float32(each).softmax(-1) for each in (logits.detach(), virtual_logits))
            return None, gradient * (virtual_MNK - soft_NK) / virtual_MNK.shape[:2].numel()


def _check_shapes(given: torch.Size, expected: torch.Size, name: str, virtual_logits: torch.Tensor) -> None:
    if virtual_logits.ndim != 3 or given != expected:
        raise ValueError(f'Expected virtual_logits of shape (M, N, K) for {name}, got {tuple(virtual_logits.shape)}.')


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    # Autocast gives logits in half precision; their softmax is computed in float32.
    return logits.to(at_least_float32(logits.dtype))


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(_at_least_float32(logits), dim=-1)
