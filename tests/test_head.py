"""Gaussian points drawn as noise of the head's outputs, against points drawn by feature, and in a network.

Run: pytest tests/test_head.py
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity
from composer_sba.latent.head import can_draw_logits, draw_logit_noise
from composer_sba.latent.kernels import draw_logit_noise_by_seed, to_json
from composer_sba.vicinity import clipped_moments, draw_basis
from small_training import logged, trainer_of, weights

N, K, Q = 6, 5, 128
GAUSSIAN = Vicinity(gaussian_fraction=1.0, sigma=0.7)


def make(dtype=torch.float64):
    latent, linear = torch.relu(torch.randn(N, Q, dtype=dtype)), nn.Linear(Q, K).to(dtype)
    nn.init.normal_(linear.weight, std=2 / math.sqrt(Q))
    return latent, linear


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize('basis', ['identity', 'orthogonal', 'hadamard', 'normalized'])
def test_the_covariance_of_the_logits_is_that_of_the_projected_noise(basis):
    latent, linear = make()
    vicinity = replace(GAUSSIAN, basis=basis)
    xi, directions = draw_logit_noise(latent, linear.weight, 3000, vicinity, generator())
    a = linear.weight
    if basis == 'normalized':  # the others are orthonormal: ΣΣᵀ = I
        a = a @ draw_basis('normalized', latent, generator())
    ours, theirs = (linear.weight @ directions) @ (linear.weight @ directions).T, a @ a.T
    assert torch.allclose(ours, theirs, rtol=1e-6), f'{(ours - theirs).abs().max()}'
    variance = GAUSSIAN.sigma**2 * clipped_moments(vicinity)[0] * latent.square().mean().item()
    measured = xi.flatten(0, 1).T.cov()
    assert torch.allclose(measured, variance * torch.eye(K, dtype=xi.dtype), atol=0.05 * variance), measured / variance


@pytest.mark.parametrize(('tau', 'noise_scale'), [(None, 'rms'), (math.inf, 'absolute')])
def test_the_divergence_and_its_gradients_are_those_of_points_drawn_by_feature_on_average(tau, noise_scale):
    """Means of 400 estimates either way, within four standard errors of their difference."""
    latent, linear = make()
    latent.requires_grad_()
    vicinity = replace(GAUSSIAN, tau=tau, noise_scale=noise_scale)

    def estimates(points):
        rows = []
        for seed in range(400):
            logits = linear(latent)
            kl = sbaf.soft_label_kl(logits, points(logits, generator(seed)))
            gradients = torch.autograd.grad(kl, [latent, linear.weight])
            rows.append(torch.cat([kl.detach()[None], *(gradient.flatten() for gradient in gradients)]))
        return torch.stack(rows)

    def by_class(logits, generator):
        xi, directions = draw_logit_noise(latent.detach(), linear.weight, 4, vicinity, generator)
        return logits + xi @ (linear.weight @ directions).T

    ours = estimates(by_class)
    theirs = estimates(lambda logits, generator: linear(vicinity.sample(latent, 4, generator)))
    error = (ours.var(0) / 400 + theirs.var(0) / 400).sqrt()
    deviation = (ours.mean(0) - theirs.mean(0)) / error
    print(
        f'KL {ours[:, 0].mean():.4f}, {theirs[:, 0].mean():.4f} ± {error[0]:.4f}; gradients {deviation.abs().max():.2f}'
    )
    assert deviation[0].abs() < 4
    assert deviation.abs().max() < 5 and deviation.std() < 1.25  # of 1,408 numbers
    weights = slice(1 + latent.numel(), None)
    assert ours[:, weights].var(0).mean() < theirs[:, weights].var(0).mean()


@pytest.mark.parametrize('weight', [torch.zeros(3, 64), torch.ones(3, 64), torch.eye(3, 64) * 1e-8])
def test_equal_or_zero_weights_of_classes_give_finite_noise(weight):
    xi, directions = draw_logit_noise(torch.ones(4, 64), weight, 5, GAUSSIAN, generator())
    moved = xi @ (weight @ directions).T
    assert moved.isfinite().all() and directions.isfinite().all()
    expected = GAUSSIAN.sigma * clipped_moments(GAUSSIAN)[0] ** 0.5 * weight[0].norm()
    assert moved.std() == pytest.approx(expected.item(), rel=0.4, abs=1e-9)
    if weight[0].norm() > 1:
        assert torch.allclose(moved[..., 0], moved[..., 2], atol=1e-2 * expected.item())


@pytest.mark.parametrize(
    ('features', 'classes', 'tau', 'expected'),
    [(64, 10, None, True), (32, 10, None, False), (32, 4, None, False), (64, 10, 0.01, False), (512, 10, 0.01, True),
     (64, 16, math.inf, True), (64, 17, math.inf, False)],
)  # fmt: skip
def test_logits_are_drawn_where_it_pays_and_the_clip_allows_it(features, classes, tau, expected):
    assert can_draw_logits(nn.Linear(features, classes), Vicinity(sigma=0.1, tau=tau)) is expected


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_another_forward_gets_points_drawn_by_feature():
    assert not can_draw_logits(Scaled(Q, K), Vicinity())


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, Q), nn.ReLU(), nn.Linear(Q, K))
        self.rows = []
        self[2].register_forward_hook(self.count)

    def count(self, module, args, output):
        self.rows.append(len(args[0]))


def expanded(model, x, vicinity, step=0):
    expander = LatentExpander(model, 'head', 4, vicinity, seed=3)
    try:
        with expander.armed(step):
            raw, virtual = expander.split(model(x))
    finally:
        expander.remove()
    return raw, virtual


def test_the_head_runs_on_raw_and_dropout_rows_and_copies_keep_their_order():
    model, x = Net().double(), torch.randn(N, 8, dtype=torch.float64)
    logits = model(x)
    raw, virtual = expanded(model, x, Vicinity(sigma=1e-4))
    assert model.rows[-1] == 3 * N
    assert torch.equal(raw, logits)
    moved = (virtual - logits).abs().amax((1, 2))
    assert (moved[:2] < 0.01).all() and (moved[2:] > 0.05).all(), moved
    assert not torch.equal(virtual[0], virtual[1])


def test_few_points_of_many_classes_are_drawn_by_feature():
    model, few, many = Net(), torch.randn(2, 8), torch.randn(3, 8)
    for x, rows in (few, 2 * (1 + 4)), (many, 3):  # 4 points a row, and 5 classes
        assert expanded(model, x, GAUSSIAN)[1].shape == (4, len(x), K)
        assert model.rows[-1] == rows


def test_without_dropout_points_the_head_runs_on_raw_rows_only():
    model, x = Net().double(), torch.randn(N, 8, dtype=torch.float64)
    raw, virtual = expanded(model, x, GAUSSIAN)
    assert model.rows[-1] == N and virtual.shape == (4, N, K)
    assert torch.equal(raw, model(x))


def test_steps_draw_anew_and_repeat():
    model, x = Net(), torch.randn(N, 8)
    first = expanded(model, x, GAUSSIAN)[1]
    assert torch.equal(first, expanded(model, x, GAUSSIAN)[1])
    assert not torch.equal(first, expanded(model, x, GAUSSIAN, step=1)[1])
    state = torch.get_rng_state()
    expanded(model, x, GAUSSIAN)
    assert torch.equal(state, torch.get_rng_state())


def test_activation_checkpointing_repeats_the_points():
    x = torch.randn(N, 8, dtype=torch.float64)
    plain = Net().double()
    checkpointed = copy.deepcopy(plain)
    for model, forward in (plain, plain), (checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=False)):
        expander = LatentExpander(model, 'head', 4, seed=3)
        with expander.armed(0):
            sbaf.soft_label_kl(*expander.split(forward(x))).backward()
        expander.remove()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), f'{(a.grad - b.grad).abs().max()}'


def test_bfloat16_gives_the_float32_divergence():
    model, x = Net(), torch.randn(64, 8)
    exact = sbaf.soft_label_kl(*expanded(model, x, Vicinity(sigma=0.5))).item()
    with torch.autocast('cpu', torch.bfloat16):
        raw, virtual = expanded(model, x, Vicinity(sigma=0.5))
    assert raw.dtype == virtual.dtype == torch.bfloat16
    assert sbaf.soft_label_kl(raw, virtual).item() == pytest.approx(exact, rel=0.05)


def test_a_compiled_network_draws_the_same_points():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, Q), nn.ReLU(), nn.Linear(Q, K)), torch.randn(N, 8)
    expected = expanded(model, x, Vicinity(sigma=0.5))
    expander = LatentExpander(model, 'head', 4, Vicinity(sigma=0.5), seed=3)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with expander.armed(0):
        ours = expander.split(compiled(x))
    sbaf.soft_label_kl(*ours).backward()
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), f'{(mine - theirs).abs().max()}'
    assert model[2].weight.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_the_operator_of_compiled_models_is_the_function():
    latent, linear = make(torch.float32)
    weight, seed = linear.weight.detach(), torch.tensor(7)
    arguments = (latent, weight, seed, 3, to_json(GAUSSIAN))
    torch.library.opcheck(draw_logit_noise_by_seed, arguments)
    for ours, theirs in zip(
        draw_logit_noise_by_seed(*arguments), draw_logit_noise(latent, weight, 3, GAUSSIAN, generator(7)), strict=True
    ):
        assert torch.equal(ours, theirs)


class Lora(nn.Module):
    """A linear layer and a low-rank term beside it, as PEFT builds them."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank term of its own, as loralib builds them."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) / 8)

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class LoraWeight(nn.Module):
    """A low-rank term as a parametrization."""

    def __init__(self, base):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features) / 8), nn.Parameter(torch.randn(3, 2) / 8)

    def forward(self, weight):
        return weight + self.b @ self.a


def lora_weight(base):
    nn.utils.parametrize.register_parametrization(base, 'weight', LoraWeight(base))
    return base


HEADS = {
    'Linear': lambda base: base,
    'spectral norm': parametrizations.spectral_norm,
    'spectral norm by hooks': nn.utils.spectral_norm,
    'weight norm': parametrizations.weight_norm,
    'weight norm by hooks': nn.utils.weight_norm,
    'orthogonal': parametrizations.orthogonal,
    'spectral norm of a weight norm': lambda base: parametrizations.spectral_norm(parametrizations.weight_norm(base)),
    'LoRA around the layer': Lora,
    'LoRA in the layer': LoraLinear,
    'LoRA of the weight': lora_weight,
    'checkpointed': checkpoint_wrapper,
}


@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated')
@pytest.mark.parametrize('head', HEADS)
def test_a_vanishing_eta_changes_no_weight_and_no_buffer_whatever_the_head_is_made_of(head):
    def fit(algorithms):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), HEADS[head](nn.Linear(256, 3))).double()
        data = TensorDataset(torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,)))
        trainer, log = trainer_of(ComposerClassifier(network, num_classes=3), data, 8, algorithms, max_duration='3ep')
        trainer.fit()
        return weights(trainer), logged(log, 'sba/kl')

    plain, _ = fit([])
    ours, kl = fit([SBA(augment_prob=1.0, eta=1e-30)])
    assert len(kl) == 12 and min(kl) > 0
    assert torch.allclose(ours, plain, rtol=0, atol=1e-13), f'weights differ by {(ours - plain).abs().max()}'
