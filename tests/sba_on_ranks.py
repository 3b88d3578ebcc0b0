"""Trains a small network with SBA on the ranks that Composer's launcher gave; each rank prints what it drew, as JSON.

Run: composer -n 2 tests/sba_on_ranks.py ddp fsdp1 fsdp2
"""

import json
import os
import sys

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SBA, Vicinity


def train(strategy: str) -> None:
    os.environ['FSDP_VERSION'] = '2' if strategy == 'fsdp2' else '1'
    torch.manual_seed(0)
    # Every rank trains on the same rows, so that what differs between ranks is the noise.
    data = TensorDataset(torch.randn(32, 6), torch.randint(4, (32,)))
    body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(16, 4))
    network[0]._fsdp_wrap = network[1]._fsdp_wrap = True
    model = ComposerClassifier(network, num_classes=4)
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, 8, sampler=dist.get_sampler(data, shuffle=False, num_replicas=1, rank=0)),
        max_duration='3ep',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        algorithms=[SBA(['0.0', '0', 'head'], vicinity=Vicinity(sigma=0.5))],
        parallelism_config=None if strategy == 'ddp' else {'fsdp': {}},
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
    )
    trainer.fit()
    drawn = {name: [round(float(v), 6) for _, v in log.data[name]] for name in ('sba/augmented', 'sba/layer', 'sba/kl')}
    wrapped = sorted({type(module).__name__ for module in trainer.state.model.modules()})
    print(json.dumps({'strategy': strategy, 'rank': dist.get_global_rank(), 'modules': wrapped, **drawn}))


if __name__ == '__main__':
    torch.cuda.current_device = lambda: torch.device('cpu')  # FSDP1 asks for the CUDA device; gloo ranks have none
    dist.initialize_dist('cpu')
    for strategy in sys.argv[1:]:
        train(strategy)
