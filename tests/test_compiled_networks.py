"""Networks that are compiled, by their owner or by the Trainer: SBA trains them as it trains eager ones.

Run: pytest tests/test_compiled_networks.py
"""

import functools

import pytest
import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import TensorDataset

from composer_sba import SBA
from small_training import logged, trainer_of, weights

ROWS, BATCH = 32, 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.body(x))


def whole(network):
    return torch.compile(network, backend='eager')


def in_place(network):
    network.compile(backend='eager')
    return network


def block(network):
    network.body = torch.compile(network.body, backend='eager')
    return network


def block_in_place(network):
    network.body.compile(backend='eager')
    return network


def head(network):
    network.fc = torch.compile(network.fc, backend='eager')
    return network


def method(network):
    network.forward = torch.compile(network.forward, backend='eager')
    return network


COMPILED = [whole, in_place, block, block_in_place, head, method]


def run(compile_network, layers, used):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = compile_network(Net().double())
    if used:
        network(torch.zeros(BATCH, 6, dtype=torch.float64))
    data = TensorDataset(torch.randn(ROWS, 6, dtype=torch.float64), torch.randint(3, (ROWS,)))
    model = ComposerClassifier(network, num_classes=3)
    trainer, log = trainer_of(model, data, BATCH, [SBA(layers, augment_prob=0.7)], max_duration='2ep')
    trainer.fit()
    torch._dynamo.reset()
    return weights(trainer), logged(log, 'sba/kl')


LAYERS = {str(layers): layers for layers in ('head', 'body.0', ['input', 'body'])}


@functools.cache
def run_eagerly(layers, used):
    return run(lambda network: network, LAYERS[layers], used)


def cases():
    """Yield every pair of the ways to compile, the layers and new or used networks; the nightly tests take the rest."""
    for i, layers in enumerate(LAYERS):
        for j, compile_network in enumerate(COMPILED):
            for used in (False, True):
                marks = [pytest.mark.nightly] if (i + j + used) % 2 else []
                name = f'{"used before" if used else "new"}-{layers}-{compile_network.__name__}'
                yield pytest.param(compile_network, layers, used, id=name, marks=marks)


@pytest.mark.parametrize(('compile_network', 'layers', 'used'), list(cases()))
def test_a_network_that_its_owner_compiled_trains_as_an_eager_one(compile_network, layers, used):
    eager, kl = run_eagerly(layers, used)
    compiled, compiled_kl = run(compile_network, LAYERS[layers], used)
    assert len(kl) > 0 and compiled_kl == pytest.approx(kl, rel=1e-9)
    assert torch.allclose(compiled, eager, atol=1e-10), f'weights differ by {(compiled - eager).abs().max()}'


def test_a_network_that_was_trained_compiled_without_sba_is_then_trained_with_it():
    network = Net()
    data = TensorDataset(torch.randn(ROWS, 6), torch.randint(3, (ROWS,)))
    for algorithms in ([], [SBA('body', augment_prob=1.0)], [], [SBA(augment_prob=1.0)]):
        model = ComposerClassifier(network, num_classes=3)
        options = {'max_duration': '2ba', 'compile_config': {'backend': 'eager'}}
        trainer, log = trainer_of(model, data, BATCH, algorithms, **options)
        trainer.fit()
        trainer.close()
        assert len(logged(log, 'sba/kl')) == 2 * len(algorithms)
