"""Vicinity: its samples, compared with the loops of reference.py (float64, 1e-10), and the moments of its noise.

Run: pytest tests/test_vicinity.py
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from composer_sba import Vicinity

N, Q, M = 4, 6, 5


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('noise_scale', ['absolute', 'rms'])
@pytest.mark.parametrize('basis', ['identity', 'normalized'])
@pytest.mark.parametrize('rescale', [True, False])
def test_samples_are_eq_7_and_8(noise_scale, basis, rescale):
    vicinity = Vicinity(0.6, sigma=0.8, tau=0.9, noise_scale=noise_scale, basis=basis, dropout=0.3, rescale=rescale)
    latent = torch.randn(N, Q, dtype=torch.float64)
    ours = vicinity.sample(latent, M, generator())

    g = generator()  # the same draws, in the order of Eq. 5-8: ε, Σ, B
    noise = torch.empty(3, N, Q, dtype=torch.float64).normal_(0, 0.8, generator=g)
    matrix = torch.eye(Q, dtype=torch.float64)
    if basis == 'normalized':
        matrix = reference.normalized_basis(torch.empty(Q, Q, dtype=torch.float64).normal_(generator=g))
    keep = torch.rand(2, N, Q, dtype=torch.float64, generator=g) >= 0.3
    unit = reference.root_mean_square(latent) if noise_scale == 'rms' else 1.0
    theirs = [
        [reference.gaussian_point(latent[i], unit * noise[j, i], unit * 0.9, matrix) for i in range(N)]
        for j in range(3)
    ]
    theirs += [[reference.dropout_point(latent[i], keep[j, i], 0.3, rescale) for i in range(N)] for j in range(2)]
    difference = (ours - torch.stack([torch.stack(copy) for copy in theirs])).abs().max()
    assert difference < 1e-10, f'samples differ by {difference}'


@pytest.mark.parametrize(
    ('fraction', 'fold', 'gaussian'), [(0.5, 4, 2), (0.5, 1, 1), (0.5, 5, 3), (0, 4, 0), (1, 4, 4), (0.3, 8, 2)]
)
def test_gaussian_points_come_first_and_have_the_given_share(fraction, fold, gaussian):
    latent = torch.ones(3, 64)
    samples = Vicinity(fraction, sigma=0.1, dropout=0.5).sample(latent, fold, generator())
    is_dropout = [bool(torch.isin(copy, torch.tensor([0.0, 2.0])).all()) for copy in samples]
    assert is_dropout == [False] * gaussian + [True] * (fold - gaussian)


def test_no_rows_have_no_virtual_samples():
    assert Vicinity().sample(torch.zeros(0, 16), 4).shape == (4, 0, 16)


def test_noise_is_clipped_at_two_sigma_by_default_and_in_units_of_rms():
    latent = 3 * torch.randn(64, 256)
    rms = reference.root_mean_square(latent)
    noise = Vicinity(1.0, sigma=0.2).sample(latent, 8, generator()) - latent
    assert noise.abs().max().item() == pytest.approx(2 * 0.2 * rms, rel=1e-5)
    # A standard normal clipped at 2 has variance 0.9205 (Φ and φ at 2).
    variance = noise.var().item() / (0.2 * rms) ** 2
    assert variance == pytest.approx(0.9205, rel=0.01), f'variance {variance:.4f}'


def test_dropout_points_keep_the_mean_only_when_rescaled():
    latent = torch.ones(64, 256)
    for rescale, mean in [(True, 1.0), (False, 0.7)]:
        samples = Vicinity(0.0, dropout=0.3, rescale=rescale).sample(latent, 8, generator())
        assert samples.mean().item() == pytest.approx(mean, rel=0.01), f'rescale={rescale}: {samples.mean():.4f}'
        assert (samples == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


def basis_of(name, width):
    """Σ, computed from samples: the noise is drawn again and Eq. (7) is solved for Σ."""
    vicinity = Vicinity(1.0, sigma=1.0, tau=math.inf, noise_scale='absolute', basis=name)
    projected = vicinity.sample(torch.zeros(4 * width, width, dtype=torch.float64), 1, generator())[0]
    noise = torch.empty(4 * width, width, dtype=torch.float64).normal_(generator=generator())
    return torch.linalg.lstsq(noise, projected).solution.T


def test_bases_are_normalized_and_orthogonal():
    normalized, orthogonal = basis_of('normalized', 50), basis_of('orthogonal', 50)
    assert torch.allclose(normalized.norm(dim=0), torch.ones(50, dtype=torch.float64))
    assert torch.allclose(orthogonal.T @ orthogonal, torch.eye(50, dtype=torch.float64), atol=1e-12)
    assert (orthogonal.diagonal() < 0).any(), 'QR without its signs would give no negative diagonal half of the time'


def walsh_hadamard(width):
    """H, whose entry in row a and column b is -1 to the number of bits that a and b have in common."""
    return torch.tensor([[(-1.0) ** (a & b).bit_count() for b in range(width)] for a in range(width)]).double()


@pytest.mark.parametrize(('features', 'width'), [(1, 1), (2, 2), (64, 64), (50, 64), (65, 128)])
def test_the_hadamard_basis_is_its_dense_matrix_and_orthonormal(features, width):
    vicinity = Vicinity(1.0, sigma=0.8, tau=0.9, noise_scale='absolute', basis='hadamard')
    drawn, redrawn = generator(), generator()
    for batch in range(2):  # with other signs
        ours = vicinity.sample(torch.zeros(N, features, dtype=torch.float64), M, drawn)
        # The same draws, in the order of Eq. 7: ε, longer where Q is no power of two, then the signs of Σ.
        noise = torch.empty(M, N, width, dtype=torch.float64).normal_(0, 0.8, generator=redrawn).clamp(-0.9, 0.9)
        signs = 2 * torch.empty(width, dtype=torch.float64).bernoulli_(generator=redrawn) - 1
        matrix = walsh_hadamard(width)[:features] * signs / math.sqrt(width)
        difference = (ours - noise @ matrix.T).abs().max()
        assert difference < 1e-12, f'samples of batch {batch} differ by {difference}'
        assert torch.allclose(matrix @ matrix.T, torch.eye(features, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize('features', [32, 48])
def test_noise_in_the_hadamard_basis_has_the_covariance_of_the_clipped_noise(features):
    vicinity = Vicinity(1.0, sigma=0.5, noise_scale='absolute', basis='hadamard')
    noise = vicinity.sample(torch.zeros(20_000, features), 1, generator())[0]
    difference = torch.cov(noise.T) / 0.5**2 - 0.9205 * torch.eye(features)
    assert difference.abs().max() < 0.05, f'covariance differs by {difference.abs().max()}'  # 5 standard errors


@pytest.mark.parametrize('basis', ['normalized', 'orthogonal', 'hadamard'])
def test_a_basis_changes_directions_and_keeps_the_scale(basis):
    latent = torch.zeros(256, 40)
    vicinity = Vicinity(1.0, sigma=0.5, noise_scale='absolute', basis=basis)
    samples = vicinity.sample(latent, 16, generator())
    assert samples.abs().max() > 1.0, 'a projected noise vector is not clipped componentwise'
    assert samples.std().item() == pytest.approx(0.5 * math.sqrt(0.9205), rel=0.05)


def test_the_noise_of_a_seed_is_the_same_in_every_dtype_and_memory_format():
    latent = torch.randn(4, 3, 8, 8)
    plain = Vicinity().sample(latent, 4, generator())
    last = Vicinity().sample(latent.contiguous(memory_format=torch.channels_last), 4, generator())
    half = Vicinity().sample(latent.bfloat16(), 4, generator())
    assert torch.allclose(plain, last, atol=1e-6)
    assert last.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(plain, half.float(), atol=0.05)


def test_gradients_reach_the_latent_batch_and_nothing_else():
    latent = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    vicinity = Vicinity(0.5, sigma=0.3, dropout=0.4)
    assert torch.autograd.gradcheck(lambda x: vicinity.sample(x, 2, generator())[1], latent)
    (gradient,) = torch.autograd.grad(vicinity.sample(latent, 2, generator())[0].sum(), latent)
    assert torch.equal(gradient, torch.ones_like(latent)), 'the scale of Gaussian noise is a constant'


@pytest.mark.parametrize('fraction', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('basis', ['identity', 'normalized', 'hadamard'])
def test_the_backward_pass_is_the_gradient(fraction, basis):
    vicinity = Vicinity(fraction, sigma=0.3, noise_scale='absolute', basis=basis, dropout=0.4)
    latent = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: vicinity.expand(x, 3, generator()), latent)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_gradients_are_summed_over_the_copies_in_every_dtype_and_memory_format(dtype, layout):
    latent = torch.rand(4, 3, 8, 8).add(1).to(dtype).contiguous(memory_format=layout).requires_grad_()
    rows = Vicinity(dropout=0.5).expand(latent, 4, generator())
    gradient = torch.randn(20, 3, 8, 8).to(dtype).contiguous(memory_format=layout)
    (ours,) = torch.autograd.grad(rows, latent, gradient)
    copies = gradient.float().unflatten(0, (5, 4))
    theirs = copies[:3].sum(0) + (copies[3:] * 2 * (rows.unflatten(0, (5, 4))[3:] != 0)).sum(0)
    for tensor in (rows, ours):
        assert tensor.is_contiguous(memory_format=layout) and tensor.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (ours - theirs).abs().max() < tolerance, f'gradients differ by {(ours - theirs).abs().max()}'


class Allocations(TorchDispatchMode):
    """Holds every tensor that an operator makes, which keeps memory from being reused."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = storage
        return out

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize(
    ('basis', 'extra'), [('identity', 0), ('hadamard', 0), ('normalized', 4 * (64 + 20 * 32) * 64)]
)
def test_the_augmented_batch_is_written_without_temporaries_of_many_rows(basis, extra):
    rows, width, fold = 32, 64, 40
    latent = torch.randn(rows, width, requires_grad=True)
    with Allocations() as forward:
        out = Vicinity(basis=basis).expand(latent, fold, generator())
    block = rows * width
    needed = 4 * (1 + fold) * block + fold // 2 * block  # what comes out, and a mask of bytes
    assert forward.bytes() - needed - extra < 4 * 3 * block, f'{forward.bytes()} bytes for {needed}, and {extra} for Σ'
    gradient = torch.ones_like(out)
    with Allocations() as backward:
        torch.autograd.grad(out, latent, gradient)
    assert backward.bytes() - gradient.nbytes < 4 * (fold // 2 + 4) * block, 'no more than the dropout points, masked'


@pytest.mark.parametrize('basis', ['orthogonal', 'hadamard'])
def test_a_generator_leaves_the_global_stream_alone(basis):
    before = torch.get_rng_state()
    first = Vicinity(basis=basis).sample(torch.ones(2, 8), 4, generator())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, Vicinity(basis=basis).sample(torch.ones(2, 8), 4, generator()))


def test_autocast_does_not_coarsen_the_projection():
    vicinity = Vicinity(1.0, basis='normalized')
    latent = torch.randn(4, 64)
    with torch.autocast('cpu', torch.bfloat16):
        under = vicinity.sample(latent, 2, generator())
    assert torch.equal(under, vicinity.sample(latent, 2, generator()))


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ({'gaussian_fraction': 1.1}, r'Expected gaussian_fraction to be a number in \[0, 1\], got 1\.1\.'),
        ({'sigma': -0.1}, r'Expected sigma to be a number in \[0, 1e30\], got -0\.1\.'),
        ({'sigma': '0.1'}, r"Expected sigma to be a number in \[0, 1e30\], got '0\.1'\."),
        ({'sigma': 1e39}, r'Expected sigma to be a number in \[0, 1e30\], got 1e\+39\.'),
        ({'tau': -1}, r'Expected tau to be a number >= 0, or None for 2 \* sigma, got -1\.'),
        ({'dropout': 1.0}, r'Expected dropout to be a number in \[0, 1\), got 1\.0\.'),
        ({'noise_scale': 'std'}, r"Expected noise_scale to be one of rms, absolute, got 'std'\."),
        ({'basis': 'random'}, r"Expected basis to be one of .*, orthogonal, hadamard, got 'random'\."),
        ({'rescale': 1}, r'Expected rescale to be true or false, got 1\.'),
    ],
)
def test_bad_arguments_are_named(argument, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        Vicinity(**argument)


def test_dense_bases_end_at_8192_features():
    message = (
        "basis='normalized' needs a 8193 × 8193 matrix, and the limit is 8192 features. Use basis='hadamard', "
        'random orthonormal directions without a matrix, or cut a narrower layer.'
    )
    with pytest.raises(ValueError, match=f'^{message}$'):
        Vicinity(basis='normalized').sample(torch.zeros(2, 8193), 2)
    assert Vicinity(basis='hadamard').sample(torch.ones(2, 8193), 2).shape == (2, 2, 8193)


@pytest.mark.parametrize('bound', [0.01, 0.2, 1.0, 2.0, math.inf])
@torch.no_grad()
def test_the_noise_is_a_clipped_gaussian(bound):
    """Its second and fourth moment are those of the closed form, in units of sigma."""
    latent = 3 * torch.randn(8, 64, dtype=torch.float64)
    vicinity = Vicinity(1.0, sigma=0.5, tau=0.5 * bound, noise_scale='absolute')
    noise = (vicinity.sample(latent, 1000, torch.Generator().manual_seed(0)) - latent) / 0.5
    b = min(bound, 40.0)
    tails, density = math.erfc(b / math.sqrt(2)), math.exp(-(b**2) / 2) / math.sqrt(2 * math.pi)
    second = 1 - tails - 2 * b * density + b**2 * tails
    fourth = 3 * (1 - tails) - 2 * (b**3 + 3 * b) * density + b**4 * tails
    assert noise.square().mean().item() == pytest.approx(second, rel=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(fourth, rel=0.03)
