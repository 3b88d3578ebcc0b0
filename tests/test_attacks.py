"""Attacks against the closed form: a linear classifier of two classes yields at its distance from the hyperplane.

Run: pytest tests/test_attacks.py
"""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba.errors import UserError
from composer_sba.robustness import ATTACKS, PixelClassifier, attack, evaluate

STD = [0.25] * 3


def linear_classifier(seed=0):
    """Return a network, images near the middle of the pixel range, their predictions and their distances by norm."""
    torch.manual_seed(seed)
    linear = nn.Linear(3 * 16, 2)
    model = PixelClassifier(nn.Sequential(nn.Flatten(), linear), mean=[0.5] * 3, std=STD).eval()
    images = 0.5 + 0.1 * torch.rand(40, 3, 4, 4)
    logits = model(images).detach()
    weight = (linear.weight[0] - linear.weight[1]).detach() / STD[0]
    margins = (logits[:, 0] - logits[:, 1]).abs()
    return model, images, logits.argmax(1), {'l2': margins / weight.norm(), 'linf': margins / weight.abs().sum()}


@pytest.mark.parametrize('name', ATTACKS)
def test_a_linear_classifier_yields_at_its_distance_and_not_before(name):
    model, images, labels, distances = linear_classifier()
    norm = name.rpartition('_')[2]
    distance = distances[norm]
    epsilon = distance.median().item()
    found = attack(model, images, labels, name, epsilon=epsilon, steps=30)
    size = (found - images).flatten(1).norm(2 if norm == 'l2' else torch.inf, dim=1)
    assert size.max() <= epsilon * (1 + 1e-4), f'{size.max():.5f} > {epsilon:.5f}'
    assert found.min() >= 0 and found.max() <= 1
    yielded = model(found).argmax(1) != labels
    assert not yielded[distance > epsilon * (1 + 1e-4)].any(), 'beyond the closed form'
    reached = distance < 0.95 * epsilon
    assert reached.sum() >= 10
    assert yielded[reached].all(), f'{yielded[reached].sum()} of {reached.sum()} images within 0.95 of the distance'


@pytest.mark.parametrize('name', ['pgd_l2', 'auto_pgd_linf'])
def test_images_stay_in_the_pixel_range(name):
    """At white, only steps downwards are possible."""
    model, images, labels, _ = linear_classifier()
    found = attack(model, torch.ones_like(images), labels, name, epsilon=0.5)
    assert found.max() <= 1 and found.min() < 1


def test_the_seed_repeats_an_attack_and_leaves_no_trace():
    model, images, labels, _ = linear_classifier()
    model.network[1].bias.requires_grad_(False)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with torch.inference_mode():
        one, again, other = (attack(model, images, labels, 'pgd_l2', steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_reports_the_error_of_the_closed_form():
    model, images, labels, distances = linear_classifier()
    labels = labels.clone()
    labels[::10] = 1 - labels[::10]  # misclassified without an attack: they count, whatever the attack does
    epsilon = distances['linf'].sort().values[19].item() * 1.01
    result = evaluate(
        model.network,
        DataLoader(TensorDataset(images, labels), 16),
        mean=[0.5] * 3,
        std=STD,
        corruptions=[],
        attacks=['auto_pgd_linf'],
        epsilons={'linf': epsilon},
        attack_steps=30,
        attack_images=20,
    )
    chosen = torch.arange(0, 40, 2)
    wrong = model(images).argmax(1) != labels
    expected = (wrong | (distances['linf'] < epsilon))[chosen].float().mean().item()
    assert result['clean']['error'] == 0.1
    [entry] = result['attacks']
    assert entry == {'attack': 'auto_pgd_linf', 'epsilon': epsilon, 'steps': 30, 'images': 20, 'error': entry['error']}
    assert entry['error'] == pytest.approx(expected, abs=1e-6), (entry, expected)


def test_an_image_that_is_misclassified_without_an_attack_counts(monkeypatch):
    """An attack may happen to move it to its class."""
    model, images, labels, _ = linear_classifier()
    options = {'mean': [0.5] * 3, 'std': STD, 'corruptions': [], 'attacks': ['pgd_l2']}
    monkeypatch.setattr('composer_sba.robustness.evaluation.attack', lambda *_, **__: images)
    result = evaluate(model.network, DataLoader(TensorDataset(1 - images, labels), 40), **options)
    wrong = (model(1 - images).argmax(1) != labels).float().mean().item()
    assert wrong > 0
    assert result['attacks'][0]['error'] == pytest.approx(wrong), 'only the attacked images, which are all right, count'


def test_mistakes_are_one_line(monkeypatch):
    model, images, labels, _ = linear_classifier()
    for arguments, line in [
        ({'name': 'pgd_l1'}, "unknown attack 'pgd_l1'; did you mean"),
        ({'name': 'pgd_l2', 'epsilon': 0}, 'Expected epsilon to be a finite number > 0, got 0'),
        ({'name': 'pgd_l2', 'steps': 0}, 'Expected steps to be an integer >= 1, got 0'),
    ]:
        with pytest.raises(UserError, match=line):
            attack(model, images, labels, **arguments)
    monkeypatch.setitem(sys.modules, 'art', None)
    monkeypatch.setitem(sys.modules, 'art.attacks.evasion', None)
    loader, options = DataLoader(TensorDataset(images, labels), 40), {'mean': [0.5] * 3, 'std': STD, 'corruptions': []}
    with pytest.raises(UserError, match=r"pip install 'composer-sba\[robustness\]', or choose --attacks none"):
        evaluate(model.network, loader, attacks=['pgd_l2'], **options)
    evaluate(model.network, loader, **options)  # without attacks nothing is missing
