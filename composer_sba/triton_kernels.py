"""Triton's code of the kernels in kernels.py. N raw rows, Q features of each, M copies; K classes.

Triton compiles the annotations too, and knows no ``Any``: they are quoted. Products of sizes need 64 bits.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def expand(
    latent: 'Any',
    rows: 'Any',
    norm: 'Any',
    seed: 'Any',
    size: 'Any',  # N * Q
    gaussian: 'Any',  # p
    fold: 'Any',  # M
    sigma: 'Any',  # of the noise, in units of the norm under RMS
    bound: 'Any',  # of the noise, in units of sigma
    dropout: 'Any',
    dropout_scale: 'Any',
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the raw rows, p Gaussian copies and M - p dropout copies of BLOCK elements of a latent batch."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    raw = tl.load(latent + at, mask=inside).to(tl.float32)
    tl.store(rows + at, raw, mask=inside)
    scale = sigma
    if RMS:
        scale = sigma * tl.load(norm)
    for copy in range(gaussian):
        drawn = tl.cast(copy, tl.int64) * size + at  # the generator's counter too: each copy has its own numbers
        noise = tl.minimum(tl.maximum(tl.randn(seed, drawn), -bound), bound)
        tl.store(rows + size + drawn, raw + noise * scale, mask=inside)
    for copy in range(gaussian, fold):
        drawn = tl.cast(copy, tl.int64) * size + at
        kept = tl.rand(seed, drawn) >= dropout
        tl.store(rows + size + drawn, tl.where(kept, raw * dropout_scale, 0.0), mask=inside)


@triton.jit
def sum_copies(
    gradient: 'Any',
    total: 'Any',
    seed: 'Any',
    size: 'Any',
    gaussian: 'Any',
    fold: 'Any',
    dropout: 'Any',
    dropout_scale: 'Any',
    BLOCK: tl.constexpr,
) -> None:
    """Sum the gradients of the rows that :func:`expand` wrote, with the masks that it drew."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    kept_sum = tl.zeros([BLOCK], dtype=tl.float32)
    sum = tl.load(gradient + at, mask=inside).to(tl.float32)
    for copy in range(gaussian):
        sum += tl.load(gradient + size + tl.cast(copy, tl.int64) * size + at, mask=inside).to(tl.float32)
    for copy in range(gaussian, fold):
        drawn = tl.cast(copy, tl.int64) * size + at
        kept = tl.rand(seed, drawn) >= dropout
        kept_sum += tl.where(kept, tl.load(gradient + size + drawn, mask=inside).to(tl.float32), 0.0)
    tl.store(total + at, sum + dropout_scale * kept_sum, mask=inside)


@triton.jit
def soft_label_kl(
    logits: 'Any',
    virtual: 'Any',
    divergences: 'Any',
    gradient: 'Any',
    classes: 'Any',
    fold: 'Any',
    logits_stride: 'Any',  # from row to row
    row_stride: 'Any',
    copy_stride: 'Any',
    weight: 'Any',  # 1 / (M * N)
    BLOCK: tl.constexpr,  # at least K
) -> None:
    """Compute the divergence of a raw row's copies from it and the gradient of their logits, Eq. (11)."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside = at < classes
    raw = tl.load(logits + row * logits_stride + at, mask=inside).to(tl.float32)
    raw = tl.where(inside, raw, -1e30)  # not as `other` of the load, which float16 would make infinite
    raw = raw - tl.max(raw)
    soft_log = raw - tl.log(tl.sum(tl.exp(raw)))
    soft = tl.exp(soft_log)
    divergence = 0.0
    for copy in range(fold):
        place = virtual + tl.cast(copy, tl.int64) * copy_stride + row * row_stride + at
        moved = tl.where(inside, tl.load(place, mask=inside).to(tl.float32), -1e30)
        moved = moved - tl.max(moved)
        moved_log = moved - tl.log(tl.sum(tl.exp(moved)))
        divergence += tl.sum(soft * (soft_log - moved_log))
        slope = (tl.exp(moved_log) - soft) * weight
        tl.store(gradient + (copy * rows + row) * classes + at, slope, mask=inside)
    tl.store(divergences + row, divergence * weight)
