"""Transforms of whole batches compared with those of single images: the same law, outcome by outcome.

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

from composer_sba.data.loader import DatasetConfig
from composer_sba.data.transforms import BatchTransform, transform


def both_paths(config, image, draws):
    """``draws`` transforms of one image, by the transform for single images and by that for batches."""
    pipeline = transform(config)
    batch = torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(draws, -1, -1, -1)
    return {'streaming': [pipeline(image) for _ in range(draws)], 'memory': BatchTransform(config)(batch)}


def assert_uniform(counts, outcomes, path):
    """Chi-square at 1 in 1,000, of draws that the seed of the test fixes."""
    assert set(counts) <= set(outcomes), f'{path}: {len(set(counts) - set(outcomes))} of its outcomes are impossible'
    assert set(counts) == set(outcomes), f'{path}: {len(set(outcomes) - set(counts))} of {len(outcomes)} never came'
    test = chisquare(list(counts.values()))
    assert test.pvalue > 1e-3, f'{path}: chi2 {test.statistic:.1f}, {len(counts) - 1} degrees of freedom: {counts}'


def test_every_crop_and_flip_is_as_likely_as_in_streaming():
    image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8))
    config = DatasetConfig('cifar10')
    normalized = transforms.Compose(transform(config).transforms[-2:])
    outcomes = set()
    for top, left, flipped in product(range(9), range(9), (False, True)):
        moved = TF.crop(TF.pad(image, [4]), top, left, 32, 32)
        outcomes.add(normalized(TF.hflip(moved) if flipped else moved).numpy().tobytes())
    assert len(outcomes) == 162
    for path, images in both_paths(config, image, 50 * 162).items():
        assert_uniform(Counter(moved.numpy().tobytes() for moved in images), outcomes, path)


@pytest.mark.parametrize('size', [3, 4])
def test_cutout_has_every_centre_as_often_as_in_streaming(size):
    def erased(row, column):
        square = np.zeros((8, 8), bool)
        square[
            max(row - size // 2, 0) : row - size // 2 + size, max(column - size // 2, 0) : column - size // 2 + size
        ] = 1
        return square.tobytes()

    outcomes = {erased(row, column) for row in range(8) for column in range(8)}
    assert len(outcomes) == 64
    config = DatasetConfig('digits', cutout=size)  # no pixel is the mean, so zeros are what was erased
    for path, images in both_paths(config, Image.new('RGB', (8, 8), 'white'), 50 * 64).items():
        squares = [image == 0 for image in images]
        assert all(torch.equal(square[:1].expand(3, -1, -1), square) for square in squares), path
        assert_uniform(Counter(square[0].numpy().tobytes() for square in squares), outcomes, path)


def test_evaluation_moves_and_erases_nothing():
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    config = DatasetConfig('cifar10', split='val', cutout=8)
    one_by_one = torch.stack([transform(config)(TF.to_pil_image(image)) for image in images])
    assert torch.equal(BatchTransform(config)(images), one_by_one)
