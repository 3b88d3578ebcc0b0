"""Transforms of whole batches compared with those of single images: the same distribution, outcome by outcome.

Run: pytest tests/test_batch_transform.py
"""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import chisquare
from torchvision import transforms

from composer_sba.data.config import KNOWN_DATASETS, DatasetConfig
from composer_sba.data.transforms import BatchTransform, transform


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


def test_evaluation_neither_moves_nor_erases():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    config = DatasetConfig('cifar10', split='val', cutout=8)
    one_by_one = torch.stack([transform(config)(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(BatchTransform(config)(images), one_by_one)
