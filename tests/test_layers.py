"""Cut layers: names to modules through wrappers, and refusals, on networks whose cut points are known.

Run: pytest tests/test_layers.py
"""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from composer_sba import LatentExpander
from composer_sba.errors import CutLayerError
from composer_sba.latent.layers import find_layers


@pytest.fixture(scope='module')
def resnet():
    return torchvision.models.resnet18(num_classes=7)


def refuse(model, layers, batch=None):
    """Check layers on a batch of three images and return the one line that refuses them."""
    batch = torch.randn(3, 3, 32, 32) if batch is None else batch
    expander = LatentExpander(model, layers)
    try:
        with pytest.raises(CutLayerError) as refusal:
            expander.check(lambda: model(batch))
    finally:
        expander.remove()
    assert '\n' not in str(refusal.value)
    return str(refusal.value)


def test_head_is_the_input_of_the_last_linear(resnet):
    (cut,) = find_layers(resnet, 'head')
    assert cut.module is resnet.fc and cut.at_input


def test_wrappers_leave_no_trace_in_names(resnet):
    wrapped = nn.Sequential()
    wrapped.add_module('module', nn.Sequential())  # as DDP and ComposerClassifier do
    inner = checkpoint_wrapper(resnet.layer2)
    wrapped.module.add_module('layer2', inner)
    for name in ('layer2', 'module.layer2', 'module.module.layer2'):
        (cut,) = find_layers(wrapped, name)
        assert cut.module is inner, 'the outermost wrapper is the one to hook'
        assert cut.name == 'layer2'


@pytest.mark.parametrize('layers', ['input', 'conv1', 'maxpool', 'layer1', 'layer3.0', 'layer4.1', 'avgpool', 'head'])
def test_block_boundaries_of_a_resnet_are_cut_points(resnet, layers):
    batch = torch.randn(3, 3, 32, 32)
    expander = LatentExpander(resnet, layers)
    expander.check(lambda: resnet(batch))
    expander.remove()


@pytest.mark.parametrize('layer', ['layer1.0.conv1', 'layer1.0.bn2'])
def test_a_layer_inside_a_residual_branch_is_refused(resnet, layer):
    message = refuse(resnet, layer)
    assert message.startswith(f"Layer '{layer}' is no cut point: the layers above it cannot take more rows")
    assert message.endswith("Near it, 'maxpool' and 'layer1.0' would do.")


def test_a_layer_that_runs_twice_is_refused(resnet):
    message = refuse(resnet, 'layer2.0.relu')
    assert 'it runs 2 times in one forward pass' in message
    assert message.endswith("Near it, 'layer1' and 'layer2.0' would do.")


def test_the_output_of_the_model_is_refused(resnet):
    assert "it is the model's output, and no layer lies above it" in refuse(resnet, 'fc')


def test_a_misspelt_layer_is_refused_with_the_nearest_names(resnet):
    with pytest.raises(
        CutLayerError, match=r"^The model has no layer 'layer9'; it has 'layer4', 'layer3', 'layer2'\.$"
    ):
        find_layers(resnet, 'layer9')


def test_a_layer_named_twice_is_refused(resnet):
    with pytest.raises(
        CutLayerError, match=r"^Layer 'layer1' is named twice in layers=\['layer1', 'module.layer1'\]\.$"
    ):
        find_layers(resnet, ['layer1', 'module.layer1'])


def test_head_of_a_model_without_linear_is_refused():
    model = torchvision.models.squeezenet1_1(num_classes=5)
    with pytest.raises(
        CutLayerError, match=r"has none\. Name the layer whose output is to be cut: 'features', 'classifier'\."
    ):
        find_layers(model, 'head')


class Net(nn.Module):
    """A network of one's own, whose forward is given."""

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
    assert 'the last nn.Linear has 3 outputs, the model 10 logits: it is not the head' in message


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


def test_predictions_that_are_not_finite_are_told_apart():
    model = Net(lambda net, x: net.fc(x) / 0, fc=nn.Linear(4, 3))
    assert 'the predictions for the first batch are not finite' in refuse(model, 'head', torch.randn(3, 4))


def test_outputs_that_are_no_logits_are_refused():
    model = Net(lambda net, x: {'logits': net.fc(x)}, fc=nn.Linear(4, 3))
    assert 'one tensor of logits, (N, K); got dict' in refuse(model, 'head', torch.randn(3, 4))
    model._run = lambda net, x: net.fc(x)[:, :, None]
    assert 'one tensor of logits, (N, K); got (3, 3, 1)' in refuse(model, 'head', torch.randn(3, 4))


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


def test_a_check_that_ran_out_of_memory_can_be_made_again():
    network, images, calls = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6), []
    expander = LatentExpander(network)

    def forward():
        calls.append(len(calls))
        if len(calls) == stop:
            raise torch.OutOfMemoryError
        return network(images)

    for stop in range(1, 5):  # the batch, another one, both, and the armed pass
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            expander.check(forward)
        assert len(network(images)) == 4, f'expanded after a failure in pass {stop}'
        expander.check(lambda: network(images))
