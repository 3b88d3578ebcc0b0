"""The survey of cut layers: its counts against SBA's own steps and sums by hand, its cuts by training at them.

Twenty families of torchvision represent the networks of users. In each, cuts that the architecture shows to be valid
train, and other layers are refused. The nightly tests take every module of every family.

Run: pytest tests/test_cut_survey.py
"""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchvision import models
from torchvision.models import vgg
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from composer_sba import LatentExpander
from composer_sba import functional as sbaf
from composer_sba.errors import CutLayerError
from composer_sba.latent.cut_survey import measure, survey
from composer_sba.latent.layers import named_layers
from composer_sba.layers import main
from composer_sba.models import digits_net, resnet_cifar
from composer_sba.recipe.recipe import load
from composer_sba.study.flops import flops_per_image
from layers_above import BatchVariance

CLASSES = 5
# Pixels, arguments of the network, cuts, and layers that cannot be cut
FAMILIES = {
    'resnet18': (32, {}, ['conv1', 'layer2', 'layer4.0', 'head'], ['layer1.0.conv1', 'layer3.0.downsample']),
    'resnext50_32x4d': (32, {}, ['layer2.1', 'head'], ['layer2.1.conv2']),
    'wide_resnet50_2': (32, {}, ['layer4', 'head'], ['layer4.2.bn3']),
    'vgg11_bn': (32, {}, ['features.4', 'classifier.1', 'head'], ['classifier']),
    'alexnet': (64, {}, ['features.2', 'avgpool', 'head'], ['classifier.6']),
    'densenet121': (
        32,
        {},
        ['features.denseblock1', 'features.transition2', 'head'],
        ['features.denseblock3.denselayer2'],
    ),
    'mobilenet_v2': (32, {}, ['features.2', 'head'], ['features.3.conv']),
    'mobilenet_v3_small': (32, {}, ['features.1', 'classifier.0', 'head'], ['features.3.block']),
    'efficientnet_b0': (32, {}, ['features.3', 'head'], ['features.2.1.block', 'features.2.0.block.2.avgpool']),
    'efficientnet_v2_s': (32, {}, ['features.2', 'head'], ['features.2.1.block']),
    'convnext_tiny': (32, {}, ['features.1', 'features.3.1', 'head'], ['features.5.2.block.0']),
    'regnet_y_400mf': (32, {}, ['stem', 'trunk_output.block2', 'head'], ['trunk_output.block2.block2-1.f']),
    'shufflenet_v2_x0_5': (32, {}, ['stage2', 'stage3.2', 'head'], ['stage3.2.branch2']),
    'squeezenet1_1': (32, {}, ['features.4', 'classifier.1'], ['features.4.expand1x1', 'head']),
    'mnasnet0_5': (32, {}, ['layers.9', 'head'], ['layers.9.1.layers']),
    'googlenet': (32, {'aux_logits': False, 'init_weights': True}, ['inception4a', 'head'], ['inception4a.branch1']),
    'inception_v3': (75, {'aux_logits': False, 'init_weights': True}, ['Mixed_6b', 'head'], ['Mixed_6b.branch1x1']),
    'swin_t': (32, {}, ['features.1', 'features.3.1', 'head'], ['features.1.0.attn']),
    'swin_v2_t': (32, {}, ['features.2', 'head'], ['features.1.0.mlp']),
    'vit_b_16': (
        32,
        {},
        ['encoder.layers.encoder_layer_1', 'head'],
        ['conv_proj', 'encoder.layers.encoder_layer_1.self_attention'],
    ),
    'maxvit_t': (32, {}, ['stem', 'blocks.0', 'head'], ['blocks.0.layers.0.layers.MBconv.layers']),
}


def thin_vgg(num_classes):
    network = models.VGG(vgg.make_layers([16, 'M', 32, 'M', 512, 'M'], batch_norm=True), init_weights=False)
    network.classifier = nn.Sequential(  # its own has 120 million weights
        nn.Linear(512 * 7 * 7, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout()
    ).append(nn.Linear(32, num_classes))
    return network


SMALL = {  # the blocks and joints of a family, fewer and thinner
    'resnet18': partial(models.ResNet, BasicBlock, [1, 1, 1, 1]),
    'vgg11_bn': thin_vgg,
    'efficientnet_b0': partial(
        models.EfficientNet,
        [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(6, 3, 2, 8, 16, 2), MBConvConfig(6, 5, 2, 16, 24, 1)],
        dropout=0.2,
    ),
    'efficientnet_v2_s': partial(
        models.EfficientNet,
        [FusedMBConvConfig(1, 3, 1, 8, 8, 1), FusedMBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(4, 3, 2, 16, 24, 1)],
        dropout=0.2,
    ),
    'convnext_tiny': partial(
        models.ConvNeXt, [CNBlockConfig(16, 32, 2), CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 3)]
    ),
    'resnext50_32x4d': partial(models.ResNet, Bottleneck, [1, 2, 1, 1], groups=8, width_per_group=4),
    'wide_resnet50_2': partial(models.ResNet, Bottleneck, [1, 1, 1, 2], width_per_group=128),
    'densenet121': partial(models.DenseNet, 8, (2, 2, 2), 16),
    'swin_t': partial(models.SwinTransformer, [2, 2], 16, [2, 2], [2, 4], [2, 2]),
    'swin_v2_t': partial(
        models.SwinTransformer,
        *([2, 2], 16, [2, 2], [2, 4], [2, 2]),
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
    'vit_b_16': partial(models.VisionTransformer, 32, 16, 2, hidden_dim=32, mlp_dim=64, num_heads=4),
    'maxvit_t': partial(models.MaxVit, (32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0),
}


def network_of(family):
    _, arguments, *_ = FAMILIES[family]
    build = SMALL.get(family) or partial(models.get_model, family, weights=None, **arguments)
    network = build(num_classes=CLASSES)
    for module in network.modules():  # ViT's head, which is initialized with zeros, has no divergence
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return network


def train_a_step(network, layer, pixels):
    """Take a step of SBA at a layer and return its loss, the divergence and the gradient of the first parameter."""
    images, labels = torch.randn(4, 3, pixels, pixels), torch.arange(4)
    expander = LatentExpander(network, layer, fold=2)
    try:
        expander.check(lambda: network(images[:2]))
        with expander.armed(step=0):
            logits, virtual = expander.split(network(images))
        divergence = sbaf.soft_label_kl(logits, virtual)
        loss = F.cross_entropy(logits, labels) + 0.1 * divergence
        network.zero_grad()
        divergence.backward()  # alone: the gradient of cross-entropy does not depend on the virtual rows
    finally:
        expander.remove()
    return loss, divergence, next(p for p in network.parameters() if p.requires_grad).grad


def check_trains(network, layer, pixels):
    loss, divergence, gradient = train_a_step(network, layer, pixels)
    assert loss.isfinite() and divergence >= -1e-6, f'{layer}: loss {loss}, divergence {divergence}'
    assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, f'{layer}: {gradient}'


def check_refused(network, layer, pixels):
    images = torch.randn(3, 3, pixels, pixels)
    with pytest.raises(CutLayerError) as refusal:
        LatentExpander(network, layer).check(lambda: network(images))
    assert '\n' not in str(refusal.value) and repr(layer) in str(refusal.value), refusal.value


# Large networks, each with the blocks of a smaller one: GoogLeNet, VGG, ResNet, MobileNet or EfficientNet. All families
# are tested every night, with all cuts of the survey.
LARGE = {'inception_v3', 'alexnet', 'wide_resnet50_2', 'resnext50_32x4d', 'regnet_y_400mf', 'mnasnet0_5'}


@pytest.mark.parametrize(
    'family', [pytest.param(each, marks=[pytest.mark.nightly] if each in LARGE else []) for each in FAMILIES]
)
def test_cuts_of_a_family_train_and_others_are_refused(family):
    pixels, _, cuts, others = FAMILIES[family]
    network = network_of(family)
    for layer in cuts:
        check_trains(network, layer, pixels)
    for layer in others:
        check_refused(network, layer, pixels)


@pytest.mark.nightly
@pytest.mark.parametrize('family', FAMILIES)
def test_every_cut_of_the_survey_trains_and_every_module_it_refuses_is_refused(family):
    pixels, _, cuts, _ = FAMILIES[family]
    network = network_of(family)
    found = [name for cut in survey(network, (3, pixels, pixels)) for name in cut.names]
    assert set(cuts) <= set(found), f'{set(cuts) - set(found)} are not found'
    for layer in found:
        check_trains(network, layer, pixels)
    within = {name for name in named_layers(network) if any(name.startswith(f'{cut}.') for cut in found)}
    for layer in named_layers(network).keys() - within - set(found):  # a block that is a cut is taken as a whole
        check_refused(network, layer, pixels)


def test_the_ratio_is_that_of_the_operations_of_a_step():
    """Compare with the study's count, which runs an armed step instead of adding up parts of a plain one.

    Only dropout points: Gaussian points at the head cost less, because they are drawn at its outputs.
    """
    baseline = ['yamls/resnet44_cifar10_baseline.yaml']
    plain = flops_per_image(load(baseline, ['model.depth=14']))
    found = {name: cut for cut in survey(resnet_cifar(10, depth=14), (3, 32, 32)) for name in cut.names}
    for layer, fold in (('head', 40), ('stage2', 4), ('stage3.0', 1)):
        sba = f'algorithms.sba={{layers: {layer}, fold: {fold}, augment_prob: 1.0, vicinity: {{gaussian_fraction: 0}}}}'
        expected = flops_per_image(load(baseline, ['model.depth=14', sba])) / plain
        assert found[layer].ratio(fold) == pytest.approx(expected, rel=1e-9), layer


def test_shares_and_memory_of_a_chain_by_hand():
    chain = nn.Sequential(nn.Linear(10, 20), nn.Sigmoid(), nn.Linear(20, 40), nn.ReLU(inplace=True), nn.Linear(40, 5))
    chain = nn.Sequential(nn.Flatten(), *chain)
    found = {cut.names: cut for cut in survey(chain, (1, 2, 5))}
    # Multiplications of the three products: forward and two gradients, but none for the input
    total = 2 * 10 * 20 + 3 * 20 * 40 + 3 * 40 * 5
    shares = {names: cut.share for names, cut in found.items()}
    assert shares == {
        ('input',): pytest.approx(1),
        ('0',): pytest.approx(1),
        ('1',): pytest.approx((3 * 20 * 40 + 3 * 40 * 5) / total),
        ('2',): pytest.approx((3 * 20 * 40 + 3 * 40 * 5) / total),
        ('3',): pytest.approx(3 * 40 * 5 / total),
        ('4', 'head'): pytest.approx(3 * 40 * 5 / total),
    }
    # A Linear keeps its input, a sigmoid and a ReLU what they return; the ReLU's is the next layer's input.
    memory = {names: cut.memory / 4 for names, cut in found.items()}
    assert memory == {('input',): 70, ('0',): 70, ('1',): 80, ('2',): 60, ('3',): 40, ('4', 'head'): 40}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_network_has_its_cuts_in_every_dtype(dtype):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 2))
    expected = [cut.names for cut in survey(network, (3, 2, 2))]
    assert [cut.names for cut in survey(network.to(dtype), (3, 2, 2))] == expected


def test_the_network_is_left_as_it_was():
    network = digits_net()
    network.conv2.eval()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    stream = torch.get_rng_state()
    survey(network, (3, 8, 8))
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert network.conv1.training and not network.conv2.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_command_prints_a_table_from_the_input_to_the_head(capsys):
    assert main(['--model', 'resnet_cifar', '--fold', '40', 'depth=20']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip('│').split('│')] for line in lines if line.startswith('│')]
    assert rows[0][:5] == ['input', '3×32×32', '3,072', '100 %', '41.00'], rows[0]
    assert [row[0] for row in rows][-1].startswith('pool, head'), rows
    assert rows[-1][1:5] == ['64', '64', '0.00158 %', '1.00063'], rows[-1]
    assert lines[0].strip() == 'resnet_cifar, 32 px, M = 40'


def own():
    """A factory of a user, ``test_cut_survey:own``."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def batches():
    """A factory that does not return a network."""
    return [own()]


def test_the_command_takes_a_factory_of_a_user(capsys, monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))
    assert main(['--model', 'test_cut_survey:own', '--channels', '1', '--image-size', '8']) == 0
    assert 'head' in capsys.readouterr().out


def broken(error='KeyError'):
    """A factory that fails, perhaps without a reason."""
    raise {'KeyError': KeyError('depth'), 'ValueError': ValueError()}[error]


def test_a_cut_above_which_no_operation_is_counted_is_free(capsys):
    """SqueezeNet ends in a mean over places."""
    assert main(['--model', 'squeezenet1_0', '--image-size', '64']) == 0
    assert capsys.readouterr().out.count(' 1.00 ') >= 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--model resnet19', "unknown model 'resnet19'; did you mean 'resnet1"),
        ('--model resnet18 depth=20', "resnet18 cannot be built with {'depth': 20}: "),
        ('--model resnet_cifar depth=21', 'resnet_cifar: depth must be 6n + 2'),
        ('--model resnet_cifar depth', "command line: expected key=value, got 'depth'"),
        ('--model nowhere:own', "nowhere:own: No module named 'nowhere'"),
        ('--model test_cut_survey:gone', "has no attribute 'gone'"),
        ('--model test_cut_survey:batches', 'expected a function that returns a torch.nn.Module, got list'),
        ('--model test_cut_survey:broken', "test_cut_survey:broken cannot be built with {}: 'depth'"),
        ('--model test_cut_survey:broken error=ValueError', "built with {'error': 'ValueError'}: ValueError"),
        ('--model test_cut_survey:own --image-size 9', 'The network takes no images of shape (3, 9, 9): '),
        ('--model digits_net --fold 0', '--fold: expected at least 1, got 0'),
        ('--model digits_net --image-size 0', '--image-size: expected at least 1, got 0'),
        ('--model digits_net --channels -1', '--channels: expected at least 1, got -1'),
        ('--model fcn_resnet50', "unknown model 'fcn_resnet50'"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, message, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and error.count('\n') == 1, error


BRANCHES = {
    'a comparison': lambda net, x: net.conv(x / 255 if x.abs().max() > 100 else x),
    'item()': lambda net, x: net.conv(x * (2.0 if x.mean().item() > 9 else 1.0)),
    'NumPy': lambda net, x: net.conv(x - float(x.detach().numpy().mean() > 9)),
    'a number of rows': lambda net, x: net.conv(x[(x.flatten(1).mean(1) < 9).nonzero()[:, 0]]),
    'assert': lambda net, x: net.conv(x) if bool(x.isfinite().all()) else 1 / 0,
}


class Branching(nn.Module):
    """A network whose forward looks at the values of the images."""

    def __init__(self, branch='a comparison'):
        super().__init__()
        self.conv, self.norm, self.fc, self.branch = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4), branch

    def forward(self, x):
        return self.fc(self.norm(BRANCHES[self.branch](self, x)).relu().mean((2, 3)))


@pytest.mark.parametrize('branch', BRANCHES)
def test_a_network_that_looks_at_values_is_listed_without_cost(branch):
    network = Branching(branch)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    cuts = survey(network, (3, 16, 16))
    assert [cut.names for cut in cuts] == [('input',), ('conv',), ('norm',), ('head',)]
    assert [cut.shape for cut in cuts] == [(3, 16, 16), (8, 14, 14), (8, 14, 14), (8,)]
    for cut in cuts:
        assert cut.share is None and cut.memory is None and cut.ratio(4) is None
        assert cut.why_unknown.startswith('forward needs values, not shapes alone: ') and '\n' not in cut.why_unknown
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    for cut in cuts:
        check_trains(network, cut.names[0], 16)


def test_the_command_prints_why_the_cost_is_unknown(capsys):
    assert main(['--model', 'test_cut_survey:Branching', '--image-size', '16', 'branch=item()']) == 0
    output = capsys.readouterr().out
    assert 'The cost is unknown: forward needs values' in output and 'MiB' not in output and '8×14×14' in output


def test_the_survey_does_not_list_layers_below_one_that_mixes_rows_in_training():
    mixing = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), BatchVariance(), nn.ReLU(), nn.Linear(16, 3))
    for network in (mixing, mixing.eval()):
        assert [cut.names for cut in survey(network, (3, 2, 2))] == [('2',), ('3', 'head')]


class TwoHeads(nn.Module):
    """A network that returns auxiliary logits in training."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.fc = nn.Linear(64, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        return (self.fc(h), self.aux(h)) if self.training else self.fc(h)


def test_a_network_with_auxiliary_outputs_in_training_has_one_cut(capsys):
    assert main('--model test_cut_survey:TwoHeads --channels 1 --image-size 8'.split()) == 0
    assert [cut.names for cut in survey(TwoHeads(), (1, 8, 8))] == [('head',)]
    assert 'body' not in capsys.readouterr().out


def test_auxiliary_outputs_without_a_head_end_in_one_line():
    network = TwoHeads()
    network.fc, network.aux = nn.Sequential(nn.Unflatten(1, (16, 1, 1)), nn.Conv2d(16, 3, 1)), nn.Identity()
    network.body = nn.Sequential(nn.Unflatten(1, (64, 1, 1)), nn.Conv2d(64, 16, 1), nn.Flatten())
    with pytest.raises(CutLayerError, match='got tuple in training mode'):
        survey(network, (1, 8, 8))


def test_a_network_in_the_parts_of_fsdp_is_not_measured(tmp_path):
    """Its hooks would keep tensors without values, which training needs."""
    is_ours = not torch.distributed.is_initialized()  # a Trainer of another test may have left one
    if is_ours:
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        assert measure(network, 'head', (3, 2, 2))[0] == 96
        fully_shard(network, mesh=init_device_mesh('cpu', (1,)))
        assert measure(network, 'head', (3, 2, 2)) == (None, {})
    finally:
        if is_ours:
            torch.distributed.destroy_process_group()
