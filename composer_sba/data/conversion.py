"""Conversion of images to MDS shards, the format that Streaming reads.

Each split becomes a folder (``train``, ``val``; of CIFAR-10-C, ``<corruption>/<severity>``) of shards with two columns:
``x``, the bytes of the image file, and ``y``, the index of its class among the sorted class names. The bytes are
unchanged unless images beyond ``max_side`` are resized. Images that are arrays are stored as PNG, which is lossless.
Converting twice gives the same bytes. ``index.json`` records the class names, the statistics of the channels and what
was resized under ``composer_sba``, and so takes them along to a remote.
"""

import contextlib
import functools
import io
import json
import logging
import math
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from composer_sba.data.mds_index import INDEX, RECORD
from composer_sba.data.readers import READERS, Source, Split
from composer_sba.data.samples import decoding_error, to_rgb
from composer_sba.errors import DatasetError, check_number, nearest

SHARD_BYTES = 1 << 26
SHUFFLE_SEED = 0
QUALITY = 90  # FFCV's for ImageNet
STATISTICS_IMAGES = 2000  # their mean is within 0.01 of that of a million; decoding more would take minutes
AHEAD_BYTES, AHEAD_FILES = 1 << 27, 256  # limits of the files that are read ahead of the writer
DECODED_BYTES = 1 << 29  # limit of the images that are decoded at the same time
NAMED_FILES = 20  # broken files that a message names

_log = logging.getLogger(__name__)


def convert(
    name: str,
    source: str | Path | None,
    out: str | Path,
    *,
    max_side: int | None = None,
    quality: int | None = None,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> dict[str, int]:
    """Convert a dataset into ``out/train`` and ``out/val``, and CIFAR-10-C into ``out/<corruption>/<severity>``.

    ``out`` appears when the conversion is complete. A killed conversion leaves a hidden folder next to ``out``, which
    the next conversion replaces. Processes that convert into the same folder wait for each other.

    A warning in the log names the files and folders that were left out: hidden ones, and those outside the class
    folders. Linked folders are read if they are inside the source.

    Args:
        name (str): ``'digits'``, ``'cifar10'``, ``'cifar100'``, ``'cifar10c'`` or ``'imagefolder'``.
        source (str | Path, optional): Folder or archive (.tar, .tar.gz, .tar.bz2, .tar.xz, .zip) with the images in
            ``train/<class>/`` and ``val/<class>/`` or ``test/<class>/``; for CIFAR also its original Python batches.
            ``None`` for ``digits``, which come with scikit-learn.
        out (str | Path): Folder to make.
        max_side (int, optional): Longest side of a stored image, for ``'imagefolder'``. A larger image is resized, with
            antialiasing and without its metadata, and stored as JPEG. Unit: pixels. Default: ``None``, which leaves
            every file as it is.
        quality (int, optional): Quality of these JPEGs, 1 to 100; requires ``max_side``. Default: ``None``, which
            stands for 90.
        overwrite (bool, optional): Whether to replace an existing dataset. Default: ``False``.
        exist_ok (bool, optional): Whether to keep an existing dataset and convert nothing. Default: ``False``.

    Returns:
        dict[str, int]: Number of images of each split; empty if ``exist_ok`` kept an existing dataset.

    Raises:
        ValueError: If ``max_side`` or ``quality`` is not an integer in its range.
        DatasetError: If ``name`` is unknown, ``max_side`` or ``quality`` is given for another dataset than
            ``'imagefolder'``, ``quality`` is given without ``max_side``, the source is missing or not as described, a
            class has no images, images cannot be read, or ``out`` exists or cannot be written. The message is one line
            with the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     convert('digits', None, f'{folder}/digits')
        {'train': 1437, 'val': 360}
    """
    if name not in READERS:
        remedy = ": convert it as 'imagefolder'" if name == 'imagenet' else nearest(str(name), READERS)
        raise DatasetError(f'unknown dataset {name!r}{remedy}')
    if max_side is not None:
        max_side = check_number('max_side', max_side, 'an integer >= 1', lambda value: value >= 1, Integral)
        if name != 'imagefolder':
            raise DatasetError(f'max_side: {max_side} resizes files of an imagefolder, not {name}: leave it out')
    if quality is not None:
        good = 'an integer from 1 to 100'
        quality = check_number('quality', quality, good, lambda value: 1 <= value <= 100, Integral)
        if name != 'imagefolder':
            raise DatasetError(f'quality: {quality} is for resized files of an imagefolder, not {name}: leave it out')
        if max_side is None:
            problem = f'quality: {quality} is for images that max_side resizes, which is not given'
            raise DatasetError(f'{problem}: add --max-side PIXELS (max_side in Python), or leave --quality out')
    given = None if source is None else Path(os.path.expanduser(source))
    out = Path(os.path.realpath(os.path.expanduser(out)))
    if exist_ok and _is_dataset(out):
        return {}  # also if nothing is writable
    if os.path.ismount(out):
        problem = f'{out} is a mount point, which cannot be replaced'
        raise DatasetError(f'{problem}: choose a folder in it, such as {out / name}')
    partial, replaced = (out.with_name(f'.{out.name}.{suffix}') for suffix in ('partial', 'replaced'))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f'.{out.name}.lock')):
            _put_back(replaced, out)
            if exist_ok and _is_dataset(out):
                return {}
            _refuse_existing(out, given, overwrite)
            for stale in (partial, replaced):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                if out.exists():
                    _try_to_move(out, replaced)
                partial.mkdir()
                images = READERS[name](given, partial / 'source')
                counts = _write(images, name, partial, max_side, quality or QUALITY)
                shutil.rmtree(partial / 'source', ignore_errors=True)
                if out.exists():
                    out.rename(replaced)
                partial.rename(out)
            finally:
                _put_back(replaced, out)
                for leftover in (partial, replaced):
                    shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise DatasetError(f'{out}: the conversion failed: {error}') from error
    for reason, paths in images.left_out.items():
        if paths:
            names = ', '.join(str(images.location(path)) for path in paths[:3]) + ', ...' * (len(paths) > 3)
            entries = 'entry' if len(paths) == 1 else 'entries'
            _log.warning('%s: left out %d %s (%s): %s', source, len(paths), entries, reason, names)
    return counts


def _is_dataset(folder: Path) -> bool:
    return any((folder / split / INDEX).is_file() for split in ('train', 'gaussian_noise/1'))


def _refuse_existing(out: Path, source: Path | None, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_dataset(out):
        raise DatasetError(f'{out} exists and is not an MDS dataset: choose another --out, or remove it yourself')
    if not overwrite:
        raise DatasetError(f'{out} already holds a dataset: pass --overwrite to replace it, or choose another --out')
    if source is not None and Path(os.path.realpath(source)).is_relative_to(out):
        raise DatasetError(f'{out} would be replaced, and --source {source} with it: choose another --out')


def _try_to_move(out: Path, replaced: Path) -> None:
    """Raise DatasetError if ``out`` cannot be replaced, before the work of a conversion would be lost."""
    try:
        out.rename(replaced)
        replaced.rename(out)
    except OSError as error:
        raise DatasetError(f'{out} cannot be replaced ({error.strerror}): choose another --out') from error


def _put_back(replaced: Path, out: Path) -> None:
    """Restore the old dataset if a conversion was killed or failed after it had moved it."""
    if replaced.exists() and not out.exists():
        replaced.rename(out)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(source: Source, name: str, out: Path, max_side: int | None, quality: int) -> dict[str, int]:
    record: dict[str, Any] = {'name': name, 'num_classes': len(source.classes), 'classes': source.classes}
    broken: list[tuple[Path, str]] = []
    moments: list[np.ndarray] = []
    resized = before = after = 0
    encode = functools.partial(_encode, max_side=max_side, quality=quality)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for split, samples in source.splits.items():
            if not samples:
                raise DatasetError(f'the {split} split has no images: nothing was converted')
            measured = 0
            if split == 'train':
                # Streaming's shuffle mixes nearby samples only, and files of one class are neighbours on disk.
                order = np.random.default_rng(SHUFFLE_SEED).permutation(len(samples))
                samples = [samples[i] for i in order]
                measured = STATISTICS_IMAGES if name == 'imagefolder' else 0
            with (
                MDSWriter(
                    columns={'x': 'bytes', 'y': 'int'},
                    out=str(out / split),
                    hashes=['sha1', 'xxh64'],
                    size_limit=SHARD_BYTES,
                ) as writer,
                tqdm(total=len(samples), desc=f'{name} {split}', unit=' images', disable=None) as progress,
            ):
                for (_, label), (future, size) in zip(samples, _ahead(encode, samples, measured, pool), strict=True):
                    try:
                        image = future.result()
                        moments += [] if image.moments is None else [image.moments]
                        resized, before, after = resized + image.resized, before + size, after + len(image.content)
                        if not broken:  # else nothing will be kept, but the user learns of all broken files
                            writer.write({'x': image.content, 'y': label})
                    except _BrokenImageError as error:
                        broken.append((source.location(error.path), error.reason))
                    progress.set_postfix_str(f'{tqdm.format_sizeof(after)}B', refresh=False)
                    progress.update()
    if broken:
        (path, reason), *others = sorted(broken)[:NAMED_FILES]
        rest = ', '.join(f'{path} ({reason})' for path, reason in others) + ', ...' * (len(broken) > NAMED_FILES)
        more, them = (f', and {len(broken) - 1:,} more: {rest}', 'them') if others else ('', 'it')
        raise DatasetError(f'{path}: not an image that can be read ({reason}){more}: repair or remove {them}')
    if moments:
        mean, square = np.mean(moments, axis=0)
        deviation = np.sqrt(np.maximum(square - mean**2, 1e-8))
        record |= {'mean': mean.round(4).tolist(), 'std': deviation.round(4).tolist()}
    if name == 'imagefolder':
        record |= {'max_side': max_side, 'quality': quality if max_side else None, 'resized': resized}
        record |= {'source_bytes': before, 'stored_bytes': after}
    for split in source.splits:
        index = out / split / INDEX
        index.write_text(json.dumps(json.loads(index.read_text()) | {RECORD: record}, sort_keys=True))
    return {split: len(samples) for split, samples in source.splits.items()}


def _ahead(
    encode: Callable[..., '_Encoded'], samples: Split, measured: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[Future['_Encoded'], int]]:
    """Yield the results of ``encode`` and the sizes of the sources in order, and keep those ahead within the limits."""
    waiting: deque[tuple[Future[_Encoded], int]] = deque()
    held = 0
    for i, (image, _) in enumerate(samples):
        size = image.nbytes if isinstance(image, np.ndarray) else image.stat().st_size
        waiting.append((pool.submit(encode, image, i < measured), size))
        held += size
        while waiting and (held > AHEAD_BYTES or len(waiting) > AHEAD_FILES):
            future, size = waiting.popleft()
            held -= size
            yield future, size
    yield from waiting


class _BrokenImageError(Exception):
    """A file that cannot be decoded."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class _Encoded(NamedTuple):
    """A file to store, the moments of its channels if they were measured, and whether the image was resized."""

    content: bytes
    moments: np.ndarray | None = None
    resized: bool = False


def _encode(image: Path | np.ndarray, measure: bool, max_side: int | None, quality: int) -> _Encoded:
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        Image.fromarray(image).save(buffer, 'PNG')
        return _Encoded(buffer.getvalue())
    try:
        content = image.read_bytes()
        opened = Image.open(io.BytesIO(content))
        max_side = max_side or max(opened.size)
        large = max(opened.size) > max_side
        if large:
            # A JPEG is decoded at a smaller scale that leaves at least twice the pixels to the resizing.
            twice = 2 * max_side / max(opened.size)
            opened.draft(None, (math.ceil(twice * opened.width), math.ceil(twice * opened.height)))
        elif not measure:
            opened.draft('RGB', (1, 1))  # a JPEG is read to its end, but only 1 in 64 of its pixels is computed
        with _decoding.hold(_PIXEL_BYTES * opened.width * opened.height):
            rgb = to_rgb(opened)
            if large:
                rgb.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
                rgb.save(buffer, 'JPEG', quality=quality, comment=b'')  # else Pillow copies the source's
            return _Encoded(buffer.getvalue() or content, _moments(rgb) if measure else None, large)
    except Exception as error:  # decoders raise many types, which depend on the format and the damage
        raise _BrokenImageError(image, decoding_error(error)) from None


def _moments(image: Image.Image) -> np.ndarray:
    """Return the mean of each channel and of its square, in [0, 1]; shape ``(2, 3)``."""
    counts = np.array(image.histogram(), np.float64).reshape(3, 256)
    levels = np.arange(256) / 255
    return np.stack([counts @ levels, counts @ levels**2]) / (image.width * image.height)


class _Budget:
    """A number of bytes that threads share: a thread waits until its part is free, or all if it needs more."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._freed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        size = min(size, self._size)
        with self._freed:
            self._freed.wait_for(lambda: size <= self._free)
            self._free -= size
        try:
            yield
        finally:
            with self._freed:
                self._free += size
                self._freed.notify_all()


_PIXEL_BYTES = 8  # of PIL, which keeps 4 for RGB and up to 4 for the mode that it decodes from
_decoding = _Budget(DECODED_BYTES)
