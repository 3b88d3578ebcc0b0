"""SBA on gloo ranks under DDP, FSDP1 and FSDP2: the same coins and layers on all, other noise on each, one loss.

pytest tests/test_distributed.py; RANKS=2,4 pytest tests/test_distributed.py for more of them
"""

import json
import os
from pathlib import Path

import pytest

import composer_sba.functional as sbaf
from sba_on_ranks import losses

SCRIPT = Path(__file__).parent / 'sba_on_ranks.py'
WRAPPER = {'ddp': 'DistributedDataParallel', 'fsdp1': 'FullyShardedDataParallel', 'fsdp2': 'FSDPLinear'}
RANKS = [int(each) for each in os.environ.get('RANKS', '2').split(',')]
COINS = [float(sbaf.should_augment(0.5, 17, t)) for t in range(8)]
CHOSEN = [float(sbaf.choose_layer(3, 17, t)) for t in range(8) if COINS[t]]


@pytest.fixture(scope='module')
def one_process():
    return losses('none')


@pytest.mark.parametrize('nproc', RANKS)
def test_ranks_agree_on_coin_layer_and_loss_and_draw_their_own_noise(run_ranks, one_process, nproc):
    said = run_ranks(SCRIPT, nproc, *WRAPPER, timeout=300)
    printed = [json.loads(line) for line in said.splitlines() if line.startswith('{')]
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
    total = one_process['loss/train/total']
    assert total[-1] < total[0], total
