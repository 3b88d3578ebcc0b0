"""The coin λ(t) and the layer k(t): their distributions, and what they depend on.

Run: pytest tests/test_schedule.py
"""

import math
import random

import numpy as np
import pytest
import torch

import composer_sba.functional as sbaf
from composer_sba.algorithms.manifold_mixup import draw_mixing
from composer_sba.schedule import noise_seed

STEPS = 4000


def test_bernoulli_prob_is_the_cosine():
    assert sbaf.bernoulli_prob(0) == 1
    assert sbaf.bernoulli_prob(math.pi / 3) == pytest.approx(0.5)
    assert sbaf.bernoulli_prob(math.pi / 2) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize('omega', [-0.1, 1.6, math.nan])
def test_bernoulli_prob_refuses_other_angles(omega):
    with pytest.raises(ValueError, match=rf'^Expected omega in \[0, π/2\] radians, got {omega}\.$'):
        sbaf.bernoulli_prob(omega)


@pytest.mark.parametrize('prob', [0.1, 0.5, 0.9])
def test_share_of_augmented_steps_is_prob_within_4_sigma(prob):
    share = np.mean([sbaf.should_augment(prob, 17, t) for t in range(STEPS)])
    bound = 4 * math.sqrt(prob * (1 - prob) / STEPS)
    assert abs(share - prob) < bound, f'share {share:.4f}, probability {prob}, bound {bound:.4f}'


def test_certain_coins():
    assert all(sbaf.should_augment(1.0, 3, t) for t in range(500))
    assert not any(sbaf.should_augment(0.0, 3, t) for t in range(500))


def test_a_larger_probability_only_adds_steps():
    small = {t for t in range(500) if sbaf.should_augment(0.3, 5, t)}
    large = {t for t in range(500) if sbaf.should_augment(0.6, 5, t)}
    assert small < large


def test_coins_of_neighbouring_steps_and_seeds_are_uncorrelated():
    coins = np.array([[sbaf.should_augment(0.5, seed, t) for t in range(STEPS)] for seed in (1, 2)], float)
    for name, a, b in [('steps', coins[0, :-1], coins[0, 1:]), ('seeds', coins[0], coins[1])]:
        correlation = np.corrcoef(a, b)[0, 1]
        assert abs(correlation) < 4 / math.sqrt(STEPS), f'{name}: {correlation:.4f}'


def test_layers_are_uniform_and_independent_of_the_coin():
    layers = np.array([sbaf.choose_layer(4, 17, t) for t in range(STEPS)])
    coins = np.array([sbaf.should_augment(0.5, 17, t) for t in range(STEPS)])
    for subset in (layers, layers[coins]):
        counts = np.bincount(subset, minlength=4)
        chi2 = ((counts - len(subset) / 4) ** 2 / (len(subset) / 4)).sum()
        assert chi2 < 21.1, f'counts {counts}, chi2 {chi2:.1f} above the 0.9999 quantile for 3 degrees of freedom'


def test_neither_reads_nor_moves_a_global_random_stream():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    first = [(sbaf.should_augment(0.5, 7, t), sbaf.choose_layer(3, 7, t)) for t in range(20)]
    assert states() == before
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert [(sbaf.should_augment(0.5, 7, t), sbaf.choose_layer(3, 7, t)) for t in range(20)] == first


def test_numpy_s_integers_give_the_coins_of_python_s():
    coins = [sbaf.should_augment(0.5, np.int64(7), t) for t in np.arange(50)]
    assert coins == [sbaf.should_augment(0.5, 7, t) for t in range(50)]


def test_noise_seeds_differ_in_every_coordinate():
    keys = [(17, 0, 5, 0, 0, 0)] + [tuple(v + (i == j) for j, v in enumerate((17, 0, 5, 0, 0, 0))) for i in range(6)]
    assert len({noise_seed(*key) for key in keys}) == len(keys)
    assert noise_seed(*keys[0]) == noise_seed(*keys[0])


@pytest.mark.parametrize('prob', [-0.1, 1.5, math.nan])
def test_should_augment_refuses_a_number_outside_0_1(prob):
    with pytest.raises(ValueError, match=rf'^Expected augment_prob in \[0, 1\], got {prob}\.$'):
        sbaf.should_augment(prob, 0, 0)


def test_choose_layer_refuses_an_empty_set():
    with pytest.raises(ValueError, match='^Expected at least one layer to choose from, got 0'):
        sbaf.choose_layer(0, 0, 0)


@pytest.mark.parametrize('draw', [sbaf.should_augment, sbaf.choose_layer, draw_mixing])
@pytest.mark.parametrize(('seed', 'step'), [(-1, 0), (0, -1)])
def test_draws_refuse_negative_keys(draw, seed, step):
    with pytest.raises(ValueError, match=rf'^Expected a seed and indices >= 0, got {seed} and .*{step}'):
        draw(1, seed, step)
