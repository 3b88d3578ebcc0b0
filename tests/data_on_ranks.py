"""One rank of ``test_data.py``; prints the labels that it reads and that its metrics count, as a line of JSON.

Run: python -m composer.cli -n 2 tests/data_on_ranks.py FOLDER '[[size, batch size, workers, drop last], ...]'
"""

import json
import sys
from typing import Any

import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist
from torchmetrics import Metric

from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.errors import DatasetError


class Labels(Metric):
    """The number of times that evaluation counted each label, over all ranks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state('counts', default=torch.zeros(size), dist_reduce_fx='sum')

    def update(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def compute(self) -> torch.Tensor:
        counted[:] = self.counts.tolist()
        return self.counts.sum()


counted: list[float] = []  # by the last Labels, for Composer passes on single numbers only


class Mean(ComposerModel):
    """A model with one weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: Any) -> torch.Tensor:
        return self.weight * batch[0].mean(dim=(1, 2, 3))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return outputs.mean()

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {'Labels': Labels(self.size)}

    def update_metric(self, batch: Any, outputs: torch.Tensor, metric: Metric) -> None:
        metric.update(outputs, batch[1])


def rank_result(folder: str, size: int, batch_size: int, workers: int, drop_last: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {'name': 'imagefolder', 'local': f'{folder}/{size}', 'num_classes': size}
    keys |= {'crop_size': 8, 'resize_size': 8, 'num_workers': workers}
    result: dict[str, Any] = {}
    try:
        train = build_dataloader(DatasetConfig(**keys), batch_size, drop_last=drop_last)
        result['epochs'] = [[labels.tolist() for _, labels in train] for _ in range(2)]
        result['length'] = len(train)
    except DatasetError as error:
        result['error'] = str(error)
    if not drop_last:
        evaluation = build_dataloader(DatasetConfig(**keys, split='val'), batch_size)
        fit: dict[str, Any] = {}
        if 'error' not in result:
            train = build_dataloader(DatasetConfig(**keys), batch_size)  # Composer refuses one that was iterated before
            fit = {'train_dataloader': train, 'max_duration': '1ep'}
        model = Mean(size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model=model, device='cpu', progress_bar=False, optimizers=optimizer, **fit)
        trainer.eval(eval_dataloader=evaluation)
        result['evaluated'] = list(counted)
        if fit:
            trainer.fit()  # ends only if every rank has a batch whenever another has one
            result['trained'] = trainer.state.timestamp.sample.value
        trainer.close()
    return result


if __name__ == '__main__':
    dist.initialize_dist('cpu')
    print(json.dumps([rank_result(sys.argv[1], *case) for case in json.loads(sys.argv[2])]))
