"""Second derivatives and torch.func through the expansion, against autograd of the expansion written out.

Run: pytest tests/test_gradients_of_any_order.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.data import TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity
from small_training import logged, trainer_of, weights

N, FOLD = 6, 4
VICINITIES = {
    'both': Vicinity(sigma=0.5, noise_scale='absolute'),
    'Gaussian points': Vicinity(1.0, sigma=0.5, noise_scale='absolute'),
    'dropout points': Vicinity(0.0, dropout=0.3),
    'hadamard': Vicinity(sigma=0.5, basis='hadamard', noise_scale='absolute'),
}


def slow_expand(vicinity, latent, fold, generator):
    """The augmented batch as a sum and products of its noise, which is read off what is drawn at a constant."""
    rows, kept = vicinity.draw(latent.detach(), fold, generator)
    p = fold - len(kept)
    noise = rows[len(latent) : (1 + p) * len(latent)].unflatten(0, (p, len(latent))) - latent.detach()
    masks = kept.to(latent.dtype) * vicinity.dropout_scale
    return torch.cat([latent, (latent + noise).flatten(0, 1), (latent * masks).flatten(0, 1)])


@pytest.mark.parametrize('vicinity', VICINITIES)
@pytest.mark.parametrize('shape', [(N, 5), (N, 2, 3, 3)], ids=str)
def test_second_derivatives_are_those_of_the_expansion_written_out(vicinity, shape):
    vicinity = VICINITIES[vicinity]
    latent = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn((1 + FOLD) * shape[0], *shape[1:], dtype=torch.float64)

    def second(expand):
        rows = expand(latent, FOLD, torch.Generator().manual_seed(0))
        (slope,) = torch.autograd.grad((weight * rows.tanh()).sum(), latent, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.square().sum(), latent, create_graph=True)
        (third,) = torch.autograd.grad((curvature * slope.detach()).sum(), latent)
        return rows, slope, curvature, third

    for ours, theirs in zip(second(vicinity.expand), second(lambda *args: slow_expand(vicinity, *args)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), f'{(ours - theirs).abs().max()}'
    torch.autograd.gradgradcheck(
        lambda latent: vicinity.expand(latent, FOLD, torch.Generator().manual_seed(0)), latent, fast_mode=True
    )


class Penalized(ComposerModel):
    """Penalizes the gradient of its logits, as Jacobian regularization does."""

    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 3)
        self.net = nn.Sequential(*layers).double()

    def forward(self, batch):
        return self.net(batch[0].requires_grad_(True))

    def loss(self, outputs, batch):
        (slope,) = torch.autograd.grad(outputs.logsumexp(1).sum(), batch[0], create_graph=True)
        return F.cross_entropy(outputs, batch[1]) + slope.square().sum(1).mean()


@pytest.mark.parametrize('layers', ['head', 'net.1', 'net.3'])
def test_a_gradient_penalty_trains_with_sba_and_a_vanishing_eta_changes_nothing(layers):
    def fit(algorithms):
        torch.manual_seed(0)
        model = Penalized()
        data = TensorDataset(torch.randn(24, 6, dtype=torch.float64), torch.randint(3, (24,)))
        trainer, log = trainer_of(model, data, 8, algorithms, max_duration='2ep')
        trainer.fit()
        return weights(trainer), logged(log, 'sba/kl')

    plain, _ = fit([])
    vanishing, kl = fit([SBA(layers, augment_prob=1.0, eta=1e-30, vicinity=VICINITIES['both'])])
    trained, _ = fit([SBA(layers, augment_prob=1.0, eta=1.0, vicinity=VICINITIES['both'])])
    assert min(kl) > 0
    assert torch.allclose(plain, vanishing, atol=1e-12), f'weights differ by {(plain - vanishing).abs().max()}'
    assert (plain - trained).abs().max() > 1e-4


@pytest.mark.parametrize('vicinity', VICINITIES)
@pytest.mark.parametrize('layers', ['input', '0', 'head'])
def test_per_sample_gradients_add_up_to_those_of_the_batch(layers, vicinity):
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    x, y = torch.randn(N, 6, dtype=torch.float64), torch.randint(3, (N,))
    expander = LatentExpander(network, layers, FOLD, VICINITIES[vicinity])

    def loss(parameters, x, y):
        raw, virtual = expander.split(functional_call(network, parameters, x))
        return F.cross_entropy(raw, y) + sbaf.soft_label_kl(raw, virtual)

    with expander.armed(0):
        batch = grad(loss)(parameters, x, y)
    with expander.armed(0):
        single = vmap(grad(loss), (None, 0, 0))(parameters, x[:, None], y[:, None])
    with expander.armed(0):
        loss(dict(network.named_parameters()), x, y).backward()
    for name, parameter in network.named_parameters():
        assert torch.allclose(batch[name], parameter.grad, atol=1e-12), name
        assert torch.allclose(single[name].mean(0), parameter.grad, atol=1e-12), name
    with expander.armed(0):
        jacobian = jacrev(lambda x: functional_call(network, parameters, x)[:N].sum(0))(x)
    expander.remove()
    plain = jacrev(lambda x: copy.deepcopy(network)(x).sum(0))(x)
    assert torch.allclose(jacobian, plain, atol=1e-12)
