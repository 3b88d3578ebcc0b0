"""A batch that ran out of memory and is tried again: bit by bit a run with the small microbatch from the start.

Run: pytest tests/test_out_of_memory.py
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from composer.core import Algorithm, Event

from breakable_training import BATCH, make_trainer
from composer_sba import SBA, Vicinity
from composer_sba.algorithms.manifold_mixup import ManifoldMixup
from composer_sba.algorithms.r_drop import RDrop

# Composer's, about a batch that did not fit and about 'auto'
pytestmark = [
    pytest.mark.filterwarnings('ignore:CUDA out of memory or excessive memory allocation retries:RuntimeWarning'),
    pytest.mark.filterwarnings("ignore:`device_train_microbatch_size='auto'` may potentially fail"),
]


def even(state):
    """Augments batch 0, which runs out of memory, and every other one."""
    return float(state.timestamp.batch.value % 2 == 0)


METHODS = {
    'cut': lambda: SBA('cut', augment_prob=even, vicinity=Vicinity(sigma=0.5)),
    'head': lambda: SBA('head', augment_prob=even, vicinity=Vicinity(sigma=0.5)),
    'in a plain batch': lambda: SBA(['cut', 'head'], augment_prob=lambda state: 1 - even(state)),
    'manifold mixup': lambda: ManifoldMixup(['input', 'cut']),
    'r-drop': RDrop,
}
COINS = {'cut': [1, 0, 1, 0], 'head': [1, 0, 1, 0], 'in a plain batch': [0, 1, 0, 1]}


class OutOfMemory:
    """Raises CUDA's error once, at the given call, and keeps weak references to the tensors until then."""

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
    """Counts tensors of the failed attempt that are alive when the batch is tried again, and the network's hooks."""

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
    """Everything that the methods logged, parameters and momentum; a failed attempt also moves running statistics."""
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
    assert memory.raised and trainer.state.device_train_microbatch_size == BATCH // 2
    assert left.alive == 0, 'tensors of the failed attempt occupy memory'
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
