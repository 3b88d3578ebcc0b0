"""The operations of a training step compared with sums by hand.

Run: pytest tests/test_flops.py
"""

from pathlib import Path

import pytest

from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.study.flops import flops_per_image, training_flops

YAMLS = Path(__file__).parent.parent / 'yamls'


def _flops(name: str, *overrides: str) -> float:
    return flops_per_image(load(YAMLS / f'{name}.yaml', overrides))


def test_a_plain_step_costs_its_matrix_products() -> None:
    """For digits_net: forward pass, gradients of the weights, and gradients of all inputs except the network's."""
    first = 2 * 64 * (3 * 9) * 32
    others = 2 * 64 * (32 * 9) * 64 + 2 * 16 * (64 * 9) * 128 + 2 * 128 * 10
    assert _flops('digits_baseline') == 2 * first + 3 * others


def test_sba_costs_the_layers_above_the_cut() -> None:
    head, fold = 3 * 2 * 128 * 10, 8
    assert _flops('digits_sba') == pytest.approx(_flops('digits_baseline') + 0.5 * fold * head)
    above_conv2, fold = 3 * (2 * 16 * (64 * 9) * 128 + 2 * 128 * 10), 4
    assert _flops('digits_sba_conv') == pytest.approx(_flops('digits_baseline') + 0.5 * fold * above_conv2)


def test_a_dense_basis_costs_its_projection() -> None:
    identity, normalized = (
        _flops('digits_sba', f'algorithms.sba.vicinity={{basis: {basis}}}') for basis in ('identity', 'normalized')
    )
    assert normalized - identity == pytest.approx(0.5 * 4 * 2 * 128**2)


def test_several_layers_cost_their_mean() -> None:
    flops = {
        layers: _flops('digits_sba', f'algorithms.sba.layers={layers}') for layers in ('conv2', 'head', '[conv2,head]')
    }
    assert flops['[conv2,head]'] == pytest.approx((flops['conv2'] + flops['head']) / 2)


def test_other_methods_multiply_the_flops() -> None:
    plain = _flops('digits_baseline')
    assert _flops('digits_cutout_ba2') == 2 * plain
    assert flops_per_image(load([YAMLS / 'digits_baseline.yaml', YAMLS / 'methods/sam.yaml'])) == 1.1 * plain


def test_a_training_costs_its_images_times_its_duration() -> None:
    recipe = load([YAMLS / 'resnet44_cifar10_baseline.yaml', YAMLS / 'methods/twice.yaml'])
    assert training_flops(recipe) == 2 * 200 * 50_000 * flops_per_image(recipe)
    recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['train_dataset.subset=5000', 'max_duration=10ba'])
    assert training_flops(recipe) == pytest.approx(10 * 64 * flops_per_image(recipe), rel=0.02)
    recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=1000sp'])
    assert training_flops(recipe) == 1000 * flops_per_image(recipe)
    with pytest.raises(UserError, match="max_duration: must be in epochs, batches or samples, got '100tok'"):
        training_flops(load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=100tok']))
