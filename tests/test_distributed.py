"""SBA on two gloo ranks under DDP, FSDP1 and FSDP2: the same coins and layers on both, other noise on each.

Run: pytest tests/test_distributed.py
"""

import json
from pathlib import Path

import pytest

import composer_sba.functional as sbaf

SCRIPT = Path(__file__).parent / 'sba_on_ranks.py'
WRAPPER = {'ddp': 'DistributedDataParallel', 'fsdp1': 'FullyShardedDataParallel', 'fsdp2': 'FSDPLinear'}


def test_ranks_agree_on_coin_and_layer_and_draw_their_own_noise(run_ranks):
    printed = [json.loads(line) for line in run_ranks(SCRIPT, 2, *WRAPPER).splitlines() if line.startswith('{')]
    ranks = {strategy: [rank for rank in printed if rank['strategy'] == strategy] for strategy in WRAPPER}
    for strategy in WRAPPER:
        check(ranks[strategy], strategy)
    for ddp, fsdp1 in zip(ranks['ddp'], ranks['fsdp1'], strict=True):
        assert ddp['sba/kl'] == pytest.approx(fsdp1['sba/kl'], abs=1e-5)


def check(ranks, strategy):
    assert [rank['rank'] for rank in ranks] == [0, 1]
    assert WRAPPER[strategy] in ranks[0]['modules'], f'{strategy} did not wrap: {ranks[0]["modules"]}'
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(12)]
    layers = [float(sbaf.choose_layer(3, 17, t)) for t in range(12)]
    for rank in ranks:
        assert rank['sba/augmented'] == coins
        assert rank['sba/layer'] == [layer for layer, coin in zip(layers, coins, strict=True) if coin]
        assert min(rank['sba/kl']) > 0
    assert all(a != b for a, b in zip(ranks[0]['sba/kl'], ranks[1]['sba/kl'], strict=True)), ranks
