"""A small network for SBA, trained for a few batches from fixed weights, and its log."""

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROWS, BATCH, CLASSES, SEED = 48, 16, 5, 17


class Net(nn.Module):
    """Dropout below the cuts 'block' and 'head', batch norm above 'block'."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.block = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.block(self.stem(x)))).mean((2, 3)))


def trainer_of(model, data, batch_size, algorithms, *, shuffle=False, momentum=0.0, **options):
    """Return Composer's Trainer on the CPU, with a fixed seed and without progress bar, and its log."""
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size, shuffle=shuffle),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum),
        algorithms=algorithms,
        loggers=[log],
        device='cpu',
        seed=SEED,
        progress_bar=False,
        **options,
    )
    return trainer, log


def make_trainer(algorithms, *, dtype=torch.float32, loss_fn=None, duration='2ep', **options):
    """Return a Trainer of Net, from fixed weights and data, and its log."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(ROWS, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (ROWS,)))
    model = ComposerClassifier(Net().to(dtype), num_classes=CLASSES, **({'loss_fn': loss_fn} if loss_fn else {}))
    options |= {'max_duration': duration, 'shuffle': True, 'momentum': 0.9}
    return trainer_of(model, data, BATCH, algorithms, **options)


def train(algorithms, **options):
    """Train Net for a few batches; return the Trainer and its log."""
    trainer, log = make_trainer(algorithms, **options)
    trainer.fit()
    return trainer, log


def logged(log, name):
    return [float(value) for _, value in log.data.get(name, [])]


def weights(trainer):
    return torch.cat([value.double().flatten() for value in trainer.state.model.state_dict().values()])
