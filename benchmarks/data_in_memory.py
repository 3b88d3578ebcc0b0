"""Measure how fast images of CIFAR's size in memory become batches, compared with a loader of tensors as in airbench.

airbench, https://github.com/KellerJordan/cifar10-airbench, keeps all images normalized and padded in one tensor,
and shifts and flips the whole epoch before the first batch. This package draws for each batch, in uint8, so that a
resumed run repeats the draws of a batch.

Run: python benchmarks/data_in_memory.py
"""

import argparse
import contextlib
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from composer.utils import get_device
from data_path import at_least, quartiles

from composer_sba.data.conversion import convert
from composer_sba.data.loader import DatasetConfig, build_dataspec
from composer_sba.provenance import hardware, software

PADDING = 4


def write_batches(folder: Path, count: int) -> None:
    """Write ``count`` random training images as CIFAR-10's Python batches."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), np.uint8)
    labels = [i % 10 for i in range(count)]
    parts = np.array_split(np.arange(count), 5)
    for name, part in {
        **{f'data_batch_{i + 1}': part for i, part in enumerate(parts)},
        'test_batch': range(10),
    }.items():
        content = {b'data': pixels[part], b'labels': [labels[i] for i in part]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f'class{i}'.encode() for i in range(10)]
    (folder / 'batches.meta').write_bytes(pickle.dumps({b'label_names': names}, protocol=2))


def shifted_epochs(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, batch: int) -> Callable:
    """Return a function that iterates over an epoch: shifts and flips of all images at once, then shuffled batches."""
    size = images.shape[-1]
    padded = F.pad((images.float() / 255 - mean) / std, [PADDING] * 4, mode='reflect')

    def epoch() -> Iterator[torch.Tensor]:
        moves = torch.randint(2 * PADDING + 1, (2, len(images)), device=images.device)
        rows = torch.empty(*images.shape[:3], padded.shape[3], device=images.device)
        moved = torch.empty_like(images, dtype=torch.float32)
        for move in range(2 * PADDING + 1):
            chosen = moves[0] == move
            rows[chosen] = padded[chosen, :, move : move + size]
        for move in range(2 * PADDING + 1):
            chosen = moves[1] == move
            moved[chosen] = rows[chosen, :, :, move : move + size]
        flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        moved = torch.where(flipped, moved.flip(3), moved)
        for part in torch.randperm(len(images), device=images.device).split(batch):
            yield moved[part]

    return epoch


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default, least in (('images', 20000, 10), ('batch', 512, 1), ('rounds', 9, 2)):
        parser.add_argument(f'--{name}', type=at_least(least), default=default, metavar='N', help=f'({default})')
    args = parser.parse_args()
    device = get_device(None).tensor_to_device(torch.empty(0)).device
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        write_batches(Path(scratch, 'batches'), args.images)
        convert('cifar10', Path(scratch, 'batches'), Path(scratch, 'mds'))
        spec = build_dataspec(
            DatasetConfig('cifar10', local=f'{scratch}/mds', in_memory=True), args.batch, device=device
        )
    dataset = spec.dataloader.dataset
    normalize = dataset.transform.normalize
    tensors = shifted_epochs(dataset.images, normalize.mean, normalize.std, args.batch)
    epochs = {
        'composer-sba, in_memory': lambda: (spec.batch_transforms(batch)[0] for batch in spec.dataloader),
        'tensors, a whole epoch at once': tensors,
    }
    spent: dict[str, list[float]] = {name: [] for name in epochs}
    for turn in range(args.rounds + 1):
        for name in list(epochs)[:: 1 if turn % 2 else -1]:
            begun = time.process_time()
            images = sum(len(batch) for batch in epochs[name]())
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            assert images == args.images
            if turn:
                spent[name].append((time.process_time() - begun) / images)
    print(f'{hardware("cpu")}, images on {device.type}; {software()}.\n')
    print(
        f'{args.images} images of 32 by 32 pixels: shift by up to {PADDING}, flip, normalized float32 batches of '
        f'{args.batch}; one epoch each in turn, n = {args.rounds}, median [quartiles] of CPU times.\n'
    )
    print('| loader | images a CPU second | CPU, µs an image | ÷ composer-sba |\n|---|---:|---:|---:|')
    for name, each in spent.items():
        ratios = quartiles(one / other for one, other in zip(each, spent['composer-sba, in_memory'], strict=True))
        middle = sorted(each)[len(each) // 2]
        print(f'| {name} | {1 / middle:.0f} | {1e6 * middle:.1f} | {ratios} |')


if __name__ == '__main__':
    main()
