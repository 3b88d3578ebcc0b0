"""Bytes that become numbers on the device: the same batches, bit by bit, as workers would make.

pytest tests/test_pixels.py
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import DataSpec
from composer.algorithms import RandAugmentTransform
from composer.utils import add_vision_dataset_transform
from PIL import Image
from torchvision import transforms

from composer_sba.data import DatasetConfig, build_dataloader, build_dataspec
from composer_sba.pixels import Normalize, ToBytes
from test_data import encoded, write

NUMBERS = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, Any]:
    """JPEGs of several sizes and modes; the keys of the config that reads them."""
    pixels = [NUMBERS.integers(0, 256, (50 + 3 * i, 60 - 2 * i, 3), np.uint8) for i in range(12)]
    images = [Image.fromarray(each).convert('L' if i % 5 == 0 else 'RGB') for i, each in enumerate(pixels)]
    for split in ('train', 'val'):
        write(tmp_path / split, [encoded(image, 'JPEG') for image in images])
    keys = {'name': 'imagefolder', 'num_classes': 12, 'crop_size': 24, 'resize_size': 32}
    return keys | {'local': str(tmp_path)}


def batches(spec: DataSpec) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [spec.batch_transforms(batch) for batch in spec.dataloader]


@pytest.mark.parametrize('keys', [{}, {'split': 'val'}, {'num_workers': 2}, {'mean': [0.1, 0.5, 0.9]}, {'cutout': 8}])
def test_batches_are_those_of_the_dataloader(folder: dict[str, Any], keys: dict[str, Any]) -> None:
    config = DatasetConfig(**folder | {'num_workers': 0} | keys)
    theirs, ours = list(build_dataloader(config, 4)), batches(build_dataspec(config, 4))
    assert len(ours) == len(theirs) == 3
    for (images, labels), (same_images, same_labels) in zip(theirs, ours, strict=True):
        assert images.dtype == same_images.dtype == torch.float32
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_in_memory_there_is_nothing_left_to_do() -> None:
    config = DatasetConfig('digits', in_memory=True)
    for theirs, ours in zip(build_dataloader(config, 500), batches(build_dataspec(config, 500)), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_workers_hand_over_bytes(folder: dict[str, Any]) -> None:
    images, _ = next(iter(build_dataspec(DatasetConfig(**folder, num_workers=0), 4).dataloader))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 24, 24)


def test_images_are_augmented_before_they_are_bytes(folder: dict[str, Any]) -> None:
    spec = build_dataspec(DatasetConfig(**folder, num_workers=0), 4)
    dataset = spec.dataloader.dataset  # type: ignore[union-attr]
    add_vision_dataset_transform(dataset, RandAugmentTransform())
    kinds = [type(step) for step in dataset.transform.transforms[-2:]]
    assert kinds == [RandAugmentTransform, ToBytes]
    assert batches(spec)[0][0].shape == (4, 3, 24, 24)


@pytest.mark.parametrize('shape', [(3, 5, 7), (2, 3, 5, 7), (2, 4, 3, 5, 7)])
def test_every_byte_is_what_torchvision_makes_of_it(shape: tuple[int, ...]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    images = torch.from_numpy(NUMBERS.integers(0, 256, shape, np.uint8))
    expected = [reference(image.permute(1, 2, 0).numpy()) for image in images.view(-1, 3, 5, 7)]
    assert torch.equal(Normalize(mean, std)(images), torch.stack(expected).view(shape))
    assert images.dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(Normalize(mean, std)(every), reference(every.permute(1, 2, 0).numpy()))
