"""SBA with Composer's models and losses: a loss keeps its type, and models that cannot be trained are refused.

Run: pytest tests/test_host.py
"""

import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from composer.algorithms import GyroDropout, MixUp
from composer.algorithms.warnings import NoEffectWarning, NotIntendedUseWarning
from composer.loss import binary_cross_entropy_with_logits
from composer.models import ComposerModel
from torch import nn
from torch.utils.data import TensorDataset

from composer_sba import SBA
from composer_sba.errors import CutLayerError, UserError
from small_training import logged, train, trainer_of

# Composer's warnings about its GyroDropout and about a model without an optimizer
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}') for message in ('GyroDropout is', 'No optimizer was specified')
]
Losses = namedtuple('Losses', ['a', 'b'])


@pytest.mark.parametrize('kind', ['dict with total', 'dict', 'tuple', 'namedtuple'])
def test_the_loss_keeps_its_kind(kind):
    def loss_fn(outputs, target):
        loss = F.cross_entropy(outputs, target)
        if 'tuple' in kind:
            return (loss, 0.1 * loss) if kind == 'tuple' else Losses(loss, 0.1 * loss)
        return {'a': loss, 'b': 0.1 * loss, **({'total': 1.1 * loss} if kind == 'dict with total' else {})}

    trainer, log = train([SBA(eta=1.0)], duration='8ba', loss_fn=loss_fn)
    assert type(trainer.state.loss) is {'tuple': tuple, 'namedtuple': Losses}.get(kind, dict)
    totals, kls = logged(log, 'loss/train/total'), iter(logged(log, 'sba/kl'))
    added = [next(kls) if coin else 0.0 for coin in logged(log, 'sba/augmented')]
    first = logged(log, 'loss/train/loss0' if 'tuple' in kind else 'loss/train/a')
    if 'tuple' in kind:  # the term joins the first loss
        first = [value - term for value, term in zip(first, added, strict=True)]
    else:
        assert logged(log, 'loss/train/sba') == pytest.approx(added, abs=1e-5), (
            'a key on every step, zero when not augmented'
        )
    assert totals == pytest.approx([1.1 * a + term for a, term in zip(first, added, strict=True)], rel=1e-4)


def test_a_loss_that_changes_logits_in_place_leaves_the_soft_label_alone():
    def loss_fn(outputs, target):
        return F.cross_entropy(outputs.mul_(2.0), target)

    def plain_loss_fn(outputs, target):
        return F.cross_entropy(outputs * 2.0, target)

    runs = [train([SBA(augment_prob=1.0)], loss_fn=fn)[1] for fn in (loss_fn, plain_loss_fn)]
    assert logged(runs[0], 'sba/kl') == logged(runs[1], 'sba/kl')


def test_hard_labels_that_interpolation_does_not_mix_are_refused():
    with pytest.raises(UserError, match="^target='hard' needs the mixed labels of MixUp in the batch"):
        train([MixUp(interpolate_loss=True), SBA(target='hard')])


def test_gyro_dropout_is_refused():
    with pytest.raises(CutLayerError, match='^SBA and GyroDropout exclude each other'):
        train([GyroDropout(p=0.5, sigma=4, tau=2), SBA()])


def test_binary_cross_entropy_warns_if_distributions_are_compared():
    with pytest.warns(NotIntendedUseWarning, match='trained with binary cross-entropy'):
        train([SBA()], loss_fn=binary_cross_entropy_with_logits, duration='1ba')
    train([SBA(target='hard', augment_prob=1.0)], loss_fn=binary_cross_entropy_with_logits, duration='1ba')


class OneLogit(ComposerModel):
    def __init__(self, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, classes))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return F.binary_cross_entropy_with_logits(outputs[:, 0], batch[1].float())


@pytest.mark.parametrize('layers', ['head', 'net.0'])
@pytest.mark.parametrize(('classes', 'target', 'warns'), [(1, 'soft', True), (1, 'hard', False), (2, 'soft', False)])
def test_a_divergence_that_is_always_zero_warns_once(layers, classes, target, warns):
    data = TensorDataset(torch.randn(16, 6), torch.randint(2, (16,)))

    def final(algorithms):
        torch.manual_seed(0)
        trainer, log = trainer_of(OneLogit(classes), data, 4, algorithms, max_duration='2ep')
        trainer.fit()
        return torch.cat([each.flatten() for each in trainer.state.model.parameters()]), log

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trained, log = final([SBA(layers, augment_prob=1.0, eta=1.0, target=target)])
    said = [each for each in caught if issubclass(each.category, NoEffectWarning)]
    assert len(said) == warns, [str(each.message) for each in said]
    if warns:
        assert 'a network with one logit has only one distribution' in str(said[0].message)
        assert logged(log, 'sba/kl') == [0.0] * 8
    assert torch.equal(trained, final([])[0]) == warns
