"""Networks against published parameter counts and FLOPs, their metrics against torchmetrics.

``python -m pytest tests/test_models.py``
"""

from typing import Any

import pytest
import torch
from composer import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from composer_sba.models import MODELS, classifier

# name, options, parameters, millions as published: torchvision's weights pages; He et al. (2016), Table 6; the codes of
# bearpaw (alexnet_cifar) and Hoffer et al. (vgg16_cifar), counted.
PARAMETERS = [
    ('alexnet', {}, 61_100_840, '61.10'),
    ('vgg16', {}, 138_357_544, '138.36'),
    ('vgg16_bn', {}, 138_365_992, '138.37'),
    ('resnet50', {}, 25_557_032, '25.56'),
    ('resnet_cifar', {'depth': 20}, 269_722, '0.27'),
    ('resnet_cifar', {'depth': 32}, 464_154, '0.46'),
    ('resnet_cifar', {}, 658_586, '0.66'),
    ('resnet_cifar', {'depth': 56}, 853_018, '0.85'),
    ('resnet_cifar', {'depth': 110}, 1_727_962, '1.7'),
    ('vgg16_cifar', {}, 14_728_266, '14.73'),
    ('vgg16_cifar', {'tail': 4096}, 33_646_666, '33.65'),
    ('alexnet_cifar', {}, 2_472_266, '2.47'),
    ('digits_net', {}, 94_986, '0.09'),
]

# name, options, GFLOP of one image forward, share (%) of the training FLOPs above each cut: computed once from the
# definitions of the networks, independently of this code. resnet_cifar without Hoffer et al.'s 1x1 shortcuts.
FLOPS = [
    (
        'resnet_cifar',
        {},
        0.1943,
        {'stem': 99.70, 'stage1': 65.65, 'stage2': 32.83, 'stage3': 0.00066, 'pool': 0.00066},
    ),
    (
        'vgg16_cifar',
        {},
        0.6264,
        {'conv1': 87.55, 'conv2': 69.43, 'conv3': 39.25, 'conv4': 9.058, 'conv5': 0.001638, 'flatten': 0.001638},
    ),
    (
        'vgg16_cifar',
        {'tail': 4096},
        0.6642,
        {'conv4': 14.25, 'conv5': 5.706, 'flatten': 5.706, 'fc1': 5.073, 'fc2': 0.01236},
    ),
    (
        'alexnet_cifar',
        {},
        0.0299,
        {'conv1': 93.15, 'conv2': 59.16, 'conv3': 40.80, 'conv4': 16.33, 'conv5': 0.0177, 'flatten': 0.0177},
    ),
]

PIXELS = {'alexnet': 224, 'vgg16': 224, 'vgg16_bn': 224, 'resnet50': 224, 'digits_net': 8}  # others: 32
CHAINS = [
    ('resnet_cifar', {}),
    ('vgg16_cifar', {}),
    ('vgg16_cifar', {'tail': 4096}),
    ('vgg16_cifar', {'batch_norm': False}),
    ('alexnet_cifar', {}),
    ('alexnet_cifar', {'batch_norm': True}),
    ('digits_net', {}),
]


def _images(name: str, rows: int) -> torch.Tensor:
    pixels = PIXELS.get(name, 32)
    return torch.randn(rows, 3, pixels, pixels)


def _chain(name: str, **options: object) -> nn.Sequential:
    network = MODELS[name](10, **options)
    assert isinstance(network, nn.Sequential)
    return network


def _training_flops(network: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(x).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(('name', 'options', 'count', 'millions'), PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str, options: dict[str, Any], count: int, millions: str) -> None:
    with torch.device('meta'):
        network = MODELS[name](**options)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == count
    decimals = len(millions.split('.')[1])
    assert f'{parameters / 1e6:.{decimals}f}' == millions


@pytest.mark.parametrize('name', MODELS)
def test_logits_have_one_column_per_class(name: str) -> None:
    with torch.device('meta'):
        assert MODELS[name](7)(_images(name, rows=3)).shape == (3, 7)


@pytest.mark.parametrize(('name', 'options'), CHAINS)
def test_every_stage_keeps_its_rows_apart(name: str, options: dict[str, Any]) -> None:
    """A cut layer's rows follow the input's: there are N of them, and row i depends on image i alone."""
    network = _chain(name, **options).eval()
    images = _images(name, rows=3)
    whole, alone = images, images[1:2]
    for stage_name, stage in network.named_children():
        whole, alone = stage(whole), stage(alone)
        assert len(whole) == 3, stage_name
        torch.testing.assert_close(whole[1:2], alone, msg=f'rows mix in {stage_name}')


@pytest.mark.parametrize(('name', 'options', 'forward', 'shares'), FLOPS)
def test_flops_and_their_shares_above_each_cut(
    name: str, options: dict[str, Any], forward: float, shares: dict[str, float]
) -> None:
    with torch.device('meta'):
        network = _chain(name, **options)
        with FlopCounterMode(display=False) as counter:
            network(_images(name, rows=1))
        assert counter.get_total_flops() / 1e9 == pytest.approx(forward, abs=5e-5)
        total = _training_flops(network, _images(name, rows=1))
        stages = [stage_name for stage_name, _ in network.named_children()]
        for cut, share in shares.items():
            above = stages.index(cut) + 1
            latent = network[:above](_images(name, rows=1)).detach().requires_grad_()
            assert 100 * _training_flops(network[above:], latent) / total == pytest.approx(share, rel=2e-3), cut


@pytest.mark.parametrize('depth', [8, 44])
def test_residual_blocks_start_as_the_identity(depth: int) -> None:
    """With the last scale of each block at zero, stage1 hands on what it gets; the head is N(0, 0.01)."""
    network = _chain('resnet_cifar', depth=depth).eval()
    stem, stage1 = network[0], network[1]
    latent = stem(_images('resnet_cifar', rows=2))
    assert torch.equal(stage1(latent), latent)
    assert network.get_parameter('head.weight').std().item() == pytest.approx(0.01, rel=0.15)


def test_resnet50_starts_blocks_as_the_identity_only_if_asked() -> None:
    plain, zero = MODELS['resnet50'](2), MODELS['resnet50'](2, zero_init_residual=True)
    assert plain.get_parameter('layer1.0.bn3.weight').eq(1).all()
    assert zero.get_parameter('layer1.0.bn3.weight').eq(0).all()


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('resnet_cifar', {'depth': 45}, r'resnet_cifar: depth must be 6n \+ 2 with n >= 1 .*, got 45'),
        ('resnet_cifar', {'depth': 2}, r'resnet_cifar: depth must be 6n \+ 2 with n >= 1 .*, got 2'),
        ('vgg16_cifar', {'tail': 1024}, r'vgg16_cifar: tail must be 512 .* or 4096 .*, got 1024'),
        ('vgg16_cifar', {'tail': '512'}, r"vgg16_cifar: tail must be 512 .* or 4096 .*, got '512'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f'^{message}$'):
        MODELS[name](10, **options)


@pytest.mark.parametrize(('name', 'options'), CHAINS)
def test_a_few_steps_improve_the_loss(name: str, options: dict[str, Any]) -> None:
    """Every network begins to fit eight images: gradients reach all of it, at a scale that SGD can use."""
    # Blocks that start as the identity leave the residual network a short signal: it takes a larger step.
    options, lr = ({'depth': 8}, 0.2) if name == 'resnet_cifar' else (options, 0.02)
    network = _chain(name, **options)
    images, labels = _images(name, rows=8), torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.95 * losses[0]:
            break
    assert min(losses) < 0.95 * losses[0], losses


def test_digits_net_learns_the_digits(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = digits
    order = torch.randperm(len(images))
    evaluation, training = order[:360], order[360:]
    network = _chain('digits_net')
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=6 * 23)
    for _ in range(6):
        for batch in training[torch.randperm(len(training))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    network.eval()
    accuracy = (network(images[evaluation]).argmax(1) == labels[evaluation]).float().mean().item()
    assert accuracy >= 0.97


def test_metrics_of_an_evaluation_equal_torchmetrics(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = digits[0][:48], digits[1][:48]
    network = MODELS['digits_net'](10)
    trainer = Trainer(
        model=classifier(network, 10),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),  # unused: without one the Trainer warns
        eval_dataloader=DataLoader(TensorDataset(images, labels), batch_size=16),
        device='cpu',
        progress_bar=False,
    )
    trainer.eval()
    logits = network.eval()(images)
    expected = {
        'MulticlassAccuracy': multiclass_accuracy(logits, labels, 10, average='micro'),
        'CrossEntropy': nn.functional.cross_entropy(logits, labels),
        'MulticlassCalibrationError': multiclass_calibration_error(logits, labels, 10, n_bins=15),
    }
    computed = {name: metric.compute() for name, metric in trainer.state.eval_metrics['eval'].items()}
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(computed[name], value, msg=f'{name}: {computed[name]}, not {value}')
    trainer.close()


class Given(nn.Module):
    """A network whose logits are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + self.zero


def evaluate(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    model = classifier(Given(), logits.shape[1])
    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        model.update_metric((logits, labels), model.eval_forward((logits, labels)), metric)
    return {name: metric.compute().item() for name, metric in metrics.items()}


@pytest.mark.parametrize(
    'row',
    [
        [0.0] * 10,  # a head that starts at zero
        [0.1, 0.9],
        [0.25, 0.75],  # sums to 1
        [0.0, 1.0],
        [1.0, 1.0, 1.0],
        [-0.4, 0.4],
        [5.0, -5.0, 0.0],
        [90.0, -90.0],
    ],
    ids=str,
)
@pytest.mark.parametrize('shift', [0.0, -0.5, 100.0])
def test_metrics_are_those_of_the_softmax(row: list[float], shift: float) -> None:
    """A constant added to all logits of a row changes no prediction, and so no metric, whatever their range."""
    logits = (torch.tensor([row]) + shift).repeat(1000, 1)
    probabilities = logits.double().softmax(1)
    labels = torch.multinomial(probabilities, 1)[:, 0]
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    expected = {
        'MulticlassAccuracy': accuracy,
        'CrossEntropy': -probabilities.log()[range(1000), labels].mean().item(),
        'MulticlassCalibrationError': abs(probabilities[0].max().item() - accuracy),
    }
    assert evaluate(logits, labels) == pytest.approx(expected, abs=1e-5)


def test_training_measures_only_accuracy() -> None:
    assert list(classifier(MODELS['digits_net'](10), 10).get_metrics(is_train=True)) == ['MulticlassAccuracy']


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match='num_classes.* larger than 1'):
        classifier(MODELS['digits_net'](1), 1)
