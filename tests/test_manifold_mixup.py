"""ManifoldMixup, compared with a slow reference that follows the equation row by row, and its draws.

Run: pytest tests/test_manifold_mixup.py
"""

import copy
import random
from pathlib import Path

import numpy
import pytest
import torch

import composer_sba.functional as sbaf
import reference
from composer_sba.algorithms.manifold_mixup import ManifoldMixup, draw_mixing, draw_partners, mix_rows
from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.train import train
from mixup_training import BATCH, CLASSES, LAYERS, ROWS, fit, make_trainer, weights
from small_training import SEED, logged

# Composer's, about mixed labels whose sum is rounded below 1; it warns about its MixUp too
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
RECIPE = str(Path(__file__).parent.parent / 'yamls' / 'digits_baseline.yaml')


def slow_loss(network, x, y, cut, mixing, partners):
    """The loss of one microbatch: h'_i = λ h_i + (1 - λ) h_j and Σ_k (λ y_ik + (1 - λ) y_jk) (-log p_k), by scalars."""
    below, above = network[:cut], network[cut:]
    latent = [below(row[None])[0] for row in x]
    total = torch.zeros((), dtype=x.dtype)
    for i, j in enumerate(partners.tolist()):
        mixed = torch.stack([mixing * a + (1 - mixing) * b for a, b in zip(latent[i], latent[j], strict=True)])
        predicted = reference.softmax(above(mixed[None])[0])
        for k in range(CLASSES):
            label = mixing * float(y[i] == k) + (1 - mixing) * float(y[j] == k)
            total = total - label * torch.log(predicted[k])
    return total / len(x)


@pytest.mark.parametrize('microbatch', [8, 3])
def test_every_step_descends_the_gradient_of_the_slow_loss(microbatch):
    algorithm = ManifoldMixup(LAYERS)
    trainer, _, data = make_trainer([algorithm], duration='4ep', device_train_microbatch_size=microbatch)
    slow = copy.deepcopy(trainer.state.model.module)
    trainer.fit()
    chosen = set()
    for step in range(4 * ROWS // BATCH):
        at = step % 3 * BATCH
        x, y = data.tensors[0][at : at + BATCH], data.tensors[1][at : at + BATCH]
        layer, mixing = sbaf.choose_layer(3, SEED, step), draw_mixing(2.0, SEED, step)
        chosen.add(layer)
        loss = 0.0
        for index, (part, labels) in enumerate(zip(x.split(microbatch), y.split(microbatch), strict=True)):
            partners = draw_partners(len(part), SEED, 0, step, index)
            loss = loss + slow_loss(slow, part, labels, [0, 2, 4][layer], mixing, partners) * len(part) / BATCH
        slow.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in slow.parameters():
                parameter -= 0.1 * parameter.grad
    assert chosen == {0, 1, 2}
    error = (torch.cat([each.flatten() for each in slow.parameters()]) - weights(trainer)).abs().max().item()
    assert error < 1e-12, f'weights differ by {error} after 12 steps'


def test_mix_rows_mixes_every_row_with_its_partner():
    rows, partners = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([3, 1, 0, 4, 2])
    mixed = mix_rows(rows, partners, 0.3)
    for i in range(5):
        for value, own, other in zip(mixed[i].flatten(), rows[i].flatten(), rows[partners[i]].flatten(), strict=True):
            assert abs(value - (0.3 * own + 0.7 * other)) < 1e-15
    half = mix_rows(rows.bfloat16(), partners, torch.tensor(0.3, dtype=torch.float64))
    assert half.dtype == torch.bfloat16


def test_the_share_has_the_moments_of_its_beta_distribution():
    for alpha in (0.2, 2.0):
        drawn = numpy.array([draw_mixing(alpha, 3, step) for step in range(4000)])
        assert abs(drawn.mean() - 0.5) < 0.02, f'mean {drawn.mean():.3f}'
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(drawn.var() / variance - 1) < 0.1, f'variance {drawn.var():.4f}, not {variance:.4f}'


def test_pairs_are_another_permutation_on_every_rank_batch_and_microbatch():
    places = [(seed, rank, step, part) for seed in (0, 1) for rank in (0, 1) for step in (0, 1) for part in (0, 1)]
    drawn = [tuple(draw_partners(64, *place).tolist()) for place in places]
    assert all(sorted(each) == list(range(64)) for each in drawn)
    assert len(set(drawn)) == len(places)
    assert drawn == [tuple(draw_partners(64, *place).tolist()) for place in places]


def test_share_and_layer_are_those_of_seed_and_batch_and_logged_once_a_batch():
    _, log = fit([ManifoldMixup(LAYERS, alpha=0.5)], duration='12ba', device_train_microbatch_size=2)
    assert logged(log, 'manifold_mixup/mixing') == [draw_mixing(0.5, SEED, step) for step in range(12)]
    assert logged(log, 'manifold_mixup/layer') == [sbaf.choose_layer(3, SEED, step) for step in range(12)]


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, again, other = (fit([ManifoldMixup(LAYERS, seed=seed)])[0] for seed in (None, None, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_streams_are_left_alone():
    states = []
    for algorithms in ([], [ManifoldMixup(LAYERS)]):
        fit(algorithms)
        states.append((torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()))
    assert states[0] == states[1]


def test_a_run_resumed_within_an_epoch_takes_the_same_steps(tmp_path):
    options = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}
    whole, _ = fit([ManifoldMixup(LAYERS)], **options)
    resumed, log = fit([ManifoldMixup(LAYERS)], load_path=str(tmp_path / 'ep1-ba4-rank0.pt'))
    assert len(logged(log, 'manifold_mixup/layer')) == 2
    assert torch.equal(whole, resumed)


def test_training_improves_on_mixtures():
    _, log = fit([ManifoldMixup(LAYERS)], duration='80ep')
    losses = logged(log, 'loss/train/total')
    start, end = sum(losses[:30]) / 30, sum(losses[-30:]) / 30
    assert end < 0.9 * start, f'loss {start:.3f} -> {end:.3f}'


def test_a_recipe_trains(digits_folder):
    settings = [f'train_dataset.local={digits_folder}', f'eval_dataset.local={digits_folder}']
    settings += ['max_duration=3ep', 'progress_bar=false', 'save_folder=null']
    settings += ['train_dataset.in_memory=true', 'eval_dataset.in_memory=true']
    trainer = train(load(RECIPE, [*settings, 'algorithms.manifold_mixup.layers=[input,conv1,conv2]']))
    accuracy = trainer.state.eval_metric_values['MulticlassAccuracy'].item()
    assert accuracy > 0.7, f'{100 * accuracy:.1f} %'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'alpha': 0}, r'Expected alpha to be a finite number > 0, got 0\.'),
        ({'alpha': float('inf')}, r'Expected alpha to be a finite number > 0, got inf\.'),
        ({'seed': -1}, r'Expected seed to be an integer >= 0, got -1\.'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        ManifoldMixup(**arguments)


def test_a_recipe_s_error_names_the_key():
    with pytest.raises(UserError, match=r'algorithms\.manifold_mixup\.alpha: expected float, got'):
        load(RECIPE, ['algorithms.manifold_mixup.alpha=high'])
