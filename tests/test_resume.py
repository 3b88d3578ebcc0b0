"""Runs that were cut off, anywhere: they end with the bits of the unbroken run.

pytest tests/test_resume.py; KILLS=50 pytest tests/test_resume.py -k killed -s -o faulthandler_timeout=0 for a campaign.
CIFAR10=data/cifar10, where the real images are: it trains on them. COINS=epoch: coins of epochs, not of batches
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from composer.core import Event
from PIL import Image
from streaming import MDSWriter

from composer_sba import SeedEachBatch
from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.train import train

# Composer's MixUp, whose two shares of a label sum to one but for rounding
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
KILLS = int(os.environ.get('KILLS', '3'))
# Batch norm, dropout, crops made by workers, SBA at two layers, a schedule, and algorithms that draw from torch,
# NumPy and Python: before the batch, at its start and in the forward pass
EVERYTHING = [
    'model.dropout=0.3',
    'train_dataset.num_workers=1',
    'algorithms.sba.layers=[conv2,head]',
    'algorithms.colout.p_row=0.2',
    'algorithms.mixup.alpha=0.4',
    'algorithms.rand_augment.severity=3',
]
# The same on 32x32 images, with SBA's probability on a schedule of its own
CIFAR10_RECIPE = str(ROOT / 'yamls' / 'alexnet_cifar10_sba.yaml')
CIFAR10 = [
    'model={name: digits_net, num_classes: 10, dropout: 0.3}',
    'scheduler={name: cosine_annealing}',
    'train_dataset.num_workers=2',
    'train_subset_num_batches=20',
    'eval_subset_num_batches=1',
    'eval_dataset.num_workers=0',
    'algorithms.sba.layers=[conv2,head]',
    'algorithms.sba.fold=4',
    'algorithms.sba.vicinity.basis=hadamard',
    'algorithms.sba.augment_prob={name: linear, alpha_i: 0.2, alpha_f: 0.9}',
    'algorithms.colout.p_row=0.2',
    'algorithms.mixup.alpha=0.4',
    'algorithms.rand_augment.severity=3',
]
COINS = os.environ.get('COINS', 'batch')
BASE = ['max_duration=3ep', 'progress_bar=false', 'eval_interval=100ep', 'global_train_batch_size=256']


def weights(recipe_keys: list[str], recipe: str = RECIPE) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)  # others sum in another order
    trainer = train(load(recipe, [*BASE, *recipe_keys]))
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def checkpoint(folder: Path, batch: int) -> Path:
    (path,) = folder.glob(f'ep*-ba{batch}-rank0.pt')
    return path


@pytest.fixture(scope='module', params=['batch', 'epoch'])
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    keys = [*EVERYTHING, f'algorithms.sba.granularity={request.param}']
    saving = [f'save_folder={folder}', 'save_interval=1ba', 'save_num_checkpoints_to_keep=-1']
    return folder, keys, weights([*keys, *saving])


# Composer, of an epoch whose last batch the checkpoint has: nothing is left to train or to measure
@pytest.mark.filterwarnings('ignore:No batches were trained')
@pytest.mark.filterwarnings('ignore:The ``compute`` method of metric')
@pytest.mark.parametrize('batch', [2, 6, 9, 17])
def test_resumed_anywhere_it_ends_with_the_same_bits(unbroken, batch: int) -> None:
    folder, keys, expected = unbroken
    resumed = weights([*keys, 'save_folder=null', f'load_path={checkpoint(folder, batch)}'])
    assert differing(resumed, expected) == []


@pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning')  # Streaming
def test_a_cifar10_recipe_too(tmp_path: Path) -> None:
    """On random pixels, three of five batches an epoch, from the middle of the third."""
    for split in ('train', 'val'):
        with MDSWriter(out=str(tmp_path / split), columns={'x': 'png', 'y': 'int'}) as out:
            for label in range(40):
                pixels = numpy.random.randint(0, 256, (32, 32, 3), numpy.uint8)
                out.write({'x': Image.fromarray(pixels), 'y': label % 10})
    keys = [*CIFAR10, 'algorithms.sba.granularity=epoch', 'global_train_batch_size=8', 'device_eval_batch_size=8']
    keys += ['train_dataset.num_workers=1', 'autoresume=false', 'train_subset_num_batches=3', 'max_duration=4ep']
    keys += [f'{section}.local={tmp_path}' for section in ('train_dataset', 'eval_dataset')]
    saving = [f'save_folder={tmp_path}/run', 'save_interval=1ba', 'save_num_checkpoints_to_keep=-1']
    expected = weights([*keys, *saving], CIFAR10_RECIPE)
    path = checkpoint(tmp_path / 'run', 8)
    assert differing(weights([*keys, 'save_folder=null', f'load_path={path}'], CIFAR10_RECIPE), expected) == []


def test_without_its_seeds_it_does_not(unbroken, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, keys, expected = unbroken
    monkeypatch.setattr(SeedEachBatch, 'match', lambda self, event, state: False)
    resumed = weights([*keys, 'save_folder=null', f'load_path={checkpoint(folder, 9)}'])
    assert 'module.head.weight' in differing(resumed, expected)


def test_a_batch_that_is_tried_again_draws_the_same(unbroken) -> None:
    folder, keys, _ = unbroken
    trainer = train(load(RECIPE, [*BASE, *keys, 'save_folder=null', 'max_duration=1ba']))
    seed = SeedEachBatch()
    draws = []
    for event in (Event.AFTER_DATALOADER, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_TRAIN_BATCH):
        assert seed.match(event, trainer.state)
        seed.apply(event, trainer.state, trainer.logger)
        draws.append((torch.rand(3).tolist(), random.random()))
    assert draws[1] == draws[2] != draws[0]


def test_the_latest_checkpoint_may_have_another_name(tmp_path: Path) -> None:
    """It is resumed again and again, and loses none; a damaged one is told by name."""
    keys = [f'save_folder={tmp_path}', 'save_latest_filename=newest-rank{rank}.pt', 'save_interval=1ba']
    keys += ['autoresume=true', 'save_overwrite=false', 'save_num_checkpoints_to_keep=-1', 'progress_bar=false']
    for batches in (2, 4, 6):
        train(load(RECIPE, [*BASE, *keys, f'max_duration={batches}ba']))
        assert {path.name for path in tmp_path.glob('*.pt')} == {
            'newest-rank0.pt',
            *(f'ep0-ba{batch}-rank0.pt' for batch in range(1, batches + 1)),
        }
    path = (tmp_path / 'newest-rank0.pt').resolve()
    path.write_bytes(path.read_bytes()[:1000] + bytes(1000) + path.read_bytes()[2000:])
    with pytest.raises(UserError, match=r'save_folder: expected a whole checkpoint .*newest-rank0.pt'):
        train(load(RECIPE, [*BASE, *keys, 'max_duration=8ba']))


@pytest.mark.parametrize('torn', [True, False])
def test_a_run_goes_on_after_a_kill_in_mid_save(unbroken, tmp_path: Path, torn: bool) -> None:
    """Cut off as a checkpoint is written, and after that, before it is the latest."""
    folder, keys, expected = unbroken
    for batch in (8, 9):
        path = checkpoint(folder, batch)
        (tmp_path / path.name).write_bytes(path.read_bytes()[: -100 if torn and batch == 9 else None])
        if batch == 8:
            (tmp_path / 'latest-rank0.pt').symlink_to(path.name)
            time.sleep(0.01)
    saving = [f'save_folder={tmp_path}', 'save_interval=1ba', 'autoresume=true', 'save_overwrite=false']
    assert differing(weights([*keys, *saving]), expected) == []


def test_a_resumed_run_deletes_the_checkpoints_from_before_in_their_turn(tmp_path: Path) -> None:
    """Composer counts those of its own process alone; another run's in the same folder stay."""
    saving = [f'save_folder={tmp_path}', 'save_interval=1ba', 'save_num_checkpoints_to_keep=2', 'autoresume=true']
    saving += ['save_overwrite=false']
    weights([*saving, 'max_duration=3ba'])
    (tmp_path / 'ep0-ba0-rank0.pt').write_text("another run's")
    weights([*saving, 'max_duration=4ba'])
    left = {path.name for path in tmp_path.glob('ep*.pt')}
    assert left == {'ep0-ba0-rank0.pt', 'ep0-ba3-rank0.pt', 'ep0-ba4-rank0.pt'}
    saver = torch.load(tmp_path / 'latest-rank0.pt', weights_only=False)['state']['callbacks']['CheckpointSaver']
    assert 'ba1-' not in str(saver), 'the record of what was saved grows for ever'


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The same command again and again, killed between one and a hundred batches after it went on."""
    chance = random.Random(17)
    images = os.environ.get('CIFAR10')
    recipe, keys = (CIFAR10_RECIPE, CIFAR10) if images else (RECIPE, EVERYTHING)
    keys = [*keys, f'algorithms.sba.granularity={COINS}', f'max_duration={12 + KILLS if images is None else 12}ep']
    keys += [f'{section}.local={images}' for section in ('train_dataset', 'eval_dataset') if images]
    command = [sys.executable, str(ROOT / 'train.py'), '-f', recipe, *keys]
    command += ['progress_bar=false', 'eval_interval=10ep', 'save_interval=5ba', 'autoresume=true']
    command += ['save_overwrite=false', 'save_num_checkpoints_to_keep=2']
    environment = os.environ | {'OMP_NUM_THREADS': '1'}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        with (tmp_path / f'{folder.name}.log').open('ab') as said:
            return subprocess.Popen(
                [*command, f'save_folder={folder}'], env=environment, stdout=said, stderr=said, start_new_session=True
            )

    def final(folder: Path) -> dict[str, torch.Tensor]:
        return torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model']

    assert start(tmp_path / 'whole').wait(timeout=1800) == 0, (tmp_path / 'whole.log').read_text()
    expected = final(tmp_path / 'whole')
    kills: list[int] = []  # the last batch that was saved before each
    runs = 0
    while len(kills) < KILLS:
        folder = tmp_path / f'broken{runs}'
        while (process := start(folder)).poll() is None and len(kills) < KILLS:
            before = set(folder.glob('ep*.pt'))
            while process.poll() is None and set(folder.glob('ep*.pt')) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 2))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            saved = [int(re.findall(r'ba(\d+)', path.name)[0]) for path in folder.glob('ep*.pt')]
            kills.append(max(saved, default=0))
        assert process.wait(timeout=1800) == 0, (tmp_path / f'{folder.name}.log').read_text()[-3000:]
        assert differing(final(folder), expected) == [], f'run {runs}, killed after batches {kills}'
        runs += 1
    print(f'{len(kills)} kills in {runs} runs, after batches {kills}: the same bits')
