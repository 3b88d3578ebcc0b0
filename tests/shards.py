"""Small images in MDS shards, as Streaming writes them, and the labels that a DataLoader reads."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from streaming import MDSWriter
from torch.utils.data import DataLoader


def encoded(image: Image.Image, format: str = 'PNG') -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write(folder: Path, images: list[Any], labels: list[int] | None = None, encoding: str = 'bytes') -> None:
    """Write an MDS split of several shards, with the columns i, x and y of Streaming's converters."""
    columns = {'i': 'int', 'x': encoding, 'y': 'int'}
    with MDSWriter(columns=columns, out=str(folder), size_limit=8000, hashes=['xxh64']) as writer:
        for i, (image, label) in enumerate(zip(images, labels or range(len(images)), strict=True)):
            writer.write({'i': i, 'x': image, 'y': label})


def small_images(size: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((8, 8, 3), i % 256, np.uint8)) for i in range(size)]


def dataset(folder: Path, size: int) -> dict[str, Any]:
    """Write ``size`` samples, each of its own class; return the keys of the config that reads them."""
    for split in ('train', 'val'):
        write(folder / split, [encoded(image) for image in small_images(size)])
    keys = {'name': 'imagefolder', 'num_classes': size, 'crop_size': 8, 'resize_size': 8}
    return keys | {'local': str(folder)}


def labels(loader: DataLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()
