"""The laws that the closed form takes the noise for: their cumulants against those of points that Vicinity draws.

Run: pytest tests/test_laws.py
"""

import math

import pytest
import torch

from composer_sba import Vicinity
from composer_sba.laws import vicinity_laws


@pytest.mark.parametrize('basis', ['identity', 'normalized', 'orthogonal', 'hadamard'])
@pytest.mark.parametrize(
    ('tau', 'noise_scale'), [(None, 'rms'), (0.1, 'rms'), (math.inf, 'absolute'), (0.6, 'absolute')]
)
@torch.no_grad()
def test_gaussian_noise_has_the_cumulants_of_the_vicinity(basis, tau, noise_scale):
    latent = 3 * torch.randn(8, 64, dtype=torch.float64)
    vicinity = Vicinity(1.0, sigma=0.5, tau=tau, basis=basis, noise_scale=noise_scale)
    generator = torch.Generator().manual_seed(0)
    noise = torch.cat([vicinity.sample(latent, 100, generator) - latent for _ in range(10)])
    (law,) = vicinity_laws(latent, torch.eye(64, dtype=torch.float64), None, latent, vicinity)
    variance = noise.square().mean().item()
    assert law.share == 1 and law.logits is latent
    assert law.noise.scale[0, 0].item() ** 2 == pytest.approx(variance, rel=0.02)
    kurtosis = noise.pow(4).mean().item() / variance**2 - 3
    assert law.noise.kurtosis[0].item() == pytest.approx(kurtosis, abs=0.12)  # of columns of unit norm, 6 / Q


@pytest.mark.parametrize('rescale', [True, False])
@pytest.mark.parametrize('features', [6, 300])
@torch.no_grad()
def test_dropout_laws_have_the_cumulants_of_the_vicinity(features, rescale):
    latent = torch.rand(1, features, dtype=torch.float64) + 0.5
    weight, bias = torch.randn(4, features, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    vicinity = Vicinity(0.0, dropout=0.3, rescale=rescale)
    laws = vicinity_laws(latent, weight, bias, latent @ weight.T + bias, vicinity)
    assert [law.share for law in laws] == pytest.approx([0.3, 0.7] if features == 6 else [1.0])
    copies = vicinity.sample(latent, 20000, torch.Generator().manual_seed(0))[:, 0]
    mean = sum(law.share * law.logits for law in laws)[0]
    virtual = copies @ weight.T + bias
    assert ((mean - virtual.mean(0)).abs() < 4 * virtual.std(0) / math.sqrt(len(virtual))).all()
    noise, rest = copies - copies.mean(0), laws[0].noise
    ruled = rest.scale[0] == 0  # whose two values make two laws
    assert ruled.sum() == len(laws) - 1
    scale = noise.std(0)
    assert torch.allclose(rest.scale[0][~ruled], scale[~ruled], rtol=0.05)
    assert rest.skewness.item() == pytest.approx((noise / scale).pow(3).mean().item(), abs=0.05)
    assert rest.kurtosis.item() == pytest.approx((noise / scale).pow(4).mean().item() - 3, abs=0.05)
