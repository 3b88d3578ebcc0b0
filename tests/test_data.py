"""Samples that a DataLoader yields compared with those that are stored: each once, and repeated by the same seed.

Run: python -m pytest tests/test_data.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import ComposerClassifier
from PIL import Image

from composer_sba.data.conversion import convert
from composer_sba.data.loader import DatasetConfig, build_dataloader, dataset_classes
from composer_sba.errors import DatasetError
from shards import dataset, labels


@pytest.mark.parametrize(
    ('size', 'workers'),
    [
        *((size, 0) for size in (1, 5, 16, 97)),
        *((size, 2) for size in (5, 97)),
        *(pytest.param(size, 2, marks=pytest.mark.nightly) for size in (1, 16)),
    ],
)
def test_each_sample_once_in_training_and_evaluation(tmp_path: Path, size: int, workers: int) -> None:
    keys = dataset(tmp_path / 'mds', size)
    train = build_dataloader(DatasetConfig(**keys, num_workers=workers), 4)
    epochs = [labels(train) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size)), f'{len(epoch)} samples, {len(set(epoch))} distinct, stored: {size}'
    assert len(train) == -(-size // 4)
    if size > 4:
        assert list(range(size)) != epochs[0] != epochs[1], 'not shuffled again'
    evaluation = build_dataloader(DatasetConfig(**keys, split='val', num_workers=workers), 4)
    assert [labels(evaluation) for _ in range(2)] == [list(range(size))] * 2


def test_two_ranks_read_each_sample_once(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    # size, batch size, workers, drop last: samples of an epoch
    cases = {
        (1, 4, 0, False): None,  # one rank would have no batch
        (5, 4, 0, False): 5,
        (5, 2, 0, False): 4,  # the fifth would be the second batch of one rank only
        (16, 4, 2, False): 16,
        (97, 32, 0, False): 97,
        (97, 4, 0, True): 96,
    }
    for size in {case[0] for case in cases}:
        dataset(tmp_path / str(size), size)
    script = Path(__file__).with_name('data_on_ranks.py')
    printed = run_ranks(script, 2, str(tmp_path), json.dumps(list(cases)))
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith('[{')]
    assert len(ranks) == 2
    for case, expected, *results in zip(cases, cases.values(), *ranks, strict=True):
        size, _, _, drop_last = case
        if expected is None:
            assert all('has 1 samples, too few for 2 ranks' in result['error'] for result in results), results
        else:
            left_out = []
            for epochs in zip(*(result['epochs'] for result in results), strict=True):
                seen = [label for batches in epochs for batch in batches for label in batch]
                assert len(seen) == len(set(seen)) == expected, f'{case}: {len(seen)} read, {len(set(seen))} distinct'
                assert {len(batches) for batches in epochs} == {results[0]['length']}, f'{case}: ranks differ'
                left_out.append(set(range(size)) - set(seen))
            if drop_last:
                assert left_out[0] != left_out[1], 'each epoch leaves out the same'
            else:
                assert [result['trained'] for result in results] == [expected] * 2, case
        if not drop_last:
            assert all(result['evaluated'] == [1] * size for result in results), f'{case}: {results[0]["evaluated"]}'


def test_the_seed_determines_order_and_augmentation_with_any_workers(few_digits: Path) -> None:
    def epochs(seed: int, workers: int = 0) -> list[torch.Tensor]:
        config = DatasetConfig('digits', local=str(few_digits), num_workers=workers)
        loader = build_dataloader(config, 16, seed=seed)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first = epochs(1)
    assert all(map(torch.equal, first, epochs(1)))
    assert all(map(torch.equal, first, epochs(1, workers=2)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], epochs(2)[0]), 'seeds 1 and 2 have the same epochs, one apart'


def test_augmentation_leaves_the_global_generator_alone(digits_folder: Path) -> None:
    loader = build_dataloader(DatasetConfig('digits', local=str(digits_folder)), 100)
    iterator = iter(loader)  # the DataLoader draws a seed here
    state = torch.get_rng_state()
    next(iterator)
    assert torch.equal(state, torch.get_rng_state())


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[float, list[int]]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        images, labels = state.batch
        self.batches.append((images.double().sum().item(), labels.tolist()))


@pytest.mark.filterwarnings('ignore:Cannot split tensor of length:UserWarning')  # the last batch of an epoch
@pytest.mark.parametrize('checkpoint', ['ep0-ba2-rank0.pt', 'ep1-ba3-rank0.pt', 'ep1-ba5-rank0.pt'])
def test_a_resumed_run_sees_the_same_batches(tmp_path: Path, few_digits: Path, checkpoint: str) -> None:
    def run(**options: Any) -> list[tuple[float, list[int]]]:
        seen = Seen()
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        loader = build_dataloader(DatasetConfig('digits', local=str(few_digits)), 64)
        model = ComposerClassifier(network, num_classes=10)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        options |= {'max_duration': '3ep', 'device': 'cpu', 'progress_bar': False, 'callbacks': [seen]}
        trainer = Trainer(model=model, train_dataloader=loader, optimizers=optimizer, **options)
        trainer.fit()
        trainer.close()
        return seen.batches

    interval = '1ep' if 'ep1-ba3' in checkpoint else '1ba'  # between two epochs Composer names the file after the next
    unbroken = run(save_folder=str(tmp_path), save_interval=interval)
    resumed = run(load_path=str(tmp_path / checkpoint))
    assert resumed == unbroken[int(checkpoint[6]) :]


def test_digits_have_the_statistics_we_normalize_with(tmp_path: Path) -> None:
    config = DatasetConfig('digits', local=str(tmp_path / 'digits'), augment=False)  # made on first use
    images = torch.cat([images for images, _ in build_dataloader(config, 100)]).double()
    assert len(images) == 1437
    assert abs(images.mean().item()) < 1e-3 and abs(images.std().item() - 1) < 1e-3, (images.mean(), images.std())


def test_a_converted_image_folder_records_classes_and_statistics(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name, grey in (('dark', 10), ('light', 240)):
            (tmp_path / 'source' / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 30), (grey, grey, grey)).save(tmp_path / 'source' / split / name / '0.png')
    convert('imagefolder', tmp_path / 'source', tmp_path / 'mds')
    keys = {'remote': str(tmp_path / 'mds'), 'split': 'val', 'crop_size': 16, 'resize_size': 16}
    config = DatasetConfig('imagefolder', local=str(tmp_path / 'cache'), **keys)
    assert dataset_classes(config) == 2
    images, _ = next(iter(build_dataloader(config, 2)))
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)
    shutil.rmtree(tmp_path / 'cache')
    assert dataset_classes(DatasetConfig('imagenet', local=str(tmp_path / 'cache'), **keys)) == 2


def test_batches_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    keys = dataset(tmp_path / 'mds', 5)
    with pytest.raises(DatasetError, match='mds/train has 5 samples, too few for 1 ranks with full batches of 6'):
        build_dataloader(DatasetConfig(**keys), 6, drop_last=True)
