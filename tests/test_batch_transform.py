"""Transforms of whole batches compared with those of single images: the same distribution, outcome by outcome.

Run: pytest tests/test_batch_transform.py
"""

import dataclasses
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import binomtest, chisquare, ks_2samp, kstest, truncnorm
from torchvision import transforms

from composer_sba.data.config import KNOWN_DATASETS, DatasetConfig
from composer_sba.data.loader import build_dataspec
from composer_sba.data.transforms import BatchTransform, transform
from composer_sba.errors import DatasetError


def both_paths(config, image, draws):
    """Transform one image ``draws`` times, with the transform for single images and with that for batches."""
    pipeline = transform(config)
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(draws, -1, -1, -1)
    return {'streaming': [pipeline(image) for _ in range(draws)], 'memory': BatchTransform(config)(batch)}


def assert_uniform(counts, outcomes, path):
    """Chi-square test at 1 in 1,000; the test's seed fixes the draws."""
    assert set(counts) <= set(outcomes), f'{path}: {len(set(counts) - set(outcomes))} outcomes are impossible'
    assert set(counts) == set(outcomes), f'{path}: {len(set(outcomes) - set(counts))} of {len(outcomes)} never occurred'
    if len(outcomes) == 1:
        return
    test = chisquare(list(counts.values()))
    assert test.pvalue > 1e-3, f'{path}: chi2 {test.statistic:.1f}, {len(counts) - 1} degrees of freedom: {counts}'


@pytest.mark.parametrize(
    ('name', 'keys', 'shift', 'flips'),
    [
        ('cifar10', {}, 4, (False, True)),
        ('cifar10', {'split': 'val', 'augment': True}, 4, (False, True)),
        ('cifar10', {'augment': False}, 0, (False,)),
        ('cifar10', {'split': 'val'}, 0, (False,)),
        ('cifar100', {'mean': [0.1, 0.2, 0.3], 'std': [1, 2, 3]}, 4, (False, True)),
        ('digits', {}, 1, (False,)),
        ('digits', {'mean': [0.5, 0.5, 0.5]}, 1, (False,)),
    ],
)
def test_crops_flips_and_statistics_are_those_of_the_config(name, keys, shift, flips):
    """Every outcome is equally likely on both paths: one crop, at most one flip, and no step twice."""
    known = KNOWN_DATASETS[name]
    image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (known.size, known.size, 3), np.uint8))
    statistics = transforms.Normalize(keys.get('mean', known.mean), keys.get('std', known.std))
    normalized = transforms.Compose([transforms.ToTensor(), statistics])
    outcomes = set()
    for top, left, flipped in product(range(2 * shift + 1), range(2 * shift + 1), flips):
        moved = TF.crop(TF.pad(image, [shift]), top, left, known.size, known.size)
        outcomes.add(normalized(TF.hflip(moved) if flipped else moved).numpy().tobytes())
    assert len(outcomes) == (2 * shift + 1) ** 2 * len(flips)
    for path, images in both_paths(DatasetConfig(name, **keys), image, 20 * len(outcomes)).items():
        assert {tuple(each.shape) for each in images} == {(3, known.size, known.size)}, path
        assert_uniform(Counter(each.numpy().tobytes() for each in images), outcomes, path)


@pytest.mark.parametrize('size', [3, 4])
def test_every_cutout_centre_is_as_likely_as_in_streaming(size):
    def erased(row, column):
        square = np.zeros((8, 8), bool)
        square[
            max(row - size // 2, 0) : row - size // 2 + size, max(column - size // 2, 0) : column - size // 2 + size
        ] = 1
        return square.tobytes()

    outcomes = {erased(row, column) for row in range(8) for column in range(8)}
    assert len(outcomes) == 64
    config = DatasetConfig('digits', cutout=size)  # no pixel is the mean, so zeros were erased
    for path, images in both_paths(config, Image.new('RGB', (8, 8), 'white'), 50 * 64).items():
        squares = [image == 0 for image in images]
        assert all(torch.equal(square[:1].expand(3, -1, -1), square) for square in squares), path
        assert_uniform(Counter(square[0].numpy().tobytes() for square in squares), outcomes, path)


@pytest.mark.parametrize(('sigma', 'prob'), [(0.1, 0.5), (0.3, 0.25), (0.1, 1.0), (0.2, 0.0)])
def test_noise_is_added_to_as_many_images_and_clipped_as_in_streaming(sigma, prob):
    """Levels of 0.5 and white, in pixel units: the share of images, and the distribution of their noise."""
    config = DatasetConfig('digits', augment=True, gaussian_noise={'sigma': sigma, 'prob': prob}, mean=[0.2, 0.3, 0.4])
    image = np.full((8, 8, 3), 128, np.uint8)
    image[:, 4:] = 255
    std = torch.tensor(KNOWN_DATASETS['digits'].std).view(3, 1, 1)
    mean = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    values = {}
    for path, images in both_paths(config, Image.fromarray(image), 1000).items():
        pixels = torch.stack(list(images)) * std + mean
        inside = pixels[:, :, 2:6, 2]  # no crop moves the padding or the white there
        noisy = (inside - 128 / 255).abs().amax((1, 2)) > 1e-5
        test = binomtest(int(noisy.sum()), 1000, prob)
        assert test.pvalue > 1e-3, f'{path}: {int(noisy.sum())} of 1000 images are noisy, expected {1000 * prob}'
        assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5, path
        values[path] = ((inside[noisy] - 128 / 255) / sigma).flatten().numpy()
    if prob:
        for path, noise in values.items():
            inside = noise[np.abs(noise) < 0.45 / sigma]
            test = kstest(inside[:20000], truncnorm(-0.45 / sigma, 0.45 / sigma).cdf)
            assert test.pvalue > 1e-3, (path, test)
        assert ks_2samp(values['streaming'], values['memory']).pvalue > 1e-3


def test_noise_is_for_training_and_has_a_range():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    noise = {'sigma': 0.5, 'prob': 1.0}
    plain, noisy = (DatasetConfig('digits', split='val', gaussian_noise=given) for given in (None, noise))
    assert torch.equal(BatchTransform(plain)(images), BatchTransform(noisy)(images))
    assert str(transform(plain)) == str(transform(noisy))
    for wrong in ({'sigma': 0, 'prob': 0.5}, {'sigma': 0.1, 'prob': 1.5}, {'sigma': 'x', 'prob': 0.5}):
        with pytest.raises(DatasetError, match=r'gaussian_noise\.(sigma|prob): expected a number'):
            transform(DatasetConfig('digits', gaussian_noise=wrong))


def test_noise_reaches_the_batches_of_a_dataspec(digits_folder):
    """Workers send bytes, which are normalized on the device, only if no step needs floats before."""
    for in_memory in (False, True):
        workers = {} if in_memory else {'num_workers': 0}
        options = {'name': 'digits', 'local': str(digits_folder), 'in_memory': in_memory, 'shuffle': False, **workers}
        config = DatasetConfig(**options, gaussian_noise={'sigma': 0.1, 'prob': 1.0})
        specs = [build_dataspec(each, 64) for each in (config, dataclasses.replace(config, gaussian_noise=None))]
        noisy, plain = (spec.batch_transforms(next(iter(spec.dataloader)))[0] for spec in specs)
        assert noisy.dtype == torch.float32 and noisy.shape == plain.shape
        levels = noisy * KNOWN_DATASETS['digits'].std[0] + KNOWN_DATASETS['digits'].mean[0]
        off_grid = (levels * 255 - (levels * 255).round()).abs() > 0.01
        assert 0.3 < off_grid.float().mean() < 1, off_grid.float().mean()


def test_evaluation_neither_moves_nor_erases():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    config = DatasetConfig('cifar10', split='val', cutout=8)
    one_by_one = torch.stack([transform(config)(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(BatchTransform(config)(images), one_by_one)
