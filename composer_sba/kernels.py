"""Fused GPU kernels: the augmented batch with its backward pass, and the soft label loss with its gradient.

An augmented step of a small network is bound by the host, which launches operators one by one. Each function here
launches one kernel. The noise comes from a counter-based generator: number i of a seed is a function of (seed, i). No
generator is created. The backward pass draws the mask again instead of keeping it. Triton is imported when the first
kernel runs, because PyTorch without CUDA does not include it.
"""

import functools
import warnings
from typing import Any

import torch

from composer_sba.errors import one_line

_BLOCK = 1024
MAX_CLASSES = 2**15  # a program holds the logits of one row


def are_usable_on(tensor: torch.Tensor) -> bool:
    """Return whether kernels can run on a tensor: on a GPU, not empty, in at most 32 bits, outside torch.func."""
    return (
        tensor.is_cuda
        and tensor.numel() > 0
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and _can_compile(tensor.device)
    )


@functools.cache
def _can_compile(device: torch.device) -> bool:
    """Return whether Triton, which needs a C compiler, can run the kernels; warn if it cannot."""
    law = {'sigma': 0.0, 'bound': 0.0, 'rms': True, 'dropout': 0.0, 'dropout_scale': 1.0}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            latent = torch.ones(1, 2, device=device, requires_grad=True)
            rows = Expansion.apply(latent, 0, (1, 2), law)
            kl, _ = soft_label_kl(rows[:1].detach(), rows[1:, None].detach())
            (gradient,) = torch.autograd.grad(rows.sum(), latent)
        return (gradient.sum() - 6 + kl).item() == 0
    except Exception as error:  # whatever Triton lacks on this machine
        warnings.warn(
            f'Triton cannot run kernels on {device}: {one_line(error)} SBA uses operators of PyTorch instead, which '
            'cost some milliseconds in each augmented step.',
            RuntimeWarning,
            stacklevel=2,
        )
        return False


def layout_of(latent: torch.Tensor) -> torch.memory_format:
    """Return the memory format of what is computed from a latent batch: channels_last if the batch has it, or dense."""
    last = latent.ndim == 4 and latent.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not latent.is_contiguous() else torch.contiguous_format


class Expansion(torch.autograd.Function):
    """The augmented batch of a seed with Σ = I, and its backward pass; :class:`.Vicinity` has the definition."""

    @staticmethod
    def forward(
        ctx: Any, latent: torch.Tensor, seed: int, copies: tuple[int, int], law: dict[str, Any]
    ) -> torch.Tensor:
        """Draw the augmented batch.

        Args:
            ctx: The context.
            latent (torch.Tensor): The raw latent batch. Shape ``(N, *)``.
            seed (int): Seed of the noise, 64 bits.
            copies (tuple): p and M, the numbers of Gaussian copies and of all copies.
            law (dict): ``sigma``; ``bound``, in units of sigma; ``rms``, whether sigma is in units of the batch's root
                mean square; ``dropout``; ``dropout_scale``.

        Returns:
            torch.Tensor: Shape ``((1 + M) * N, *)``, dtype and memory format of ``latent``.
        """
        from composer_sba import triton_kernels

        ctx.copies, ctx.law, ctx.layout = copies, law, layout_of(latent)
        ctx.seed = seed % 2**63  # what a signed integer holds
        gaussian, fold = copies
        rms = law['rms'] and gaussian > 0
        latent = latent.contiguous(memory_format=ctx.layout)
        size = latent.numel()
        shape = ((1 + fold) * len(latent), *latent.shape[1:])
        rows = torch.empty(shape, dtype=latent.dtype, device=latent.device, memory_format=ctx.layout)
        _launch(
            triton_kernels.expand,
            -(-size // _BLOCK),
            latent,
            rows,
            torch.linalg.vector_norm(latent, dtype=torch.float32) if rms else latent,
            ctx.seed,
            size,
            gaussian,
            fold,
            law['sigma'] / size**0.5 if rms else law['sigma'],
            law['bound'],
            law['dropout'],
            law['dropout_scale'],
            RMS=rms,
            BLOCK=_BLOCK,
        )
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the raw latent batch, the sum over the copies."""
        from composer_sba import triton_kernels

        gaussian, fold = ctx.copies
        gradient = gradient.contiguous(memory_format=ctx.layout)
        raw = gradient[: len(gradient) // (1 + fold)]
        if torch.is_grad_enabled():  # for a second derivative: the masks are what is drawn from ones without noise
            masks = Expansion.apply(torch.ones_like(raw), ctx.seed, ctx.copies, {**ctx.law, 'sigma': 0.0})
            return (masks * gradient).unflatten(0, (1 + fold, -1)).sum(0), None, None, None
        total = torch.empty_like(raw)
        _launch(
            triton_kernels.sum_copies,
            -(-total.numel() // _BLOCK),
            gradient,
            total,
            ctx.seed,
            total.numel(),
            gaussian,
            fold,
            ctx.law['dropout'],
            ctx.law['dropout_scale'],
            BLOCK=_BLOCK,
        )
        return total, None, None, None


def soft_label_kl(logits: torch.Tensor, virtual_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the soft label loss and its gradient.

    Args:
        logits (torch.Tensor): Predictions for the raw samples. Shape ``(N, K)``, K <= ``MAX_CLASSES``.
        virtual_logits (torch.Tensor): Predictions for their virtual samples. Shape ``(M, N, K)``.

    Returns:
        tuple: The mean divergence in nats, shape ``()``, and its gradient by ``virtual_logits``, of their shape; both
        float32.
    """
    from composer_sba import triton_kernels

    fold, rows, classes = virtual_logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    virtual_logits = virtual_logits if virtual_logits.stride(-1) == 1 else virtual_logits.contiguous()
    divergences = torch.empty(rows, device=logits.device)
    gradient = torch.empty(fold, rows, classes, device=logits.device)
    _launch(
        triton_kernels.soft_label_kl,
        rows,
        logits,
        virtual_logits,
        divergences,
        gradient,
        classes,
        fold,
        logits.stride(0),
        virtual_logits.stride(1),
        virtual_logits.stride(0),
        1 / (fold * rows),
        BLOCK=1 << (classes - 1).bit_length(),
    )
    return divergences.sum(), gradient


def _launch(kernel: Any, programs: int, tensor: torch.Tensor, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(tensor):  # Triton launches on the current device
        kernel[(programs,)](tensor, *args, **constants)
