"""Images to convert, in folders or in CIFAR's batches, and what a conversion has made of them."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from streaming.base.format.mds import MDSReader

MODES = {'a.jpg': 'RGB', 'b.jpg': 'L', 'c.jpg': 'CMYK', 'd.png': 'P', 'e.png': 'RGBA', 'f.png': 'LA', 'g.webp': 'RGB'}

CIFAR10C = (
    'brightness contrast defocus_blur elastic_transform fog frost gaussian_blur gaussian_noise glass_blur '
    'impulse_noise jpeg_compression motion_blur pixelate saturate shot_noise snow spatter speckle_noise zoom_blur'
).split()


def picture(mode: str = 'RGB', size: tuple[int, int] = (12, 10), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode) if mode != 'RGBA' else Image.fromarray(pixels)


def image_folder(root: Path, classes: tuple[str, ...] = ('ant', 'bee', 'cat'), held_out: str = 'val') -> Path:
    """Images of several formats and modes: 21 of each class in ``train`` and 7 in ``held_out``."""
    for split, copies in (('train', 3), (held_out, 1)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for copy in range(copies):
                for file, mode in MODES.items():
                    picture(mode, seed=copy).save(root / split / name / f'{copy}{file}')
    return root


def small_folder(root: Path, *more: str) -> Path:
    """One black image of each of two classes in each split, and ``more`` of them."""
    for path in (*(f'{split}/{name}/0.png' for split in ('train', 'val') for name in ('ant', 'bee')), *more):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(root / path, 'PNG')
    return root


def text_file(root: Path) -> Path:
    (small_folder(root) / 'val' / 'ant' / 'notes.txt').write_text('no image')
    return root


def cifar_batches(folder: Path, per_batch: int = 20) -> np.ndarray:
    """CIFAR-10's Python batches with random pixels; returns those of the test batch, ``(N, 3072)``."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (per_batch, 3072), np.uint8)
    batch = {b'data': pixels, b'labels': [i % 10 for i in range(per_batch)]}
    for name in ('test_batch', *(f'data_batch_{i}' for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f'class{i}'.encode() for i in range(10)]
    (folder / 'batches.meta').write_bytes(pickle.dumps({b'label_names': names}, protocol=2))
    return pixels


def samples(folder: Path) -> list[dict[str, Any]]:
    """The samples of an MDS split, read by Streaming's own reader."""
    shards = json.loads((folder / 'index.json').read_text())['shards']
    readers = [MDSReader.from_json(str(folder.parent), folder.name, shard) for shard in shards]
    return [reader[i] for reader in readers for i in range(len(reader))]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'index.json').read_text())['composer_sba']


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith('.lock'))


def cifar10c_arrays(folder: Path, size: int = 4) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """CIFAR-10-C's layout with ``size`` images instead of 10,000; returns arrays by corruption, and all labels."""
    folder.mkdir(parents=True)
    rng, labels = np.random.default_rng(0), np.tile(np.arange(size) % 10, 5).astype(np.uint8)
    arrays = {name: rng.integers(0, 256, (5 * size, 32, 32, 3), np.uint8) for name in CIFAR10C}
    for name, array in {**arrays, 'labels': labels}.items():
        np.save(folder / f'{name}.npy', array)
    return arrays, labels
