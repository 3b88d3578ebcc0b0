"""Trains a small network with SBA on the ranks that Composer's launcher gave; each rank prints what it drew, as JSON.

Run: composer -n 2 tests/sba_on_ranks.py ddp fsdp1 fsdp2
"""

import json
import os
import sys
from typing import Any

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SBA, Vicinity

LAYERS = ['0.0', '0', 'head']


def fit(strategy: str, sba: SBA, *, own_rows: bool, lr: float) -> dict[str, Any]:
    """Train 9 batches of 8 rows; on each rank the same ones, or its share of them (``own_rows``)."""
    os.environ['FSDP_VERSION'] = '2' if strategy == 'fsdp2' else '1'
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(72, 6), torch.randint(4, (72,)))
    norm = nn.Identity() if own_rows else nn.BatchNorm1d(16)  # whose statistics are a rank's own
    body = nn.Sequential(nn.Linear(6, 16), norm, nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(16, 4))
    network[0]._fsdp_wrap = network[1]._fsdp_wrap = True
    model = ComposerClassifier(network, num_classes=4)
    shares = {} if own_rows else {'num_replicas': 1, 'rank': 0}
    rows = 8 // dist.get_world_size() if own_rows else 8
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, rows, sampler=dist.get_sampler(data, shuffle=False, **shares)),
        max_duration='1ep',
        optimizers=torch.optim.SGD(model.parameters(), lr=lr),
        algorithms=[sba],
        parallelism_config={'fsdp': {}} if strategy.startswith('fsdp') else None,
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
    )
    trainer.fit()
    names = ('sba/augmented', 'sba/layer', 'sba/kl', 'loss/train/total')
    wrapped = sorted({type(module).__name__ for module in trainer.state.model.modules()})
    return {'modules': wrapped} | {name: [float(value) for _, value in log.data[name]] for name in names}


def draws(strategy: str) -> dict[str, Any]:
    """Every rank trains on the same rows, so that what differs between ranks is the noise."""
    return fit(strategy, SBA(LAYERS, vicinity=Vicinity(sigma=0.5)), own_rows=False, lr=0.01)


def losses(strategy: str) -> dict[str, Any]:
    """Without noise the steps are those of one process; the hard label gives virtual rows a loss all the same."""
    # FSDP2 asks for the mean of the gradients, and torch 2.7's gloo gives it their sum.
    lr = 0.1 / dist.get_world_size() if strategy == 'fsdp2' else 0.1
    sba = SBA(LAYERS, eta=0.5, target='hard', vicinity=Vicinity(1.0, sigma=0.0))
    return fit(strategy, sba, own_rows=True, lr=lr)


if __name__ == '__main__':
    torch.cuda.current_device = lambda: torch.device('cpu')  # FSDP1 asks for the CUDA device; gloo ranks have none
    dist.initialize_dist('cpu')
    for strategy in sys.argv[1:]:
        found = {'strategy': strategy, 'rank': dist.get_global_rank()}
        print(json.dumps(found | {'draws': draws(strategy), 'losses': losses(strategy)}))
