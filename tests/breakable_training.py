"""A small network with modules that call a test's function, and a Trainer for it."""

import torch
import torch.nn.functional as F
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SeedEachBatch, sort_sba_last, sort_seed_first

BATCH, CLASSES = 16, 5


class Probe(nn.Identity):
    """Calls ``happen`` in a training step's forward pass and ``back`` in its backward pass."""

    def __init__(self):
        super().__init__()
        self.happen = self.back = lambda rows: None

    def forward(self, x):
        if self.training and torch.is_grad_enabled():  # not when layers are checked
            self.happen(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: self.back(gradient))
        return x


class Net(nn.Module):
    """Batch norm and dropout below the cut 'cut', batch norm above it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))
        self.below = Probe()
        self.cut = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.above = Probe()
        self.fc = nn.Linear(8, CLASSES)
        self.logits = Probe()

    def forward(self, x):
        h = self.norm(self.cut(self.below(self.stem(x))))
        return self.logits(self.fc(self.above(torch.relu(h)).mean((2, 3))))


def make_trainer(*algorithms, loss_fn=F.cross_entropy, microbatch=None, duration='4ba'):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(CLASSES, (48,)))
    model = ComposerClassifier(Net(), num_classes=CLASSES, loss_fn=loss_fn)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, BATCH, shuffle=True),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[SeedEachBatch(), *algorithms],
        algorithm_passes=[sort_sba_last, sort_seed_first],
        loggers=[InMemoryLogger()],
        device='cpu',
        device_train_microbatch_size=microbatch,
        seed=17,
        progress_bar=False,
    )
    return trainer, trainer.state.model.module
