"""SBA before and after algorithms that change the batch, the loss or the step, compared with runs without SBA.

Run: pytest tests/test_order.py
"""

import warnings

import pytest
import torch
from composer.algorithms import SAM, SWA, CutMix, LabelSmoothing, MixUp
from composer.algorithms.warnings import NotIntendedUseWarning
from composer.core import Algorithm, Event

import composer_sba.functional as sbaf
from composer_sba import SBA, Vicinity, sort_sba_last
from small_training import BATCH, logged, train, weights

# Composer's warnings about its own algorithms
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}') for message in ('SAM has', 'SWA has', 'Some targets have less')
]
OTHERS = {
    'label smoothing': lambda: LabelSmoothing(0.1),
    'mixup': MixUp,
    'mixup, interpolated loss': lambda: MixUp(interpolate_loss=True),
    'cutmix': CutMix,
    'sam': lambda: SAM(rho=0.05, interval=2),
    'swa': lambda: SWA(swa_start='1ep', swa_end='2ep'),
}


@pytest.mark.parametrize('other', list(OTHERS))
@pytest.mark.parametrize('sba_first', [True, False])
def test_composes_in_either_order(other, sba_first):
    algorithms = [SBA(), OTHERS[other]()] if sba_first else [OTHERS[other](), SBA()]
    trainer, log = train(algorithms, algorithm_passes=[sort_sba_last], duration='3ep')
    without, _ = train([OTHERS[other]()], duration='3ep')
    assert torch.isfinite(weights(trainer)).all()
    assert not torch.equal(weights(trainer), weights(without)), 'SBA had no effect'
    assert logged(log, 'sba/augmented') == [float(sbaf.should_augment(0.5, 17, t)) for t in range(9)]
    assert min(logged(log, 'sba/kl')) > 0


def test_both_passes_of_sam_see_one_coin_and_one_noise():
    seen = []

    class Watch(Algorithm):
        """Keeps the inputs of the head; with a vanishing rho SAM's second pass has the weights of its first."""

        def match(self, event, state):
            return event == Event.FIT_START

        def apply(self, event, state, logger):
            state.model.module.stem[3].p = 0.0
            state.model.module.fc.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))

    train([SAM(rho=1e-12, interval=1), SBA(vicinity=Vicinity(sigma=1.0)), Watch()], duration='6ba')
    passes = [rows for rows in seen if len(rows) in (BATCH, 5 * BATCH)][-12:]
    assert {len(rows) for rows in passes} == {BATCH, 5 * BATCH}
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_a_loss_rescaled_after_sba_warns_once_and_names_the_algorithm():
    with pytest.warns(NotIntendedUseWarning, match='^MixUp changed the loss after SBA added its term') as caught:
        train([SBA(augment_prob=1.0), MixUp(interpolate_loss=True)])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', NotIntendedUseWarning)
        train([SBA(augment_prob=1.0), MixUp(interpolate_loss=True)], algorithm_passes=[sort_sba_last])
