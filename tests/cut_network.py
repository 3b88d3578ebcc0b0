"""A network with batch norm and dropout above the cut, and its predictions for an expanded batch."""

import torch
from torch import nn

from composer_sba import LatentExpander, Vicinity

N, M = 6, 3
GAUSSIAN = Vicinity(1.0, sigma=0.5, noise_scale='absolute')


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.trunk(x)))))


def make(dropout=0.0, dtype=torch.float64):
    model = Net(dropout).to(dtype)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model, torch.randn(N, 4, dtype=dtype), torch.randint(3, (N,))


def predict(model, x, layers, step=0, vicinity=GAUSSIAN, **options):
    expander = LatentExpander(model, layers, M, vicinity, **options)
    with expander.armed(step):
        out = model(x)
    expander.remove()
    return expander.split(out)
