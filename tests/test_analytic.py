"""The analytic estimator: against Monte Carlo over Vicinity.sample, against quadrature, and in a Trainer.

Run: pytest tests/test_analytic.py
"""

import copy
import json
import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.algorithms import SAM, SWA, MixUp
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, Vicinity, sort_sba_last
from composer_sba.analytic import AnalyticHead
from composer_sba.errors import CutLayerError
from composer_sba.expectation import MAX_GROUPS
from composer_sba.laws import vicinity_laws

ROWS, CLASSES = 16, 5
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


@pytest.mark.parametrize('basis', ['identity', 'normalized', 'orthogonal', 'hadamard'])
@pytest.mark.parametrize(
    ('tau', 'noise_scale'), [(None, 'rms'), (0.1, 'rms'), (math.inf, 'absolute'), (0.6, 'absolute')]
)
@torch.no_grad()
def test_gaussian_noise_has_the_cumulants_of_the_vicinity(basis, tau, noise_scale):
    latent = 3 * torch.randn(8, 64, dtype=torch.float64)
    vicinity = Vicinity(1.0, sigma=0.5, tau=tau, basis=basis, noise_scale=noise_scale)
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([vicinity.sample(latent, 100, generator) - latent for _ in range(10)])
    (law,) = vicinity_laws(latent, torch.eye(64, dtype=torch.float64), None, latent, vicinity)
    variance = noise.square().mean().item()
    assert law.share == 1 and law.logits is latent
    assert law.noise.scale[0, 0].item() ** 2 == pytest.approx(variance, rel=0.02)
    kurtosis = noise.pow(4).mean().item() / variance**2 - 3
    assert law.noise.kurtosis[0].item() == pytest.approx(kurtosis, abs=0.12)  # of columns of unit norm, 6 / Q


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('features', [6, 300])
@torch.no_grad()
def test_dropout_laws_have_the_cumulants_of_the_vicinity(features, rescale):
    latent = torch.rand(1, features, dtype=torch.float64) + 0.5
    weight, bias = torch.randn(4, features, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    vicinity = Vicinity(0.0, dropout=0.3, rescale=rescale)
    laws = vicinity_laws(latent, weight, bias, latent @ weight.T + bias, vicinity)
    assert [law.share for law in laws] == pytest.approx([0.3, 0.7] if features == 6 else [1.0])
    copies = vicinity.sample(latent, 20000, torch.Generator().manual_seed(0))[:, 0]
    mean = sum(law.share * law.logits for law in laws)[0]
    virtual = copies @ weight.T + bias
    assert ((mean - virtual.mean(0)).abs() < 4 * virtual.std(0) / math.sqrt(len(virtual))).all()
    noise, rest = copies - copies.mean(0), laws[0].noise
    ruled = rest.scale[0] == 0  # whose two values make two laws
    assert ruled.sum() == len(laws) - 1
    scale = noise.std(0)
    assert torch.allclose(rest.scale[0][~ruled], scale[~ruled], rtol=0.05)
    assert rest.skewness.item() == pytest.approx((noise / scale).pow(3).mean().item(), abs=0.05)
    assert rest.kurtosis.item() == pytest.approx((noise / scale).pow(4).mean().item() - 3, abs=0.05)


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


class Net(nn.Module):
    """A convolutional head behind pooling, with batch norm and dropout below it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))


def gradients_of(model, x, y, head=None, body=None):
    """Gradients of cross-entropy plus twice the divergence: by the head's hook, or by the function itself."""
    model.zero_grad()
    torch.manual_seed(1)
    if head is None:
        latent = model.stem(x).mean((2, 3))
        logits = model.fc(latent)
        kl = sbaf.expected_soft_label_kl(latent, model.fc, logits, VICINITIES['not rescaled'])
    else:
        head.arm(0)
        logits = (body or model)(x)
        kl = head.kl()
    (2 * kl + F.cross_entropy(logits, y)).backward()
    if head is not None:
        head.disarm()
    return [parameter.grad.clone() for parameter in model.parameters()]


def make_net(dtype=torch.float64):
    return Net().to(dtype), torch.randn(6, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (6,))


@pytest.mark.parametrize('how', ['eager', 'checkpointed', 'compiled', 'copied'])
def test_the_hook_gives_the_gradients_of_the_function(how):
    torch._dynamo.reset()
    model, x, y = make_net()
    expected = gradients_of(model, x, y)
    head = AnalyticHead(model, VICINITIES['not rescaled'])
    if how == 'copied':  # as Composer's SWA does
        head.arm(0)
        copy.deepcopy(model)(x)
        with pytest.raises(RuntimeError, match="the layer 'head' did not run in the armed forward pass"):
            head.kl()
    body = {
        'checkpointed': lambda x: checkpoint(model, x, use_reentrant=False),
        'compiled': torch.compile(model, backend='eager'),
    }.get(how)
    for _ in range(2):
        for a, b in zip(gradients_of(model, x, y, head, body), expected, strict=True):
            assert (a - b).abs().max() < 1e-10, f'{(a - b).abs().max()}'
        model(x)
        with pytest.raises(RuntimeError, match='No expected divergence'):
            head.kl()
    head.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch._dynamo.reset()


def test_a_head_without_gradients_is_refused():
    model, x, _ = make_net()
    AnalyticHead(model).arm(0)
    with pytest.raises(CutLayerError, match="^estimator='analytic' cannot learn from a head that runs without"):
        checkpoint(model, x.requires_grad_(), use_reentrant=True)


def test_a_scaled_loss_keeps_small_gradients_of_half_precision():
    """With float16 gradients computed before the GradScaler's factor, these would be zero."""
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 3)).half()
    latent = torch.rand(4, 8).half().requires_grad_()
    head = AnalyticHead(model, Vicinity(1.0, sigma=1e-3))
    head.arm(0)
    model(latent)
    (head.kl() * 2**16).backward()
    assert latent.grad.dtype == torch.float16 and latent.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), "the model's predictions are not those that its last"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten(), nn.Unflatten(1, (2, 3)), Mean()),
         r'the last nn.Linear gets an input of shape \(5, 2, 2\), not \(N, Q\)'),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), 'has 6 outputs, the model 3 logits: it is not the head'),
    ],
)  # fmt: skip
def test_models_whose_logits_are_not_the_heads_are_refused(build, message):
    model, x = build(), torch.randn(5, 4)
    with pytest.raises(CutLayerError, match=message) as refusal:
        AnalyticHead(model).check(lambda: model(x))
    assert '\n' not in str(refusal.value)
    log_softmax = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1))
    AnalyticHead(log_softmax).check(lambda: log_softmax(x))  # the same predictions


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def make_trainer(algorithms, *, dtype=torch.float32, duration='4ba', **options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2 * ROWS, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (2 * ROWS,)))
    model = ComposerClassifier(Net().to(dtype), num_classes=CLASSES, **options.pop('model', {}))
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, ROWS),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=algorithms,
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
        **options,
    )
    return trainer, log


def train(algorithms, **options):
    trainer, log = make_trainer(algorithms, **options)
    trainer.fit()
    return trainer, log


def logged(log, name):
    return [float(value) for _, value in log.data.get(name, [])]


def weights(trainer):
    return torch.cat([value.double().flatten() for value in trainer.state.model.state_dict().values()])


def test_one_step_descends_the_gradient():
    trainer, log = make_trainer(
        [SBA(augment_prob=1.0, eta=3.0, estimator='analytic')], dtype=torch.float64, duration='1ba'
    )
    before = copy.deepcopy(trainer.state.model.module)
    before.stem[3].p = trainer.state.model.module.stem[3].p = 0.0
    x, y = next(iter(trainer.state.train_dataloader))
    trainer.fit()
    latent = before.stem(x).mean((2, 3))
    logits = before.fc(latent)
    kl = sbaf.expected_soft_label_kl(latent, before.fc, logits, Vicinity())
    (F.cross_entropy(logits, y) + 3 * kl).backward()
    for start, end in zip(before.parameters(), trainer.state.model.module.parameters(), strict=True):
        assert (start - 0.1 * start.grad - end).abs().max() < 1e-10
    assert logged(log, 'sba/kl') == pytest.approx([kl.item()])
    assert logged(log, 'loss/train/total') == pytest.approx([(F.cross_entropy(logits, y) + 3 * kl).item()])


def test_what_is_logged_and_that_raw_rows_are_those_of_a_plain_step():
    plain, _ = train([], dtype=torch.float64, duration='20ba')
    sba, log = train([SBA(eta=1e-30, estimator='analytic')], dtype=torch.float64, duration='20ba')
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(20)]
    assert torch.allclose(weights(plain), weights(sba), atol=1e-12, rtol=0)
    assert logged(log, 'sba/augmented') == coins
    assert len(logged(log, 'sba/kl')) == sum(coins) and min(logged(log, 'sba/kl')) > 0
    assert logged(log, 'sba/layer') == [0.0] * int(sum(coins))
    assert 'sba/virtual_agreement' not in log.data


def test_microbatches_change_nothing():
    """Nothing is random in the term; noise in absolute units, since the root mean square is that of a microbatch."""

    def final(microbatch):
        vicinity = Vicinity(sigma=0.5, noise_scale='absolute')
        sba = SBA(augment_prob=1.0, eta=2.0, vicinity=vicinity, estimator='analytic')
        trainer, log = make_trainer([sba], dtype=torch.float64, device_train_microbatch_size=microbatch)
        trainer.state.model.module.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double().requires_grad_(False)
        for parameter in trainer.state.model.module.stem.parameters():
            nn.init.constant_(parameter, 0.1)
        trainer.fit()
        return trainer.state.model.module.fc.weight.detach(), logged(log, 'sba/kl')

    (whole, kls), (parts, kls_of_parts) = final(16), final(4)
    assert (whole - parts).abs().max() < 1e-9
    assert kls == pytest.approx(kls_of_parts)


@pytest.mark.parametrize(
    'other', [lambda: SAM(rho=0.05), lambda: SWA(swa_start='1ep', swa_end='2ep'), lambda: MixUp(interpolate_loss=True)]
)
@pytest.mark.filterwarnings('ignore:SAM has', 'ignore:SWA has', 'ignore:Some targets have less')
def test_composes(other):
    sba = SBA(augment_prob=1.0, estimator='analytic')
    trainer, log = train([sba, other()], duration='3ep', algorithm_passes=[sort_sba_last])
    assert torch.isfinite(weights(trainer)).all()
    assert len(logged(log, 'sba/kl')) == 6 and min(logged(log, 'sba/kl')) > 0
    assert not any(module._forward_hooks for module in trainer.state.model.modules())


def test_a_step_that_fails_leaves_nothing_behind():
    def loss_fn(outputs, target):
        raise ZeroDivisionError

    sba = SBA(augment_prob=1.0, estimator='analytic')
    trainer, _ = make_trainer([sba], model={'loss_fn': loss_fn})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    trainer.eval(DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), 4))
    with pytest.raises(RuntimeError, match='No expected divergence'):
        sba._attached.kl()


def test_compiled_by_the_trainer_it_trains_as_eagerly():
    torch._dynamo.reset()
    eager, compiled = (
        weights(train([SBA(estimator='analytic')], compile_config=config)[0]) for config in (None, {'backend': 'eager'})
    )
    torch._dynamo.reset()
    assert torch.allclose(eager, compiled, atol=1e-5), f'weights differ by {(eager - compiled).abs().max()}'


def test_the_estimator_is_in_repr_and_hyperparameters():
    sba = SBA(estimator='analytic')
    assert "estimator='analytic'" in repr(sba) and sba.local_hparams['estimator'] == 'analytic'
    assert SBA().local_hparams['estimator'] == 'sampled'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'estimator': 'exact'}, r"Expected estimator to be one of sampled, analytic, got 'exact'\."),
        ({'layers': 'stem'}, r"Expected layers to be 'head' for estimator='analytic', got 'stem'\."),
        ({'layers': ['head', 'stem']}, r"Expected layers to be 'head' for .*, got \['head', 'stem'\]\."),
        ({'target': 'hard'}, r"Expected target to be 'soft' for estimator='analytic', got 'hard'\."),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        SBA(**{'estimator': 'analytic', **arguments})
    SBA(layers=['head'], estimator='analytic')


RANKS = """
import json, os, sys
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from composer_sba import SBA, Vicinity

def train(strategy):
    os.environ['FSDP_VERSION'] = '2' if strategy == 'fsdp2' else '1'
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 6), torch.randint(4, (32,)))
    network = nn.Sequential(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 4))
    network[0]._fsdp_wrap = network[1]._fsdp_wrap = True
    network[1]._activation_checkpointing = True
    model = ComposerClassifier(network, num_classes=4)
    checkpointing = strategy == 'fsdp1 checkpointed'
    fsdp = {'activation_checkpointing': checkpointing, 'activation_checkpointing_reentrant': False}
    log = InMemoryLogger()
    # On gloo FSDP2 adds gradients where the others take their mean.
    rate = 0.15 if strategy == 'fsdp2' else 0.3
    Trainer(
        model=model,
        train_dataloader=DataLoader(data, 8, sampler=dist.get_sampler(data, shuffle=False, num_replicas=1, rank=0)),
        max_duration='3ep',
        optimizers=torch.optim.SGD(model.parameters(), lr=rate),
        algorithms=[SBA(eta=2.0, vicinity=Vicinity(sigma=0.5), estimator='analytic')],
        parallelism_config=None if strategy == 'ddp' else {'fsdp': fsdp},
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
    ).fit()
    kl = [float(value) for _, value in log.data['sba/kl']]
    print(json.dumps({'strategy': strategy, 'kl': kl, 'loss': [float(v) for _, v in log.data['loss/train/total']]}))

torch.cuda.current_device = lambda: torch.device('cpu')  # FSDP1 asks for the CUDA device; gloo ranks have none
dist.initialize_dist('cpu')
for strategy in sys.argv[1:]:
    train(strategy)
"""


def test_sharded_heads_learn_what_whole_heads_do(run_ranks, tmp_path):
    """DDP, FSDP1 and FSDP2 on two ranks with the same rows: the weights are gathered where the term is computed."""
    script = tmp_path / 'ranks.py'
    script.write_text(RANKS)
    strategies = ['ddp', 'fsdp1 checkpointed', 'fsdp2']
    printed = [json.loads(line) for line in run_ranks(script, 2, *strategies).splitlines() if line.startswith('{')]
    assert len(printed) == 6
    for run in printed:
        assert run['kl'] == pytest.approx(printed[0]['kl'], rel=1e-4), run['strategy']
        assert run['loss'] == pytest.approx(printed[0]['loss'], rel=1e-4), run['strategy']
