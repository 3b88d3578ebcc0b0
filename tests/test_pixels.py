"""Bytes that are normalized on the device: the same batches bit by bit as from workers, and crops close to PIL's.

pytest tests/test_pixels.py
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import DataSpec
from composer.algorithms import RandAugmentTransform
from composer.utils import add_vision_dataset_transform
from PIL import Image
from streaming.base.dataset import StreamingDataset
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from composer_sba.algorithms.batch_augmentation import Copies
from composer_sba.data.loader import DatasetConfig, build_dataloader, build_dataspec
from composer_sba.data.samples import decode
from composer_sba.data.transforms import Normalize, Pipeline, RandomResizedCrop, ToBytes
from shards import encoded, write

NUMBERS = np.random.default_rng(0)
QUARTER_TURN = Image.Exif()  # torchvision's ImageFolder ignores it as well
QUARTER_TURN[0x0112] = 6


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, Any]:
    """Write JPEGs of several sizes and modes; return the keys of the config that reads them."""
    pixels = [NUMBERS.integers(0, 256, (50 + 3 * i, 60 - 2 * i, 3), np.uint8) for i in range(12)]
    images = [Image.fromarray(each).convert('L' if i % 5 == 0 else 'RGB') for i, each in enumerate(pixels)]
    for split in ('train', 'val'):
        write(tmp_path / split, [encoded(image, 'JPEG') for image in images])
    keys = {'name': 'imagefolder', 'num_classes': 12, 'crop_size': 24, 'resize_size': 32}
    return keys | {'local': str(tmp_path)}


def photograph(height: int, width: int) -> Image.Image:
    """Draw smooth colours, for which JPEG is designed."""
    noise = NUMBERS.integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


class Unchanged:
    takes_tensors = True

    def __call__(self, image: Any) -> Any:
        return image


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


def test_batches_in_memory_are_already_normalized() -> None:
    config = DatasetConfig('digits', in_memory=True)
    for theirs, ours in zip(build_dataloader(config, 500), batches(build_dataspec(config, 500)), strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_workers_return_bytes(folder: dict[str, Any]) -> None:
    images, _ = next(iter(build_dataspec(DatasetConfig(**folder, num_workers=0), 4).dataloader))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 24, 24)


def test_images_are_augmented_before_they_are_bytes(folder: dict[str, Any]) -> None:
    spec = build_dataspec(DatasetConfig(**folder, num_workers=0), 4)
    dataset = spec.dataloader.dataset
    add_vision_dataset_transform(dataset, RandAugmentTransform())
    kinds = [type(step) for step in dataset.transform.transforms[-2:]]
    assert kinds == [RandAugmentTransform, ToBytes]
    assert batches(spec)[0][0].shape == (4, 3, 24, 24)


@pytest.mark.parametrize(
    ('mode', 'options', 'becomes_tensor'),
    [
        ('RGB', {}, True),
        ('RGB', {'progressive': True, 'subsampling': 0}, True),
        ('RGB', {'exif': QUARTER_TURN}, True),
        ('L', {}, True),
        ('CMYK', {}, False),
        ('RGB', {'format': 'PNG'}, False),
        ('P', {'format': 'PNG'}, False),
    ],
)
def test_a_tensor_has_the_pixels_of_the_image(mode: str, options: dict[str, Any], becomes_tensor: bool) -> None:
    buffer = io.BytesIO()
    photograph(57, 75).convert(mode).save(buffer, **{'format': 'JPEG'} | options)
    file = buffer.getvalue()
    image, pixels = decode(file), decode(file, tensors=True)
    assert isinstance(image, Image.Image) and image.mode == 'RGB'
    assert isinstance(pixels, torch.Tensor) == becomes_tensor
    if isinstance(pixels, Image.Image):
        pixels = pil_to_tensor(pixels)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, pil_to_tensor(image))


def test_pil_reports_what_is_wrong_with_a_broken_jpeg() -> None:
    with pytest.raises(OSError, match='image file is truncated'):
        decode(encoded(photograph(100, 100), 'JPEG')[:-500], tensors=True)


@pytest.mark.parametrize('size', [(375, 500), (90, 61), (40, 400)])  # the last is wider than any crop
def test_a_tensor_is_cropped_as_an_image(size: tuple[int, int]) -> None:
    file, crop = encoded(photograph(*size), 'JPEG'), RandomResizedCrop(96)
    assert isinstance(decode(file, tensors=True), torch.Tensor)
    far = []
    for seed in range(20):
        crops = []
        for tensors in (False, True):
            torch.manual_seed(seed)
            crops.append(ToBytes()(crop(decode(file, tensors))).int())
            following = torch.rand(())
        far.append((crops[0] - crops[1]).abs())
        torch.manual_seed(seed)
        transforms.RandomResizedCrop(96)(decode(file))
        assert torch.rand(()) == following, 'not as many draws as torchvision'
    levels = torch.stack(far).double()
    assert levels.max() <= 1 and levels.mean() < 0.02, (levels.max(), levels.mean())


@pytest.mark.parametrize('fold', [None, 3])
@pytest.mark.parametrize('workers', [0, 2])
def test_tensors_and_images_give_one_batch(folder: dict[str, Any], workers: int, fold: int | None) -> None:
    def run(kind: Callable[[list[Callable]], Callable]) -> list[list[torch.Tensor]]:
        loader: Any = build_dataspec(DatasetConfig(**folder, num_workers=workers), 4).dataloader
        pipeline = kind(loader.dataset.transform.transforms)
        loader.dataset.transform = Copies(pipeline, fold) if fold else pipeline
        assert getattr(loader.dataset.transform, 'takes_tensors', False) == (kind is Pipeline)
        return list(loader)

    for (ours, labels), (images, same_labels) in zip(run(Pipeline), run(transforms.Compose), strict=True):
        assert ours.shape == (4, *([fold] if fold else []), 3, 24, 24) and torch.equal(labels, same_labels)
        far = (ours.int() - images.int()).abs()
        assert far.max() <= 1, far.max()


def test_jpegs_from_streamings_converter_become_tensors(tmp_path: Path) -> None:
    write(tmp_path / 'train', [photograph(40, 60)], encoding='jpeg')
    config = DatasetConfig('imagefolder', local=str(tmp_path), num_classes=1, num_workers=0)
    dataset: Any = build_dataspec(config, 1).dataloader.dataset
    dataset.transform = Unchanged()
    pixels, _ = dataset.get_item(0)
    assert isinstance(pixels, torch.Tensor), type(pixels)
    assert torch.equal(pixels, pil_to_tensor(StreamingDataset.get_item(dataset, 0)['x']))


@pytest.mark.parametrize('shape', [(3, 5, 7), (2, 3, 5, 7), (2, 4, 3, 5, 7)])
def test_every_byte_is_normalized_as_by_torchvision(shape: tuple[int, ...]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    images = torch.from_numpy(NUMBERS.integers(0, 256, shape, np.uint8))
    expected = [reference(image.permute(1, 2, 0).numpy()) for image in images.view(-1, 3, 5, 7)]
    assert torch.equal(Normalize(mean, std)(images), torch.stack(expected).view(shape))
    assert images.dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    assert torch.equal(Normalize(mean, std)(every), reference(every.permute(1, 2, 0).numpy()))
