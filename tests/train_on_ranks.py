"""Trains a recipe on the ranks that Composer's launcher gave; each prints, as JSON, what its batches were.

Run: composer -n 2 tests/train_on_ranks.py RECIPE KEY=VALUE ...
"""

import json
import sys
import zlib
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_sba.recipe.recipe import load
from composer_sba.train import train


class Record(LoggerDestination):
    """By batch: a checksum of each image as it was transformed, and the coin and the layer of SBA."""

    def __init__(self) -> None:
        self.images: dict[int, list[int]] = {}
        self.draws: dict[int, list[float]] = {}

    def after_dataloader(self, state: State, logger: Logger) -> None:
        rows = state.batch[0].cpu().numpy()
        self.images[state.timestamp.batch.value] = [zlib.crc32(row.tobytes()) for row in rows]

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if step is not None and 'sba/augmented' in metrics:
            # Logged at the end of the batch, when the clock is in the next one
            self.draws[step - 1] = [float(metrics[name]) for name in ('sba/augmented', 'sba/layer') if name in metrics]


def run(recipe: str, keys: list[str]) -> dict[str, Any]:
    record = Record()
    train(load(recipe, keys), record)
    return {'rank': dist.get_global_rank(), 'images': list(record.images.items()), 'draws': list(record.draws.items())}


if __name__ == '__main__':
    print(json.dumps(run(sys.argv[1], sys.argv[2:])))
