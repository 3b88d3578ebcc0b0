"""Images to MDS shards, the format Streaming reads: ``python -m composer_sba.convert --help``.

Each split becomes a folder (``train``, ``val``) of shards with two columns: ``x``, the bytes of the image file as they
came, and ``y``, the index of its class among the sorted class names. Pixels that come as arrays are stored as PNG,
which loses nothing. Converting twice gives the same bytes. What a reader should know (class names, statistics of the
channels) stands in ``index.json`` under ``composer_sba``: there it travels with the shards, to a remote as well.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from composer_sba.data.mds_index import INDEX, RECORD
from composer_sba.data.readers import READERS, Source, Split
from composer_sba.data.samples import to_rgb
from composer_sba.errors import DatasetError

SHARD_BYTES = 1 << 26
SHUFFLE_SEED = 0
STATISTICS_IMAGES = 2000  # their mean is within 0.01 of that of a million; decoding more would take minutes


def convert(
    name: str, source: str | Path | None, out: str | Path, *, overwrite: bool = False, exist_ok: bool = False
) -> dict[str, int]:
    """Convert a data set into ``out/train`` and ``out/val``.

    ``out`` appears when everything is written and not before: a conversion that was killed leaves only a hidden
    folder beside it, which the next one replaces. Processes that convert into one folder wait for one another.

    Args:
        name (str): ``'digits'``, ``'cifar10'``, ``'cifar100'`` or ``'imagefolder'``.
        source (str | Path, optional): A folder or an archive (.tar, .tar.gz, .tar.xz, .zip) with the images in
            ``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``; for CIFAR also its original python batches.
            ``None`` for ``digits``, which come with scikit-learn.
        out (str | Path): Folder to make.
        overwrite (bool, optional): Whether to replace a dataset that is there. Default: ``False``.
        exist_ok (bool, optional): Whether to leave a dataset that is there as it is. Default: ``False``.

    Returns:
        dict[str, int]: Number of images of each split; empty if ``exist_ok`` left things as they were.

    Raises:
        DatasetError: If the source is missing or not as described, an image cannot be read, ``out`` exists or cannot
            be written; the message is one line with the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert('digits', None, f'{folder}/digits')
        {'train': 1437, 'val': 360}
    """
    out = Path(out).absolute()
    partial, replaced = (out.with_name(f'.{out.name}.{suffix}') for suffix in ('partial', 'replaced'))
    if exist_ok and _is_dataset(out):
        return {}  # and nothing need be writable
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f'.{out.name}.lock')):
            if exist_ok and _is_dataset(out):
                return {}
            _refuse_existing(out, overwrite)
            for stale in (partial, replaced):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
            try:
                counts = _write(READERS[name](source, partial / 'source'), name, partial)
                shutil.rmtree(partial / 'source', ignore_errors=True)
                if out.exists():
                    out.rename(replaced)
                partial.rename(out)
            finally:
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise DatasetError(f'{out}: the conversion failed: {error}') from error
    return counts


def _is_dataset(folder: Path) -> bool:
    return (folder / 'train' / INDEX).is_file()


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_dataset(out):
        raise DatasetError(f'{out} exists and is no MDS dataset: choose another --out, or remove it yourself')
    if not overwrite:
        raise DatasetError(f'{out} holds a dataset already: pass --overwrite to replace it, or choose another --out')


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(source: Source, name: str, out: Path) -> dict[str, int]:
    record: dict[str, Any] = {'name': name, 'num_classes': len(source.classes), 'classes': source.classes}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for split, samples in source.splits.items():
            if not samples:
                raise DatasetError(f'the {split} split has no images: nothing was converted')
            if split == 'train':
                # Neighbours on disk are neighbours in a shard, and a shuffle while streaming reaches only so far.
                order = np.random.default_rng(SHUFFLE_SEED).permutation(len(samples))
                samples = [samples[i] for i in order]
                if name == 'imagefolder':
                    record |= _statistics([image for image, _ in samples[:STATISTICS_IMAGES]], pool)
            with (
                MDSWriter(
                    columns={'x': 'bytes', 'y': 'int'},
                    out=str(out / split),
                    hashes=['sha1', 'xxh64'],
                    size_limit=SHARD_BYTES,
                ) as writer,
                tqdm(total=len(samples), desc=f'{name} {split}', unit=' images', disable=None) as progress,
            ):
                for encoded, label in _encode_all(samples, pool):
                    writer.write({'x': encoded, 'y': label})
                    progress.update()
    for split in source.splits:
        index = out / split / INDEX
        index.write_text(json.dumps(json.loads(index.read_text()) | {RECORD: record}, sort_keys=True))
    return {split: len(samples) for split, samples in source.splits.items()}


def _encode_all(samples: Split, pool: ThreadPoolExecutor) -> Iterator[tuple[bytes, int]]:
    # A pool's map would read the whole data set ahead of the writer.
    for start in range(0, len(samples), 1024):
        chunk = samples[start : start + 1024]
        yield from zip(pool.map(_encode, [image for image, _ in chunk]), [label for _, label in chunk], strict=True)


def _encode(image: Path | np.ndarray) -> bytes:
    if isinstance(image, Path):
        encoded = image.read_bytes()
        _decode(encoded, image, thumbnail=True)
        return encoded
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()


def _decode(encoded: bytes, path: Path, thumbnail: bool = False) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded))
        if thumbnail:
            image.draft('RGB', (1, 1))  # a JPEG is read to its end, but only an eighth of its pixels is computed
        return to_rgb(image)
    except Exception as error:  # what a decoder raises depends on the format and on where the file is broken
        raise DatasetError(f'{path}: not an image that can be read ({error}): repair or remove it') from error


def _statistics(images: list[Any], pool: ThreadPoolExecutor) -> dict[str, list[float]]:
    """Channel means and standard deviations of RGB in [0, 1], each image counting as much as another."""

    def moments(path: Path) -> np.ndarray:
        pixels = np.asarray(_decode(path.read_bytes(), path), np.float64).reshape(-1, 3) / 255
        return np.stack([pixels.mean(0), np.square(pixels).mean(0)])

    mean, square = np.mean(list(pool.map(moments, images)), axis=0)
    return {'mean': mean.round(4).tolist(), 'std': np.sqrt(np.maximum(square - mean**2, 1e-8)).round(4).tolist()}
