"""The vicinity P′ of a latent batch: the law from which virtual samples are drawn (Eq. 5-8 of Li et al., 2020)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from composer_sba.errors import TooWideError, UserError, check_choice, check_flag, check_number

NoiseScale = Literal['rms', 'absolute']
Basis = Literal['identity', 'normalized', 'orthogonal', 'hadamard']

MAX_DENSE_FEATURES = 8192  # a dense Σ of this width holds 256 MiB in float32

Drawn = tuple[torch.Tensor, torch.Tensor]  # the augmented batch, and the features that its dropout points kept


@dataclass(frozen=True)
class Vicinity:
    r"""The mixed vicinity P′ that virtual samples are drawn from: truncated Gaussian noise and dropout.

    Implements Eq. (5)-(8) of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_. Of the M virtual samples of a raw
    sample :math:`\mathbf{x}`, the first p are Gaussian points and the other q = M - p are dropout points:

    .. math::
        \mathbf{x} + \mathbf{\Sigma}\,\mathrm{clip}(\varepsilon, \tau), \quad \varepsilon \sim \mathcal{N}(0, \sigma^2
        I) \qquad \text{and} \qquad \mathbf{B} \odot \mathbf{x}, \quad \mathbf{B} \sim \mathrm{Bernoulli}(1 - r)^Q

    Args:
        gaussian_fraction (float, optional): Share p / M of Gaussian points, in [0, 1]; p is rounded to the nearest
            integer, halves up. Default: ``0.5``.
        sigma (float, optional): Standard deviation σ of the noise before it is clipped, >= 0, in the unit that
            ``noise_scale`` names. Default: ``0.1``.
        tau (float, optional): Bound τ on each component of the noise, >= 0, in the same unit. Default: ``None``, 2σ.
        noise_scale (str, optional): ``'rms'``: σ and τ are in units of the root mean square of the raw latent batch
            (all rows and features of it, as a constant), or ``'absolute'``. Default: ``'rms'``.
        basis (str, optional): The projection Σ, drawn anew for each batch: ``'identity'``; ``'normalized'``: a Gaussian
            matrix with columns of unit norm, the paper's; ``'orthogonal'``: a uniformly random orthogonal matrix;
            ``'hadamard'``: random signs and a Walsh-Hadamard transform, as orthonormal, but O(Q log Q) and without a
            matrix. Where Q is no power of two, ε is as long as the next one, and Σ is the first Q rows of the
            transform, so that ΣΣᵀ = I at any Q. Default: ``'identity'``, whose law differs from a rotation's by the
            clip alone.
        dropout (float, optional): Probability r that a feature of a dropout point is deleted, in [0, 1), to the nearest
            1 / 65,536. Default: ``0.5``.
        rescale (bool, optional): Divide dropout points by 1 - r, so that their mean is the raw sample; ``False`` is Eq.
            (8) to the letter. Default: ``True``.

    Raises:
        ValueError: If an argument lies outside its range; the message names it, its range and its value.

    Example:
        >>> Vicinity(sigma=0.2).sample(torch.ones(8, 16), fold=4).shape
        torch.Size([4, 8, 16])
    """

    gaussian_fraction: float = 0.5
    sigma: float = 0.1
    tau: float | None = None
    noise_scale: NoiseScale = 'rms'
    basis: Basis = 'identity'
    dropout: float = 0.5
    rescale: bool = True

    def __post_init__(self) -> None:
        check_number('gaussian_fraction', self.gaussian_fraction, 'a number in [0, 1]', lambda value: 0 <= value <= 1)
        check_number('sigma', self.sigma, 'a finite number >= 0', lambda value: 0 <= value < math.inf)
        if self.tau is not None:
            check_number('tau', self.tau, 'a number >= 0, or None for 2 * sigma', lambda value: value >= 0)
        check_choice('noise_scale', self.noise_scale, NoiseScale)
        check_choice('basis', self.basis, Basis)
        check_number('dropout', self.dropout, 'a number in [0, 1)', lambda value: 0 <= value < 1)
        check_flag('rescale', self.rescale)

    def num_gaussian(self, fold: int) -> int:
        """Count the Gaussian points p among ``fold`` virtual samples; the other ``fold - p`` are dropout points."""
        return math.floor(self.gaussian_fraction * fold + 0.5)

    def unit(self, latent: torch.Tensor) -> torch.Tensor:
        """Give the unit of σ and τ: a raw latent batch's root mean square, or 1. Shape ``()``, float32 or wider."""
        dtype = torch.promote_types(latent.dtype, torch.float32)
        if self.noise_scale == 'absolute':
            return latent.new_ones((), dtype=dtype)
        return torch.linalg.vector_norm(latent, dtype=dtype) / math.sqrt(latent.numel())

    def sample(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw ``fold`` virtual samples of each row of a latent batch.

        Args:
            latent (torch.Tensor): The raw latent batch :math:`X_k`. Shape ``(N, *)``, floating; ``*`` holds Q features.
            fold (int): M >= 1, virtual samples per raw sample.
            generator (torch.Generator, optional): Where the noise comes from, on the device of ``latent``. Default:
                ``None``, the global generator.

        Returns:
            torch.Tensor: Gaussian points first, then dropout points. Shape ``(M, N, *)``, dtype and memory format of
            ``latent``. Gradients flow to ``latent``; the noise and its scale are constants. The same generator state
            gives the same noise in every memory format and every dtype up to float32.

        Raises:
            ValueError: If ``basis`` is ``'normalized'`` or ``'orthogonal'``, a Q × Q matrix, and Q exceeds 8,192.
        """
        return self.expand(latent, fold, generator)[len(latent) :].unflatten(0, (fold, len(latent)))

    def expand(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Build the augmented batch [X_k; V_g; V_d] of Eq. (6): the raw rows, then the virtual samples, copy by copy.

        Args, errors and noise are those of :meth:`sample`.

        Returns:
            torch.Tensor: Shape ``((1 + M) * N, *)``, dtype and memory format of ``latent``.
        """
        return Expansion.apply(latent, self, fold, generator)

    @torch.no_grad()
    def draw(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> Drawn:
        """Write the augmented batch without gradients; :meth:`expand` is this and its backward pass.

        Returns:
            tuple: The augmented batch, shape ``((1 + M) * N, *)``, and the features that dropout points kept, bool,
            shape ``(q, N, *)``, contiguous.
        """
        rows, kept = buffers(latent, fold, self)
        raw, gaussian, dropout = rows.unflatten(0, (1 + fold, -1)).split([1, fold - len(kept), len(kept)])
        raw.copy_(latent)
        with torch.autocast(latent.device.type, enabled=False):
            if len(gaussian) > 0:
                self._write_gaussian(gaussian, latent, generator)
            if len(dropout) > 0:
                _draw_kept(kept, dropout, self.dropout, generator)
                dropout.copy_(kept).mul_(latent * self.dropout_scale)
        return rows, kept

    @property
    def dropout_scale(self) -> float:
        """What a dropout point multiplies the features with that it keeps."""
        return 1 / (1 - self.dropout) if self.rescale else 1.0

    def _write_gaussian(self, points: torch.Tensor, latent: torch.Tensor, generator: torch.Generator | None) -> None:
        """Write x + Σ clip(ε, τ), Eq. (7), of each copy of each row into ``points``, shape ``(p, N, *)``."""
        tau = 2 * self.sigma if self.tau is None else self.tau
        features = math.prod(latent.shape[1:])
        width = 2 ** (features - 1).bit_length() if self.basis == 'hadamard' else features
        noise = _scratch(points, width).normal_(0, self.sigma, generator=generator).clamp_(-tau, tau)
        if self.basis == 'hadamard':
            rotate(noise, generator)
        elif self.basis != 'identity':
            noise = noise @ draw_basis(self.basis, noise, generator).T
        if self.noise_scale == 'rms':
            noise *= self.unit(latent)
        torch.add(latent, noise[:, :features].view(points.shape), out=points)


class Expansion(torch.autograd.Function):
    """:meth:`Vicinity.draw` with its backward pass: the sum over the copies. The noise and its scale are constants."""

    @staticmethod
    def forward(
        ctx: Any, latent: torch.Tensor, vicinity: Vicinity, fold: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Give the augmented batch of :meth:`Vicinity.draw`."""
        rows, kept = vicinity.draw(latent, fold, generator)
        ctx.save_for_backward(kept)
        ctx.dropout_scale = vicinity.dropout_scale
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        """Give the gradient of the raw latent batch, None for the other arguments."""
        (kept,) = ctx.saved_tensors
        copies = gradient.unflatten(0, (-1, kept.shape[1]))
        shifted, dropout = copies.split([len(copies) - len(kept), len(kept)])
        total = _sum(shifted)
        if len(kept) > 0:
            total.add_(_sum(torch.empty_like(dropout).copy_(kept).mul_(dropout)), alpha=ctx.dropout_scale)
        return total, *[None] * (len(ctx.needs_input_grad) - 1)


def _sum(copies: torch.Tensor) -> torch.Tensor:
    return torch.sum(copies, 0, out=torch.empty_like(copies[0]))  # by itself it would make channels_last contiguous


def as_vicinity(vicinity: Vicinity | Mapping[str, Any]) -> Vicinity:
    """Make a Vicinity of a mapping of its arguments, as a recipe holds it; ValueError names what is none of them."""
    if isinstance(vicinity, Vicinity):
        return vicinity
    known = [field.name for field in fields(Vicinity)]
    if not isinstance(vicinity, Mapping) or not set(vicinity) <= set(known):
        problem = f'Expected vicinity to be a Vicinity or a mapping of {", ".join(known)}, got {vicinity!r}.'
        raise UserError(problem, 'vicinity')
    return Vicinity(**vicinity)


def buffers(latent: torch.Tensor, fold: int, vicinity: Vicinity) -> Drawn:
    """Allocate what :meth:`Vicinity.draw` fills."""
    channels_last = latent.ndim == 4 and latent.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not latent.is_contiguous() else torch.contiguous_format
    shape = ((1 + fold) * len(latent), *latent.shape[1:])
    rows = torch.empty(shape, dtype=latent.dtype, device=latent.device, memory_format=layout)
    return rows, latent.new_empty(fold - vicinity.num_gaussian(fold), *latent.shape, dtype=torch.bool)


def _scratch(points: torch.Tensor, width: int) -> torch.Tensor:
    """Room for the draws of ``points``, shape ``(copies, N, *)``: theirs if it will do. Shape ``(copies * N, width)``.

    It is contiguous and at least float32, so that one seed means one noise whatever the latent batch's format is.
    """
    dtype = torch.promote_types(points.dtype, torch.float32)
    own = points.dtype == dtype and points.is_contiguous() and points[0, 0].numel() == width
    return (points if own else points.new_empty(*points.shape[:2], width, dtype=dtype)).view(-1, width)


def _draw_kept(kept: torch.Tensor, room: torch.Tensor, rate: float, generator: torch.Generator | None) -> None:
    """Delete features with probability ``rate`` to the nearest 1 / 65,536: 16 bits each, which cost a CPU a third.

    ``room``, of the shape of ``kept``, is what will be overwritten anyway; its memory is used where it can be.
    """
    words = -(-kept.numel() // 4)
    size, offset = 8 * words // room.element_size(), room.storage_offset() * room.element_size()
    fits = room.is_contiguous() and size <= room.numel() and offset % 8 == 0
    bits = room.view(-1)[:size].view(torch.int64) if fits else room.new_empty(words, dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)
    chances = bits.view(torch.int16)[: kept.numel()].view(kept.shape)
    torch.ge(chances, min(round(rate * 2**16), 2**16 - 1) - 2**15, out=kept)


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
