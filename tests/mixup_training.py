"""A small network that is trained with or without ManifoldMixup from fixed weights."""

import torch
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import TensorDataset

from small_training import trainer_of

ROWS, BATCH, CLASSES = 24, 8, 5
LAYERS = ['input', '1', 'head']


def make_network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_trainer(algorithms, *, network=make_network, duration='2ep', dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = ComposerClassifier(network().to(dtype), num_classes=CLASSES)
    data = TensorDataset(torch.randn(ROWS, 6, dtype=dtype), torch.randint(CLASSES, (ROWS,)))
    trainer, log = trainer_of(model, data, BATCH, algorithms, max_duration=duration, **options)
    return trainer, log, data


def fit(algorithms, **options):
    trainer, log, _ = make_trainer(algorithms, **options)
    trainer.fit()
    return weights(trainer), log


def weights(trainer):
    return torch.cat([each.detach().flatten() for each in trainer.state.model.parameters()])
