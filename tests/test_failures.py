"""Steps that fail: a batch that ran out of memory and is tried again, and exceptions anywhere in an armed step.

Compared with a run that had the small microbatch from the start, bit by bit, and with the network without hooks.

Run: pytest tests/test_failures.py
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.core import Algorithm, Event
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SBA, MajorityVote, SeedEachBatch, Vicinity, sort_sba_last, sort_seed_first
from composer_sba.manifold_mixup import ManifoldMixup
from composer_sba.r_drop import RDrop

BATCH, CLASSES = 16, 5
# What Composer says when a batch did not fit, and of 'auto'
pytestmark = [
    pytest.mark.filterwarnings('ignore:CUDA out of memory or excessive memory allocation retries:RuntimeWarning'),
    pytest.mark.filterwarnings("ignore:`device_train_microbatch_size='auto'` may potentially fail"),
]


class Place(nn.Identity):
    """Where something may happen in training: in the forward pass or, ``back``, in the backward pass."""

    def __init__(self):
        super().__init__()
        self.happen = self.back = lambda rows: None

    def forward(self, x):
        if self.training:
            self.happen(x)
            if x.requires_grad:
                x.register_hook(lambda gradient: self.back(gradient))
        return x


class Net(nn.Module):
    """Batch norm and dropout below the cut 'cut', batch norm above it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))
        self.below = Place()
        self.cut = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.above = Place()
        self.fc = nn.Linear(8, CLASSES)
        self.logits = Place()

    def forward(self, x):
        h = self.norm(self.cut(self.below(self.stem(x))))
        return self.logits(self.fc(self.above(torch.relu(h)).mean((2, 3))))


def make_trainer(*algorithms, loss_fn=F.cross_entropy, microbatch=None, duration='4ba'):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(CLASSES, (48,)))
    model = ComposerClassifier(Net(), num_classes=CLASSES, loss_fn=loss_fn)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, BATCH, shuffle=True),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=[SeedEachBatch(), *algorithms],
        algorithm_passes=[sort_sba_last, sort_seed_first],
        loggers=[InMemoryLogger()],
        device='cpu',
        device_train_microbatch_size=microbatch,
        seed=17,
        progress_bar=False,
    )
    return trainer, trainer.state.model.module


# --- out of memory ----------------------------------------------------------------------------------------------------


def even(state):
    """Augments batch 0, which runs out of memory, and every other one."""
    return float(state.timestamp.batch.value % 2 == 0)


METHODS = {
    'cut': lambda: SBA('cut', augment_prob=even, vicinity=Vicinity(sigma=0.5)),
    'head': lambda: SBA('head', augment_prob=even, vicinity=Vicinity(sigma=0.5)),
    'in a plain batch': lambda: SBA(['cut', 'head'], augment_prob=lambda state: 1 - even(state)),
    'analytic': lambda: SBA(augment_prob=even, estimator='analytic'),
    'manifold mixup': lambda: ManifoldMixup(['input', 'cut']),
    'r-drop': RDrop,
}
COINS = {'cut': [1, 0, 1, 0], 'head': [1, 0, 1, 0], 'in a plain batch': [0, 1, 0, 1], 'analytic': [1, 0, 1, 0]}


class OutOfMemory:
    """Raises what CUDA raises, once, at the given call, and keeps weak references to what was there until then."""

    def __init__(self, call):
        self.calls_left = call
        self.seen = []
        self.raised = False

    def watch(self, rows):
        if not self.raised:
            self.seen.append(weakref.ref(rows))

    def __call__(self, rows):
        self.watch(rows)
        self.calls_left -= 1
        if self.calls_left == 0:
            self.raised = True
            raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB.')


class Leftovers(Algorithm):
    """As the batch is tried again: whether tensors of the failed try live, and the hooks of the network."""

    def __init__(self, memory, network):
        self.memory = memory
        self.network = network
        self.alive = None
        self.hooks = []

    def match(self, event, state):
        return event in (Event.BEFORE_FORWARD, Event.BATCH_END)

    def apply(self, event, state, logger):
        if event == Event.BATCH_END:
            modules = self.network.modules()
            self.hooks.append(sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in modules))
        elif self.memory.raised and self.alive is None:
            self.alive = sum(each() is not None for each in self.memory.seen)


def numbers(trainer, network):
    """Parameters, momentum and everything logged by the methods; running statistics are of failed tries too."""
    log = trainer.logger.destinations[0].data
    logged = {
        name: [float(v) for _, v in log[name]] for name in log if name.startswith(('sba/', 'loss/', 'man', 'r_d'))
    }
    state = [each['momentum_buffer'] for each in trainer.state.optimizers[0].state.values()]
    return logged, torch.cat([each.detach().flatten() for each in (*network.parameters(), *state)])


@pytest.mark.parametrize('place', ['below', 'above', 'logits', 'loss', 'backward'])
@pytest.mark.parametrize('method', list(METHODS))
def test_a_batch_that_ran_out_of_memory_is_that_of_small_microbatches(method, place, monkeypatch):
    monkeypatch.setattr('composer.trainer.trainer._is_auto_microbatching', lambda size, device: size == 'auto')
    memory = OutOfMemory(call=1)

    def loss_fn(outputs, target):
        if place == 'loss':
            memory(outputs) if not memory.raised else None
        return F.cross_entropy(outputs, target)

    trainer, network = make_trainer(METHODS[method](), loss_fn=loss_fn, microbatch='auto')
    network.below.happen = memory.watch  # what the convolution above it keeps for its gradient
    if place == 'backward':
        network.below.back = memory
    elif place != 'loss':
        getattr(network, place).happen = memory
    left = Leftovers(memory, network)
    trainer.state.algorithms.append(left)
    trainer.fit()
    assert memory.raised and trainer.state.device_train_microbatch_size == (BATCH if method == 'r-drop' else BATCH // 2)
    assert left.alive == 0, 'tensors of the failed try take the memory of the next'
    assert len(set(left.hooks)) == 1, f'hooks after each batch: {left.hooks}'

    small, expected = make_trainer(METHODS[method](), microbatch=BATCH // 2)
    small.fit()
    (ours, weights), (theirs, expected_weights) = numbers(trainer, network), numbers(small, expected)
    assert ours == theirs
    assert ours.get('sba/augmented') == COINS.get(method)
    assert torch.equal(weights, expected_weights), f'they differ by {(weights - expected_weights).abs().max()}'


def test_the_second_microbatch_may_be_the_one_that_does_not_fit():
    memory = OutOfMemory(call=2)
    trainer, network = make_trainer(METHODS['cut'](), microbatch=8)
    trainer.state.auto_microbatching = True
    network.above.happen = memory
    trainer.fit()
    small, expected = make_trainer(METHODS['cut'](), microbatch=4)
    small.fit()
    (ours, weights), (theirs, expected_weights) = numbers(trainer, network), numbers(small, expected)
    assert memory.raised and ours == theirs and torch.equal(weights, expected_weights)


# --- exceptions -------------------------------------------------------------------------------------------------------


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
    'analytic': lambda: SBA(augment_prob=1.0, estimator='analytic'),
    'manifold mixup': lambda: ManifoldMixup('cut'),
}
MOMENTS = ['below', 'above', 'logits', 'after_forward', 'loss', 'after_loss', 'before_backward', 'backward']


@pytest.mark.parametrize('error', [Broken(), KeyboardInterrupt()], ids=['exception', 'interrupt'])
@pytest.mark.parametrize('moment', MOMENTS)
@pytest.mark.parametrize('method', list(STEPS))
def test_a_step_that_breaks_off_leaves_the_network_plain(method, moment, error):
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
def test_an_evaluation_that_breaks_off_leaves_the_network_plain(place, error):
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
