"""Measure how fast images of ImageNet's sizes reach the network, compared with other loaders of the same images.

Run: python benchmarks/data_path.py > benchmarks/data-<date>-<device>.md

NVIDIA DALI and FFCV take part if they can be imported: ``pip install nvidia-dali-cuda120`` needs no GPU, and FFCV is
built from its source, with libturbojpeg and OpenCV.
"""

import argparse
import contextlib
import datetime
import io
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
import torch.nn.functional as F
from composer.utils import get_device
from PIL import Image
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from composer_sba.data.conversion import convert
from composer_sba.data.loader import DatasetConfig, build_dataspec
from composer_sba.data.transforms import Pipeline, RandomResizedCrop
from composer_sba.provenance import hardware, software

SIZES = [  # width and height of 40 images in turn: about 500 by 375 pixels in the mean, few larger, one beyond 2,000
    *[(500, 375)] * 14, *[(375, 500)] * 6, *[(500, 333)] * 5, *[(333, 500)] * 2, (500, 400), (400, 300), (320, 240),
    (240, 180), (300, 225), (200, 300), (150, 112), (256, 256), (640, 480), (800, 600), (1024, 768), (1280, 960),
    (2048, 1536),
]  # fmt: skip
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CROP, MAX_SIDE = 224, 512
BEFORE, OURS, SMALLER, FOLDER, RAW = (
    'composer-sba, whole images decoded',
    'composer-sba',
    f'composer-sba, --max-side {MAX_SIDE}',
    'ImageFolder',
    'FFCV, 500 px, half raw',
)


def photograph(numbers: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return an image with the 1/f amplitude spectrum of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(numbers.normal(size=(3, height, width)))
    pink = np.fft.irfft2(white / frequency, s=(height, width)).transpose(1, 2, 0)
    pink = pink @ [[1, 0.8, 0.7], [0, 0.4, 0.2], [0, 0, 0.3]]  # correlates the colours
    return Image.fromarray((127 + 55 * pink / pink.std()).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, count: int) -> None:
    """Write ``count`` JPEGs of ten classes for training and ten for validation."""
    numbers = np.random.default_rng(0)
    for i in range(count + 10):
        path = folder / ('train' if i < count else 'val') / str(i % 10) / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(numbers, *SIZES[i * 7 % len(SIZES)]).save(path, quality=88)


# --- the data paths ---------------------------------------------------------------------------------------------------


class WholeImages(RandomResizedCrop):
    """The crop as it was before only a part of a JPEG was decoded."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Crop and resize a decoded image."""
        top, left, height, width = self._crop.get_params(image, self._crop.scale, self._crop.ratio)
        crop = image[None, :, top : top + height, left : left + width]
        return F.interpolate(crop, self._crop.size, mode='bilinear', antialias=True)[0]


class WholeImagePipeline(Pipeline):
    """A pipeline that gets decoded images."""

    takes_jpegs = False


def ours(shards: Path, batch: int, workers: int, device: torch.device, whole: bool = False) -> Iterable:
    """Return the batches of this package, with the statistics that the others use."""
    config = DatasetConfig('imagefolder', local=str(shards), num_workers=workers, mean=MEAN, std=STD)
    spec = build_dataspec(config, batch, device=device)
    if whole:
        dataset: Any = spec.dataloader.dataset
        dataset.transform = WholeImagePipeline([WholeImages(CROP), *dataset.transform.transforms[1:]])
    return Mapped(spec.dataloader, lambda batch: spec.batch_transforms(batch)[0])


def folder(images: Path, batch: int, workers: int, load: Callable[[str], Any], first: list[Callable]) -> Iterable:
    """Return the batches of torchvision's ImageFolder with its second transforms."""
    steps = [v2.RandomResizedCrop(CROP, antialias=True), v2.RandomHorizontalFlip()]
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    dataset = ImageFolder(str(images), v2.Compose([*first, *steps, v2.ToImage(), *last]), loader=load)
    return Mapped(torch_loader(dataset, batch, workers, shuffle=True), lambda batch: batch[0])


def torch_loader(dataset: Any, batch: int, workers: int, **options: Any) -> DataLoader:
    """Return a DataLoader with the usual settings."""
    return DataLoader(
        dataset,
        batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def with_draft(path: str) -> Image.Image:
    """Decode a file with PIL at the smallest scale that leaves twice the pixels of the crop to both sides."""
    image = Image.open(path)
    image.draft('RGB', (2 * CROP, 2 * CROP))
    return image.convert('RGB')


def to_tensor(path: str) -> torch.Tensor:
    """Decode a file with torchvision."""
    return decode_jpeg(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8))


class PlainStreaming(StreamingDataset):
    """A dataset as in Streaming's documentation: PIL decodes, torchvision's transforms crop."""

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    def __getitem__(self, at: int) -> Any:
        """Return a transformed image."""
        return self.transform(Image.open(io.BytesIO(super().__getitem__(at)['x'])).convert('RGB'))


def dali(images: Path, batch: int, workers: int) -> Iterable:
    """Return the batches of DALI on the CPU, which decodes the crop alone."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    @pipeline_def(batch_size=batch, num_threads=max(workers, 1), device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        files, _ = fn.readers.file(file_root=str(images), random_shuffle=True, name='files')
        crop = fn.decoders.image_random_crop(files, device='cpu', output_type=types.RGB)
        return fn.crop_mirror_normalize(
            fn.resize(crop, size=[CROP, CROP], antialias=True),
            dtype=types.FLOAT,
            output_layout='CHW',
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            mirror=fn.random.coin_flip(),
        )

    policy = LastBatchPolicy.PARTIAL
    batches = DALIGenericIterator([pipeline()], ['x'], reader_name='files', last_batch_policy=policy, auto_reset=True)
    return Mapped(batches, lambda batch: batch[0]['x'])


def ffcv(images: Path, scratch: Path, batch: int, workers: int, **stored: Any) -> Iterable:
    """Write a file of FFCV and return its batches, normalized by FFCV as well."""
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter

    file = scratch / f'{stored["write_mode"]}.beton'
    if not file.exists():
        pairs = [(image,) for image, _ in ImageFolder(str(images))]
        DatasetWriter(str(file), {'image': RGBImageField(**stored)}, num_workers=1).from_indexed_dataset(pairs)
    mean, std = (255 * np.array(values) for values in (MEAN, STD))
    steps = [RandomResizedCropRGBImageDecoder((CROP, CROP)), RandomHorizontalFlip()]
    steps += [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    order = OrderOption.RANDOM
    loader = Loader(str(file), batch, max(workers, 1), True, order, drop_last=False, pipelines={'image': steps})
    return Mapped(loader, lambda batch: batch[0])


class Mapped:
    """The batches of an iterable, each mapped to its images."""

    def __init__(self, batches: Iterable, images: Callable[[Any], torch.Tensor]) -> None:
        self.batches, self.images = batches, images

    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(self.images, iter(self.batches))


# --- the measurement --------------------------------------------------------------------------------------------------


def clocks() -> tuple[float, float]:
    """Return the wall time and the CPU time of this process and its workers. Unit: seconds."""
    workers = (process.cpu_times() for process in psutil.Process().children())
    return time.perf_counter(), time.process_time() + sum(each.user + each.system for each in workers)


def epoch(batches: Iterable[torch.Tensor], device: torch.device, ahead: bool) -> tuple[float, float]:
    """Read all batches and return the seconds per image of each clock.

    Args:
        batches (Iterable): The batches of one epoch.
        device (torch.device): Where the batches are used.
        ahead (bool): Whether the loader begins the next epoch at the end of one.

    Returns:
        tuple[float, float]: Wall time and CPU time per image. Unit: seconds.
    """
    begun = clocks()
    images = sum(len(batch.to(device, non_blocking=True)) for batch in batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall = time.perf_counter() - begun[0]
    if ahead:
        time.sleep(0.5)  # each turn includes the work of one epoch
    return wall / images, (clocks()[1] - begun[1]) / images


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default, least in (('images', 480, 1), ('batch', 64, 1), ('rounds', 5, 2)):
        parser.add_argument(f'--{name}', type=at_least(least), default=default, metavar='N', help=f'({default})')
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        '--workers',
        type=at_least(0),
        nargs='+',
        default=sorted({1, cores}),
        metavar='N',
        help='processes, or threads of DALI and FFCV; each number is measured (1 and the number of cores)',
    )
    args = parser.parse_args()
    device = get_device(None).tensor_to_device(torch.empty(0)).device
    torch.set_num_threads(1)  # the workers use one thread
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        source = Path(scratch, 'jpeg')
        write_images(source, args.images)
        stored = {name: Path(scratch, name) for name in ('mds', 'smaller')}
        convert('imagefolder', source, stored['mds'])
        convert('imagefolder', source, stored['smaller'], max_side=MAX_SIDE)
        sizes = {name: bytes_of(folder, '**/*.mds') for name, folder in stored.items()}
        found, missing = {}, set()
        for workers in args.workers:
            found[workers], absent = measure(args, workers, source / 'train', stored, Path(scratch), device)
            missing |= absent
        mean_bytes = bytes_of(source, '**/*.jpg') / (args.images + 10)

    width, height = (statistics.mean(side) for side in zip(*SIZES, strict=True))
    print(f'# Images a second, {datetime.datetime.now(datetime.timezone.utc).date()}\n')
    print(f'{hardware("cpu")}, batches on {device.type}; {software()}.\n')
    print(
        f'{args.images} JPEGs of {min(map(min, SIZES))} to {max(map(max, SIZES)):,} pixels a side, '
        f'{width:.0f} by {height:.0f} in the mean, '
        f'{mean_bytes / 1000:.0f} kB on average, with the spectrum of photographs; random resized crop to {CROP}, '
        f'flip, normalized float32 batches of {args.batch}. Shards with --max-side {MAX_SIDE} have '
        f'{sizes["smaller"] / sizes["mds"]:.2f} of the bytes. FFCV encodes all images again, at quality 90. The data '
        f'paths take turns, one epoch each, after one of warm-up; n = {args.rounds}: median [quartiles]. CPU time is '
        'that of all processes and threads, with normalization. The images a second of DALI leave out the batch that '
        f'it reads ahead between two epochs. Load of the machine: {os.getloadavg()[2]:.1f}. '
        f'Not installed: {", ".join(sorted(missing)) or "none"}.'
    )
    for workers, spent in found.items():
        print(f'\n## {workers} worker{"s" * (workers != 1)}\n')
        print(f'| data path | images/s | CPU, ms an image | {FOLDER} ÷ this | before ÷ this | best other ÷ this |')
        print('|---|---:|---:|---:|---:|---:|')
        others = {name: each for name, each in spent.items() if not name.startswith((OURS, 'decoding', RAW))}
        best = min(others, key=lambda name: statistics.median(cpu for _, cpu in others[name]))
        for name, each in spent.items():
            wall, cpu = zip(*each, strict=True)
            compared = (ratio(spent[other], each) for other in (FOLDER, BEFORE, best))
            print(
                f'| {name} | {1 / statistics.median(wall):.0f} | {1000 * statistics.median(cpu):.2f} | '
                f'{" | ".join(compared)} |'
            )
        print(f'\nBest other of those that read all pixels as they came, by CPU time: {best}. Ratios are of CPU times.')


def measure(
    args: argparse.Namespace,
    workers: int,
    images: Path,
    stored: dict[str, Path],
    scratch: Path,
    device: torch.device,
) -> tuple[dict[str, list[tuple[float, float]]], set[str]]:
    """Return the seconds per image of each data path and turn, and the libraries that are not installed."""
    of_images, ends = (images, args.batch, workers), (args.batch, workers, device)
    paths: dict[str, Callable[[], Iterable]] = {
        FOLDER: lambda: folder(*of_images, default_loader, []),
        'ImageFolder, tensors': lambda: folder(*of_images, to_tensor, []),
        'ImageFolder, PIL draft': lambda: folder(*of_images, with_draft, []),
        'Streaming as in its documentation': lambda: torch_loader(
            PlainStreaming(local=str(stored['mds'] / 'train'), shuffle=True, batch_size=args.batch),
            args.batch,
            workers,
        ),
        BEFORE: lambda: ours(stored['mds'], *ends, whole=True),
        OURS: lambda: ours(stored['mds'], *ends),
        SMALLER: lambda: ours(stored['smaller'], *ends),
        'decoding alone, torchvision': lambda: Mapped(
            torch_loader(ImageFolder(str(images), lambda image: 0, loader=to_tensor), args.batch, workers),
            lambda batch: batch[0],
        ),
        'DALI, crop decoded on the CPU': lambda: dali(*of_images),
        'FFCV, JPEG': lambda: ffcv(images, scratch, args.batch, workers, write_mode='jpg'),
        RAW: lambda: ffcv(
            images,
            scratch,
            args.batch,
            workers,
            write_mode='proportion',
            max_resolution=500,
            compress_probability=0.5,
            jpeg_quality=90,
        ),
    }
    loaders, missing = {}, set()
    for name, build in paths.items():
        try:
            loaders[name] = build()
        except ModuleNotFoundError as error:
            missing.add(str(error.name))
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for turn in range(args.rounds + 1):  # workers start in the first turn, before the threads of DALI and FFCV
        for name in list(loaders)[:: 1 if turn % 2 == 0 else -1]:
            seconds = epoch(loaders[name], device, ahead=name.startswith('DALI'))
            print(f'{workers} workers, turn {turn} of {args.rounds}: {name}', file=sys.stderr)
            if turn:
                spent[name].append(seconds)
    return spent, missing


def bytes_of(folder: Path, pattern: str) -> int:
    """Return the size of the files of a folder."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def ratio(other: list[tuple[float, float]], own: list[tuple[float, float]]) -> str:
    """Format the ratio of CPU times, paired by turn."""
    return quartiles(theirs / mine for (_, theirs), (_, mine) in zip(other, own, strict=True))


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
