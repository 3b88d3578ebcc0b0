"""RDrop, compared with a slow reference that follows the equation pair by pair, and in Composer's Trainer.

Run: pytest tests/test_r_drop.py
"""

import copy
import random
from pathlib import Path

import numpy
import pytest
import torch
from composer.algorithms import SAM, LabelSmoothing
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import StochasticDepth

import reference
from composer_sba import SBA, sort_sba_last
from composer_sba.algorithms.r_drop import RDrop, dropout_rate, two_pass_kl
from composer_sba.errors import UserError
from composer_sba.recipe.build import build_components
from composer_sba.recipe.recipe import load
from composer_sba.recipe.registry import components
from small_training import logged, trainer_of

RECIPE = str(Path(__file__).parent.parent / 'yamls' / 'digits_baseline.yaml')
ROWS, BATCH, CLASSES = 24, 8, 5


def make_network(rate=0.3):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(rate), nn.Linear(16, CLASSES))


def make_trainer(algorithms, *, network=make_network, duration='2ep', loss_fn=None, **options):
    torch.manual_seed(0)
    model = ComposerClassifier(
        network().double(), num_classes=CLASSES, **({} if loss_fn is None else {'loss_fn': loss_fn})
    )
    data = TensorDataset(torch.randn(ROWS, 6, dtype=torch.float64), torch.randint(CLASSES, (ROWS,)))
    trainer, log = trainer_of(model, data, BATCH, algorithms, max_duration=duration, **options)
    return trainer, log, data


def fit(algorithms, **options):
    trainer, log, _ = make_trainer(algorithms, **options)
    trainer.fit()
    return weights(trainer.state.model), log


def weights(model):
    return torch.cat([each.detach().flatten() for each in model.parameters()])


def slow_losses(first, second, labels):
    """Mean cross-entropy of both passes, and the mean of (KL(p1 || p2) + KL(p2 || p1)) / 2, by scalars."""
    entropy = divergence = torch.zeros((), dtype=first.dtype)
    for a, b, label in zip(first, second, labels.tolist(), strict=True):
        p, q = reference.softmax(a), reference.softmax(b)
        entropy = entropy + (reference.cross_entropy(label, p) + reference.cross_entropy(label, q)) / 2
        divergence = divergence + (reference.kl_divergence(p, q) + reference.kl_divergence(q, p)) / 2
    return entropy / len(labels), divergence / len(labels)


def test_the_divergence_and_its_gradient_are_those_of_the_equation():
    logits = (3 * torch.randn(12, CLASSES, dtype=torch.float64)).requires_grad_()
    ours = two_pass_kl(logits)
    _, slow = slow_losses(logits[0::2], logits[1::2], torch.zeros(6, dtype=torch.long))
    assert abs(ours.item() - slow.item()) < 1e-12, f'{ours.item()} against {slow.item()}'
    (a,), (b,) = torch.autograd.grad(ours, logits), torch.autograd.grad(slow, logits)
    assert (a - b).abs().max() < 1e-12, f'gradients differ by {(a - b).abs().max()}'
    assert (a.abs().sum(-1) > 0).all(), 'the gradient flows through both passes'


@pytest.mark.parametrize('microbatch', [None, 4, 3])
@pytest.mark.parametrize('alpha', [0.3, 5.0, 0.0])
def test_every_step_descends_the_gradient_of_the_slow_loss(alpha, microbatch):
    """With the masks that dropout drew, on a copy of the network."""
    masks, rows = [], []

    def keep_mask(module, args, output):
        if module.training:
            masks.append((output != 0).double() / (1 - module.p))

    options = {} if microbatch is None else {'device_train_microbatch_size': microbatch}
    trainer, log, data = make_trainer([RDrop(alpha)], **options)
    network = trainer.state.model.module
    slow = copy.deepcopy(network)
    network[2].register_forward_hook(keep_mask)
    network.register_forward_hook(lambda module, args, output: rows.append(args[0]) if module.training else None)
    trainer.fit()
    logged_kl, logged_loss = logged(log, 'r_drop/kl'), logged(log, 'loss/train/total')
    parts = iter(zip(masks, rows, strict=True))
    for step in range(2 * ROWS // BATCH):
        at = step % 3 * BATCH
        x, y = data.tensors[0][at : at + BATCH], data.tensors[1][at : at + BATCH]
        entropy = divergence = 0.0
        for part, labels in zip(x.split(microbatch or BATCH), y.split(microbatch or BATCH), strict=True):
            mask, seen = next(parts)
            assert torch.equal(seen[0::2], part) and torch.equal(seen[1::2], part), 'both passes are adjacent'
            assert not torch.equal(mask[0::2], mask[1::2]), 'two masks'
            hidden = slow[:2](part)
            passes = [slow[3](hidden * each) for each in (mask[0::2], mask[1::2])]
            ce, kl = slow_losses(*passes, labels)
            entropy, divergence = entropy + ce * len(part) / BATCH, divergence + kl * len(part) / BATCH
        loss = entropy + alpha * divergence
        assert logged_kl[step] == pytest.approx(divergence.item(), rel=1e-6)
        assert logged_loss[step] == pytest.approx(loss.item(), rel=1e-6)
        slow.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in slow.parameters():
                parameter -= 0.1 * parameter.grad
    assert next(parts, None) is None
    error = (weights(slow) - weights(network)).abs().max().item()
    assert error < 1e-12, f'weights differ by {error} after 6 steps'


def test_the_paper_doubles_loss_and_alpha():
    """Its CE + CE + α (KL + KL) / 2 with α = 0.6 is twice our loss with 0.3."""
    logits, labels = torch.randn(8, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (4,))
    entropy, divergence = slow_losses(logits[0::2], logits[1::2], labels)
    paper = 2 * entropy + 0.6 * divergence
    ours = nn.functional.cross_entropy(logits, labels.repeat_interleave(2)) + 0.3 * two_pass_kl(logits)
    assert abs(paper - 2 * ours) < 1e-12


def test_time_counts_inputs_and_train_metrics_both_passes():
    seen = []
    trainer, _, data = make_trainer([RDrop()], duration='1ep')
    update = trainer.state.model.update_metric

    def watch(batch, outputs, metric):
        seen.append((batch[1], outputs))
        update(batch, outputs, metric)

    trainer.state.model.update_metric = watch
    trainer.fit()
    assert trainer.state.timestamp.sample == ROWS
    assert torch.equal(torch.cat([labels for labels, _ in seen]), data.tensors[1].repeat_interleave(2))
    assert all(outputs.shape == (2 * BATCH, CLASSES) for _, outputs in seen)
    labels, outputs = seen[-1]
    share = (outputs.argmax(-1) == labels).float().mean().item()
    assert trainer.state.train_metric_values['MulticlassAccuracy'].item() == pytest.approx(share)


def test_another_fit_does_not_double_the_microbatch_again():
    rows = []
    trainer, _, _ = make_trainer([RDrop()], duration='1ep', device_train_microbatch_size=4)
    trainer.state.model.module.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    trainer.fit()
    trainer.fit(duration='1ep')
    assert rows == [8] * 12
    trainer.fit(duration='1ep', device_train_microbatch_size=2)
    assert rows[12:] == [4] * 12


def test_evaluation_and_prediction_see_every_row_once():
    trainer, _, data = make_trainer([RDrop()])
    trainer.fit()
    assert [len(each) for each in trainer.predict(DataLoader(data, 8))] == [8, 8, 8]
    trainer.eval(DataLoader(data, 8))
    assert trainer.state.eval_metric_values['CrossEntropy'].isfinite()


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, again = (fit([RDrop()])[0] for _ in range(2))
    assert torch.equal(first, again)
    trainer, _, _ = make_trainer([RDrop()])
    torch.manual_seed(5)  # of the masks
    trainer.fit()
    assert not torch.equal(first, weights(trainer.state.model))


def test_it_draws_no_random_numbers():
    """A fit moves the global streams as dropout on doubled batches does."""
    states = []
    for doubled in (False, True):
        trainer, _, data = make_trainer([] if doubled else [RDrop()])
        if doubled:
            rows = TensorDataset(*(each.repeat_interleave(2, 0) for each in data.tensors))
            trainer.fit(train_dataloader=DataLoader(rows, 2 * BATCH), device_train_microbatch_size=2 * BATCH)
        else:
            trainer.fit()
        states.append((torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()))
    assert states[0] == states[1]


def test_a_run_resumed_after_an_epoch_takes_the_same_steps(tmp_path):
    whole, _ = fit([RDrop()], save_folder=str(tmp_path), save_interval='1ep', save_num_checkpoints_to_keep=-1)
    resumed, log = fit([RDrop()], load_path=str(tmp_path / 'ep1-ba3-rank0.pt'))
    assert len(logged(log, 'r_drop/kl')) == 3
    assert torch.equal(whole, resumed)


def test_both_passes_of_sam_are_compared():
    with pytest.warns(UserWarning, match='SAM has'):
        _, log = fit([SAM(rho=0.05, interval=1), RDrop()])
    assert len(logged(log, 'r_drop/kl')) == 6 and min(logged(log, 'r_drop/kl')) > 0


# Composer's, about smoothed labels whose sum is rounded below 1
@pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
def test_with_label_smoothing_and_sba():
    final, log = fit([SBA('head', augment_prob=1.0), LabelSmoothing(0.1), RDrop()], algorithm_passes=[sort_sba_last])
    assert torch.isfinite(final).all()
    assert min(logged(log, 'r_drop/kl')) > 0 and min(logged(log, 'sba/kl')) > 0


def test_training_improves_and_the_term_makes_passes_agree():
    kls = {}
    for alpha in (0.0, 5.0):
        _, log = fit([RDrop(alpha)], duration='40ep')
        losses, kl = logged(log, 'loss/train/total'), logged(log, 'r_drop/kl')
        kls[alpha] = sum(kl[-30:]) / 30
        start, end = sum(losses[:30]) / 30, sum(losses[-30:]) / 30
        assert end < 0.95 * start, f'alpha {alpha}: loss {start:.3f} -> {end:.3f}'
    assert kls[5.0] < 0.7 * kls[0.0], f'mean KL {kls[5.0]:.4f} with the term, {kls[0.0]:.4f} without'


def test_dropout_rates_of_modules():
    attention = nn.MultiheadAttention(4, 2, dropout=0.2)
    found = [dropout_rate(each) for each in (nn.Dropout2d(0.4), attention, StochasticDepth(0.1, 'row'), nn.ReLU())]
    assert found == [0.4, 0.2, 0.1, 0.0]
    layer = nn.TransformerEncoderLayer(4, 2, dropout=0.3)
    assert dropout_rate(layer) == 0.0, 'its dropout is a module of its own'
    assert max(map(dropout_rate, layer.modules())) == 0.3


@pytest.mark.parametrize('network', [lambda: make_network(0.0), lambda: nn.Sequential(nn.Linear(6, CLASSES))])
def test_a_network_without_dropout_is_refused(network):
    trainer, _, _ = make_trainer([RDrop()], network=network)
    modules = len(list(trainer.state.model.modules()))
    expected = (
        f'RDrop compares two passes through dropout, and none of the {modules} modules of ComposerClassifier has a '
        'rate > 0: give the network an nn.Dropout(0.1) or leave RDrop out.'
    )
    with pytest.raises(UserError) as refused:
        trainer.fit()
    assert str(refused.value) == expected


def test_a_microbatch_that_separates_the_passes_is_refused():
    class Odd(RDrop):
        def fit_start(self, state, logger):
            state.device_train_microbatch_size = 5

    with pytest.raises(
        UserError, match=r'two passes of every input, \(2 \* N, K\), got \(5, 5\); .* here 5 rows, must be'
    ):
        fit([Odd()])


def test_a_loss_of_several_parts_is_refused():
    def loss_fn(outputs, target):
        return {'a': nn.functional.cross_entropy(outputs, target)}

    with pytest.raises(UserError, match='^RDrop adds its term to a loss that is one tensor, got dict'):
        fit([RDrop()], loss_fn=loss_fn)


@pytest.mark.parametrize('alpha', [-1, float('nan'), True])
def test_bad_arguments_are_named(alpha):
    with pytest.raises(ValueError, match=rf'^Expected alpha to be a finite number >= 0, got {alpha!r}\.$'):
        RDrop(alpha)


def test_an_odd_number_of_logits_is_refused():
    with pytest.raises(ValueError, match=r'^Expected logits of shape \(2 \* N, K\), got \(3, 5\)\.$'):
        two_pass_kl(torch.zeros(3, 5))


def test_a_recipe_can_name_it():
    assert components('algorithms')['r_drop'] is RDrop
    with torch.device('meta'):
        parts = build_components(load(RECIPE, ['algorithms.r_drop.alpha=1']))
    assert [repr(each) for each in parts['algorithms']] == ['RDrop(alpha=1)']
