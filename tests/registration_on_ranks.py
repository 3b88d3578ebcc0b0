"""One of two ranks that build DataLoaders while a run ends or one rank fails; prints what it met, as a line of JSON.

Run by tests/test_shared_memory.py: registration_on_ranks.py FOLDER NUMBER, the number of a block of a run that ends.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from composer.utils import dist
from streaming.base import dataset
from streaming.base.shared import prefix
from streaming.base.stream import Stream

from composer_sba.data import loader, shared_memory
from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.errors import DatasetError, UserError
from composer_sba.recipe.build import build_trainer
from composer_sba.recipe.recipe import load

KEYS = {'name': 'imagefolder', 'num_classes': 16, 'crop_size': 8, 'resize_size': 8, 'num_workers': 0}
LOOKS = 9  # blocks that Streaming looks for, each in turn


def ends_between_looks(folder: Path, number: int) -> Callable[..., int]:
    """The look of rank 0 for free numbers, and that of rank 1 after another run has ended."""
    look, seen = prefix._check_and_find, [0]

    def looked(*args: Any) -> int:
        if dist.get_local_rank() == 1 and not seen[0]:
            while not (folder / 'looked').exists():
                time.sleep(0.01)
            Path(f'/dev/shm/{number:06}_locals').unlink()
        found = look(*args)
        seen[0] += 1
        if dist.get_local_rank() == 0 and seen[0] == LOOKS:
            (folder / 'looked').touch()
        return found

    return looked


def failing(owner: Any, name: str, rank: int) -> Any:
    """Let a step of Streaming's construction fail on one rank."""
    original = getattr(owner, name)

    def step(*args: Any, **keys: Any) -> Any:
        if dist.get_local_rank() == rank:
            raise OSError(f'{name} failed on rank {rank}')
        return original(*args, **keys)

    return mock.patch.object(owner, name, step)


def outcome(local: Path, **keys: Any) -> str | int:
    try:
        loader = build_dataloader(DatasetConfig(**KEYS | keys, local=str(local)), 4)
        return sum(len(labels) for _, labels in loader)
    except (DatasetError, OSError) as error:
        return str(error)


def refusal(overrides: list[str]) -> str:
    try:
        build_trainer(load('digits_baseline.yaml', ['eval_dataset=null', *overrides]))
    except UserError as error:
        return str(error)
    return 'accepted'


def main(folder: Path, number: int) -> None:
    dist.initialize_dist('cpu')
    good, result = folder / 'good', {}
    with mock.patch.object(prefix, '_check_and_find', ends_between_looks(folder, number)):
        result['a run ends'] = outcome(good)
    result['hash'] = outcome(folder / 'changed')
    steps = [(Stream, 'get_shards', 0), (Stream, 'get_shards', 1)]  # before the ranks agree on a number
    steps += [(Stream, 'set_up_local', 0), (dataset, 'SharedBarrier', 1)]  # after it
    for owner, name, rank in steps:
        with failing(owner, name, rank):
            result[f'{name} failed on rank {rank}'] = outcome(good)
    missing = folder / ('good' if dist.get_local_rank() == 0 else 'missing')
    result['missing on rank 1'] = outcome(missing)
    dataset_of = [f'train_dataset.{key}={value}' for key, value in (KEYS | {'local': missing}).items()]
    with failing(shared_memory, 'FileLock', 0):
        result['FileLock on rank 0'] = outcome(good)
    for rank in (0, 1):
        with failing(loader, 'MemoryDataset', rank):
            digits = {'name': 'digits', 'in_memory': True, 'num_classes': None, 'crop_size': None, 'resize_size': None}
            result[f'MemoryDataset on rank {rank}'] = outcome(folder / 'digits', **digits)
    result['missing in a recipe'] = refusal([*dataset_of, 'model.num_classes=16'])
    result['a file in place of a folder on rank 0'] = refusal([f'save_folder={good}/train/index.json/run'])
    result['afterwards'] = outcome(good)
    print(json.dumps(result))


if __name__ == '__main__':
    main(Path(sys.argv[1]), int(sys.argv[2]))
