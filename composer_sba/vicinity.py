"""The vicinity P′ of a latent batch: the law from which virtual samples are drawn (Eq. 5-8 of Li et al., 2020)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from composer_sba.checks import check_choice, check_flag, check_number

NoiseScale = Literal['rms', 'absolute']
Basis = Literal['identity', 'normalized', 'orthogonal']

MAX_DENSE_FEATURES = 8192  # a dense Σ of this width holds 256 MiB in float32


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
            matrix with columns of unit norm, the paper's; ``'orthogonal'``: a uniformly random orthogonal matrix.
            Default: ``'identity'``, whose law differs from a rotation's by the clip alone.
        dropout (float, optional): Probability r that a feature of a dropout point is deleted, in [0, 1). Default:
            ``0.5``.
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
            ValueError: If Σ is dense and Q exceeds 8,192.
        """
        return self.expand(latent, fold, generator)[len(latent) :].unflatten(0, (fold, len(latent)))

    def expand(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Build the augmented batch [X_k; V_g; V_d] of Eq. (6): the raw rows, then the virtual samples, copy by copy.

        Args, errors and noise are those of :meth:`sample`.

        Returns:
            torch.Tensor: Shape ``((1 + M) * N, *)``, dtype and memory format of ``latent``.
        """
        return self.place(latent, self.draw(latent, fold, generator))

    @torch.no_grad()
    def draw(self, latent: torch.Tensor, fold: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw all that is random in the virtual samples: Σ clip(ε, τ) for Gaussian points, B for dropout points.

        Returns:
            torch.Tensor: Shape ``(M * N, *)``, contiguous and at least float32, so that one seed means one noise
            whatever the dtype and the memory format. No gradient flows to ``latent``, which gives shape and scale.
        """
        gaussian = self.num_gaussian(fold)
        with torch.autocast(latent.device.type, enabled=False):
            blocks = []
            if gaussian > 0:
                blocks.append(self._noise(latent, gaussian, generator))
            if gaussian < fold:
                blocks.append(self._mask(latent, fold - gaussian, generator))
            return torch.cat(blocks)

    def place(self, latent: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Place the virtual samples that :meth:`draw` drew around the latent batch, below it; shapes as there."""
        rows = len(latent)
        gaussian = self.num_gaussian(len(drawn) // rows) * rows
        blocks = [latent]
        with torch.autocast(latent.device.type, enabled=False):
            if gaussian > 0:
                blocks.append((latent + _as_copies(drawn[:gaussian], latent)).flatten(0, 1))
            if gaussian < len(drawn):
                blocks.append((latent * _as_copies(drawn[gaussian:], latent)).flatten(0, 1))
            return torch.cat(blocks)

    def _noise(self, latent: torch.Tensor, copies: int, generator: torch.Generator | None) -> torch.Tensor:
        """Σ clip(ε, τ) for each copy of each row, Eq. (7). Shape ``(copies * N, *)``."""
        tau = 2 * self.sigma if self.tau is None else self.tau
        noise = _empty(latent, copies).normal_(0, self.sigma, generator=generator).clamp_(-tau, tau)
        if self.basis != 'identity':
            rows = noise.flatten(1)
            noise = (rows @ _draw_basis(self.basis, rows, generator).T).view_as(noise)
        if self.noise_scale == 'rms':
            noise *= torch.linalg.vector_norm(latent, dtype=noise.dtype) / math.sqrt(latent.numel())
        return noise

    def _mask(self, latent: torch.Tensor, copies: int, generator: torch.Generator | None) -> torch.Tensor:
        """B for each copy of each row, Eq. (8). Shape ``(copies * N, *)``."""
        mask = _empty(latent, copies).bernoulli_(1 - self.dropout, generator=generator)
        return mask.div_(1 - self.dropout) if self.rescale else mask


def as_vicinity(vicinity: Vicinity | Mapping[str, Any]) -> Vicinity:
    """Make a Vicinity of a mapping of its arguments, as a recipe holds it; ValueError names what is none of them."""
    if isinstance(vicinity, Vicinity):
        return vicinity
    known = [field.name for field in fields(Vicinity)]
    if not isinstance(vicinity, Mapping) or not set(vicinity) <= set(known):
        raise ValueError(f'Expected vicinity to be a Vicinity or a mapping of {", ".join(known)}, got {vicinity!r}.')
    return Vicinity(**vicinity)


def _empty(latent: torch.Tensor, copies: int) -> torch.Tensor:
    dtype = torch.promote_types(latent.dtype, torch.float32)
    return torch.empty((copies * len(latent), *latent.shape[1:]), dtype=dtype, device=latent.device)


def _as_copies(block: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Give noise of shape (copies * N, *) the dtype and memory format of ``latent`` and the shape (copies, N, *)."""
    channels_last = latent.ndim == 4 and latent.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not latent.is_contiguous() else torch.contiguous_format
    return block.to(latent.dtype, memory_format=layout).unflatten(0, (-1, len(latent)))


def _draw_basis(basis: Basis, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw the Q × Q projection Σ, one for the whole batch (Sec. 3.3)."""
    width = rows.shape[1]
    if width > MAX_DENSE_FEATURES:
        raise ValueError(
            f'basis={basis!r} needs a {width} × {width} matrix; dense bases end at {MAX_DENSE_FEATURES} features. Use '
            f"basis='identity', whose noise has the same law up to the clip, or cut a narrower layer.",
        )
    square = torch.empty(width, width, dtype=rows.dtype, device=rows.device).normal_(generator=generator)
    if basis == 'normalized':
        return square / torch.linalg.vector_norm(square, dim=0)
    factor, triangle = torch.linalg.qr(square)
    return factor * triangle.diagonal().sign()  # without these signs QR does not draw uniformly


@torch.library.custom_op('composer_sba::draw', mutates_args=())
def draw_by_seed(
    latent: torch.Tensor,
    seed: torch.Tensor,
    fold: int,
    gaussian_fraction: float,
    sigma: float,
    tau: float | None,
    noise_scale: str,
    basis: str,
    dropout: float,
    rescale: bool,
) -> torch.Tensor:
    """Run :meth:`Vicinity.draw` on a generator of this seed, as one operator: torch.compile cannot trace a generator.

    ``latent`` is detached. ``seed`` is 64 bits in a tensor of shape ``()`` on the CPU, since a number would be compiled
    in. The rest are the fold and the vicinity's own arguments, since an operator takes no dataclass.
    """
    # An operator's schema knows str, where Vicinity asks for one of a few.
    vicinity = Vicinity(gaussian_fraction, sigma, tau, noise_scale, basis, dropout, rescale)  # type: ignore[arg-type]
    return vicinity.draw(latent, fold, torch.Generator(latent.device).manual_seed(int(seed) % 2**64))


@draw_by_seed.register_fake
def _(latent: torch.Tensor, seed: torch.Tensor, fold: int, *vicinity: Any) -> torch.Tensor:
    return _empty(latent, fold)
