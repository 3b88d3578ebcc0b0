"""When SBA augments: its coins and layers compared with the functions of seed and batch, and what schedulers say.

Run: pytest tests/test_coins.py
"""

import pytest
import torch
from composer.core import Event
from composer.optim import LinearScheduler

import composer_sba.functional as sbaf
from composer_sba import SBA
from small_training import BATCH, ROWS, logged, train


def test_coins_are_those_of_should_augment_and_metrics_are_logged_once_a_batch():
    _, log = train([SBA(['block', 'head'])], duration='8ba', device_train_microbatch_size=4)
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(8)]
    layers = [float(sbaf.choose_layer(2, 17, t)) for t in range(8) if coins[t]]
    assert len(set(layers)) == len(set(coins)) == 2, f'{layers} and {coins} show nothing'
    assert logged(log, 'sba/augmented') == coins
    assert logged(log, 'sba/augment_prob') == [0.5] * 8
    assert logged(log, 'sba/layer') == layers
    assert len(logged(log, 'sba/kl')) == sum(coins) and min(logged(log, 'sba/kl')) > 0
    assert all(0 <= share <= 1 for share in logged(log, 'sba/virtual_agreement'))


def test_a_plain_batch_asks_for_nothing_within_it():
    seen = {}

    class Watched(SBA):
        def apply(self, event, state, logger):
            seen.setdefault(state.timestamp.batch.value - (event is Event.BATCH_END), []).append(event)
            super().apply(event, state, logger)

    train([Watched('head')], duration='8ba')
    plain = [t for t in range(1, 8) if not sbaf.should_augment(0.5, 17, t)]
    asked = {t: seen[t] for t in plain if seen[t] != [Event.BATCH_START, Event.BATCH_END]}
    assert len(plain) > 1 and not asked, f'Of the plain batches {plain}, these have other events: {asked}.'


def test_a_divergence_that_is_read_late_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr('composer_sba.sba.read_at_once', lambda loss: False)
    monkeypatch.setattr('composer_sba.algorithms._composer.FiniteGuard.check', lambda *args: read.append(args[3]))
    train([SBA('head')], duration='8ba')
    assert read == [t for t in range(8) if sbaf.should_augment(0.5, 17, t)]


def test_epoch_granularity_keeps_the_coin_within_an_epoch():
    _, log = train([SBA(granularity='epoch')], duration='6ep')
    per_epoch = torch.tensor(logged(log, 'sba/augmented')).view(6, ROWS // BATCH)
    assert per_epoch[:, 0].tolist() == [float(sbaf.should_augment(0.5, 17, epoch)) for epoch in range(6)]
    assert (per_epoch == per_epoch[:, :1]).all()


def test_epoch_granularity_asks_a_scheduler_once_an_epoch():
    linear = LinearScheduler(alpha_i=0.0, alpha_f=1.0)
    _, log = train([SBA(granularity='epoch', augment_prob=linear)], duration='6ep')
    assert logged(log, 'sba/augment_prob') == pytest.approx([epoch / 6 for epoch in range(6) for _ in range(3)])
    per_epoch = torch.tensor(logged(log, 'sba/augmented')).view(6, 3)
    assert (per_epoch == per_epoch[:, :1]).all()


def test_a_composer_scheduler_is_the_probability_of_its_time():
    _, log = train([SBA(augment_prob=LinearScheduler(alpha_i=0.0, alpha_f=1.0))], duration='6ba')
    assert logged(log, 'sba/augment_prob') == pytest.approx([t / 6 for t in range(6)])


def test_a_scheduler_that_leaves_0_1_is_named():
    with pytest.raises(
        ValueError, match=r'^Expected augment_prob in \[0, 1\], got 1\.5 from LinearScheduler at batch 3\.$'
    ):
        train([SBA(augment_prob=LinearScheduler(alpha_i=0.0, alpha_f=3.0))], duration='6ba')
