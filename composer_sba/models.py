"""Networks that a recipe can name, as plain ``nn.Module`` objects, and the metrics of a ``ComposerClassifier``.

The 224-pixel networks are torchvision's, with random weights. The others are chains of named stages. The output of each
stage is a cut layer: give its name in the last column to :class:`.SBA`.

=================  =======  ========  ==============================================================
name               pixels   M params  stages
=================  =======  ========  ==============================================================
``alexnet``        224      61.10     torchvision's
``vgg16``          224      138.36    torchvision's
``vgg16_bn``       224      138.37    torchvision's
``resnet50``       224      25.56     torchvision's
``resnet_cifar``   32       0.66      stem, stage1, stage2, stage3, pool, head (``depth=44``)
``vgg16_cifar``    32       14.73     conv1 ... conv5, flatten, head; with ``tail=4096`` (33.65) fc1 and
                                      fc2 before the head
``alexnet_cifar``  32       2.47      conv1 ... conv5, flatten, head
``digits_net``     8        0.09      conv1, conv2, conv3, pool, head
=================  =======  ========  ==============================================================

Parameters are counted with 1,000 classes at 224 pixels and with 10 at fewer. Shapes: N images, K = ``num_classes``.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
import torchvision
from composer.metrics import CrossEntropy
from composer.models import ComposerClassifier
from torch import nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from composer_sba.errors import UserError


def classifier(network: nn.Module, num_classes: int) -> ComposerClassifier:
    """Wrap a network for Composer's Trainer, with cross-entropy loss and the metrics of this package's tables.

    Evaluation measures ``MulticlassAccuracy`` (top-1, micro average), ``CrossEntropy`` (nats) and
    ``MulticlassCalibrationError`` (expected calibration error of the softmax in 15 bins, `Guo et al., 2017
    <https://arxiv.org/abs/1706.04599>`_). Training measures only accuracy, because Composer logs the loss anyway.

    Args:
        network (torch.nn.Module): Maps images to logits of shape ``(N, K)``.
        num_classes (int): K, the number of classes, >= 2.

    Returns:
        ComposerClassifier: The network as its ``module``. Batches are ``(images, labels)``, labels of shape ``(N,)``
        or, if soft, ``(N, K)``.

    Raises:
        ValueError: If ``num_classes`` is below 2.

    Example:
        >>> model = classifier(digits_net(), num_classes=10)
        >>> sorted(model.get_metrics(is_train=False))
        ['CrossEntropy', 'MulticlassAccuracy', 'MulticlassCalibrationError']
    """
    metrics: dict[str, Metric | MetricCollection] = {
        'MulticlassAccuracy': MulticlassAccuracy(num_classes, average='micro'),
        'CrossEntropy': CrossEntropy(),
        'MulticlassCalibrationError': _CalibrationError(num_classes, n_bins=15),
    }
    return ComposerClassifier(
        network,
        num_classes,
        train_metrics=MulticlassAccuracy(num_classes, average='micro'),
        val_metrics=MetricCollection(metrics),
    )


def alexnet(num_classes: int = 1000) -> nn.Module:
    """Build torchvision's AlexNet (`Krizhevsky, 2014 <https://arxiv.org/abs/1404.5997>`_), with random weights.

    Example:
        >>> alexnet(10)(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return torchvision.models.alexnet(num_classes=num_classes)


def vgg16(num_classes: int = 1000) -> nn.Module:
    """Build torchvision's VGG16 (`Simonyan & Zisserman, 2015 <https://arxiv.org/abs/1409.1556>`_), with random weights.

    Example:
        >>> with torch.device('meta'):  # shapes without the weights
        ...     vgg16(10)(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return torchvision.models.vgg16(num_classes=num_classes)


def vgg16_bn(num_classes: int = 1000) -> nn.Module:
    """Build torchvision's VGG16 with batch normalization after every convolution, with random weights.

    Example:
        >>> with torch.device('meta'):  # shapes without the weights
        ...     vgg16_bn(10)(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return torchvision.models.vgg16_bn(num_classes=num_classes)


def resnet50(num_classes: int = 1000, zero_init_residual: bool = False) -> nn.Module:
    """Build torchvision's ResNet50 (`He et al., 2016 <https://arxiv.org/abs/1512.03385>`_), with random weights.

    Args:
        num_classes (int, optional): K. Default: ``1000``.
        zero_init_residual (bool, optional): Start every block as the identity, with a scale of zero in its
            last batch normalization (`Goyal et al., 2017 <https://arxiv.org/abs/1706.02677>`_, Sec. 5.1).
            Default: ``False``.

    Returns:
        torch.nn.Module: Images ``(N, 3, 224, 224)`` to logits ``(N, K)``.

    Example:
        >>> resnet50(10)(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """
    return torchvision.models.resnet50(num_classes=num_classes, zero_init_residual=zero_init_residual)


def resnet_cifar(num_classes: int = 10, depth: int = 44) -> nn.Sequential:
    """Build the ResNet for 32-pixel images of `He et al., 2016 <https://arxiv.org/abs/1512.03385>`_, Sec. 4.2.

    It has three stages of ``(depth - 2) / 6`` blocks with 16, 32 and 64 channels. Shortcuts have no parameters (option
    A), as in the counts of their Table 6. `Hoffer et al., 2020 <https://arxiv.org/abs/1901.09335>`_ use 1x1
    convolutions with batch normalization instead, with 2,752 more parameters. The initialization is Hoffer et al.'s:
    every block is the identity (its last scale is zero), and the head is N(0, 0.01).

    Args:
        num_classes (int, optional): K. Default: ``10``.
        depth (int, optional): Weighted layers, 6n + 2 with n >= 1. Default: ``44``.

    Returns:
        torch.nn.Sequential: Images ``(N, 3, 32, 32)`` to logits ``(N, K)``.

    Raises:
        UserError: If ``depth`` is not 6n + 2 with n >= 1.

    Example:
        >>> resnet_cifar(10, depth=20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks, remainder = divmod(depth - 2, 6)
    if blocks < 1 or remainder:
        problem = f'resnet_cifar: depth must be 6n + 2 with n >= 1 (20, 32, 44, 56, 110, ...), got {depth!r}'
        raise UserError(problem, 'depth')
    return _chain(
        stem=nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        stage1=nn.Sequential(*(_ResidualBlock(16, 16) for _ in range(blocks))),
        stage2=nn.Sequential(_ResidualBlock(16, 32), *(_ResidualBlock(32, 32) for _ in range(blocks - 1))),
        stage3=nn.Sequential(_ResidualBlock(32, 64), *(_ResidualBlock(64, 64) for _ in range(blocks - 1))),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        head=nn.Linear(64, num_classes),
    )


def vgg16_cifar(num_classes: int = 10, tail: int = 512, batch_norm: bool = True) -> nn.Sequential:
    """Build VGG16 (`Simonyan & Zisserman, 2015 <https://arxiv.org/abs/1409.1556>`_) for 32-pixel images.

    Args:
        num_classes (int, optional): K. Default: ``10``.
        tail (int, optional): ``512``: one Linear, 512-K. ``4096``: 512-4096-4096-K with a dropout of 0.5 after both
            hidden layers, as in the code of `Hoffer et al., 2020 <https://arxiv.org/abs/1901.09335>`_. Unit: features.
            Default: ``512``.
        batch_norm (bool, optional): Normalize after every convolution. Default: ``True``.

    Returns:
        torch.nn.Sequential: Images ``(N, 3, 32, 32)`` to logits ``(N, K)``.

    Raises:
        UserError: If ``tail`` is neither 512 nor 4096.

    Example:
        >>> vgg16_cifar(10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if tail not in (512, 4096):
        raise UserError(f'vgg16_cifar: tail must be 512 (512-K) or 4096 (512-4096-4096-K), got {tail!r}', 'tail')
    channels = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
    stages: dict[str, nn.Module] = {}
    for number, widths in enumerate(channels, start=1):
        convolutions = (_conv(*pair, batch_norm=batch_norm) for pair in pairwise(widths))
        stages[f'conv{number}'] = nn.Sequential(*convolutions, nn.MaxPool2d(2))
    stages['flatten'] = nn.Flatten()
    if tail == 4096:
        stages['fc1'] = nn.Sequential(nn.Linear(512, 4096), nn.ReLU(), nn.Dropout(0.5))
        stages['fc2'] = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5))
    return _chain(**stages, head=nn.Linear(tail, num_classes))


def alexnet_cifar(num_classes: int = 10, batch_norm: bool = False) -> nn.Sequential:
    """Build AlexNet for 32-pixel images: five convolutions and one Linear, 256-K.

    This is the network of `pytorch-classification <https://github.com/bearpaw/pytorch-classification>`_ (22.78 % error
    on CIFAR-10, 56.13 % on CIFAR-100). The SBA paper does not describe its AlexNet; this one's error is nearest to the
    paper's baseline.

    Args:
        num_classes (int, optional): K. Default: ``10``.
        batch_norm (bool, optional): Normalize after every convolution. Default: ``False``.

    Returns:
        torch.nn.Sequential: Images ``(N, 3, 32, 32)`` to logits ``(N, K)``.

    Example:
        >>> alexnet_cifar(10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return _chain(
        conv1=nn.Sequential(_conv(3, 64, kernel=11, stride=4, batch_norm=batch_norm), nn.MaxPool2d(2)),
        conv2=nn.Sequential(_conv(64, 192, kernel=5, batch_norm=batch_norm), nn.MaxPool2d(2)),
        conv3=_conv(192, 384, batch_norm=batch_norm),
        conv4=_conv(384, 256, batch_norm=batch_norm),
        conv5=nn.Sequential(_conv(256, 256, batch_norm=batch_norm), nn.MaxPool2d(2)),
        flatten=nn.Flatten(),
        head=nn.Linear(256, num_classes),
    )


def digits_net(num_classes: int = 10, *, dropout: float = 0.0) -> nn.Sequential:
    """Build the demo's network: small, batch-normalized, for scikit-learn's 8-pixel digits, ``(N, 3, 8, 8)``.

    Args:
        num_classes (int, optional): K. Default: ``10``.
        dropout (float, optional): Dropout rate before the last layer; 0 adds no dropout layer. Default: ``0.0``.

    Returns:
        torch.nn.Sequential: With the stages conv1, conv2, conv3, pool and head.

    Example:
        >>> digits_net()(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    return _chain(
        conv1=_conv(3, 32, batch_norm=True),
        conv2=nn.Sequential(_conv(32, 64, batch_norm=True), nn.MaxPool2d(2)),
        conv3=nn.Sequential(_conv(64, 128, batch_norm=True), nn.MaxPool2d(2)),
        pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([nn.Dropout(dropout)] if dropout else [])),
        head=nn.Linear(128, num_classes),
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (alexnet, vgg16, vgg16_bn, resnet50, resnet_cifar, vgg16_cifar, alexnet_cifar, digits_net)
}


class _CalibrationError(MulticlassCalibrationError):
    """The calibration error of logits. torchmetrics would read logits as probabilities if all are in [0, 1]."""

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        super().update(preds.float().softmax(1), target)


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters. New channels come with half the height and width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.new_channels = out_channels - in_channels
        stride = 2 if self.new_channels else 1
        last_norm = nn.BatchNorm2d(out_channels)
        nn.init.zeros_(last_norm.weight)
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            last_norm,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        if self.new_channels:  # the shortcut pads the additional channels with zeros
            shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))
        return nn.functional.relu(shortcut + self.branch(x))


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, *, batch_norm: bool) -> nn.Sequential:
    """Build convolution, batch norm (optional) and ReLU. The published counts include a bias even before batch norm."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)
    norm = [nn.BatchNorm2d(out_channels)] if batch_norm else []
    return nn.Sequential(convolution, *norm, nn.ReLU())


def _chain(**stages: nn.Module) -> nn.Sequential:
    """Chain stages under their names. Convolutions start from He et al.'s normal weights by fan-in, Linears N(0, 0.01).

    In the networks without normalization, fan-in keeps the scale of activations, whereas fan-out shrinks it.
    """
    network = nn.Sequential(OrderedDict(stages))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network
