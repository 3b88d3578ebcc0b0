"""SBA on gloo ranks under DDP, FSDP1 and FSDP2: the same coins and layers on all, other noise on each, one loss.

Run: pytest tests/test_distributed.py. On four ranks as well: pytest tests/test_distributed.py -m ''
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest

import composer_sba.functional as sbaf
import train_on_ranks
from programs import start
from sba_on_ranks import losses

SCRIPT = Path(__file__).parent / 'sba_on_ranks.py'
WRAPPER = {'ddp': 'DistributedDataParallel', 'fsdp1': 'FullyShardedDataParallel', 'fsdp2': 'FSDPLinear'}
NPROCS = [2, pytest.param(4, marks=pytest.mark.nightly)]
COINS = [float(sbaf.should_augment(0.5, 17, t)) for t in range(9)]
CHOSEN = [float(sbaf.choose_layer(3, 17, t)) for t in range(9) if COINS[t]]


@pytest.fixture(scope='module')
def one_process():
    return losses('none')


@pytest.mark.parametrize('nproc', NPROCS)
def test_ranks_agree_on_coin_layer_and_loss_and_draw_their_own_noise(run_ranks, one_process, nproc):
    assert set(CHOSEN) == {0, 1, 2}, f'{CHOSEN} leaves a layer out: train for more batches'
    said = run_ranks(SCRIPT, nproc, *WRAPPER, timeout=300)
    printed = [json.loads(line) for line in said.splitlines() if line.startswith('{"')]
    for strategy, wrapper in WRAPPER.items():
        ranks = [rank for rank in printed if rank['strategy'] == strategy]
        assert [rank['rank'] for rank in ranks] == list(range(nproc))
        assert wrapper in ranks[0]['draws']['modules'], f'{strategy} did not wrap: {ranks[0]["draws"]["modules"]}'
        for rank in ranks:
            for run in ('draws', 'losses'):
                assert rank[run]['sba/augmented'] == COINS, (strategy, rank['rank'], run)
                assert rank[run]['sba/layer'] == CHOSEN, (strategy, rank['rank'], run)
            assert rank['losses']['loss/train/total'] == pytest.approx(one_process['loss/train/total'], abs=1e-5), (
                strategy
            )
        kls = [rank['draws']['sba/kl'] for rank in ranks]
        assert min(map(min, kls)) > 0
        assert all(len(set(batch)) == nproc for batch in zip(*kls, strict=True)), f'{strategy}: ranks share their noise'
    ddp, fsdp1 = (
        [rank['draws']['sba/kl'] for rank in printed if rank['strategy'] == each] for each in ('ddp', 'fsdp1')
    )
    for ours, theirs in zip(ddp, fsdp1, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_one_process_has_the_same_coins_and_learns(one_process):
    assert one_process['sba/augmented'] == COINS and one_process['sba/layer'] == CHOSEN
    total = [loss for loss, coin in zip(one_process['loss/train/total'], COINS, strict=True) if coin]
    assert total[-1] < total[0], total


# --- recipes ----------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
KEYS = ['max_duration=2ep', 'progress_bar=false', 'eval_interval=100ep', 'global_train_batch_size=32']
KEYS += ['train_dataset.num_workers=1', 'algorithms.sba.layers=[conv2,head]', 'save_interval=1ba']


def batches(ranks):
    """Batch -> its images on all ranks, sorted; batch -> coin and layer, the same on all."""
    images = {}
    for rank in ranks:
        for batch, found in rank['images']:
            images[batch] = sorted([*images.get(batch, []), *found])
        assert rank['draws'] == ranks[0]['draws']
    return images, {batch: draws for batch, draws in ranks[0]['draws']}


def launched(run_ranks, nproc, keys):
    said = run_ranks(ROOT / 'tests' / 'train_on_ranks.py', nproc, RECIPE, *KEYS, *keys, timeout=300)
    return batches([json.loads(line) for line in said.splitlines() if line.startswith('{"')])


@pytest.mark.parametrize('nproc', [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_run_of_two_ranks_goes_on_on_another_number_of_them(run_ranks, few_digits, tmp_path, nproc):
    """From the middle of an epoch: the same images in each batch, transformed alike, the same coins and layers."""
    folder = tmp_path / 'two'
    data = [f'{section}.local={few_digits}' for section in ('train_dataset', 'eval_dataset')]
    images, draws = launched(run_ranks, 2, [*data, f'save_folder={folder}', 'save_num_checkpoints_to_keep=-1'])
    assert sorted(images) == list(range(12)) and sorted(draws) == list(range(12))
    for epoch in range(2):
        seen = [each for batch in range(6 * epoch, 6 * epoch + 6) for each in images[batch]]
        assert len(seen) == 190, f'{len(seen)} images in epoch {epoch}'
    (middle,) = folder.glob('*-ba8-rank0.pt')
    elsewhere = tmp_path / 'elsewhere'
    keys = [*data, f'load_path={middle}', f'save_folder={elsewhere}']
    if nproc == 1:
        resumed = batches([json.loads(json.dumps(train_on_ranks.run(RECIPE, [*KEYS, *keys])))])
    else:
        resumed = launched(run_ranks, nproc, keys)
    assert resumed[0] == {batch: images[batch] for batch in range(8, 12)}, f'{nproc} ranks saw other images'
    assert resumed[1] == {batch: draws[batch] for batch in range(8, 12)}, f'{nproc} ranks drew otherwise'


@pytest.mark.parametrize('victim', [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_rank_that_is_killed_takes_the_run_down(few_digits, tmp_path, victim):
    shutil.copytree(few_digits, tmp_path / 'digits')
    keys = ['max_duration=1000ep', 'progress_bar=false', 'train_dataset.num_workers=1', f'save_folder={tmp_path}/run']
    keys += [f'{section}.local={tmp_path}/digits' for section in ('train_dataset', 'eval_dataset')]
    command = [ROOT / 'tests' / 'forked_launcher.py', '-n', '2', ROOT / 'train.py', '-f', RECIPE, *keys]
    with start(*command, output=tmp_path / 'log') as launcher:
        end = time.monotonic() + 300
        while not list(tmp_path.glob('run/ep*.pt')) and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.create_time())
        assert len(ranks) == 2, launcher.said
        ranks[victim].kill()
        assert launcher.wait(120) != 0, launcher.said  # the launcher gives the others 30 s
        assert f'Rank {victim} crashed with exit code -9' in launcher.said
        end = time.monotonic() + 60
        while (left := group(launcher.pid)) and time.monotonic() < end:  # workers look for their trainer every 5 s
            time.sleep(0.1)
        assert not left, f'processes left: {left}'
        blocks = [path.name for path in Path('/dev/shm').glob('*_locals') if str(tmp_path) in path.read_text('latin1')]
        assert not blocks, f'shared memory left: {blocks}'


def group(leader):
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(' '.join(process.cmdline())[:200])
    return found
