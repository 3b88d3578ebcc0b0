"""Names of layers: each means one layer, in ``layers=...`` and in the survey.

Run: pytest tests/test_layer_names.py
"""

import pytest
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel

from composer_sba import LatentExpander
from composer_sba.errors import CutLayerError
from composer_sba.latent.cut_survey import survey
from composer_sba.latent.layers import find_layers, named_layers


@pytest.fixture(scope='module')
def resnet():
    return torchvision.models.resnet18(num_classes=7)


class Chain(nn.Module):
    """Runs its layers in the order in which they are given; an equal layer gets a second name, and runs once."""

    def __init__(self, **layers):
        super().__init__()
        self._order = []
        for name, layer in layers.items():
            if layer not in self._order and not isinstance(layer, nn.ModuleList):
                self._order.append(layer)
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self._order:
            x = layer(x)
        return x


def taken_names():
    return Chain(input=nn.Linear(6, 8), head=nn.ReLU(), body=nn.Linear(8, 8), output=nn.Linear(8, 3))


def head_as_a_block():
    return Chain(body=nn.Linear(6, 8), head=nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))


def own_module():
    return Chain(module=nn.Sequential(nn.Linear(6, 8), nn.ReLU()), fc=nn.Linear(8, 3))


def own_module_with_the_same_names():
    inner = Chain(conv=nn.Linear(6, 8), fc=nn.Linear(8, 8))
    return Chain(module=inner, fc=nn.Linear(8, 3))


def only_a_module():
    return Chain(module=Chain(body=nn.Linear(6, 8), fc=nn.Linear(8, 3)))


def alias():
    act = nn.ReLU()
    return Chain(body=nn.Linear(6, 8), blocks=nn.ModuleList([act]), act=act, fc=nn.Linear(8, 3))


def alias_of_the_head():
    fc = nn.Linear(8, 3)
    network = Chain(fc=fc, body=nn.Linear(6, 8), classifier=fc)
    network._order.reverse()
    return network


def compiled():
    return torch.compile(own_module_with_the_same_names(), backend='eager')


def compiled_block():
    return Chain(body=torch.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), backend='eager'), fc=nn.Linear(8, 3))


def checkpointed_head():
    return Chain(body=nn.Linear(6, 8), fc=checkpoint_wrapper(nn.Linear(8, 3)))


def data_parallel():
    return DataParallel(own_module_with_the_same_names())


def test_copies_of_a_network_on_several_devices_are_refused():
    model = data_parallel()
    model.device_ids = [0, 1]
    with pytest.raises(CutLayerError, match='use DistributedDataParallel'):
        LatentExpander(model, '0')


# A network, a name, and the module that it means: an attribute path, or '' for the network itself
MEANINGS = [
    (taken_names, 'input', ''),
    (taken_names, 'module.input', 'input'),
    (taken_names, 'module.module.input', 'input'),
    (taken_names, 'head', 'output'),
    (taken_names, 'module.head', 'head'),
    (head_as_a_block, 'head', 'head.1'),
    (head_as_a_block, 'head.0', 'head.0'),
    (head_as_a_block, 'module.head', 'head'),
    (own_module, 'module', 'module'),
    (own_module, '0', 'module.0'),
    (own_module, 'module.0', 'module.0'),
    (own_module, 'head', 'fc'),
    (own_module_with_the_same_names, 'fc', 'fc'),
    (own_module_with_the_same_names, 'module.fc', 'module.fc'),
    (own_module_with_the_same_names, 'module.module.fc', 'module.fc'),
    (own_module_with_the_same_names, 'module', 'module'),
    (own_module_with_the_same_names, 'head', 'fc'),
    (own_module_with_the_same_names, 'input', ''),
    (only_a_module, 'module.body', 'module.body'),
    (only_a_module, 'body', 'module.body'),
    (only_a_module, 'input', ''),
    (alias, 'act', 'act'),
    (alias, 'blocks.0', 'act'),
    (alias_of_the_head, 'head', 'fc'),
    (alias_of_the_head, 'classifier', 'fc'),
    (compiled, 'module.fc', '_orig_mod.module.fc'),
    (compiled, 'fc', '_orig_mod.fc'),
    (compiled, 'input', '_orig_mod'),
    (compiled_block, 'body', 'body'),
    (compiled_block, 'body.0', 'body._orig_mod.0'),
    (checkpointed_head, 'fc', 'fc'),
    (checkpointed_head, 'head', 'fc'),
    (data_parallel, 'module.fc', 'module.module.fc'),
    (data_parallel, 'fc', 'module.fc'),
    (data_parallel, 'head', 'module.fc'),
]


@pytest.mark.parametrize(('build', 'name', 'path'), MEANINGS)
def test_a_name_means_one_module(build, name, path):
    network = build()
    (cut,) = find_layers(network, name)
    assert cut.module is network.get_submodule(path)
    assert cut.at_input == (name in ('input', 'head'))


@pytest.mark.parametrize('build', list(dict.fromkeys(build for build, _, _ in MEANINGS)))
def test_every_name_that_is_listed_finds_its_layer(build):
    network = build()
    for name, module in named_layers(network).items():
        (cut,) = find_layers(network, name)
        assert cut.name == name and cut.module is module and not cut.at_input


@pytest.mark.parametrize(
    ('build', 'expected'),
    [
        (taken_names, [('input',), ('module.input',), ('module.head',), ('head', 'body')]),
        (head_as_a_block, [('input',), ('body',), ('head', 'head.0')]),
        (own_module, [('input',), ('0',), ('module', 'head', '1')]),
        (own_module_with_the_same_names, [('input',), ('module.conv',), ('module', 'head', 'module.fc')]),
        (alias, [('input',), ('body',), ('head', 'act', 'blocks.0')]),
        (compiled_block, [('input',), ('body.0',), ('body', 'head', 'body.1')]),
    ],
)
def test_the_survey_uses_the_same_names(build, expected):
    found = [cut.names for cut in survey(build(), (6,))]
    assert [set(names) for names in found] == [set(names) for names in expected]
    for names in found:
        for name in names:
            find_layers(build(), name)


def test_an_alias_is_the_same_layer_twice():
    with pytest.raises(CutLayerError, match=r"^Layer 'blocks.0' is named twice in layers=\['act', 'blocks.0'\]\.$"):
        find_layers(alias(), ['act', 'blocks.0'])


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
