"""Trains SBA(estimator='analytic') on the ranks that Composer's launcher gave; each prints its losses, as JSON.

Run: composer -n 2 tests/analytic_on_ranks.py ddp 'fsdp1 checkpointed' fsdp2
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


def train(strategy):
    os.environ['FSDP_VERSION'] = '2' if strategy == 'fsdp2' else '1'
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 6), torch.randint(4, (32,)))
    network = nn.Sequential(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 4))
    network[0]._fsdp_wrap = network[1]._fsdp_wrap = True
    network[1]._activation_checkpointing = True
    model = ComposerClassifier(network, num_classes=4)
    checkpointing = strategy == 'fsdp1 checkpointed'
    fsdp = {'activation_checkpointing': checkpointing, 'activation_checkpointing_reentrant': False}
    log = InMemoryLogger()
    # On gloo FSDP2 adds gradients where the others take their mean.
    rate = 0.15 if strategy == 'fsdp2' else 0.3
    Trainer(
        model=model,
        train_dataloader=DataLoader(data, 8, sampler=dist.get_sampler(data, shuffle=False, num_replicas=1, rank=0)),
        max_duration='3ep',
        optimizers=torch.optim.SGD(model.parameters(), lr=rate),
        algorithms=[SBA(eta=2.0, vicinity=Vicinity(sigma=0.5), estimator='analytic')],
        parallelism_config=None if strategy == 'ddp' else {'fsdp': fsdp},
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
    ).fit()
    kl = [float(value) for _, value in log.data['sba/kl']]
    print(json.dumps({'strategy': strategy, 'kl': kl, 'loss': [float(v) for _, v in log.data['loss/train/total']]}))


if __name__ == '__main__':
    torch.cuda.current_device = lambda: torch.device('cpu')  # FSDP1 asks for the CUDA device; gloo ranks have none
    dist.initialize_dist('cpu')
    for strategy in sys.argv[1:]:
        train(strategy)
