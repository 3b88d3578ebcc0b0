"""When SBA augments: its coins and layers, compared with the functions of seed and batch, and its schedulers.

Run: pytest tests/test_coins.py
"""

import pytest
import torch
from composer.core import Callback, Event
from composer.optim import (
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    LinearScheduler,
    MultiStepScheduler,
    StepScheduler,
)

import composer_sba.functional as sbaf
from composer_sba import SBA
from composer_sba.errors import UserError
from small_training import BATCH, ROWS, logged, make_trainer, train


def test_coins_are_those_of_should_augment_and_metrics_are_logged_once_a_batch():
    _, log = train([SBA(['block', 'head'])], duration='8ba', device_train_microbatch_size=4)
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(8)]
    layers = [float(sbaf.choose_layer(2, 17, t)) for t in range(8) if coins[t]]
    assert len(set(layers)) == len(set(coins)) == 2, f'layers {layers} and coins {coins} do not vary'
    assert logged(log, 'sba/augmented') == coins
    assert logged(log, 'sba/augment_prob') == [0.5] * 8
    assert logged(log, 'sba/layer') == layers
    assert len(logged(log, 'sba/kl')) == sum(coins) and min(logged(log, 'sba/kl')) > 0
    assert all(0 <= share <= 1 for share in logged(log, 'sba/virtual_agreement'))


def test_sba_runs_on_no_event_within_a_plain_batch():
    seen = {}

    class Watched(SBA):
        def apply(self, event, state, logger):
            seen.setdefault(state.timestamp.batch.value - (event is Event.BATCH_END), []).append(event)
            super().apply(event, state, logger)

    train([Watched('head')], duration='8ba')
    plain = [t for t in range(1, 8) if not sbaf.should_augment(0.5, 17, t)]
    extra = {t: seen[t] for t in plain if seen[t] != [Event.BATCH_START, Event.BATCH_END]}
    assert len(plain) > 1 and not extra, f'plain batches {plain} with further events: {extra}'


def test_a_divergence_that_is_read_late_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr('composer_sba.sba.is_on_cpu', lambda loss: False)
    monkeypatch.setattr('composer_sba.algorithms._composer.FiniteGuard.check', lambda *args: read.append(args[3]))
    train([SBA('head')], duration='8ba')
    assert read == [t for t in range(8) if sbaf.should_augment(0.5, 17, t)]


def test_epoch_granularity_keeps_the_coin_within_an_epoch():
    _, log = train([SBA(granularity='epoch')], duration='6ep')
    per_epoch = torch.tensor(logged(log, 'sba/augmented')).view(6, ROWS // BATCH)
    assert per_epoch[:, 0].tolist() == [float(sbaf.should_augment(0.5, 17, epoch)) for epoch in range(6)]
    assert (per_epoch == per_epoch[:, :1]).all()


def test_epoch_granularity_evaluates_a_scheduler_once_an_epoch():
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


# Composer schedulers with times of their own, in batches of an unscaled run of 12: a next one is one line here
SCHEDULERS = {
    'linear': lambda: LinearScheduler(0.0, 1.0, t_max='12ba'),
    'linear, over the duration': lambda: LinearScheduler(0.0, 1.0),
    'step': lambda: StepScheduler('4ba', gamma=0.5),
    'multi step': lambda: MultiStepScheduler(['2ba', '8ba'], gamma=0.5),
    'cosine, in epochs': lambda: CosineAnnealingScheduler(t_max='4ep'),
    'warmup': lambda: ConstantWithWarmupScheduler(t_warmup='6ba'),
    'a function of state and ratio': lambda: lambda state, ssr: min(1.0, state.timestamp.batch.value / (12 * ssr)),
}


class Rates(Callback):
    """Keeps the learning rate of every batch."""

    def __init__(self):
        self.seen = []

    def batch_end(self, state, logger):
        self.seen.append(state.schedulers[0].get_last_lr()[0] / 0.1)  # of the next batch: Composer's rate is one late


@pytest.mark.parametrize('ratio', [0.5, 1.0, 1.5])
@pytest.mark.parametrize('name', list(SCHEDULERS))
def test_the_probability_follows_scale_schedule_ratio_as_the_learning_rate_does(name, ratio):
    rates, scheduler = Rates(), SCHEDULERS[name]
    sba = SBA(augment_prob=scheduler(), eta=1e-3)
    options = {'schedulers': scheduler(), 'scale_schedule_ratio': ratio, 'callbacks': [rates]}
    trainer, log = train([sba], duration='12ba', **options)
    assert trainer.state.timestamp.batch == int(12 * ratio)
    assert logged(log, 'sba/augment_prob') == pytest.approx(rates.seen, abs=1e-12)
    assert len(set(rates.seen)) > 1, rates.seen


def test_epoch_granularity_follows_scale_schedule_ratio():
    sba = SBA(augment_prob=LinearScheduler(0.0, 1.0, t_max='4ep'), granularity='epoch')
    _, log = train([sba], duration='4ep', schedulers=LinearScheduler(0.0, 1.0), scale_schedule_ratio=0.5)
    assert logged(log, 'sba/augment_prob') == pytest.approx([0.0] * 3 + [0.5] * 3)


def test_each_fit_has_its_own_scale_schedule_ratio():
    rates = Rates()
    linear = LinearScheduler(0.0, 1.0, t_max='6ba')
    trainer, log = make_trainer([SBA(augment_prob=linear)], duration='6ba', schedulers=linear, callbacks=[rates])
    trainer.fit()
    trainer.fit(reset_time=True, duration='6ba', schedulers=linear, scale_schedule_ratio=2.0)
    assert logged(log, 'sba/augment_prob') == pytest.approx(rates.seen)
    assert rates.seen[6:] == pytest.approx([t / 12 for t in range(12)])


def test_a_function_of_the_state_alone_cannot_be_scaled():
    options = {'duration': '6ba', 'schedulers': LinearScheduler(), 'scale_schedule_ratio': 0.5}
    for function in (lambda state: 0.5, lambda state, prob=0.5: prob):
        with pytest.raises(UserError, match='^augment_prob takes only the state, .*schedule_ratio=0.5 cannot'):
            train([SBA(augment_prob=function)], **options)
        _, log = train([SBA(augment_prob=function)], duration='6ba', schedulers=LinearScheduler())
        assert logged(log, 'sba/augment_prob') == [0.5] * 6
