"""What a DataLoader yields compared with what is stored: each sample once, the same again with the same seed.

Run: python -m pytest tests/test_data.py
"""

import concurrent.futures
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streaming.base.stream
import torch
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import ComposerClassifier
from PIL import Image
from streaming import MDSWriter, StreamingDataset
from streaming.base.hashing import get_hash
from torch.utils.data import DataLoader

from composer_sba import sharing
from composer_sba.convert import convert
from composer_sba.data import DatasetConfig, build_dataloader, dataset_classes, transform
from composer_sba.errors import DatasetError

pytestmark = [
    # Streaming leaves a fetched shard open while it compares its hash.
    pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning'),
    # PyTorch's DataLoader, when it ends workers after one of them has raised; it then waits 5 s for each.
    pytest.mark.filterwarnings(
        'ignore:Exception in thread QueueFeederThread:pytest.PytestUnhandledThreadExceptionWarning'
    ),
]


def encoded(image: Image.Image, format: str = 'PNG') -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write(folder: Path, images: list[Any], labels: list[int] | None = None, encoding: str = 'bytes') -> None:
    """An MDS split as Streaming writes it: columns i, x and y, several shards."""
    columns = {'i': 'int', 'x': encoding, 'y': 'int'}
    with MDSWriter(columns=columns, out=str(folder), size_limit=8000, hashes=['xxh64']) as writer:
        for i, (image, label) in enumerate(zip(images, labels or range(len(images)), strict=True)):
            writer.write({'i': i, 'x': image, 'y': label})


def small_images(size: int) -> list[Image.Image]:
    return [Image.fromarray(np.full((8, 8, 3), i % 256, np.uint8)) for i in range(size)]


def dataset(folder: Path, size: int) -> dict[str, Any]:
    """Write ``size`` samples, each of a class of its own; returns the keys of the config that reads them."""
    for split in ('train', 'val'):
        write(folder / split, [encoded(image) for image in small_images(size)])
    keys = {'name': 'imagefolder', 'num_classes': size, 'crop_size': 8, 'resize_size': 8}
    return keys | {'local': str(folder)}


def labels(loader: DataLoader) -> list[int]:
    return torch.cat([labels for _, labels in loader]).tolist()


@pytest.fixture(scope='module')
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp('data') / 'digits')
    convert('digits', None, folder)
    return folder


# --- each sample once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('size', [1, 5, 16, 97])
def test_each_sample_once_in_training_and_evaluation(tmp_path: Path, size: int, workers: int) -> None:
    keys = dataset(tmp_path / 'mds', size)
    train = build_dataloader(DatasetConfig(**keys, num_workers=workers), 4)
    epochs = [labels(train) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size)), f'{len(epoch)} samples, {len(set(epoch))} distinct, stored: {size}'
    assert len(train) == -(-size // 4)
    if size > 4:
        assert list(range(size)) != epochs[0] != epochs[1], 'not shuffled anew'
    evaluation = build_dataloader(DatasetConfig(**keys, split='val', num_workers=workers), 4)
    assert [labels(evaluation) for _ in range(2)] == [list(range(size))] * 2


def test_two_ranks_read_each_sample_once(tmp_path: Path, run_ranks: Callable[..., str]) -> None:
    # size, batch size, workers, drop last: samples of an epoch
    cases = {
        (1, 4, 0, False): None,  # one rank would have no batch
        (5, 4, 0, False): 5,
        (5, 2, 0, False): 4,  # the fifth would be the second batch of one rank only
        (16, 4, 2, False): 16,
        (97, 32, 0, False): 97,
        (97, 4, 0, True): 96,
    }
    for size in {case[0] for case in cases}:
        dataset(tmp_path / str(size), size)
    script = Path(__file__).with_name('data_on_ranks.py')
    printed = run_ranks(script, 2, str(tmp_path), json.dumps(list(cases)))
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith('[{')]
    assert len(ranks) == 2
    for case, expected, *results in zip(cases, cases.values(), *ranks, strict=True):
        size, _, _, drop_last = case
        if expected is None:
            assert all('has 1 samples, too few for 2 ranks' in result['error'] for result in results), results
        else:
            left_out = []
            for epochs in zip(*(result['epochs'] for result in results), strict=True):
                seen = [label for batches in epochs for batch in batches for label in batch]
                assert len(seen) == len(set(seen)) == expected, f'{case}: {len(seen)} read, {len(set(seen))} distinct'
                assert {len(batches) for batches in epochs} == {results[0]['length']}, f'{case}: ranks differ'
                left_out.append(set(range(size)) - set(seen))
            if drop_last:
                assert left_out[0] != left_out[1], 'each epoch leaves out the same'
            else:
                assert [result['trained'] for result in results] == [expected] * 2, case
        if not drop_last:
            assert all(result['evaluated'] == [1] * size for result in results), f'{case}: {results[0]["evaluated"]}'


@pytest.mark.parametrize(
    ('samples', 'nodes', 'ranks', 'workers', 'batch_size'), [(97, 1, 3, 2, 4), (64, 2, 2, 1, 4), (61, 2, 4, 3, 2)]
)
def test_partition_resumes_on_other_nodes_in_the_same_order(
    samples: int, nodes: int, ranks: int, workers: int, batch_size: int
) -> None:
    def batches(dealt: np.ndarray) -> list[set[int]]:
        by_step = dealt.transpose(3, 2, 0, 1, 4).reshape(dealt.shape[3] * dealt.shape[2], -1)
        return [{int(i) for i in step if i >= 0} for step in by_step if (step >= 0).any()]

    steps = batches(sharing.partition(samples, nodes, nodes, ranks, workers, batch_size))
    whole = set().union(*steps)
    assert sum(map(len, steps)) == len(whole) > samples - nodes * ranks
    rest = sharing.partition(samples, nodes, 1, nodes * ranks, workers, batch_size, 2 * nodes * ranks * batch_size)
    assert batches(rest) == steps[2:]


# --- the same again ---------------------------------------------------------------------------------------------------


def test_seed_decides_order_and_augmentation_whatever_the_workers(digits_folder: str) -> None:
    def epochs(seed: int, workers: int = 0) -> list[torch.Tensor]:
        config = DatasetConfig('digits', local=digits_folder, num_workers=workers)
        loader = build_dataloader(config, 100, seed=seed)
        return [torch.cat([images for images, _ in loader]) for _ in range(2)]

    first = epochs(1)
    assert all(map(torch.equal, first, epochs(1)))
    assert all(map(torch.equal, first, epochs(1, workers=2)))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], epochs(2)[0]), 'seeds 1 and 2 have the same epochs, one apart'


def test_augmentation_leaves_the_global_generator_alone(digits_folder: str) -> None:
    loader = build_dataloader(DatasetConfig('digits', local=digits_folder), 100)
    iterator = iter(loader)  # the DataLoader draws a seed here
    state = torch.get_rng_state()
    next(iterator)
    assert torch.equal(state, torch.get_rng_state())


class Seen(Callback):
    def __init__(self) -> None:
        self.batches: list[tuple[float, list[int]]] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        images, labels = state.batch
        self.batches.append((images.double().sum().item(), labels.tolist()))


@pytest.mark.filterwarnings('ignore:Cannot split tensor of length:UserWarning')  # of the last batch of an epoch
@pytest.mark.parametrize('checkpoint', ['ep0-ba2-rank0.pt', 'ep1-ba3-rank0.pt', 'ep1-ba5-rank0.pt'])
def test_resumed_run_sees_what_the_unbroken_run_sees(tmp_path: Path, digits_folder: str, checkpoint: str) -> None:
    def run(**options: Any) -> list[tuple[float, list[int]]]:
        seen = Seen()
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        loader = build_dataloader(DatasetConfig('digits', local=digits_folder), 512)
        model = ComposerClassifier(network, num_classes=10)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        options |= {'max_duration': '3ep', 'device': 'cpu', 'progress_bar': False, 'callbacks': [seen]}
        trainer = Trainer(model=model, train_dataloader=loader, optimizers=optimizer, **options)
        trainer.fit()
        trainer.close()
        return seen.batches

    interval = '1ep' if 'ep1-ba3' in checkpoint else '1ba'  # between two epochs Composer's file has the next one's name
    unbroken = run(save_folder=str(tmp_path), save_interval=interval)
    resumed = run(load_path=str(tmp_path / checkpoint))
    assert resumed == unbroken[int(checkpoint[6]) :]


def test_a_run_that_was_killed_does_not_stop_the_next(tmp_path: Path) -> None:
    """Blocks in shared memory: the killed run's are removed, those of a run that lives stay."""
    dataset(tmp_path / 'remote', 16)
    script = tmp_path / 'reader.py'
    script.write_text(
        'import sys, time\n'
        'from composer_sba.data import DatasetConfig, build_dataloader\n'
        'keys = dict(name="imagefolder", num_classes=16, crop_size=8, resize_size=8)\n'
        'loader = build_dataloader(DatasetConfig(**keys, remote=sys.argv[1], local=sys.argv[2]), 4)\n'
        'print("blocks", loader.dataset._shm_prefix_int, flush=True)\n'
        'time.sleep(100)\n'
    )
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONWARNINGS': 'ignore'}
    readers: list[subprocess.Popen[str]] = []
    prefixes = []
    try:
        for local in ('killed', 'alive'):  # the second maps the blocks of the first while it looks for free names
            command = [sys.executable, str(script), str(tmp_path / 'remote'), str(tmp_path / local)]
            readers.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
            )
            assert readers[-1].stdout is not None
            prefixes.append(int(readers[-1].stdout.readline().split()[1]))
        os.killpg(readers[0].pid, signal.SIGKILL)  # with the process that would tidy up after it
        readers[0].wait()
        killed, alive = (Path(f'/dev/shm/{prefix:06}_locals') for prefix in prefixes)
        assert killed.exists() and alive.exists(), prefixes
        keys = {'local': str(tmp_path / 'killed'), 'remote': str(tmp_path / 'remote')}
        config = DatasetConfig('imagefolder', num_classes=16, crop_size=8, resize_size=8, **keys)
        loader = build_dataloader(config, 4)
        assert sorted(labels(loader)) == list(range(16))
        assert alive.exists(), 'a block of a living run was removed'
    finally:
        for reader in readers:
            reader.kill()
            reader.communicate()


def test_a_batch_that_a_killed_worker_was_handing_over_is_removed() -> None:
    """By name, age and whether its maker lives; torch names its files torch_<pid>_<random>_<count>."""
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    shared = Path('/dev/shm')
    old, new, living = (
        shared / f'torch_{name}' for name in (f'{dead.pid}_1_2', f'{dead.pid}_1_3', f'{os.getpid()}_1_2')
    )
    try:
        for path in (old, new, living):
            path.touch()
        for path in (old, living):
            os.utime(path, (0, 0))
        with sharing.registration():
            assert [path.exists() for path in (old, new, living)] == [False, True, True]
    finally:
        for path in (old, new, living):
            path.unlink(missing_ok=True)


def test_a_shard_is_asked_for_once_and_not_with_each_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time Streaming locks a file. With a limit it wants to know what was asked for last."""
    asked: list[int] = []
    prepare_shard = StreamingDataset.prepare_shard

    def recorded(self: StreamingDataset, shard_id: int, blocking: bool = True) -> None:
        asked.append(shard_id)
        prepare_shard(self, shard_id, blocking)

    monkeypatch.setattr(StreamingDataset, 'prepare_shard', recorded)
    keys = dataset(tmp_path / 'mds', 97)
    limited = {'remote': keys['local'], 'local': str(tmp_path / 'c'), 'cache_limit': '1gb'}
    for cache, once in ({}, True), (limited, False):
        asked.clear()
        loader = build_dataloader(DatasetConfig(**keys | cache, num_workers=0), 4)
        assert [len(labels(loader)) for _ in range(2)] == [97, 97]
        shards = set(range(loader.dataset.num_shards))
        assert set(asked) == shards and len(shards) > 1
        # Streaming's thread, which asks, may be behind when an epoch ends
        assert len(asked) == len(shards) if once else len(asked) > 2 * len(shards), (cache, len(asked), len(shards))


# --- images and transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK', 'P', 'RGBA', 'LA', '1', 'transparent palette'])
def test_any_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    colour = Image.new('RGB', (8, 8), (255, 0, 0))
    if mode == 'transparent palette':
        buffer = io.BytesIO()
        colour.convert('P').save(buffer, 'PNG', transparency=bytes([0, 128]))
        image = buffer.getvalue()
    else:
        image = encoded(colour.convert(mode), 'JPEG' if mode == 'CMYK' else 'PNG')
    write(tmp_path / 'mds' / 'val', [image])
    keys = {'name': 'imagefolder', 'num_classes': 1, 'crop_size': 8, 'resize_size': 8, 'split': 'val'}
    config = DatasetConfig(local=str(tmp_path / 'mds'), mean=[0, 0, 0], std=[1, 1, 1], **keys)
    images, _ = next(iter(build_dataloader(config, 1)))
    assert images.shape == (1, 3, 8, 8) and images.dtype == torch.float32
    red, green, blue = images[0].mean(dim=(1, 2)).tolist()
    grey = mode in ('L', 'LA', '1')
    assert (red == green == blue) if grey else (red > 0.95 and green < 0.05 and blue < 0.05), (red, green, blue)


def test_datasets_of_streamings_converters_are_read(tmp_path: Path) -> None:
    images = [picture.resize((32, 32)) for picture in small_images(10)]
    write(tmp_path / 'val', images, encoding='pil')
    config = DatasetConfig('cifar10', local=str(tmp_path), split='val', mean=[0, 0, 0], std=[1, 1, 1])
    found, found_labels = next(iter(build_dataloader(config, 10)))
    assert found_labels.tolist() == list(range(10))
    expected = torch.arange(10).reshape(10, 1, 1, 1).expand(10, 3, 32, 32) / 255
    torch.testing.assert_close(found, expected)


def test_digits_have_the_statistics_we_normalize_with(tmp_path: Path) -> None:
    config = DatasetConfig('digits', local=str(tmp_path / 'digits'), augment=False)  # made on first use
    images = torch.cat([images for images, _ in build_dataloader(config, 100)]).double()
    assert len(images) == 1437
    assert abs(images.mean().item()) < 1e-3 and abs(images.std().item() - 1) < 1e-3, (images.mean(), images.std())


@pytest.mark.parametrize(
    ('name', 'size', 'flips', 'shifts'), [('cifar10', 32, True, 4), ('cifar100', 32, True, 4), ('digits', 8, False, 1)]
)
def test_small_images_are_shifted_and_flipped(name: str, size: int, flips: bool, shifts: int) -> None:
    image = Image.new('L', (size, size))
    image.putpixel((size // 2, size // 2), 255)
    image.putpixel((size // 2 + 1, size // 2), 128)  # to the right, unless flipped
    pipeline = transform(DatasetConfig(name, mean=[0, 0, 0], std=[1, 1, 1]))
    moves, orders = set(), set()
    for _ in range(500):
        tensor = pipeline(image)
        assert tensor.shape == (3, size, size)
        row, column = divmod(int(tensor[0].argmax()), size)
        moves.add(row - size // 2)
        orders.add(bool(column + 1 < size and tensor[0, row, column + 1] > 0))
    assert moves == set(range(-shifts, shifts + 1)), moves
    assert orders == ({True, False} if flips else {True}), orders
    still = transform(DatasetConfig(name, split='val', mean=[0, 0, 0], std=[1, 1, 1]))(image)
    assert int(still[0].argmax()) == size // 2 * size + size // 2


def test_large_images_are_cropped_to_size() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    random_crop = transform(DatasetConfig('imagenet'))
    assert random_crop(image).shape == (3, 224, 224)
    assert not torch.equal(random_crop(image), random_crop(image))
    centre = transform(DatasetConfig('imagenet', split='val', crop_size=160, resize_size=176))
    assert centre(image).shape == (3, 160, 160)
    assert torch.equal(centre(image), centre(image))


def test_converted_image_folder_brings_classes_and_statistics(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        for name, grey in (('dark', 10), ('light', 240)):
            (tmp_path / 'source' / split / name).mkdir(parents=True)
            Image.new('RGB', (40, 30), (grey, grey, grey)).save(tmp_path / 'source' / split / name / '0.png')
    convert('imagefolder', tmp_path / 'source', tmp_path / 'mds')
    keys = {'remote': str(tmp_path / 'mds'), 'split': 'val', 'crop_size': 16, 'resize_size': 16}
    config = DatasetConfig('imagefolder', local=str(tmp_path / 'cache'), **keys)
    assert dataset_classes(config) == 2
    images, _ = next(iter(build_dataloader(config, 2)))
    torch.testing.assert_close(images.mean(dim=(1, 2, 3)), torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0)
    shutil.rmtree(tmp_path / 'cache')
    assert dataset_classes(DatasetConfig('imagenet', local=str(tmp_path / 'cache'), **keys)) == 2


# --- mistakes ---------------------------------------------------------------------------------------------------------


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


def rewrite(path: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(content)


def no_samples(folder: Path) -> None:
    (folder / 'val' / 'index.json').write_text('{"version": 2, "shards": []}')


INDEX, SHARD = 'val/index.json', 'val/shard.00000.mds'
MAKE = r'python -m composer_sba.convert imagefolder --source \.\.\. --out \S+mds'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (remove(''), rf'mds does not exist: make it with {MAKE}$'),
        (remove('val'), rf"mds has no split 'val' \(found: \['train'\]\): correct split, or make it with {MAKE}$"),
        (remove(INDEX), rf'mds/val has no index.json, it is incomplete: make it again with {MAKE} --overwrite$'),
        (rewrite(INDEX, b''), rf'{INDEX} is not the index of an MDS dataset \(.+\): make it again with {MAKE}'),
        (rewrite(INDEX, b'[]'), rf'{INDEX} is not the index of an MDS dataset \(.+\): make it again with {MAKE}'),
        (remove(SHARD), rf'{SHARD} is missing, index.json lists it: make it again with {MAKE}'),
        (rewrite(SHARD, b'cut'), rf'{SHARD} has 3 bytes, index.json says [\d,]+: make it again with {MAKE}'),
        (no_samples, rf'mds/val holds no samples: make it again with {MAKE}'),
    ],
)
def test_incomplete_datasets_are_refused_before_training(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    keys = dataset(tmp_path / 'mds', 5)
    damage(tmp_path / 'mds')
    for refused in (dataset_classes, lambda config: build_dataloader(config, 4)):
        with pytest.raises(DatasetError, match=message) as caught:
            refused(DatasetConfig(**keys, split='val'))
        assert '\n' not in str(caught.value)


TRUNCATED = encoded(Image.new('RGB', (64, 64)), 'JPEG')[:400]
BLACK = encoded(Image.new('RGB', (8, 8)))


@pytest.mark.parametrize(
    ('split', 'workers', 'image', 'label', 'message'),
    [
        ('train', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('val', 0, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('train', 1, TRUNCATED, 0, r'sample 0 cannot be read \(.+\): make it again with python -m'),
        ('val', 0, b'no image', 0, r'sample 0 cannot be read \(cannot identify image file .+\): make it again with'),
        ('train', 0, BLACK, 7, r'sample 0 has the label 7, expected 0 to 4: correct num_classes or the data'),
        ('val', 0, BLACK, -1, r'sample 0 has the label -1, expected 0 to 4: correct num_classes or the data'),
    ],
)
def test_unreadable_samples_are_named(
    tmp_path: Path, split: str, workers: int, image: bytes, label: int, message: str
) -> None:
    write(tmp_path / split, [image], [label])
    config = DatasetConfig('imagefolder', local=str(tmp_path), split=split, num_classes=5, num_workers=workers)
    with pytest.raises(DatasetError) as caught:
        list(build_dataloader(config, 1))
    last = str(caught.value).strip().splitlines()[-1]  # a worker's traceback comes before
    assert re.search(f'{tmp_path}/{split}: {message}', last), str(caught.value)


@pytest.mark.parametrize(('split', 'workers'), [('train', 0), ('train', 2), ('val', 0)])
def test_shard_that_cannot_be_fetched_is_neither_a_short_epoch_nor_a_wait_for_ever(
    tmp_path: Path, split: str, workers: int
) -> None:
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    loader = build_dataloader(DatasetConfig(**keys, split=split, num_workers=workers), 4)
    (tmp_path / 'remote' / split / 'shard.00001.mds').write_bytes(b'not what was hashed')
    with pytest.raises(DatasetError) as caught:
        list(loader)
    last = str(caught.value).strip().splitlines()[-1]
    assert 'Checksum failure' in last and f'delete {tmp_path}/cache/{split} to fetch it again' in last, last
    assert not (tmp_path / 'cache' / split / 'shard.00001.mds').exists(), 'the next run would take the bad shard'


def test_a_worker_both_of_whose_threads_fail_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streaming waits for threads that return; here the one that looks ahead fails, and then the one that reads on."""

    def fails_too(self: StreamingDataset, it: Any) -> None:
        assert self._event.wait(60)
        raise OSError('this thread fails as well')

    monkeypatch.setattr(StreamingDataset, '_ready_thread', fails_too)
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    loader = build_dataloader(DatasetConfig(**keys, num_workers=0), 4)
    (tmp_path / 'remote' / 'train' / 'shard.00001.mds').write_bytes(b'not what was hashed')
    said: list[str] = []

    def read() -> None:
        try:
            list(loader)
        except DatasetError as error:
            said.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), 'the epoch of a dataset that lacks a shard does not end'
    assert len(said) == 1 and 'a shard cannot be fetched' in said[0], said


def test_no_sample_is_taken_from_a_shard_before_its_hash_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker wants to read a shard that another has fetched and not checked; it looks whole, but one bit differs."""
    keys = dataset(tmp_path / 'remote', 97) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    stored = tmp_path / 'remote' / 'train' / 'shard.00001.mds'
    broken = bytearray(stored.read_bytes())
    broken[-1] ^= 1
    stored.write_bytes(broken)
    data = build_dataloader(DatasetConfig(**keys, num_workers=0), 4).dataset
    comparing, look = threading.Event(), threading.Event()

    def slowly(algorithm: str, content: bytes) -> str:
        comparing.set()
        assert look.wait(60)
        return get_hash(algorithm, content)

    monkeypatch.setattr(streaming.base.stream, 'get_hash', slowly)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        fetched = threads.submit(data.prepare_shard, 1)  # as another worker would
        assert comparing.wait(60)
        read = threads.submit(data.get_item, 96)
        time.sleep(0.5)  # it could have read a hundred samples
        look.set()
        for error in fetched.exception(60), read.exception(60):
            assert 'Checksum failure' in str(error), error


def test_remote_that_is_not_there(tmp_path: Path) -> None:
    config = DatasetConfig('cifar10', local=str(tmp_path / 'cache'), remote=str(tmp_path / 'nowhere'))
    with pytest.raises(DatasetError, match=r'nowhere/train/index.json cannot be fetched \(.+\): check remote'):
        dataset_classes(config)


def test_wrong_keys_are_refused(tmp_path: Path, digits_folder: str) -> None:
    unlabelled = dataset(tmp_path / 'mds', 5) | {'num_classes': None}
    write(tmp_path / 'bare' / 'train', [encoded(Image.new('RGB', (8, 8)))])
    for keys, message in (
        ({'name': 'mnist'}, r'name: mnist is no known data set: choose one of digits, cifar10, cifar100, imagenet'),
        ({'name': 'cifar10', 'crop_size': 28}, r'crop_size and resize_size do not apply to cifar10, .* 32x32'),
        ({'name': 'cifar10', 'cache_limit': '1gb'}, r'cache_limit without a remote would delete the only copy'),
        ({'name': 'cifar10', 'mean': [0.5]}, r'mean: expected three numbers, got \[0.5\]'),
        ({'name': 'cifar10', 'std': [1, 1, 0]}, r'std: expected three positive numbers, got \[1, 1, 0\]'),
        ({'name': 'cifar10', 'local': digits_folder}, r'digits/train holds digits, not cifar10: correct name or local'),
        ({'name': 'digits', 'local': digits_folder, 'num_classes': 9}, r'num_classes: 9 contradicts .*which has 10'),
        (unlabelled, r'mds/train does not tell its number of classes: set num_classes'),
        ({'name': 'cifar10', 'local': str(tmp_path / 'bare')}, r'sample 0 has 8x8 pixels, expected 32x32'),
        (
            {'name': 'imagefolder', 'split': 'val', 'crop_size': 300},
            r'resize_size: 256 is smaller than crop_size: 300: choose a larger one',
        ),
    ):
        with pytest.raises(DatasetError, match=message):
            config = DatasetConfig(**keys)
            transform(config)
            list(build_dataloader(config, 1))


def test_batches_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    keys = dataset(tmp_path / 'mds', 5)
    with pytest.raises(DatasetError, match='mds/train has 5 samples, too few for 1 ranks with full batches of 6'):
        build_dataloader(DatasetConfig(**keys), 6, drop_last=True)


def test_digits_without_scikit_learn_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(DatasetError, match=r"not installed: pip install 'composer-sba\[demo\]'"):
        dataset_classes(DatasetConfig('digits', local=str(tmp_path / 'digits')))


def _make_digits(folder: str) -> None:
    assert dataset_classes(DatasetConfig('digits', local=folder)) == 10


def test_processes_that_make_digits_at_the_same_time(tmp_path: Path) -> None:
    context = multiprocessing.get_context('spawn')
    folder = str(tmp_path / 'digits')
    processes = [context.Process(target=_make_digits, args=(folder,), daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
