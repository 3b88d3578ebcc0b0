"""The vicinal distribution P′, from which virtual samples of a latent batch are drawn (Eq. 5-8 of Li et al., 2020).

In reading order: class Vicinity, its gradient, a recipe's mapping, buffers and draws.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from composer_sba import kernels
from composer_sba.errors import TooWideError, UserError, check_choice, check_flag, check_number, nearest

NoiseScale = Literal['rms', 'absolute']
Basis = Literal['identity', 'normalized', 'orthogonal', 'hadamard']

_LAST_SIGMA = 30.0  # a Gaussian's share beyond so many σ is zero in float64
MAX_DENSE_FEATURES = 8192  # a dense Σ of this width holds 256 MiB in float32

Drawn = tuple[torch.Tensor, torch.Tensor]  # the augmented batch, and the features that its dropout points keep


@dataclass(frozen=True)
class Vicinity:
    r"""The vicinal distribution P′ of virtual samples: a mixture of truncated Gaussian noise and dropout.

    Implements Eq. (5)-(8) of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_. A raw sample :math:`\mathbf{x}` has
    M virtual samples. The first p are Gaussian points and the other q = M - p are dropout points:

    .. math::
        \mathbf{x} + \mathbf{\Sigma}\,\mathrm{clip}(\varepsilon, \tau), \quad \varepsilon \sim \mathcal{N}(0, \sigma^2
        I) \qquad \text{and} \qquad \mathbf{B} \odot \mathbf{x}, \quad \mathbf{B} \sim \mathrm{Bernoulli}(1 - r)^Q

    Args:
        gaussian_fraction (float, optional): Share p / M of Gaussian points, in [0, 1]; p is rounded to the nearest
            integer, halves up. Default: ``0.5``.
        sigma (float, optional): Standard deviation σ of the noise before it is clipped, in [0, 1e30], in the unit of
            ``noise_scale``. Default: ``0.1``.
        tau (float, optional): Bound τ on each component of the noise, >= 0, in the same unit. Default: ``None``, 2σ.
        noise_scale (str, optional): ``'rms'``: σ and τ are in units of the root mean square of the raw latent batch
            (over all its rows and features, as a constant), or ``'absolute'``. Default: ``'rms'``.
        basis (str, optional): The projection Σ, drawn anew for each batch: ``'identity'``; ``'normalized'``: a Gaussian
            matrix with columns of unit norm, the paper's; ``'orthogonal'``: a uniformly random orthogonal matrix;
            ``'hadamard'``: random signs and a Walsh-Hadamard transform, also orthonormal, in O(Q log Q) time and
            without a matrix. If Q is not a power of two, ε has the length of the next one and Σ is the first Q rows of
            the transform; ΣΣᵀ = I for every Q. Default: ``'identity'``, whose distribution differs from a rotation's
            only by the clip.
        dropout (float, optional): Probability r that a feature of a dropout point is deleted, in [0, 1). Default:
            ``0.5``.
        rescale (bool, optional): Divide dropout points by 1 - r, which makes the raw sample their mean; ``False`` is
            Eq. (8) to the letter. Default: ``True``.

    Raises:
        ValueError: If an argument is out of range; the message names it, its range and its value.

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
        numbers = {
            'gaussian_fraction': ('a number in [0, 1]', lambda value: 0 <= value <= 1),
            'sigma': ('a number in [0, 1e30]', lambda value: 0 <= value <= 1e30),  # float32 ends at 3e38
            'tau': ('a number >= 0, or None for 2 * sigma', lambda value: value >= 0),
            'dropout': ('a number in [0, 1)', lambda value: 0 <= value < 1),
        }
        for name, (expected, holds) in numbers.items():
            if name != 'tau' or self.tau is not None:
                object.__setattr__(self, name, check_number(name, getattr(self, name), expected, holds))
        check_choice('noise_scale', self.noise_scale, NoiseScale)
        check_choice('basis', self.basis, Basis)
        check_flag('rescale', self.rescale)

    def num_gaussian(self, fold: int) -> int:
        """Return p, how many of ``fold`` virtual samples are Gaussian points; the others are dropout points."""
        return math.floor(self.gaussian_fraction * fold + 0.5)

    def has_noise(self, fold: int) -> bool:
        """Return whether any of ``fold`` virtual samples differs from the raw sample."""
        gaussian = self.num_gaussian(fold)
        return (gaussian > 0 and self.bound > 0) or (gaussian < fold and self.dropout > 0)

    def sample(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw ``fold`` virtual samples of each row of a latent batch.

        Args:
            latent (torch.Tensor): The raw latent batch :math:`X_k`. Shape ``(N, *)``, floating; ``*`` holds Q features.
            fold (int): M >= 1, virtual samples per raw sample.
            generator (torch.Generator, optional): The source of the noise, on the device of ``latent``. Default:
                ``None``, the global generator.

        Returns:
            torch.Tensor: Gaussian points first, then dropout points. Shape ``(M, N, *)``, dtype and memory format of
            ``latent``. Gradients flow to ``latent``; the noise and its scale are constants. The same generator state
            gives the same noise in every memory format and every dtype up to float32.

        Raises:
            ValueError: If ``basis`` is ``'normalized'`` or ``'orthogonal'``, a Q × Q matrix, and Q exceeds 8,192.
        """
        return self.expand(latent, fold, generator)[len(latent) :].unflatten(0, (fold, len(latent)))

    @torch.compiler.disable  # which cannot trace a generator
    def expand(self, latent: torch.Tensor, fold: int, source: torch.Generator | int | None = None) -> torch.Tensor:
        """Build the augmented batch [X_k; V_g; V_d] of Eq. (6): the raw rows, then the virtual samples, copy by copy.

        Args, errors and noise are those of :meth:`sample`, but the source of the noise may be a seed, 64 bits. On CUDA,
        kernels draw from a seed without a generator (:mod:`composer_sba.kernels`), other noise of the same law.

        Returns:
            torch.Tensor: Shape ``((1 + M) * N, *)``, dtype and memory format of ``latent``.
        """
        if isinstance(source, int):
            if self.basis == 'identity' and kernels.are_usable_on(latent):
                law = {
                    'sigma': self.sigma,
                    'bound': self.bound / self.sigma if self.sigma > 0 else 0.0,
                    'rms': self.noise_scale == 'rms',
                    'dropout': self.dropout,
                    'dropout_scale': self.dropout_scale,
                }
                fused: torch.Tensor = kernels.Expansion.apply(latent, source, (self.num_gaussian(fold), fold), law)
                return fused
            source = torch.Generator(latent.device).manual_seed(source)
        rows: torch.Tensor = Expansion.apply(latent, self, fold, source)[0]
        return rows

    @torch.no_grad()
    def draw(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> Drawn:
        """Draw the augmented batch without gradients; :meth:`expand` adds the backward pass.

        Returns:
            tuple: The augmented batch, shape ``((1 + M) * N, *)``, and the features that dropout points keep, bool,
            shape ``(q, N, *)``, contiguous.
        """
        rows, kept = buffers(latent, fold, self)
        raw, gaussian, dropout = rows.unflatten(0, (1 + fold, -1)).split([1, fold - len(kept), len(kept)])
        raw.copy_(latent)
        with torch.autocast(latent.device.type, enabled=False):
            if len(gaussian) > 0:
                self._write_gaussian(gaussian, latent, generator)
            if len(dropout) > 0:
                chances = _scratch(dropout, dropout.shape).uniform_(generator=generator)
                torch.ge(chances, self.dropout, out=kept)
                torch.mul(latent * self.dropout_scale, kept, out=dropout)
        return rows, kept

    @property
    def dropout_scale(self) -> float:
        """The factor of the features that a dropout point keeps."""
        return 1 / (1 - self.dropout) if self.rescale else 1.0

    @property
    def bound(self) -> float:
        """τ, limited to 30 σ, which clips nothing and which float32 can hold."""
        return min(2 * self.sigma if self.tau is None else self.tau, _LAST_SIGMA * self.sigma)

    def _write_gaussian(self, points: torch.Tensor, latent: torch.Tensor, generator: torch.Generator | None) -> None:
        """Write x + Σ clip(ε, τ), Eq. (7), of each copy of each row into ``points``, shape ``(p, N, *)``."""
        features = width = math.prod(latent.shape[1:])
        shape = points.shape
        if self.basis == 'hadamard':
            width = 2 ** (features - 1).bit_length()
            shape = torch.Size((*points.shape[:2], width))
        noise = _scratch(points, shape).normal_(0, self.sigma, generator=generator).clamp_(-self.bound, self.bound)
        if self.basis != 'identity':
            noise = noise.view(-1, width)
            if self.basis == 'hadamard':
                rotate(noise, generator)
            else:
                noise = noise @ draw_basis(self.basis, noise, generator).T
            noise = noise[:, :features].view(points.shape)
        if self.noise_scale == 'rms':
            norm = torch.linalg.vector_norm(latent, dtype=at_least_float32(latent.dtype))
            torch.addcmul(latent, noise, norm, value=1 / math.sqrt(max(latent.numel(), 1)), out=points)
        else:
            torch.add(latent, noise, out=points)


class Expansion(torch.autograd.Function):
    """:meth:`Vicinity.draw` with its backward pass, the sum over the copies. The noise and its scale are constants.

    Gradients of any order and ``torch.func`` transforms are supported. ``torch.func.vmap`` draws for all rows at once.
    """

    @staticmethod
    def forward(latent: torch.Tensor, vicinity: Vicinity, fold: int, generator: torch.Generator | None) -> Drawn:
        """Return the augmented batch and the mask of :meth:`Vicinity.draw`."""
        return vicinity.draw(latent, fold, generator)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Drawn) -> None:
        """Keep the mask for the backward pass."""
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # the gradient of the mask would be one more block
        ctx.dropout_scale = inputs[1].dropout_scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the raw latent batch, and None for the other arguments."""
        if gradient is None:  # undefined: no output that depends on the rows has a gradient
            return (None,) * len(ctx.needs_input_grad)
        (kept,) = ctx.saved_tensors
        copies = gradient.unflatten(0, (-1, kept.shape[1]))
        shifted, dropout = copies.split([len(copies) - len(kept), len(kept)])
        if torch.is_grad_enabled():  # for a second derivative, which operations that write into buffers do not have
            total = shifted.sum(0) + ctx.dropout_scale * (kept * dropout).sum(0)
        else:
            total = _sum(shifted)
            if len(kept) > 0:
                total.add_(_sum(dropout * kept), alpha=ctx.dropout_scale)
        return total, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        latent: torch.Tensor,
        vicinity: Vicinity,
        fold: int,
        generator: torch.Generator | None,
    ) -> tuple[Drawn, tuple[int, int]]:
        """Draw for the rows of all examples as for one batch."""
        latents = latent.movedim(in_dims[0] or 0, 0)  # (B, N, *)
        rows, kept = Expansion.apply(latents.flatten(0, 1), vicinity, fold, generator)
        rows = rows.unflatten(0, (1 + fold, *latents.shape[:2])).movedim(1, 0).flatten(1, 2)
        return (rows, kept.unflatten(1, latents.shape[:2])), (0, 1)


def _sum(copies: torch.Tensor) -> torch.Tensor:
    if copies.ndim < 5:
        return copies.sum(0)
    return torch.sum(copies, 0, out=torch.empty_like(copies[0]))  # a plain sum makes channels_last contiguous


def as_vicinity(vicinity: Vicinity | Mapping[str, Any]) -> Vicinity:
    """Return a Vicinity, given one or a mapping of its arguments; raise UserError for anything else."""
    if isinstance(vicinity, Vicinity):
        return vicinity
    known = [field.name for field in fields(Vicinity)]
    if not isinstance(vicinity, Mapping) or not set(vicinity) <= set(known):
        wrong = [str(key) for key in vicinity if key not in known] if isinstance(vicinity, Mapping) else []
        end = nearest(wrong[0], known) if wrong else '.'
        problem = f'Expected vicinity to be a Vicinity or a mapping of {", ".join(known)}, got {vicinity!r}{end}'
        raise UserError(problem, 'vicinity')
    return Vicinity(**vicinity)


def buffers(latent: torch.Tensor, fold: int, vicinity: Vicinity) -> Drawn:
    """Allocate the tensors that :meth:`Vicinity.draw` fills."""
    shape = ((1 + fold) * len(latent), *latent.shape[1:])
    rows = torch.empty(shape, dtype=latent.dtype, device=latent.device, memory_format=kernels.layout_of(latent))
    return rows, latent.new_empty(fold - vicinity.num_gaussian(fold), *latent.shape, dtype=torch.bool)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for a narrower dtype, which would round noise and divergences, and any other dtype as it is."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _scratch(points: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return memory of a shape for the draws of ``points``; their own, with their shape, if it has the size.

    It is contiguous and at least float32: a seed gives one noise for all dtypes and memory formats of the latent batch.
    """
    dtype = at_least_float32(points.dtype)
    if points.dtype == dtype and points.is_contiguous() and points.numel() == shape.numel():
        return points
    return points.new_empty(shape, dtype=dtype)


def rotate(noise: torch.Tensor, generator: torch.Generator | None) -> None:
    """Multiply rows by Σ = H D / √Q in place: random signs D, then the Walsh-Hadamard matrix H, Q a power of two."""
    width = noise.shape[1]
    signs = noise.new_empty(width).bernoulli_(generator=generator).mul_(2).sub_(1)
    noise *= signs / math.sqrt(width)
    for stage in range(width.bit_length() - 1):
        first, second = noise.view(len(noise), -1, 2, 2**stage).unbind(2)
        first += second
        torch.sub(first, second, alpha=2, out=second)  # first is the sum by now


def draw_basis(basis: Basis, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw the Q × Q projection Σ, one for the whole batch (Sec. 3.3)."""
    width = rows.shape[1]
    if width > MAX_DENSE_FEATURES:
        raise TooWideError(
            f'basis={basis!r} needs a {width} × {width} matrix, and the limit is {MAX_DENSE_FEATURES} features. Use '
            f"basis='hadamard', random orthonormal directions without a matrix, or cut a narrower layer.",
        )
    square = torch.empty(width, width, dtype=rows.dtype, device=rows.device).normal_(generator=generator)
    if basis == 'normalized':
        return square.div_(torch.linalg.vector_norm(square, dim=0))  # in place: it can be the largest tensor of a step
    factor, triangle = torch.linalg.qr(square)
    return factor.mul_(triangle.diagonal().sign())  # without these signs the draw is not uniform
