"""The kernels of a GPU, run by Triton's interpreter, against the operators of PyTorch that they replace.

Run: pytest tests/test_kernels.py
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import composer_sba.functional as sbaf
from composer_sba import LatentExpander, Vicinity, kernels
from operator_count import operators_of_step

pytest.importorskip('triton')
pytestmark = pytest.mark.filterwarnings('ignore:Conversion of an array with ndim > 0:DeprecationWarning')  # Triton's

SEED = 2**64 - 3
VICINITIES = {
    'both': Vicinity(sigma=0.3),
    'absolute, not rescaled': Vicinity(0.4, sigma=0.5, tau=0.2, noise_scale='absolute', dropout=0.3, rescale=False),
    'Gaussian points without a bound': Vicinity(1.0, sigma=0.3, tau=math.inf),
    'dropout points': Vicinity(0.0, dropout=0.7),
    'no noise': Vicinity(1.0, sigma=0.0),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Use kernels on the CPU, which conftest.py has told Triton to interpret: slowly, so blocks are small."""
    monkeypatch.setattr(kernels, '_BLOCK', 256)
    monkeypatch.setattr(kernels, 'are_usable_on', lambda tensor: tensor.dtype != torch.float64)


def expand(vicinity, latent, fold=4, seed=SEED):
    return vicinity.expand(latent, fold, seed)


@pytest.mark.parametrize('vicinity', VICINITIES)
def test_the_augmented_batch_has_the_law_of_the_vicinity(vicinity):
    vicinity = VICINITIES[vicinity]
    latent = torch.randn(16, 125)
    raw, *copies = expand(vicinity, latent).view(5, 16, 125)
    _, *expected = vicinity.expand(latent, 4, torch.Generator().manual_seed(123)).view(5, 16, 125)
    assert torch.equal(raw, latent)
    for ours, theirs in zip(copies, expected, strict=True):
        for statistic in (
            lambda copy: (copy - latent).mean(),
            lambda copy: (copy - latent).std(),
            lambda copy: (copy == 0).float().mean(),
            lambda copy: ((copy - latent) * latent).mean(),
        ):
            assert statistic(ours).item() == pytest.approx(statistic(theirs).item(), rel=0.1, abs=0.2)
        assert (ours - latent).abs().max() <= (theirs - latent).abs().max() * 1.5 + 1e-6
    rows = expand(vicinity, latent[:1])
    if vicinity.has_noise(4):
        assert not torch.equal(copies[0], copies[1])
        assert not torch.equal(expand(vicinity, latent[:1], seed=SEED - 1)[1:], rows[1:])
    assert torch.equal(expand(vicinity, latent[:1]), rows)


def test_the_noise_is_bounded_in_units_of_the_root_mean_square():
    latent = 3 * torch.randn(32, 100)
    noise = expand(Vicinity(1.0, sigma=0.2), latent, 2)[32:] - latent.repeat(2, 1)
    rms = latent.square().mean().sqrt().item()
    assert noise.abs().max().item() == pytest.approx(2 * 0.2 * rms, rel=1e-4)
    assert noise.var().item() / (0.2 * rms) ** 2 == pytest.approx(0.9205, rel=0.05)  # of a Gaussian clipped at 2


@pytest.mark.parametrize('vicinity', VICINITIES)
@pytest.mark.parametrize('shape', [(6, 40), (6, 3, 4, 5), (2, 150)], ids=str)
def test_the_gradient_is_the_sum_over_copies_with_the_masks_that_were_drawn(vicinity, shape):
    vicinity, latent = VICINITIES[vicinity], torch.rand(*shape) + 0.5
    if len(shape) == 4:
        latent = latent.contiguous(memory_format=torch.channels_last)
    latent.requires_grad_()
    rows = expand(vicinity, latent)
    assert rows.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
    weight = torch.randn(rows.shape)
    (ours,) = torch.autograd.grad(rows, latent, weight, retain_graph=True)
    copies, weights = rows.detach().view(5, *shape), weight.view(5, *shape)
    p = vicinity.num_gaussian(4)
    theirs = weights[: 1 + p].sum(0) + vicinity.dropout_scale * (weights[1 + p :] * (copies[1 + p :] != 0)).sum(0)
    assert torch.allclose(ours, theirs, atol=1e-5), f'{(ours - theirs).abs().max()}'
    assert ours.stride() == latent.stride()
    again = torch.autograd.grad(rows, latent, weight, create_graph=True)[0]
    assert torch.allclose(ours, again, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_draws_the_noise_of_float32(dtype):
    latent = torch.randn(8, 32).to(dtype)
    ours, theirs = expand(Vicinity(sigma=0.5), latent), expand(Vicinity(sigma=0.5), latent.float())
    assert ours.dtype == dtype and torch.allclose(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(('fold', 'classes'), [(1, 2), (4, 10), (3, 1000)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_the_soft_label_loss_and_its_gradient(fold, classes, dtype, monkeypatch):
    rows = torch.randn((1 + fold) * 5, classes).mul_(3).to(dtype)
    raw, virtual = rows[:5], rows[5:].view(fold, 5, classes).requires_grad_()
    ours = sbaf.soft_label_kl(raw, virtual)
    (gradient,) = torch.autograd.grad(2.5 * ours, virtual)
    monkeypatch.setattr(kernels, 'are_usable_on', lambda tensor: False)
    theirs = sbaf.soft_label_kl(raw, virtual)
    (expected,) = torch.autograd.grad(2.5 * theirs, virtual)
    assert gradient.dtype == dtype and ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6), f'{(gradient - expected).abs().max()}'


def test_offsets_beyond_32_bits():
    """The copies of so large a batch lie 2^30 values apart. Few of the values are written, so few take memory."""
    from composer_sba import triton_kernels

    size, seed, block = 2**30, 5, 16
    raw, rows = torch.full((block,), 7.0), torch.empty(4 * size, dtype=torch.int8)
    triton_kernels.expand[(1,)](raw, rows, raw, seed, size, 0, 3, 0.0, 0.0, 0.0, 1.0, RMS=False, BLOCK=block)
    total = torch.zeros(block)
    triton_kernels.sum_copies[(1,)](rows, total, seed, size, 3, 3, 0.0, 1.0, BLOCK=block)
    assert total.tolist() == [4 * 7] * block
    logits = rows.as_strided((3, 1, 4), (size, 4, 1), size)
    divergence, gradient = torch.empty(1), torch.empty(3, 1, 4)
    arguments = (raw, logits, divergence, gradient, 4, 3, 4, 4, size, 1 / 3)
    triton_kernels.soft_label_kl[(1,)](*arguments, BLOCK=4)
    assert divergence.item() == pytest.approx(0, abs=1e-6)


COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget

from composer_sba import functional, kernels
from composer_sba.vicinity import Vicinity


class Driver:
    get_current_device = get_current_stream = lambda *args: 0
    get_current_target = lambda self: GPUTarget('cuda', 80, 32)


def compile_only(kernel, programs, *args, **constants):
    print(kernel.__name__, len(kernel.warmup(*args, grid=(programs,), **constants).asm['cubin']))


triton.runtime.driver.set_active(Driver())
kernels.are_usable_on, kernels._launch = lambda tensor: True, compile_only
cases = [(dtype, 4, Vicinity()) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
for dtype, fold, vicinity in [*cases, (torch.float32, 1, Vicinity(noise_scale='absolute'))]:
    rows = vicinity.expand(torch.ones(2, 8, dtype=dtype, requires_grad=True), fold, 2**64 - 3)
    rows.sum().backward()
    functional.soft_label_kl(rows[:2], rows[2:].view(fold, 2, 8))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """To machine code, as they are launched, which needs no GPU. The interpreter accepts more than the compiler."""
    variables = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    compiled = subprocess.run(
        [sys.executable, '-c', COMPILE],
        env=variables | {'TRITON_CACHE_DIR': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    names = [line.split()[0] for line in compiled.stdout.splitlines()]
    assert names == 4 * ['expand', 'sum_copies', 'soft_label_kl'], compiled.stdout


@pytest.mark.parametrize('fold', [1, 4, 32])
def test_an_augmented_step_of_a_gpu_dispatches_at_most_25_operators_more(fold, monkeypatch):
    """A kernel counts as one operator; what the interpreter does in its place does not count."""
    from composer_sba import triton_kernels

    network = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
    batch = torch.randn(4, 32), torch.randint(10, (4,))
    launches = []
    for name in ('expand', 'sum_copies', 'soft_label_kl'):
        kernel = getattr(triton_kernels, name)

        class Launched:
            def __getitem__(self, grid, name=name, kernel=kernel):
                def launch(*args, **kwargs):
                    launches.append(name)
                    with torch.utils._python_dispatch._disable_current_modes():
                        kernel[grid](*args, **kwargs)

                return launch

        monkeypatch.setattr(triton_kernels, name, Launched())

    plain = operators_of_step(network, *batch).names
    expander = LatentExpander(network, 'head', fold)
    augmented = operators_of_step(network, *batch, expander).names
    expander.remove()
    assert launches == ['expand', 'soft_label_kl', 'sum_copies']
    more = len(augmented) + len(launches) - len(plain)
    print(f'M = {fold}: {more} operators and kernels more than the {len(plain)} of a plain step')
    assert more <= 25, sorted(augmented)
