"""Measure how fast images of ImageNet's size reach the network, compared with torchvision's ImageFolder.

Both read the same JPEGs. Run: python benchmarks/data_path.py > benchmarks/data-<date>-<device>.md
"""

import argparse
import contextlib
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from composer.utils import get_device
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from composer_sba.data.conversion import convert
from composer_sba.data.loader import DatasetConfig, build_dataspec, transform
from composer_sba.data.samples import decode
from composer_sba.provenance import hardware, software

WIDTH, HEIGHT = 500, 375


def photograph(numbers: np.random.Generator) -> Image.Image:
    """Return an image with the 1/f amplitude spectrum of photographs; about 100 kB as a JPEG."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(numbers.normal(size=(3, HEIGHT, WIDTH)))
    pink = np.fft.irfft2(white / frequency, s=(HEIGHT, WIDTH)).transpose(1, 2, 0)
    pink = pink @ [[1, 0.8, 0.7], [0, 0.4, 0.2], [0, 0, 0.3]]  # correlates the colours
    return Image.fromarray((127 + 55 * pink / pink.std()).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs of ten classes for training and ten for validation."""
    numbers = np.random.default_rng(0)
    for i in range(count + 10):
        path = folder / ('train' if i < count else 'val') / str(i % 10) / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(numbers).save(path, quality=92)


def as_tensors(path: str) -> Image.Image | torch.Tensor:
    """Decode a file with composer-sba's decoder."""
    return decode(Path(path).read_bytes(), tensors=True)


def clocks() -> tuple[float, float, float]:
    """Return the wall time, the CPU time of this process and the CPU time of its workers. Unit: seconds."""
    workers = (process.cpu_times() for process in psutil.Process().children())
    return time.perf_counter(), time.process_time(), sum(each.user + each.system for each in workers)


def epoch(batches: Iterable[torch.Tensor]) -> tuple[float, float, float]:
    """Read all batches and return the seconds per image of each clock; without workers, the third is the second."""
    begun = clocks()
    images = sum(len(batch) for batch in batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, trainer, workers = (after - before for after, before in zip(clocks(), begun, strict=True))
    return wall / images, trainer / images, (workers or trainer) / images


def stages(paths: list[Path], load: Callable[[str], Any], steps: list[Callable]) -> dict[str, float]:
    """Time each stage of the work of one process for an image. Unit: milliseconds."""
    spent = dict.fromkeys(['decode', *(type(step).__name__ for step in steps)], 0.0)
    for path in paths:
        image: Any = str(path)
        for name, step in zip(spent, [load, *steps], strict=True):
            begun = time.process_time()
            image = step(image)
            spent[name] += time.process_time() - begun
    return {name: 1000 * total / len(paths) for name, total in spent.items()}


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name, default, least in (('images', 1024, 1), ('workers', 1, 0), ('batch', 64, 1), ('rounds', 7, 2)):
        parser.add_argument(f'--{name}', type=at_least(least), default=default, metavar='N', help=f'({default})')
    args = parser.parse_args()
    device = get_device(None).tensor_to_device(torch.empty(0)).device
    torch.set_num_threads(1)  # the workers use one thread

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        source, out = Path(folder, 'jpeg'), Path(folder, 'mds')
        write_images(source, args.images)
        convert('imagefolder', source, out)
        config = DatasetConfig('imagefolder', local=str(out), num_workers=args.workers)
        normalize = transform(config).transforms[-1]

        def folder_loader(loader: Callable[[str], Any], last: Callable) -> DataLoader:
            return DataLoader(
                ImageFolder(str(source / 'train'), last, loader=loader),
                args.batch,
                shuffle=True,
                num_workers=args.workers,
                persistent_workers=args.workers > 0,
                pin_memory=torch.cuda.is_available(),
            )

        usual = [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
        tensors = [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(normalize.mean, normalize.std),
        ]
        ours, images = (build_dataspec(config, args.batch, device=device) for _ in range(2))
        steps: list[Callable] = ours.dataloader.dataset.transform.transforms
        images.dataloader.dataset.transform = transforms.Compose(steps)  # a transform that receives PIL images

        loaders = {
            'ImageFolder': folder_loader(default_loader, transforms.Compose(usual)),
            "ImageFolder, torchvision's tensor transforms": folder_loader(as_tensors, v2.Compose(tensors)),
            'composer-sba, PIL images': images.dataloader,
            'composer-sba': ours.dataloader,
            'decoding alone, PIL': folder_loader(default_loader, lambda image: 0),
            'decoding alone, torchvision': folder_loader(as_tensors, lambda image: 0),
        }

        def batches(name: str) -> Iterator[torch.Tensor]:
            normalized = ours.batch_transforms if name.startswith('composer') else lambda batch: batch
            return (normalized(batch)[0].to(device, non_blocking=True) for batch in loaders[name])

        spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in loaders}
        for turn in range(args.rounds + 1):
            for name in list(loaders) if turn % 2 else list(loaders)[::-1]:
                spent[name].append(epoch(batches(name)))
        paths = sorted((source / 'train').glob('*/*.jpg'))[:200]
        size = sum(path.stat().st_size for path in paths) / len(paths)
        parts = {
            'ImageFolder': stages(paths, default_loader, usual),
            'composer-sba': stages(paths, as_tensors, steps),
        }

    print(f'# Images a second, {datetime.datetime.now(datetime.timezone.utc).date()}\n')
    print(f'{hardware("cpu")}, batches on {device.type}; {software()}.\n')
    print(
        f'{args.images} JPEGs of {WIDTH} by {HEIGHT} pixels, {size / 1000:.0f} kB on average, with the spectrum of '
        f'photographs; random resized crop to 224, flip, normalized float32 batches of {args.batch}; {args.workers} '
        f'workers. The data paths take turns, one epoch each, after one epoch of warm-up; n = {args.rounds}: median '
        '[quartiles]. The times in ms are CPU times of the workers and of the process that trains, which normalizes '
        f'for composer-sba if there is no other device. Load of the machine: {os.getloadavg()[2]:.1f}.\n'
    )
    print('| data path | images/s | ÷ ImageFolder | workers, ms an image | ÷ ImageFolder | trainer, ms an image |')
    print('|---|---:|---:|---:|---:|---:|')
    for name, each in spent.items():
        wall, trainer, workers = zip(*each[1:], strict=True)
        others = spent['ImageFolder'][1:]
        faster = quartiles(other[0] / own for own, other in zip(wall, others, strict=True))
        cheaper = quartiles(other[2] / own for own, other in zip(workers, others, strict=True))
        print(
            f'| {name} | {1 / statistics.median(wall):.0f} | {faster} | {1000 * statistics.median(workers):.2f} | '
            f'{cheaper} | {1000 * statistics.median(trainer):.2f} |'
        )
    print(
        '\nThe stages of the work of a worker for an image, in milliseconds of CPU time, without reading and batching:'
    )
    for name, each in parts.items():
        print(f'\n| {name}: {" | ".join(each)} |\n|{"---:|" * len(each)}')
        print(f'| {" | ".join(f"{value:.2f}" for value in each.values())} |')


def quartiles(ratios: Iterable[float]) -> str:
    """Format the median and the quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f'{middle:.2f} [{low:.2f}, {high:.2f}]'


def at_least(least: int) -> Callable[[str], int]:
    """Return a type of command-line arguments: integers that are not less than ``least``."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'expected an integer >= {least}, got {text!r}')
        return int(text)

    return integer


if __name__ == '__main__':
    main()
