"""Batch normalization of an augmented batch in one pass: all rows with the batch statistics of the raw rows."""

import math
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm


def normalize(module: _BatchNorm, rows: torch.Tensor, raw_rows: int) -> torch.Tensor:
    """Run a batch norm layer on an augmented batch, with the statistics of its first ``raw_rows`` rows.

    The running statistics are updated as by a pass of the raw rows alone, bit by bit if the call is eager. Gradients
    flow through the statistics, and may be of any order.

    Args:
        module (torch.nn.modules.batchnorm._BatchNorm): The layer, which normalizes with batch statistics.
        rows (torch.Tensor): The augmented batch. Shape ``(rows, C, *)``.
        raw_rows (int): N, the number of raw rows.

    Returns:
        torch.Tensor: The normalized rows, in the shape and dtype of ``rows``.

    Raises:
        ValueError: If the shape does not fit the layer, or the raw rows have only one value per channel.
    """
    module._check_input_dim(rows)
    count = raw_rows * math.prod(rows.shape[2:])  # values of a channel, of which the variance needs two
    if count < 2:
        size = torch.Size([raw_rows, *rows.shape[1:]])
        raise ValueError(f'Expected more than 1 value per channel when training, got input size {size}')  # as torch
    running_mean = running_var = None
    momentum = 0.0
    if module.training and module.track_running_stats:
        running_mean, running_var = module.running_mean, module.running_var
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.add_(1)
            momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        elif module.momentum is not None:
            momentum = module.momentum
    # torch.compile fuses operators, and cannot see that the kernel updates running statistics.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        output, mean, variance = _by_operators(rows, raw_rows, module.weight, module.bias, module.eps)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
                running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        return output
    if running_mean is None or running_var is None:  # the kernel takes the dtype of statistics from them
        dtype = torch.promote_types(rows.dtype, torch.float32) if module.weight is None else module.weight.dtype
        running_mean, running_var = rows.new_zeros(2, rows.shape[1], dtype=dtype)
    return _OnePass.apply(rows, module.weight, module.bias, raw_rows, running_mean, running_var, momentum, module.eps)


def _by_operators(
    rows: torch.Tensor, raw_rows: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normalized rows, and the mean and biased variance of the raw rows; autograd knows each operator."""
    rows_and_space = [dim for dim in range(rows.ndim) if dim != 1]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    variance, mean = torch.var_mean(wide[:raw_rows], rows_and_space, correction=0)
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    output = torch.addcmul(_per_channel(shift, rows), wide, _per_channel(scale, rows)).to(rows.dtype)
    return output, mean, variance


def _per_channel(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (rows.ndim - 2))


class _OnePass(torch.autograd.Function):
    """The kernels of evaluation mode, with the statistics of the raw rows instead of running ones."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        raw_rows: int,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        """Update the running statistics and normalize all rows."""
        mean, variance = torch.batch_norm_update_stats(rows[:raw_rows], running_mean, running_var, momentum)
        ctx.save_for_backward(rows, weight, bias, mean, variance)
        ctx.raw_rows, ctx.eps = raw_rows, eps
        return torch.native_batch_norm(rows, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        r"""Return the gradients of rows, weight and bias.

        With :math:`g` the gradient of the output, s the standard deviation and n the number of values of a channel in
        the raw rows, each raw value loses :math:`\gamma / s \cdot (\sum g + \hat x \sum g \hat x) / n` because it moves
        the statistics. Both sums are over all rows: they are the gradients of bias and weight.
        """
        rows, weight, bias, mean, variance = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # for a second derivative, which the kernels do not have
            output, _, _ = _by_operators(rows, ctx.raw_rows, weight, bias, ctx.eps)
            inputs = [each for each, need in zip((rows, weight, bias), needed, strict=True) if need]
            found = iter(torch.autograd.grad(output, inputs, gradient, create_graph=True))
            return *(next(found) if need else None for need in needed), *[None] * 5
        inverse = (variance + ctx.eps).rsqrt_()
        sums = not rows.is_cuda  # whether the kernel of both also makes the sums well
        if not sums:  # SyncBatchNorm's
            total, weighted, _, _ = torch.batch_norm_backward_reduce(
                gradient, rows, mean, inverse, weight, True, False, False
            )
            weighted = weighted * inverse
        moved, *found = torch.ops.aten.native_batch_norm_backward(
            gradient, rows, weight, mean, variance, mean, inverse, False, ctx.eps, [needed[0], sums, sums]
        )
        if sums:
            weighted, total = found
        if needed[0]:
            scale = inverse if weight is None else inverse * weight
            slope = weighted * inverse
            slope *= scale
            raw = moved[: ctx.raw_rows]
            shift = torch.addcmul(total * scale, slope, mean, value=-1)
            correction = torch.addcmul(_per_channel(shift, rows), rows[: ctx.raw_rows], _per_channel(slope, rows))
            raw.sub_(correction, alpha=mean.numel() / raw.numel())
        return moved, weighted if needed[1] else None, total if needed[2] else None, *[None] * 5
