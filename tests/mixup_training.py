"""A small network trained with ManifoldMixup, or without, from one fixed start."""

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, BATCH, CLASSES, SEED = 24, 8, 5, 17
LAYERS = ['input', '1', 'head']


def make_network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_trainer(algorithms, *, network=make_network, duration='2ep', dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = ComposerClassifier(network().to(dtype), num_classes=CLASSES)
    data = TensorDataset(torch.randn(ROWS, 6, dtype=dtype), torch.randint(CLASSES, (ROWS,)))
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, BATCH),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=algorithms,
        loggers=[log],
        device='cpu',
        seed=SEED,
        progress_bar=False,
        **options,
    )
    return trainer, log, data


def fit(algorithms, **options):
    trainer, log, _ = make_trainer(algorithms, **options)
    trainer.fit()
    return weights(trainer), log


def weights(trainer):
    return torch.cat([each.detach().flatten() for each in trainer.state.model.parameters()])
