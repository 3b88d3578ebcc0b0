"""The expected divergence against Monte Carlo over Vicinity.sample, against quadrature and second order.

Its gradients against those of the sampled loss, and against finite differences.

Run: pytest tests/test_expectation.py
"""

import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import composer_sba.functional as sbaf
from composer_sba import Vicinity
from composer_sba.expectation import MAX_GROUPS

Affine = namedtuple('Affine', ['weight', 'bias'])


def make_head(classes, features, margin, rows=4):
    """A linear layer like a trained one, and sparse non-negative inputs: logits as a discriminant of class means has.

    ``margin`` is the standard deviation of the logits: 0.5 is a head at initialization, 4 one that is sure.
    """
    means = torch.relu(torch.randn(classes, features, dtype=torch.float64) - 0.3)
    latent = torch.relu(means[:rows] + 0.7 * torch.randn(rows, features, dtype=torch.float64) - 0.3)
    linear = nn.Linear(features, classes).double()
    with torch.no_grad():
        weight = means - means.mean(0) + 0.3 * torch.randn(classes, features, dtype=torch.float64)
        linear.weight.copy_(weight * margin / (latent @ weight.T).std())
        linear.bias.normal_(0, 0.1)
    return linear, latent


def clipped_variance(sigma, tau):
    """Of N(0, sigma²) clipped at ±tau, by the trapezoid rule."""
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    return torch.trapezoid((sigma * x).clamp(-tau, tau) ** 2 * torch.exp(-x * x / 2), x).item() / math.sqrt(2 * math.pi)


def monte_carlo(linear, latent, vicinity, draws):
    """The mean KL over many draws and its standard error; its second order controls the noise."""
    logits = linear(latent)
    probs = logits.softmax(-1)
    spread = probs @ linear.weight.square() - (probs @ linear.weight).square()  # Var_p(w_d)
    rms, rate = latent.square().mean(), vicinity.dropout
    powers = rms * clipped_variance(vicinity.sigma, 2 * vicinity.sigma), latent.square() * rate / (1 - rate)
    sample = vicinity.sample(latent, draws, torch.Generator().manual_seed(1))
    total, variance = 0.0, 0.0
    gaussian = vicinity.num_gaussian(draws)
    for copies, power in zip(sample.split([gaussian, draws - gaussian]), powers, strict=True):
        if len(copies) == 0:
            continue
        virtual = linear(copies)
        values = (probs * (logits.log_softmax(-1) - virtual.log_softmax(-1))).sum(-1)
        if vicinity.rescale:
            noise = virtual - logits
            second = ((probs * noise.square()).sum(-1) - (probs * noise).sum(-1).square()) / 2
            slope = ((values - values.mean(0)) * (second - second.mean(0))).mean(0) / second.var(0)
            values = values - slope * (second - (power * spread).sum(-1) / 2)
        share, values = len(copies) / draws, values.mean(1)
        total, variance = total + share * values.mean(), variance + share**2 * values.var() / len(copies)
    return total.item(), variance.sqrt().item()


VICINITIES = {
    **{f'sigma {sigma}': Vicinity(1.0, sigma=sigma) for sigma in (0.1, 0.5, 1.0)},
    **{f'dropout {rate}': Vicinity(0.0, dropout=rate) for rate in (0.1, 0.5)},
    'half each': Vicinity(0.5, sigma=0.5),
    'not rescaled': Vicinity(0.25, sigma=0.5, dropout=0.3, rescale=False),
}


@pytest.mark.parametrize('vicinity', VICINITIES.values(), ids=VICINITIES)
@pytest.mark.parametrize(
    ('classes', 'features', 'margin', 'draws'),
    [(10, 64, 0.5, 4000), (10, 64, 4.0, 8000), (10, 512, 0.5, 1000), (10, 512, 2.0, 2000),
     (100, 64, 0.5, 1000), (100, 64, 4.0, 4000), (100, 512, 0.5, 500), (100, 512, 2.0, 1000)],
)  # fmt: skip
@torch.no_grad()
def test_it_is_within_3_percent_of_monte_carlo(classes, features, margin, draws, vicinity):
    linear, latent = make_head(classes, features, margin)
    ours = sbaf.expected_soft_label_kl(latent, linear, linear(latent), vicinity).item()
    theirs, error = monte_carlo(linear, latent, vicinity, draws)
    print(f'{classes:4} {features:4} {margin} {theirs:.3e} {ours / theirs - 1:+.2%} se {error / theirs:.2%}')
    assert abs(ours - theirs) < 0.03 * theirs + 2 * error, f'{ours} against {theirs} ± {error}'


def test_two_classes_are_exact():
    """One difference of logits, Gaussian: against the trapezoid rule, and the gradients of both."""
    linear, latent = make_head(2, 16, 2.0, rows=2)
    latent.requires_grad_()
    vicinity = Vicinity(1.0, sigma=1.0, tau=math.inf, noise_scale='absolute')
    logits = linear(latent)
    ours = sbaf.expected_soft_label_kl(latent, linear, logits, vicinity)
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    first = torch.zeros_like(x) + (linear.weight[0] - linear.weight[1]).norm() * x  # of the first class's logit
    virtual = logits + torch.stack([first, torch.zeros_like(first)], -1)
    kl = (logits.detach().softmax(-1) * (logits.detach().log_softmax(-1) - virtual.log_softmax(-1))).sum(-1)
    theirs = torch.trapezoid(kl.mean(1) * torch.exp(-(x[:, 0] ** 2) / 2), x[:, 0]) / math.sqrt(2 * math.pi)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
    gradients = (torch.autograd.grad(each, [latent, linear.weight], retain_graph=True) for each in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max(), f'{(a - b).abs().max()} of {b.abs().max()}'


@pytest.mark.parametrize('classes', [10, 100])
@pytest.mark.parametrize('fraction', [0.0, 1.0])
@torch.no_grad()
def test_small_noise_has_the_second_order(classes, fraction):
    """As slow loops: half the sum over features of Var(δ_d) Var_p(w_d)."""
    linear, latent = make_head(classes, 32, 1.0, rows=2)
    latent *= 1e-3
    vicinity = Vicinity(fraction, sigma=1e-3, noise_scale='absolute')
    probs, total = linear(latent).softmax(-1), 0.0
    for row in range(2):
        for d in range(32):
            weights = [linear.weight[k, d].item() for k in range(classes)]
            mean = sum(probs[row, k].item() * weights[k] for k in range(classes))
            spread = sum(probs[row, k].item() * (weights[k] - mean) ** 2 for k in range(classes))
            noise = clipped_variance(1e-3, 2e-3) if fraction else latent[row, d].item() ** 2
            total += noise * spread / 2 / 2
    ours = sbaf.expected_soft_label_kl(latent, linear, linear(latent), vicinity).item()
    # Beyond MAX_GROUPS classes the noise of the improbable ones is taken for independent.
    assert ours == pytest.approx(total, rel=1e-2 if classes > MAX_GROUPS else 1e-4)


@pytest.mark.parametrize('stop_gradient', [True, False])
@pytest.mark.parametrize('vicinity', [Vicinity(1.0, sigma=0.7), Vicinity(0.0, dropout=0.3), VICINITIES['not rescaled']])
def test_gradients_are_the_mean_gradients_of_the_sampled_loss(vicinity, stop_gradient):
    linear, latent = make_head(6, 48, 1.5)
    latent.requires_grad_()
    tensors = [latent, linear.weight, linear.bias]
    logits = linear(latent)
    ours = torch.autograd.grad(
        sbaf.expected_soft_label_kl(latent, linear, logits, vicinity, stop_gradient=stop_gradient), tensors
    )
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(30):
        virtual = linear(vicinity.sample(latent, 500, generator))
        loss = sbaf.soft_label_kl(linear(latent), virtual, stop_gradient=stop_gradient)
        drawn.append(torch.autograd.grad(loss, tensors))
    for name, a, each in zip(['latent', 'weight', 'bias'], ours, zip(*drawn, strict=True), strict=True):
        b = torch.stack(each)
        error = (b.var(0).sum() / len(b)).sqrt().item()
        size, difference = b.mean(0).norm().item(), (a - b.mean(0)).norm().item()
        assert difference < 0.02 * size + 2 * error, f'{name}: {difference} of {size} ± {error}'


@pytest.mark.parametrize(
    ('classes', 'rescale', 'stop_gradient'),  # a constant soft label shows in differences only if the noise has a mean
    [(5, True, True), (5, True, False), (5, False, False), (MAX_GROUPS + 6, True, True)],
)
def test_gradients_are_those_of_finite_differences(classes, rescale, stop_gradient):
    vicinity = Vicinity(0.5, sigma=0.5, noise_scale='absolute', dropout=0.4, rescale=rescale)

    def loss(latent, weight, bias, logits):
        linear = Affine(weight, bias)
        return sbaf.expected_soft_label_kl(latent, linear, logits, vicinity, stop_gradient=stop_gradient)

    shapes = [(2, 3), (classes, 3), (classes,), (2, classes)]
    torch.autograd.gradcheck(loss, [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes])


def test_a_constant_soft_label_makes_a_difference_only_if_the_noise_has_a_mean():
    linear, latent = make_head(6, 16, 2.0)
    for rescale in (True, False):
        first, second = (
            sbaf.expected_soft_label_kl(latent, linear, linear(latent), Vicinity(rescale=rescale), stop_gradient=stop)
            for stop in (True, False)
        )
        assert first.item() == second.item()
        a, b = (torch.autograd.grad(each, linear.weight)[0] for each in (first, second))
        assert torch.allclose(a, b, atol=1e-12) == rescale


@pytest.mark.parametrize('classes', [2, 3, 10, MAX_GROUPS, MAX_GROUPS + 1, 1000])
@pytest.mark.parametrize(
    'vicinity',
    [
        Vicinity(1.0, sigma=0.0),
        Vicinity(sigma=100.0, dropout=0.99),
        Vicinity(0.3, dropout=1e-4),
        Vicinity(0.0, dropout=0.0),
    ],
)
def test_any_noise_gives_a_finite_value_and_gradients(classes, vicinity):
    latent, linear = torch.relu(torch.randn(8, 32)).requires_grad_(), nn.Linear(32, classes)
    nn.init.normal_(linear.weight)
    kl = sbaf.expected_soft_label_kl(latent, linear, linear(latent), vicinity)
    kl.backward()
    assert -1e-6 < kl.item() < 1e4
    assert latent.grad.isfinite().all() and linear.weight.grad.isfinite().all()
    if vicinity.dropout == 0 or vicinity.sigma == 0:
        assert abs(kl.item()) < 1e-5 and linear.weight.grad.abs().max() < 1e-3


@torch.no_grad()
def test_the_sampled_estimate_comes_closer_as_one_over_the_root_of_the_fold():
    linear, latent = make_head(10, 64, 1.0)
    vicinity, generator = Vicinity(0.5, sigma=0.5), torch.Generator().manual_seed(0)
    logits = linear(latent)
    limit = sbaf.expected_soft_label_kl(latent, linear, logits, vicinity)
    distances = []
    for fold in (2, 8, 32, 128):
        draws = [sbaf.soft_label_kl(logits, linear(vicinity.sample(latent, fold, generator))) for _ in range(100)]
        distances.append((torch.stack(draws) - limit).square().mean().sqrt().item())
    for more, fewer in zip(distances, distances[1:], strict=False):
        assert more / fewer == pytest.approx(2, rel=0.25), distances


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    linear, latent = make_head(10, 64, 1.0)
    exact = sbaf.expected_soft_label_kl(latent, linear, linear(latent), Vicinity())
    with torch.autocast('cpu', torch.bfloat16):
        latent, linear = latent.to(dtype), linear.to(dtype)
        kl = sbaf.expected_soft_label_kl(latent, linear, F.linear(latent, linear.weight, linear.bias), Vicinity())
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(exact.item(), rel=0.03)


def test_shapes_that_do_not_belong_together_are_refused():
    linear = nn.Linear(4, 3)
    with pytest.raises(
        ValueError, match=r'of shapes \(N, Q\), \(K, Q\) and \(N, K\), got \(2, 4\), \(3, 4\), \(2, 5\)'
    ):
        sbaf.expected_soft_label_kl(torch.zeros(2, 4), linear, torch.zeros(2, 5), Vicinity())
    with pytest.raises(ValueError, match=r'got \(2, 7, 4\), \(3, 4\), \(2, 7, 3\)'):
        sbaf.expected_soft_label_kl(torch.zeros(2, 7, 4), linear, torch.zeros(2, 7, 3), Vicinity())
