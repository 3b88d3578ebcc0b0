"""Runs that were interrupted at any batch, compared with the uninterrupted run: the weights are equal bit by bit.

Run: pytest tests/test_resume.py. For a campaign: pytest tests/test_resume.py -k killed -m '' --campaign 50 -s
"""

import random
import re
import time
from collections.abc import Iterator
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
from programs import Program, start

pytestmark = [
    # Composer's MixUp, whose two shares of a label sum to one but for rounding
    pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability'),
    pytest.mark.usefixtures('only_worker'),  # which trains the run that they are compared with
]

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
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
FEW_DIGITS = ['train_dataset.local=few_digits', 'eval_dataset.local=few_digits']  # 190 images to train on
BASE = ['max_duration=2ep', 'progress_bar=false', 'eval_interval=100ep', 'global_train_batch_size=32', *FEW_DIGITS]


@pytest.fixture(scope='module', autouse=True)
def _in_the_folder_of_the_data(few_digits: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(few_digits.parent)
        yield


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


# The test of the CIFAR-10 recipe has coins of epochs
@pytest.fixture(scope='module', params=['batch', pytest.param('epoch', marks=pytest.mark.nightly)])
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    keys = [*EVERYTHING, f'algorithms.sba.granularity={request.param}']
    saving = [f'save_folder={folder}', 'save_interval=1ba', 'save_num_checkpoints_to_keep=-1']
    return folder, keys, weights([*keys, *saving])


# Composer, of an epoch whose last batch the checkpoint has: nothing is left to train or to measure
@pytest.mark.filterwarnings('ignore:No batches were trained')
@pytest.mark.filterwarnings('ignore:The ``compute`` method of metric')
@pytest.mark.parametrize('batch', [2, 6, 9])
def test_resumed_anywhere_it_ends_with_the_same_bits(unbroken, batch: int) -> None:
    folder, keys, expected = unbroken
    resumed = weights([*keys, 'save_folder=null', f'load_path={checkpoint(folder, batch)}'])
    assert differing(resumed, expected) == []


@pytest.fixture
def cifar10(tmp_path: Path) -> list[str]:
    """Keys that train on 40 images of random pixels instead of the recipe's."""
    for split in ('train', 'val'):
        with MDSWriter(out=str(tmp_path / split), columns={'x': 'png', 'y': 'int'}) as out:
            for label in range(40):
                pixels = numpy.random.randint(0, 256, (32, 32, 3), numpy.uint8)
                out.write({'x': Image.fromarray(pixels), 'y': label % 10})
    keys = ['algorithms.sba.granularity=epoch', 'global_train_batch_size=8', 'device_eval_batch_size=8']
    keys += ['train_dataset.num_workers=1', 'train_subset_num_batches=3']
    return [*CIFAR10, *keys, *(f'{section}.local={tmp_path}' for section in ('train_dataset', 'eval_dataset'))]


@pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning')  # Streaming
def test_a_cifar10_recipe_too(tmp_path: Path, cifar10: list[str]) -> None:
    """Three of five batches an epoch, resumed in the middle of the third epoch."""
    keys = [*cifar10, 'autoresume=false', 'max_duration=4ep']
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
    with pytest.raises(UserError, match=r'save_folder: cannot load the checkpoint .*newest-rank0.pt'):
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


@pytest.mark.parametrize('coins', ['batch', pytest.param('epoch', marks=pytest.mark.nightly)])
@pytest.mark.parametrize('data', ['digits', pytest.param('cifar10', marks=pytest.mark.nightly)])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    tmp_path: Path, request: pytest.FixtureRequest, campaign: int, coins: str, data: str
) -> None:
    """The same command again and again, killed within half a second after it saved a checkpoint."""
    chance, limit = random.Random(17), campaign or 1
    if data == 'digits':
        recipe, keys = RECIPE, [*EVERYTHING, *FEW_DIGITS, 'global_train_batch_size=16']
    else:
        recipe, keys = CIFAR10_RECIPE, request.getfixturevalue('cifar10')
    command = [ROOT / 'train.py', '-f', recipe, *keys, f'algorithms.sba.granularity={coins}']
    command += [f'max_duration={3 + limit}ep', 'progress_bar=false', 'eval_interval=10ep', 'save_interval=5ba']
    command += ['autoresume=true', 'save_overwrite=false', 'save_num_checkpoints_to_keep=2']

    def begin(folder: Path) -> Program:
        return start(*command, f'save_folder={folder}', output=tmp_path / f'{folder.name}.log')

    def finish(program: Program, folder: Path) -> dict[str, torch.Tensor]:
        assert program.wait(timeout=1800) == 0, program.said[-3000:]
        return torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model']

    expected = finish(begin(tmp_path / 'whole'), tmp_path / 'whole')
    kills: list[int] = []  # the last batch that was saved before each
    runs = 0
    while len(kills) < limit:
        folder = tmp_path / f'broken{runs}'
        while (program := begin(folder)).poll() is None and len(kills) < limit:
            before = set(folder.glob('ep*.pt'))
            while program.poll() is None and set(folder.glob('ep*.pt')) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
            if program.poll() is not None:
                break
            program.kill()
            saved = [int(re.findall(r'ba(\d+)', path.name)[0]) for path in folder.glob('ep*.pt')]
            kills.append(max(saved, default=0))
        assert differing(finish(program, folder), expected) == [], f'run {runs}, killed after batches {kills}'
        runs += 1
    print(f'{len(kills)} kills in {runs} runs, after batches {kills}: the same bits')
