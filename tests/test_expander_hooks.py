"""Hooks of LatentExpander: after ``remove()``, whatever came before, the network is what it was and can be exported.

Run: pytest tests/test_expander_hooks.py
"""

import copy

import pytest
import torch
from torch import nn

from composer_sba import LatentExpander, Vicinity
from composer_sba.errors import CutLayerError


class Net(nn.Module):
    """Batch norm and dropout above the first cut; may fail, and may mix rows."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.drop, self.fc = (
            nn.Linear(6, 64),
            nn.BatchNorm1d(64),
            nn.Dropout(0.3),
            nn.Linear(64, 3),
        )

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.body(x)))))


def broken_pass(network, x, expander):
    handle = network.drop.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), expander.armed(0):
        network(x)
    handle.remove()


def interrupted_pass(network, x, expander):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = network.norm.register_forward_pre_hook(interrupt)
    expander.arm(0)
    with pytest.raises(KeyboardInterrupt):
        network(x)
    handle.remove()


def refused_check(network, x, expander):
    handle = network.fc.register_forward_hook(lambda module, args, output: output - output.mean(0))
    with pytest.raises(CutLayerError):
        expander.check(lambda: network(x))
    handle.remove()


def interrupted_check(network, x, expander):
    passes = []

    def forward():
        passes.append(0)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return network(x)

    with pytest.raises(KeyboardInterrupt):
        expander.check(forward)


def armed_pass(network, x, expander):
    with expander.armed(0):
        expander.split(network(x))


def armed_and_left(network, x, expander):
    expander.arm(0)


def attached_twice(network, x, expander):
    expander.attach()
    expander.attach()


def attached_again(network, x, expander):
    expander.remove()
    expander.attach()
    armed_pass(network, x, expander)


def checked(network, x, expander):
    expander.check(lambda: network(x))


def backward_pass(network, x, expander):
    with expander.armed(0):
        raw, virtual = expander.split(network(x))
        (raw.sum() + virtual.sum()).backward()
    network.zero_grad()


HISTORIES = [
    lambda *_: None,
    checked,
    armed_pass,
    armed_and_left,
    backward_pass,
    broken_pass,
    interrupted_pass,
    refused_check,
    interrupted_check,
    attached_twice,
    attached_again,
]
CUTS = ['head', ['input', 'body', 'head']]


def left_in(network):
    """Names of modules with a hook or a forward of their own."""
    return [
        name
        for name, module in network.named_modules()
        if module._forward_hooks
        or module._forward_pre_hooks
        or module._forward_hooks_with_kwargs
        or module._forward_pre_hooks_with_kwargs
        or 'forward' in vars(module)
    ]


@pytest.mark.parametrize('history', HISTORIES, ids=lambda history: history.__name__)
@pytest.mark.parametrize('layers', CUTS, ids=str)
def test_after_remove_the_network_is_what_it_was_and_is_exported(history, layers):
    network, x = Net(), torch.randn(8, 6)
    expander = LatentExpander(network, layers, 4, Vicinity(sigma=0.5))
    history(network, x, expander)
    expander.remove()
    expander.remove()
    assert left_in(network) == []
    torch.manual_seed(0)
    expected = copy.deepcopy(network)(x)
    torch.manual_seed(0)
    assert torch.equal(network(x), expected)
    network.eval()
    assert torch.equal(torch.jit.script(network)(x), network(x))
    assert torch.equal(torch.export.export(network, (x,)).module()(x), network(x))


def test_a_removed_expander_attaches_again_disarmed():
    network, x = Net(), torch.randn(8, 6)
    expander = LatentExpander(network, 'body', 4)
    expander.arm(0)
    expander.remove()
    expander.attach()
    assert len(network(x)) == 8
    armed_pass(network, x, expander)


def test_removing_one_expander_leaves_the_hooks_of_another():
    network, x = Net(), torch.randn(8, 6)
    first, second = LatentExpander(network, 'body', 2), LatentExpander(network, 'head', 3)
    first.remove()
    with second.armed(0):
        assert len(second.split(network(x))[1]) == 3
    second.remove()
    assert left_in(network) == []


def test_a_copy_of_an_attached_network_is_not_tied_to_the_expander():
    network, x = Net(), torch.randn(8, 6)
    expander = LatentExpander(network, 'body', 2)
    copied = copy.deepcopy(network)
    expander.arm(0)
    assert len(copied(x)) == 8 and len(network(x)) == 24
    expander.remove()
