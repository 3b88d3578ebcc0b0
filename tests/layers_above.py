"""Layers to put above a cut: those that treat rows by themselves, whatever they draw, and those that mix rows."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import DropBlock2d, StochasticDepth


class Function(nn.Module):
    """A function of the rows that acts in training only."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x) if self.training else x


class BatchVariance(nn.Module):
    """Divides by the batch's standard deviation in training, as EvoNorm-B0 does, and is no BatchNorm of torch."""

    def __init__(self):
        super().__init__()
        self.register_buffer('running', torch.ones(16))

    def forward(self, x):
        if self.training:
            self.running.lerp_(x.var(0, unbiased=False).detach(), 0.1)
        return x / ((x.var(0, unbiased=False) if self.training else self.running) + 1e-5).sqrt()


class RunningVariance(BatchVariance):
    """Divides by a running standard deviation, and moves it."""

    def forward(self, x):
        output = x / (self.running + 1e-5).sqrt()
        self.running = self.running.lerp(x.var(0, unbiased=False).detach(), 0.1)
        return output


def drop_path(layer, x):
    """Drop rows, as timm's DropPath does."""
    return x * x.new_empty(len(x), 1).bernoulli_(0.7)


def add_less_noise(layer, x):
    """Add noise that decreases with the number of calls."""
    layer.calls += 1
    return x + torch.randn_like(x) / layer.calls


def own_noise(layer, x):
    return x + torch.randn(x.shape, generator=layer.generator)


def mix_style(draw):
    """Mix the rows' statistics, as MixStyle does on half of the batches."""

    def mix(layer, x):
        if draw() > 0.5:
            return x
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        others = torch.randperm(len(x))
        return (x - mean) / std * (0.6 * std + 0.4 * std[others]) + 0.6 * mean + 0.4 * mean[others]

    return mix


class Attention(nn.Module):
    """Attention between four parts of each row, with dropout of its own."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.block(x.unflatten(1, (4, 4))).flatten(1)


class ByName(nn.Module):
    """Calls layers with their arguments by name."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(input=self.norm(input=x))


BY_ROW = {
    'ReLU': nn.ReLU,
    'BatchNorm1d': lambda: nn.BatchNorm1d(16),
    'BatchNorm1d without running statistics': lambda: nn.BatchNorm1d(16, track_running_stats=False),
    'frozen BatchNorm1d': lambda: nn.BatchNorm1d(16).eval(),
    'LayerNorm': lambda: nn.LayerNorm(16),
    'Dropout': lambda: nn.Dropout(0.5),
    'RReLU': nn.RReLU,
    'StochasticDepth of rows': lambda: StochasticDepth(0.5, 'row'),
    'StochasticDepth of batches': lambda: StochasticDepth(0.5, 'batch'),
    'F.dropout': lambda: Function(lambda layer, x: F.dropout(x, 0.5)),
    'DropPath': lambda: Function(drop_path),
    'DropBlock2d': lambda: Function(lambda layer, x: DropBlock2d(0.4, 3)(x.view(-1, 1, 4, 4)).flatten(1)),
    'attention with dropout': Attention,
    'noise of torch': lambda: Function(lambda layer, x: x + torch.randn_like(x)),
    'noise of NumPy': lambda: Function(lambda layer, x: x + torch.from_numpy(np.random.randn(*x.shape)).float()),
    'noise of Python': lambda: Function(lambda layer, x: x * random.random()),
    'noise of a generator of its own': lambda: Function(own_noise, generator=torch.Generator()),
    'noise that decreases with a counter': lambda: Function(add_less_noise, calls=0),
    'noise that decreases with a buffer': lambda: Function(add_less_noise, calls=torch.zeros(())),
    'running variance': RunningVariance,
    'spectral norm': lambda: parametrizations.spectral_norm(nn.Linear(16, 16)),
    'spectral norm by hooks': lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
    'weight norm': lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
    'weight norm by hooks': lambda: nn.utils.weight_norm(nn.Linear(16, 16)),
    'layers called by name': ByName,
}
MIXES_ROWS = {
    'batch variance': BatchVariance,
    'batch mean': lambda: Function(lambda layer, x: x - x.mean(0)),
    'batch size': lambda: Function(lambda layer, x: x / len(x)),
    'batch norm as a function': lambda: Function(lambda layer, x: F.batch_norm(x, None, None, training=True)),
    'batch norm of a frozen layer': lambda: Function(
        lambda layer, x: x - layer.mean.lerp_(x.mean(0).detach(), 0.5), mean=torch.zeros(16)
    ),
    'shuffled rows': lambda: Function(lambda layer, x: x + x[torch.randperm(len(x))]),
    'MixStyle': lambda: Function(mix_style(random.random)),
    'MixStyle with a coin of torch': lambda: Function(mix_style(lambda: torch.rand(()))),
    'MixStyle with a coin of NumPy': lambda: Function(mix_style(np.random.rand)),
    'mean and dropout': lambda: Function(lambda layer, x: F.dropout(x - x.mean(0), 0.5)),
}
