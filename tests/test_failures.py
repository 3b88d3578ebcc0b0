"""Exceptions anywhere in an armed step or evaluation: afterwards the network predicts as one without hooks.

Run: pytest tests/test_failures.py
"""

import pytest
import torch
import torch.nn.functional as F
from composer.core import Algorithm, Event
from torch.utils.data import DataLoader, TensorDataset

from breakable_training import BATCH, Net, make_trainer
from composer_sba import SBA, MajorityVote
from composer_sba.algorithms.manifold_mixup import ManifoldMixup


class Broken(Exception):
    pass


class Breaking(Algorithm):
    """Raises at an event."""

    def __init__(self, event, error):
        self.event = event
        self.error = error

    def match(self, event, state):
        return event == self.event

    def apply(self, event, state, logger):
        raise self.error


STEPS = {
    'sampled': lambda: SBA('cut', augment_prob=1.0),
    'manifold mixup': lambda: ManifoldMixup('cut'),
}
MOMENTS = ['below', 'above', 'logits', 'after_forward', 'loss', 'after_loss', 'before_backward', 'backward']


@pytest.mark.parametrize('error', [Broken(), KeyboardInterrupt()], ids=['exception', 'interrupt'])
@pytest.mark.parametrize('moment', MOMENTS)
@pytest.mark.parametrize('method', list(STEPS))
def test_after_a_step_that_raises_the_network_predicts_as_before(method, moment, error):
    def fail(*_):
        if failing:
            raise error

    def loss_fn(outputs, target):
        if moment == 'loss':
            fail()
        return F.cross_entropy(outputs, target)

    failing = True
    trainer, network = make_trainer(STEPS[method](), loss_fn=loss_fn)
    plain = Net().eval()
    if moment == 'backward':
        network.below.back = fail
    elif moment in ('below', 'above', 'logits'):
        getattr(network, moment).happen = fail
    elif moment != 'loss':
        trainer.state.algorithms.append(Breaking(Event(moment), error))
    with pytest.raises(type(error)):
        trainer.fit()
    failing = False

    images = torch.randn(6, 3, 8, 8)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain(images)), 'called directly'
    with torch.no_grad():
        assert torch.equal(network(images), plain(images)), 'called directly, without gradients'
    data = DataLoader(TensorDataset(images, torch.zeros(6, dtype=torch.long)), 6)
    (predicted,) = trainer.predict(data)
    assert torch.equal(predicted, plain(images)), 'predicted'
    trainer.eval(data)
    expected = F.cross_entropy(plain(images), torch.zeros(6, dtype=torch.long)).item()
    assert trainer.state.eval_metric_values['CrossEntropy'].item() == pytest.approx(expected), 'evaluated'

    trainer.state.algorithms[:] = [each for each in trainer.state.algorithms if not isinstance(each, Breaking)]
    trainer.fit()
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network.eval()(images), plain(images)), 'after the next fit'
    hooks = [name for name, each in network.named_modules() if each._forward_hooks or each._forward_pre_hooks]
    assert hooks == []


@pytest.mark.parametrize('error', [Broken(), KeyboardInterrupt()], ids=['exception', 'interrupt'])
@pytest.mark.parametrize('place', ['below', 'above', 'metric'])
def test_after_an_evaluation_that_raises_the_network_predicts_as_before(place, error):
    def fail(*_):
        if failing:
            raise error

    failing = True
    trainer, network = make_trainer(MajorityVote('cut'))
    plain = Net()
    plain.load_state_dict(network.state_dict())
    if place == 'metric':
        trainer.state.algorithms.append(Breaking(Event.EVAL_AFTER_FORWARD, error))
    else:
        getattr(network, place).register_forward_pre_hook(fail)
    data = DataLoader(TensorDataset(torch.randn(BATCH, 3, 8, 8), torch.zeros(BATCH, dtype=torch.long)), BATCH)
    with pytest.raises(type(error)):
        trainer.eval(data)
    failing = False
    images = torch.randn(BATCH, 3, 8, 8)
    for training in (False, True):
        outputs = []
        for each in (network.train(training), plain.train(training)):
            torch.manual_seed(1)
            outputs.append(each(images))
        assert torch.equal(*outputs), f'training={training}'
