"""target='hard' with labels of every form: the term is the task's own loss, of virtual samples instead of raw ones.

Run: pytest tests/test_labels.py
"""

import pytest
import torch
import torch.nn.functional as F
from composer.algorithms import LabelSmoothing
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity
from small_training import SEED, logged, trainer_of

# Composer's, about smoothed labels whose sum is rounded below 1
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
ROWS, BATCH, CLASSES = 24, 8, 3
WEIGHTS = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)


def cross_entropy(outputs, target):
    return F.cross_entropy(outputs, target)


def weighted(outputs, target):
    return F.cross_entropy(outputs, target, weight=WEIGHTS)


def smoothed(outputs, target):
    return F.cross_entropy(outputs, target, label_smoothing=0.3)


def in_place(outputs, target):
    return F.cross_entropy(outputs.mul_(2.0), target)


def parts(outputs, target):
    loss = F.cross_entropy(outputs, target)
    return {'a': loss, 'b': 0.5 * loss}


def with_total(outputs, target):
    return parts(outputs, target) | {'total': 3 * F.cross_entropy(outputs, target)}


def unreduced(outputs, target):
    return F.cross_entropy(outputs, target, reduction='none')


def ignored(labels, index):
    return torch.where(torch.arange(ROWS) % 4 == 0, index, labels)


# The task's loss, and labels made of class indices: a next form of labels is one line here
FORMS = {
    'class indices': (cross_entropy, lambda y: y),
    'ignored labels': (cross_entropy, lambda y: ignored(y, -100)),
    'ignored labels, 255': (nn.CrossEntropyLoss(ignore_index=255), lambda y: ignored(y, 255)),
    'int32': (lambda outputs, target: F.cross_entropy(outputs, target.long()), lambda y: y.int()),
    '(N, 1)': (lambda outputs, target: F.cross_entropy(outputs, target[:, 0]), lambda y: y[:, None]),
    'one-hot integers': (lambda outputs, target: F.cross_entropy(outputs, target.float()), F.one_hot),
    'distributions': (cross_entropy, lambda y: 0.9 * F.one_hot(y) + 0.1 / CLASSES),
    'class weights': (weighted, lambda y: y),
    'label smoothing in the loss': (smoothed, lambda y: y),
    'a loss that changes logits in place': (in_place, lambda y: y),
    'several labels, binary cross-entropy': (
        F.binary_cross_entropy_with_logits,
        lambda y: (F.one_hot(y) + F.one_hot(y.flip(0))).clamp(max=1).float(),
    ),
    'regression to one-hot labels': (F.mse_loss, lambda y: F.one_hot(y).double()),
    'a dict of losses': (parts, lambda y: y),
    'a dict of losses with a total': (with_total, lambda y: y),
    'a loss for each row': (unreduced, lambda y: y),
}


class Model(ComposerModel):
    """Keeps logits and the loss of every call of ``loss``, as Composer reduces it."""

    def __init__(self, loss_fn):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        self.loss_fn, self.calls = loss_fn, []

    def forward(self, batch):
        return self.net(batch['image'] if isinstance(batch, dict) else batch[0])

    def loss(self, outputs, batch):
        logits = outputs.detach().clone()
        loss = self.loss_fn(outputs, batch['label'] if isinstance(batch, dict) else batch[1])
        values = [loss['total']] if isinstance(loss, dict) and 'total' in loss else loss
        values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else [values]
        self.calls.append((logits, sum(value.mean().item() for value in values)))
        return loss


def make_rows():
    torch.manual_seed(0)
    return torch.randn(ROWS, 6).double(), torch.randint(CLASSES, (ROWS,))


def fit(model, data, algorithms, **options):
    trainer, log = trainer_of(model, data, BATCH, algorithms, max_duration='1ep', **options)
    trainer.fit()
    return log


@pytest.mark.parametrize('form', list(FORMS))
def test_the_term_is_the_mean_of_the_task_s_loss_over_the_copies(form):
    loss_fn, make_labels = FORMS[form]
    rows, labels = make_rows()
    model = Model(loss_fn)
    sba = SBA(fold=3, augment_prob=1.0, eta=0.5, target='hard', vicinity=Vicinity(sigma=1.0))
    log = fit(model, TensorDataset(rows, make_labels(labels)), [sba])
    totals = logged(log, 'loss/train/total')
    for step, total in enumerate(totals):
        raw, *virtual = model.calls[4 * step : 4 * step + 4]
        assert total == pytest.approx(raw[1] + 0.5 * sum(loss for _, loss in virtual) / 3, rel=1e-5)
        assert all(logits.shape == (BATCH, CLASSES) for logits, _ in (raw, *virtual))
        assert len({loss for _, loss in (raw, *virtual)}) == 4, 'four different batches of logits'
    assert len(model.calls) == 4 * len(totals) == 12


def test_without_noise_the_term_is_the_loss_again():
    rows, labels = make_rows()
    model = Model(weighted)
    sba = SBA(augment_prob=1.0, eta=0.5, target='hard', vicinity=Vicinity(1.0, sigma=0.0))
    log = fit(model, TensorDataset(rows, ignored(labels, -100)), [sba], device_train_microbatch_size=4)
    losses = [loss for _, loss in model.calls[::5]]
    expected = [1.5 * (first + second) / 2 for first, second in zip(losses[0::2], losses[1::2], strict=True)]
    assert logged(log, 'loss/train/total') == pytest.approx(expected, rel=1e-6)


def test_for_cross_entropy_it_is_eq_9_of_the_expander_s_samples():
    rows, labels = make_rows()
    model = Model(cross_entropy)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    network.load_state_dict(model.net.state_dict())
    vicinity = Vicinity(sigma=1.0)
    sba = SBA('net.1', augment_prob=1.0, eta=1.0, target='hard', vicinity=vicinity)
    log = fit(model, TensorDataset(rows[:BATCH], labels[:BATCH]), [sba])
    expander = LatentExpander(network, '1', vicinity=vicinity, seed=SEED)
    with expander.armed(step=0):
        raw, virtual = expander.split(network(rows[:BATCH]))
    expected = F.cross_entropy(raw, labels[:BATCH]) + sbaf.hard_label_loss(virtual, labels[:BATCH])
    assert logged(log, 'loss/train/total')[0] == pytest.approx(expected.item(), rel=1e-6)


def test_a_batch_may_be_a_dict():
    rows, labels = make_rows()
    model = Model(cross_entropy)
    sba = SBA('net.1', augment_prob=1.0, target='hard')
    log = fit(model, StackDataset(image=rows, label=labels), [sba])
    assert len(model.calls) == 5 * len(logged(log, 'sba/kl')) == 15


def test_labels_that_composer_smooths_are_hard_again():
    rows, labels = make_rows()

    def total(algorithms):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        log = fit(ComposerClassifier(network, num_classes=CLASSES), TensorDataset(rows, labels), algorithms)
        return torch.tensor(logged(log, 'loss/train/total')[:1])

    def sba():
        return SBA(augment_prob=1.0, eta=1.0, target='hard', vicinity=Vicinity(1.0, sigma=0.0))

    plain, smooth = total([]), total([LabelSmoothing(0.3)])
    assert torch.allclose(total([LabelSmoothing(0.3), sba()]), smooth + plain)
    assert not torch.allclose(smooth, plain)
