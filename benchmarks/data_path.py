"""Measures how fast images of ImageNet's size reach the network, beside torchvision's ImageFolder on the same JPEGs.

Run: python benchmarks/data_path.py [--images 1024] [--workers 1] [--rounds 7] > benchmarks/data-<date>-<device>.md
"""

import argparse
import contextlib
import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from composer.utils import get_device
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from composer_sba.convert import convert
from composer_sba.data import DatasetConfig, build_dataspec, transform
from composer_sba.mds import to_rgb
from composer_sba.study.worker import hardware, shared_facts

WIDTH, HEIGHT = 500, 375


def photograph(numbers: np.random.Generator) -> Image.Image:
    """Make an image with the spectrum of photographs, whose amplitude falls as 1/f; about 100 kB as a JPEG."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(numbers.normal(size=(3, HEIGHT, WIDTH)))
    pink = np.fft.irfft2(white / frequency, s=(HEIGHT, WIDTH)).transpose(1, 2, 0)
    pink = pink @ [[1, 0.8, 0.7], [0, 0.4, 0.2], [0, 0, 0.3]]  # colours go together
    return Image.fromarray((127 + 55 * pink / pink.std()).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs for training, of ten classes, and ten for validation."""
    numbers = np.random.default_rng(0)
    for i in range(count + 10):
        path = folder / ('train' if i < count else 'val') / str(i % 10) / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(numbers).save(path, quality=92)


def images_per_second(batches: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Take all batches of an epoch; unit: images a second."""
    begun, images = time.perf_counter(), 0
    for batch in batches():
        images += len(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - begun)


def stages(paths: list[Path], pipeline: transforms.Compose) -> dict[str, float]:
    """Time what one process does for an image, stage by stage; unit: milliseconds."""
    seconds: dict[str, float] = {}
    for path in paths:
        image = Image.open(path)
        for step in [to_rgb, *pipeline.transforms]:
            begun = time.perf_counter()
            image = step(image)
            name = 'decode' if step is to_rgb else type(step).__name__
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - begun
    return {name: 1000 * total / len(paths) for name, total in seconds.items()}


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=1024)
    parser.add_argument('--workers', type=int, default=1)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--rounds', type=int, default=7)
    args = parser.parse_args()
    device = get_device(None).tensor_to_device(torch.empty(0)).device

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        source, out = Path(folder, 'jpeg'), Path(folder, 'mds')
        write_images(source, args.images)
        convert('imagefolder', source, out)
        config = DatasetConfig('imagefolder', local=str(out), num_workers=args.workers)
        pipeline = transforms.Compose(transform(config).transforms[1:])  # ImageFolder has made it RGB
        spec = build_dataspec(config, args.batch, device=device)

        def folder_loader(images: ImageFolder) -> DataLoader:
            return DataLoader(
                images,
                args.batch,
                shuffle=True,
                num_workers=args.workers,
                persistent_workers=args.workers > 0,
                pin_memory=torch.cuda.is_available(),
            )

        usual = folder_loader(ImageFolder(str(source / 'train'), pipeline))
        decoded = folder_loader(ImageFolder(str(source / 'train'), lambda image: image.size[0]))
        ways: dict[str, Callable[[], Iterable[torch.Tensor]]] = {
            'ImageFolder': lambda: (images.to(device, non_blocking=True) for images, _ in usual),
            'composer-sba': lambda: (spec.batch_transforms(batch)[0] for batch in spec.dataloader),
            'decoding alone': lambda: (widths for widths, _ in decoded),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name in list(ways) if turn % 2 else list(ways)[::-1]:
                rates[name].append(images_per_second(ways[name]))
        paths = sorted((source / 'train').glob('*/*.jpg'))[:200]
        size = sum(path.stat().st_size for path in paths) / len(paths)
        parts = stages(paths, pipeline)

    facts = shared_facts(1)
    versions = ', '.join(f'{package} {version}' for package, version in facts['versions'].items())
    print(f'# Images a second, {datetime.datetime.now(datetime.timezone.utc).date()}\n')
    print(f'{hardware("cpu")}, batches on {device.type}; {versions}; commit {facts["commit"]}.\n')
    print(
        f'{args.images} JPEGs of {WIDTH} by {HEIGHT} pixels, {size / 1000:.0f} kB on average, with the spectrum of '
        f'photographs; random resized crop to 224, flip, normalized float32 batches of {args.batch}; {args.workers} '
        f'workers; epochs in turn, after one to warm up, n = {args.rounds}: median [quartiles].\n'
    )
    print('| data path | images/s | ÷ ImageFolder |\n|---|---:|---:|')
    for name, each in rates.items():
        ratios = [own / other for own, other in zip(each[1:], rates['ImageFolder'][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f'| {name} | {statistics.median(each[1:]):.0f} | {middle:.2f} [{low:.2f}, {high:.2f}] |')
    print('\nWhat a worker does for ImageFolder, one process, milliseconds an image; composer-sba leaves ToTensor and')
    print('Normalize to the device:\n')
    print(f'| {" | ".join(parts)} |\n|{"---:|" * len(parts)}')
    print(f'| {" | ".join(f"{value:.2f}" for value in parts.values())} |')


if __name__ == '__main__':
    main()
