"""What a step of a recipe costs, in operations, against sums by hand.

pytest tests/test_cost.py
"""

from pathlib import Path

import pytest

from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.study.flops import flops_per_image, training_flops

YAMLS = Path(__file__).parent.parent / 'yamls'


def _cost(name: str, *overrides: str) -> float:
    return flops_per_image(load(YAMLS / f'{name}.yaml', overrides))


def test_of_a_plain_step_is_that_of_its_products() -> None:
    """Of digits_net: forward, gradient of the weights, and gradient of the input but for the first layer's."""
    first = 2 * 64 * (3 * 9) * 32
    others = 2 * 64 * (32 * 9) * 64 + 2 * 16 * (64 * 9) * 128 + 2 * 128 * 10
    assert _cost('digits_baseline') == 2 * first + 3 * others


def test_of_sba_is_that_of_the_tail() -> None:
    head, fold = 3 * 2 * 128 * 10, 8
    assert _cost('digits_sba') == pytest.approx(_cost('digits_baseline') + 0.5 * fold * head)
    above_conv2, fold = 3 * (2 * 16 * (64 * 9) * 128 + 2 * 128 * 10), 4
    assert _cost('digits_sba_conv') == pytest.approx(_cost('digits_baseline') + 0.5 * fold * above_conv2)


def test_of_a_dense_basis_counts_the_projection() -> None:
    identity, normalized = (
        _cost('digits_sba', f'algorithms.sba.vicinity={{basis: {basis}}}') for basis in ('identity', 'normalized')
    )
    assert normalized - identity == pytest.approx(0.5 * 4 * 2 * 128**2)


def test_of_several_layers_is_their_mean() -> None:
    of = {
        layers: _cost('digits_sba', f'algorithms.sba.layers={layers}') for layers in ('conv2', 'head', '[conv2,head]')
    }
    assert of['[conv2,head]'] == pytest.approx((of['conv2'] + of['head']) / 2)


def test_of_rivals() -> None:
    plain = _cost('digits_baseline')
    assert _cost('digits_cutout_ba2') == 2 * plain
    assert flops_per_image(load([YAMLS / 'digits_baseline.yaml', YAMLS / 'methods/sam.yaml'])) == 1.1 * plain


def test_of_a_whole_training() -> None:
    recipe = load([YAMLS / 'resnet44_cifar10_baseline.yaml', YAMLS / 'methods/twice.yaml'])
    assert training_flops(recipe) == 2 * 200 * 50_000 * flops_per_image(recipe)
    recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['train_dataset.subset=5000', 'max_duration=10ba'])
    assert training_flops(recipe) == pytest.approx(10 * 64 * flops_per_image(recipe), rel=0.02)
    recipe = load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=1000sp'])
    assert training_flops(recipe) == 1000 * flops_per_image(recipe)
    with pytest.raises(UserError, match="max_duration: expected epochs, batches or samples, got '100tok'"):
        training_flops(load(YAMLS / 'resnet8_cifar10_baseline.yaml', ['max_duration=100tok']))
