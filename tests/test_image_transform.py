"""Transforms of single images: every shift and flip occurs, and the size is the documented one.

Run: python -m pytest tests/test_image_transform.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

from composer_sba.data.config import resolve
from composer_sba.data.loader import DatasetConfig, transform


@pytest.mark.parametrize(
    ('name', 'size', 'flips', 'shifts'), [('cifar10', 32, True, 4), ('cifar100', 32, True, 4), ('digits', 8, False, 1)]
)
def test_small_images_are_shifted_and_flipped(name: str, size: int, flips: bool, shifts: int) -> None:
    image = Image.new('L', (size, size))
    image.putpixel((size // 2, size // 2), 255)
    image.putpixel((size // 2 + 1, size // 2), 128)  # to the right, unless flipped
    pipeline = transform(DatasetConfig(name, mean=[0, 0, 0], std=[1, 1, 1]))
    moves, orders = set(), set()
    for _ in range(500):
        tensor = pipeline(image)
        assert tensor.shape == (3, size, size)
        row, column = divmod(int(tensor[0].argmax()), size)
        moves.add(row - size // 2)
        orders.add(bool(column + 1 < size and tensor[0, row, column + 1] > 0))
    assert moves == set(range(-shifts, shifts + 1)), moves
    assert orders == ({True, False} if flips else {True}), orders
    still = transform(DatasetConfig(name, split='val', mean=[0, 0, 0], std=[1, 1, 1]))(image)
    assert int(still[0].argmax()) == size // 2 * size + size // 2


def test_large_images_are_cropped_to_size() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    random_crop = transform(DatasetConfig('imagenet'))
    assert random_crop(image).shape == (3, 224, 224)
    assert not torch.equal(random_crop(image), random_crop(image))
    centre = transform(DatasetConfig('imagenet', split='val', crop_size=160, resize_size=176))
    assert centre(image).shape == (3, 160, 160)
    assert torch.equal(centre(image), centre(image))


@pytest.mark.parametrize(
    ('crop_size', 'resize_size'), [(None, 256), (32, 36), (96, 109), (160, 182), (224, 256), (299, 341), (384, 438)]
)
def test_evaluation_sees_seven_eighths_of_each_side_at_any_size(crop_size: int | None, resize_size: int) -> None:
    """As timm does it, floor(size / 0.875): a fixed 256 would show a network of 32 pixels 1/64 of the image."""
    config = DatasetConfig('imagefolder', 'nowhere', split='val', crop_size=crop_size, mean=[0, 0, 0], std=[1, 1, 1])
    assert resolve(config).resize_size == resize_size
    ramp = np.tile(np.linspace(0, 255, 512).round().astype(np.uint8), (512, 1))  # brightness is the position
    seen = transform(config)(Image.fromarray(ramp))[0, 0]
    assert seen.max() - seen.min() == pytest.approx(7 / 8, abs=0.03), (seen.min(), seen.max())
