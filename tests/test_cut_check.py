"""The check of a cut: networks whose cut points are known pass or are refused, and are left as they were.

Run: pytest tests/test_cut_check.py
"""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from composer import Trainer
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import DataLoader

from composer_sba import SBA, LatentExpander
from composer_sba.errors import CutLayerError
from composer_sba.latent.cut_check import check_cut
from composer_sba.latent.cut_survey import survey
from composer_sba.latent.layers import find_layers
from layers_above import BY_ROW, MIXES_ROWS, Function


@pytest.fixture(scope='module')
def resnet():
    return torchvision.models.resnet18(num_classes=7)


def refuse(model, layers, batch=None):
    """Check layers on a batch of three images and return the one line of the refusal."""
    batch = torch.randn(3, 3, 32, 32) if batch is None else batch
    expander = LatentExpander(model, layers)
    try:
        with pytest.raises(CutLayerError) as refusal:
            expander.check(lambda: model(batch))
    finally:
        expander.remove()
    assert '\n' not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize('layers', ['input', 'conv1', 'maxpool', 'layer1', 'layer3.0', 'layer4.1', 'avgpool', 'head'])
def test_block_boundaries_of_a_resnet_are_cut_points(resnet, layers):
    batch = torch.randn(3, 3, 32, 32)
    expander = LatentExpander(resnet, layers)
    expander.check(lambda: resnet(batch))
    expander.remove()


@pytest.mark.parametrize('layer', ['layer1.0.conv1', 'layer1.0.bn2'])
def test_a_layer_inside_a_residual_branch_is_refused(resnet, layer):
    message = refuse(resnet, layer)
    assert message.startswith(f"Layer '{layer}' cannot be cut: the layers above it cannot take more rows")
    assert message.endswith("Use 'maxpool' or 'layer1.0', the nearest that can be cut.")


def test_a_layer_that_runs_twice_is_refused(resnet):
    message = refuse(resnet, 'layer2.0.relu')
    assert 'it runs 2 times in one forward pass' in message
    assert message.endswith("Use 'layer1' or 'layer2.0', the nearest that can be cut.")


def test_the_output_of_the_model_is_refused(resnet):
    assert "it is the model's output, with no layer above it" in refuse(resnet, 'fc')


class Net(nn.Module):
    """A network with a given forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = forward

    def forward(self, x):
        return self._run(self, x)


def test_a_last_linear_that_is_not_the_head_is_refused():
    def forward(net, x):
        return net.conv(x * torch.sigmoid(net.gate(x.mean((2, 3))))[:, :, None, None]).mean((2, 3))

    model = Net(forward, conv=nn.Conv2d(3, 10, 1), gate=nn.Linear(3, 3))
    message = refuse(model, 'head')
    assert (
        "the last nn.Linear makes (3, 3), which is not among the model's outputs, (3, 10): it is not the head"
        in message
    )


def test_a_last_linear_with_one_output_that_is_not_the_head_is_refused():
    model = Net(lambda net, x: (net.fc(x), net.aux(x))[0], fc=nn.Linear(4, 1), aux=nn.Linear(4, 1))
    assert 'which is not among the model' in refuse(model, 'head', torch.randn(3, 4))


def test_a_layer_that_does_not_run_is_refused():
    model = Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 3), unused=nn.Linear(4, 4))
    assert 'it runs 0 times in one forward pass' in refuse(model, 'unused', torch.randn(3, 4))


def test_a_tuple_output_is_refused():
    model = Net(lambda net, x: net.fc(net.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 4, batch_first=True), fc=nn.Linear(4, 3))
    message = refuse(model, 'rnn', torch.randn(3, 5, 4))
    assert 'its output is a tuple, not one tensor' in message


def test_rows_that_do_not_follow_the_input_are_refused():
    model = Net(
        lambda net, x: net.fc(net.step(x.flatten(0, 1)).view(3, 5, 4).mean(1)), step=nn.Linear(4, 4), fc=nn.Linear(4, 3)
    )
    assert 'its output has shape (15, 4) for a batch of 3 rows' in refuse(model, 'step', torch.randn(3, 5, 4))


MIXERS = {
    'mean over rows': lambda h: h - h.mean(0),
    'batch statistics in evaluation': lambda h: F.batch_norm(h, None, None, training=True),
    'attention over rows': lambda h: torch.softmax(h @ h.T, -1) @ h,
    'a part of the rows': lambda h: h - h[: len(h) // 2 + 1].mean(0),
}


@pytest.mark.parametrize('mixer', list(MIXERS))
def test_layers_above_that_mix_rows_are_refused(mixer):
    model = Net(lambda net, x: net.fc(MIXERS[mixer](net.body(x))), body=nn.Identity(), fc=nn.Linear(4, 3))
    assert 'the layers above it mix rows' in refuse(model, 'body', torch.randn(6, 4))


def test_a_refusal_tries_no_more_layers_than_it_needs():
    """Counted in forward passes: each of up to three layers takes four at most, whatever the size of the network."""
    model = torchvision.models.resnet18(num_classes=7)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    refuse(model, 'layer4.1.conv1')
    assert len(passes) <= 16, f'{len(passes)} forward passes'


def test_predictions_that_are_not_finite_are_refused():
    model = Net(lambda net, x: net.fc(x) / 0, fc=nn.Linear(4, 3))
    assert 'the predictions for the first batch are not finite' in refuse(model, 'head', torch.randn(3, 4))


def test_an_output_that_is_not_logits_is_refused():
    model = Net(lambda net, x: {'logits': net.fc(net.body(x))}, body=nn.Linear(4, 4), fc=nn.Linear(4, 3))
    assert 'one tensor of logits, (N, K); got dict' in refuse(model, 'body', torch.randn(3, 4))
    model._run = lambda net, x: net.fc(net.body(x))[:, :, None]
    assert 'one tensor of logits, (N, K); got (3, 3, 1)' in refuse(model, 'body', torch.randn(3, 4))


def test_the_check_leaves_model_and_random_state_as_they_were(resnet):
    resnet.train()
    resnet.layer4.eval()
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    stream = torch.get_rng_state()
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expander = LatentExpander(resnet, ['layer1', 'head'])
    expander.check(lambda: resnet(batch))
    expander.remove()
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in resnet.state_dict().items())
    assert resnet.layer1.training and not resnet.layer4[0].bn1.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet.modules())


def test_a_check_that_ran_out_of_memory_can_be_repeated():
    network, images, calls = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), []
    expander = LatentExpander(network, '1')

    def forward():
        calls.append(len(calls))
        if len(calls) == stop:
            raise torch.OutOfMemoryError
        return network(images)

    for stop in range(1, 6):  # the batch, three pairs of latent batches, and the armed pass
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            expander.check(forward)
        assert len(network(images)) == 4, f'expanded after a failure in pass {stop}'
        expander.check(lambda: network(images))


def below(layer):
    """A network with a layer above the cut '1'."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), layer, nn.Linear(16, 3))


def state_of(network):
    """What a check must not change."""
    streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    numbers = [
        value.get_state().tolist() if isinstance(value, torch.Generator) else value
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, int | float | torch.Generator)
    ]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()]
    forwards = ['forward' in vars(module) for module in network.modules()]
    return {name: value.tolist() for name, value in network.state_dict().items()}, streams, numbers, hooks, forwards


@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated')
@pytest.mark.parametrize('layer', BY_ROW)
def test_a_layer_that_treats_rows_by_themselves_passes_in_training_and_nothing_is_changed(layer):
    network, x = below(BY_ROW[layer]()), torch.randn(8, 6)
    before = state_of(network)
    cut = find_layers(network, '1')[0]
    check_cut(network, cut, lambda: network(x))
    assert state_of(network) == before
    expander = LatentExpander(network, '1')
    before = state_of(network)[:3]
    expander.check(lambda: network(x))
    assert state_of(network)[:3] == before


@pytest.mark.parametrize('layer', MIXES_ROWS)
def test_a_layer_that_mixes_rows_in_training_only_is_refused_in_training_only(layer):
    network, x = below(MIXES_ROWS[layer]()), torch.randn(8, 6)
    before = state_of(network)
    message = refuse(network, '1', x)
    reason = 'in training mode, predictions for the same rows change when others do: the layers above it mix rows'
    assert message == f"Layer '1' cannot be cut: {reason}. Use '2', the nearest that can be cut."
    assert state_of(network) == before
    LatentExpander(network.eval(), '1').check(lambda: network(x))
    check_cut(network.train(), find_layers(network, '1')[0], lambda: network(x), rows_may_mix=True)


UNREPEATABLE = {
    'a generator of NumPy': lambda layer, x: x + float(layer.numpy.normal()),
    'a list': lambda layer, x: x * len(layer.calls) if layer.calls.append(0) is None else x,
}


@pytest.mark.parametrize('function', UNREPEATABLE)
def test_equal_passes_that_differ_are_not_called_mixed_rows(function):
    layer = Function(UNREPEATABLE[function], numpy=np.random.default_rng(0), calls=[])
    message = refuse(below(layer), '1', torch.randn(8, 6))
    assert 'two equal passes in training mode give different predictions' in message and 'mix' not in message


OUTPUTS = {
    'auxiliary logits': (lambda h, fc: (fc(h), fc(h)), 'tuple'),
    'a dictionary': (lambda h, fc: {'logits': fc(h)}, 'dict'),
    'features too': (lambda h, fc: [fc(h), h], 'list'),
    'logits by place': (lambda h, fc: fc(h)[:, :, None], '(4, 3, 1)'),
}


@pytest.mark.parametrize('output', OUTPUTS)
def test_outputs_that_differ_in_training_are_refused_in_training_only(output):
    function, got = OUTPUTS[output]
    network = Net(
        lambda net, x: function(net.body(x), net.fc) if net.training else net.fc(net.body(x)),
        body=nn.Linear(6, 16),
        fc=nn.Linear(16, 3),
    )
    x = torch.randn(4, 6)
    message = refuse(network, 'body', x)
    assert f"one tensor of logits, (N, K); got {got} in training mode. Cut it at layers='head', turn" in message
    LatentExpander(network.eval(), 'body').check(lambda: network(x))


class Merging(nn.Linear):
    """Merges a low-rank term into its weight in ``eval()``, as LoRA's layers do, and counts."""

    def __init__(self):
        super().__init__(16, 16)
        self.a, self.b, self.switches = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2)), []

    def train(self, mode=True):
        self.switches.append(mode)
        if mode != self.training:
            self.weight.data += (self.b @ self.a) * (-1 if mode else 1)
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (x @ self.a.T @ self.b.T if self.training else 0)


class Frozen(nn.BatchNorm1d):
    """Stays in evaluation mode."""

    def train(self, mode=True):
        return super().train(False)


def test_modules_that_act_when_their_mode_changes_are_not_switched():
    network, x = below(nn.Sequential(Merging(), Frozen(16))), torch.randn(8, 6)
    network.train()
    network[2][0].switches.clear()
    before = state_of(network)
    LatentExpander(network, '1').check(lambda: network(x))
    assert network[2][0].switches == [] and state_of(network)[:3] == before[:3]


@pytest.mark.parametrize('training', [True, False])
def test_the_survey_leaves_modules_that_act_when_their_mode_changes_as_they_were(training):
    network = nn.Sequential(nn.Flatten(), below(nn.Sequential(Merging(), Frozen(16)))).train(training)
    before = state_of(network)
    assert 'head' in survey(network, (1, 2, 3))[-1].names
    assert state_of(network) == before


BY_NAME = {
    'a layer': ('body', lambda net, x: net.fc(torch.relu(net.body(input=x)))),
    'the head': ('head', lambda net, x: net.fc(input=net.body(x))),
    'the head, by a wide layer': ('head', lambda net, x: net.wide(input=net.body(x).repeat(1, 8))),
    'the network, with an option': ('input', lambda net, x, scale=1.0: net.fc(net.body(x) * scale)),
}


@pytest.mark.parametrize('case', BY_NAME)
def test_layers_that_are_called_by_name_are_cut(case):
    layers, forward = BY_NAME[case]

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(6, 16), nn.Linear(16, 3)
            if 'wide' in case:
                self.wide = nn.Linear(128, 3)

        def forward(self, *, images, **options):
            return forward(self, images, **options)

    network, images = ByKeyword(), torch.randn(8, 6)
    options = {'scale': 2.0} if 'option' in case else {}
    expected = network(images=images, **options)
    expander = LatentExpander(network, layers, 4)
    expander.check(lambda: network(images=images, **options))
    with expander.armed(0):
        raw, virtual = expander.split(network(images=images, **options))
    assert torch.allclose(raw, expected, atol=1e-6) and not torch.equal(virtual[0], raw)


def test_a_check_does_not_use_up_the_pass_for_which_another_algorithm_is_armed():
    network, x = below(nn.Identity()), torch.randn(8, 6)
    first, second = LatentExpander(network, '0', 2), LatentExpander(network, 'head', 3)
    first.arm(0)
    second.check(lambda: network(x))
    raw, virtual = first.split(network(x))
    assert virtual.shape == (2, 8, 3) and raw.shape == (8, 3)
    first.disarm()


class InputDict(ComposerModel):
    """A model whose batches are dictionaries, from which it takes the images out."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, batch):
        return self.net(batch['x'].sub_(0.5) if self.training else batch['x'])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch['y'])


def test_microbatches_of_one_row_are_checked_and_trained():
    data = DataLoader([{'x': torch.randn(6), 'y': 1} for _ in range(8)], 4)
    model = InputDict()
    trainer = Trainer(
        model=model,
        train_dataloader=data,
        algorithms=[SBA(augment_prob=1.0)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration='1ep',
        device_train_microbatch_size=1,
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 2


class TwoHeads(ComposerModel):
    """More outputs in training, as GoogLeNet and Inception have them."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, batch):
        h = self.body(batch[0]).relu()
        return (self.fc(h), self.aux(h)) if self.training else self.fc(h)

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs[0], batch[1]) + 0.3 * F.cross_entropy(outputs[1], batch[1])


def test_auxiliary_outputs_are_refused_before_the_first_batch_whatever_the_coin_says():
    model = TwoHeads()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader([(torch.randn(6), 1) for _ in range(8)], 4),
        algorithms=[SBA('body', augment_prob=1e-9)],
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration='1ep',
        device='cpu',
        progress_bar=False,
    )
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        CutLayerError, match=r"got tuple in training mode\. Cut it at layers='head', turn auxiliary outputs off"
    ):
        trainer.fit()
    assert all(map(torch.equal, before, model.parameters()))
