"""Images in memory compared with Streaming's: the same samples, repeated by the same seed, also from compressed shards.

Run: pytest tests/test_memory.py
"""

import copy
import dataclasses
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from composer import Callback, Trainer
from composer.models import ComposerClassifier
from composer.utils import add_vision_dataset_transform
from PIL import Image, ImageOps
from streaming import MDSWriter
from torch import nn

from composer_sba import BatchAugmentation
from composer_sba.algorithms.batch_augmentation import Copies
from composer_sba.data.config import KNOWN_DATASETS
from composer_sba.data.in_memory import MemoryDataset
from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.data.transforms import Normalize
from composer_sba.errors import DatasetError
from composer_sba.recipe.recipe import load
from composer_sba.train import train
from shards import encoded, write

RECIPE = str(Path(__file__).parent.parent / 'yamls' / 'digits_sba.yaml')


@pytest.fixture
def folder(few_digits):
    return str(few_digits)


@pytest.fixture
def loader(folder):
    """``loader(batch_size, seed=17, **keys)`` builds a DataLoader of the digits, in memory by default."""

    def build(batch_size=100, *, seed=17, drop_last=False, **keys):
        config = DatasetConfig('digits', **({'local': folder, 'in_memory': True, 'num_workers': 0} | keys))
        return build_dataloader(config, batch_size, seed=seed, drop_last=drop_last)

    return build


def epoch(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def multiset(images, labels):
    return Counter(zip((image.numpy().tobytes() for image in images), labels.tolist(), strict=True))


def test_every_epoch_has_the_samples_that_streaming_has(loader):
    memory, streaming = loader(augment=False), loader(augment=False, in_memory=False)
    assert len(memory) == len(streaming) == 2
    for _ in range(2):
        samples = multiset(*epoch(memory))
        assert samples == multiset(*epoch(streaming))
        assert samples.total() == 190


def test_evaluation_has_the_batches_that_streaming_has(loader):
    memory, streaming = loader(10, split='val'), loader(10, split='val', in_memory=False)
    assert len(memory) == len(streaming) == 4
    for _ in range(2):
        for ours, theirs in zip(memory, streaming, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
            assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.int64


def test_seed_and_epoch_determine_order_and_transforms(loader):
    def epochs(seed, **keys):
        epochs_of_it = loader(seed=seed, cutout=2, **keys)
        return [epoch(epochs_of_it) for _ in range(2)]

    for images, again in zip(epochs(1), epochs(1), strict=True):
        assert torch.equal(images[0], again[0])
    labels = [labels for seed in (1, 2) for _, labels in epochs(seed)]
    for i, j in product(range(4), range(4)):
        assert i == j or not torch.equal(labels[i], labels[j]), 'two epochs have the same order'
    images = [images for seed in (1, 2) for images, _ in epochs(seed, shuffle=False)]
    for i, j in product(range(4), range(4)):
        assert i == j or not torch.equal(images[i], images[j]), 'two epochs have the same crops'
    chosen = loader(seed=1, cutout=2)
    chosen.sampler.set_epoch(1)
    assert torch.equal(epoch(chosen)[0], epochs(1)[1][0])


def test_batches_of_one_epoch_have_different_draws(loader):
    train = loader(8)
    train.dataset.images[:] = train.dataset.images[0].clone()
    batches = [images.numpy().tobytes() for images, _ in train]
    assert len(set(batches)) == len(batches) == 24


def test_the_global_generator_is_left_alone(loader):
    batches = iter(loader(cutout=2))  # the DataLoader draws a seed here
    state = torch.get_rng_state()
    next(batches)
    assert torch.equal(state, torch.get_rng_state())


class Seen(Callback):
    def __init__(self):
        self.batches = []

    def batch_end(self, state, logger):
        self.batches.append(copy.deepcopy(state.batch))


def fit(loader, algorithms=(), **options):
    """Train for three epochs by default; return the weights and the batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.Dropout(), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    seen = Seen()
    options = {'max_duration': '3ep', 'device': 'cpu', 'progress_bar': False, 'callbacks': [seen]} | options
    model = ComposerClassifier(network, num_classes=10)
    trainer = Trainer(
        model=model, train_dataloader=loader, optimizers=optimizer, algorithms=list(algorithms), **options
    )
    trainer.fit()
    trainer.close()
    return nn.utils.parameters_to_vector(network.parameters()).detach(), seen.batches


@pytest.mark.filterwarnings('ignore:Cannot split tensor of length:UserWarning')  # the last batch of an epoch
@pytest.mark.parametrize('checkpoint', ['ep0-ba2-rank0.pt', 'ep1-ba5-rank0.pt'])
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_bits(tmp_path, loader, checkpoint):
    weights, batches = fit(loader(64, cutout=2), save_folder=str(tmp_path), save_interval='1ba')
    resumed, rest = fit(loader(64, cutout=2), load_path=str(tmp_path / checkpoint))
    assert len(batches) == 9
    for ours, unbroken in zip(rest, batches[int(checkpoint[6]) :], strict=True):
        assert torch.equal(ours[0], unbroken[0]) and torch.equal(ours[1], unbroken[1])
    assert torch.equal(resumed, weights), f'differ by {(resumed - weights).abs().max():.2g}'


def test_batches_that_cannot_be_filled_are_refused(loader, folder):
    with pytest.raises(
        DatasetError, match=f'^{folder}/train has 5 samples, too few for 1 ranks with full batches of 6$'
    ):
        loader(6, subset=5, drop_last=True)


def test_a_subset_does_not_depend_on_the_seed(loader):
    everything = loader(augment=False, shuffle=False)
    chosen = torch.randperm(190, generator=torch.Generator().manual_seed(0))[:60]
    expected = multiset(everything.dataset.images[chosen].float(), everything.dataset.labels[chosen])
    for seed in (1, 2):
        part = loader(seed=seed, subset=60)
        assert len(part.dataset) == len(epoch(part)[1]) == 60
        assert multiset(part.dataset.images.float(), part.dataset.labels) == expected


def test_copies_of_one_image_have_different_crops(loader, digits_folder):
    train = loader(64, subset=640, local=str(digits_folder))
    originals = {
        TF.pad(image, [1])[:, top : top + 8, left : left + 8].numpy().tobytes(): i
        for i, image in enumerate(train.dataset.images)
        for top, left in product(range(3), range(3))
    }
    normalize = train.dataset.transform.normalize
    mean, std = normalize.mean, normalize.std
    train.dataset.transform = Copies(train.dataset.transform, 4)
    different = 0
    for images, labels in train:
        assert images.shape == (64, 4, 3, 8, 8) and labels.shape == (64,)
        pixels = ((images * std + mean) * 255).round().to(torch.uint8)
        for copies, label in zip(pixels, labels, strict=True):
            (original,) = {originals[image.numpy().tobytes()] for image in copies}
            assert train.dataset.labels[original] == label
            different += len({image.numpy().tobytes() for image in copies})
    # Four draws from 9 crops give 9 (1 - (8/9)^4) = 3.39 different ones on average.
    assert different / 640 == pytest.approx(3.39, abs=0.1)


@pytest.mark.filterwarnings('ignore:Cannot split tensor of length:UserWarning')
def test_batch_augmentation_trains_on_the_copies(loader):
    _, batches = fit(loader(64), [BatchAugmentation(fold=3)])
    assert [len(images) for images, _ in batches] == [192, 192, 186] * 3
    for images, labels in batches:
        assert torch.equal(labels[::3], labels[1::3]) and torch.equal(labels[::3], labels[2::3])
        assert not torch.equal(images[::3], images[1::3])


def test_a_recipe_reads_into_memory(folder):
    keys = [f'local={folder}', 'in_memory=true']
    overrides = [f'{section}.{key}' for section in ('train_dataset', 'eval_dataset') for key in keys]
    overrides += ['max_duration=2ba', 'progress_bar=false', 'save_folder=null', 'device=cpu']
    trainer = train(load(RECIPE, [*overrides, 'train_dataset.subset=150']))
    assert isinstance(trainer.state.dataloader.dataset, MemoryDataset)
    assert trainer.state.timestamp.sample == 128 and len(trainer.state.dataloader.dataset) == 150
    evaluation = trainer.state.evaluators[0].dataloader.dataloader.dataset
    assert isinstance(evaluation, MemoryDataset) and len(evaluation) == 40
    assert 0 < trainer.state.eval_metric_values['MulticlassAccuracy'] < 1


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        ({'name': 'imagenet'}, 'in_memory does not apply to imagenet, whose images differ in size: remove the key'),
        (
            {'name': 'imagefolder'},
            'in_memory does not apply to imagefolder, whose images differ in size: remove the key',
        ),
        ({'remote': 's3://x'}, 'in_memory reads the shards of local: download the dataset there, and remove remote'),
        ({'num_workers': 2}, 'num_workers: 2 workers are not used with in_memory: remove the key'),
        ({'in_memory': False, 'subset': 5}, 'subset requires in_memory: true'),
        ({'subset': 0}, 'subset: expected a number of samples >= 1, got 0'),
        ({'subset': 191}, 'subset: 191 is more than the 190 samples of FOLDER/train: choose a smaller one'),
    ],
)
def test_wrong_keys_are_refused(folder, keys, message):
    with pytest.raises(DatasetError) as caught:
        build_dataloader(DatasetConfig(**({'name': 'digits', 'local': folder, 'in_memory': True} | keys)), 4)
    assert str(caught.value) == message.replace('FOLDER', folder)


BLACK = encoded(Image.new('RGB', (32, 32)))


@pytest.mark.parametrize(
    ('image', 'label', 'message'),
    [
        (
            b'no image',
            0,
            r'sample 1 cannot be read \(cannot identify image file\): make it again with composer-sba convert',
        ),
        (BLACK, 10, 'sample 1 has the label 10, expected 0 to 9: correct num_classes or the data$'),
        (
            encoded(Image.new('RGB', (8, 8))),
            0,
            'sample 1 has 8x8 pixels, expected 32x32: read it as name: imagefolder$',
        ),
    ],
)
def test_broken_samples_are_named(tmp_path, image, label, message):
    write(tmp_path / 'train', [BLACK, image], [0, label])
    with pytest.raises(DatasetError, match=f'^{tmp_path}/train: {message}'):
        build_dataloader(DatasetConfig('cifar10', local=str(tmp_path), in_memory=True), 2)


# Streaming leaves a shard open while it compares its hash or decompresses it.
LEFT_OPEN = pytest.mark.filterwarnings('ignore:unclosed file .*shard:ResourceWarning')
STATISTICS = KNOWN_DATASETS['cifar10'].mean, KNOWN_DATASETS['cifar10'].std
OPTIONS = {'num_workers': 0, 'verify': True, 'augment': False}
COMPRESSIONS = ['zstd', 'zstd:7', 'gz', 'bz2', 'br', 'snappy']


def compressed(folder, compression='zstd', hashes=('xxh64',)):
    """Forty images of CIFAR's size, in several compressed shards; returns their pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    columns = {'x': 'png', 'y': 'int'}
    options = {'compression': compression, 'hashes': list(hashes), 'size_limit': 60_000}
    with MDSWriter(columns=columns, out=str(folder / 'train'), **options) as writer:
        for i, image in enumerate(pixels):
            writer.write({'x': Image.fromarray(image), 'y': i % 10})
    assert len(list((folder / 'train').glob('shard.*'))) > 1
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@LEFT_OPEN
@pytest.mark.parametrize('compression', COMPRESSIONS)
def test_compressed_shards_are_read(tmp_path, compression):
    """In memory the folder stays as it is; Streaming then decompresses into it; in memory again."""
    pixels = compressed(tmp_path, compression)
    stored = sorted((tmp_path / 'train').iterdir())
    expected = multiset(Normalize(*STATISTICS)(pixels), torch.arange(40) % 10)
    first = {'in_memory': True, 'subset': 40}
    for keys in (first, {'in_memory': False}, {'in_memory': True}):
        loader = build_dataloader(DatasetConfig('cifar10', local=str(tmp_path), **keys, **OPTIONS), 8)
        assert multiset(*epoch(loader)) == expected, keys
        unchanged = sorted((tmp_path / 'train').iterdir()) == stored
        assert unchanged == (keys == first), keys


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda content: content[:-1] + b'!', r'shard.00000.mds.zstd has changed since it was written, its xxh64'),
        (lambda content: content[:-1], r'shard.00000.mds.zstd has [\d,]+ bytes, index.json says [\d,]+'),
    ],
)
@pytest.mark.parametrize('in_memory', [True, False])
def test_damaged_compressed_shards_are_named(tmp_path, in_memory, damage, message):
    compressed(tmp_path)
    shard = tmp_path / 'train' / 'shard.00000.mds.zstd'
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(DatasetError, match=message):
        build_dataloader(DatasetConfig('cifar10', local=str(tmp_path), in_memory=in_memory), 8)


@LEFT_OPEN
@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize('damage', [lambda content: bytes(len(content)), lambda content: content[:-9] + b'otherwise'])
def test_a_shard_that_cannot_be_decompressed_is_named_and_kept(tmp_path, in_memory, damage):
    """Without hashes. Streaming's way to refuse a download is to delete it; here it is the only copy."""
    compressed(tmp_path, 'gz', hashes=())
    shard = tmp_path / 'train' / 'shard.00000.mds.gz'
    shard.write_bytes(damage(shard.read_bytes()))
    before = {path: path.read_bytes() for path in (tmp_path / 'train').iterdir()}
    with pytest.raises(DatasetError, match=f'{tmp_path}/train.*: make it again with composer-sba convert') as caught:
        list(build_dataloader(DatasetConfig('cifar10', local=str(tmp_path), in_memory=in_memory, num_workers=0), 8))
    assert '\n' not in str(caught.value)
    if in_memory:
        assert 'shard.00000.mds.gz cannot be decompressed (' in str(caught.value)
    for path, content in before.items():
        assert path.exists() and path.read_bytes() == content, f'{path} is gone'


@LEFT_OPEN
def test_decompressed_shards_alone_are_not_deleted(tmp_path):
    """The cache of a compressed remote has no compressed files, and Streaming would empty it once remote is removed."""
    pixels = compressed(tmp_path / 'remote')
    keys = {'local': str(tmp_path / 'cache'), 'num_workers': 0, 'augment': False}
    for _ in range(2):
        config = DatasetConfig('cifar10', remote=str(tmp_path / 'remote'), **keys)
        loader = build_dataloader(config, 8)
        assert len(epoch(loader)[1]) == 40
        loader.dataset._locals_shm.buf[:4] = bytes(4)  # as when the run ends, so that the next may use the folder
    cached = sorted((tmp_path / 'cache' / 'train').iterdir())
    with pytest.raises(DatasetError, match=r'shard.00000.mds.zstd is missing, only decompressed shards are left: set '):
        build_dataloader(DatasetConfig('cifar10', **keys), 8)
    assert sorted((tmp_path / 'cache' / 'train').iterdir()) == cached
    memory = build_dataloader(DatasetConfig('cifar10', in_memory=True, **keys), 8)
    assert multiset(*epoch(memory)) == multiset(Normalize(*STATISTICS)(pixels), torch.arange(40) % 10)


def test_a_transform_of_single_images_acts_before_they_are_normalized(loader):
    """Composer's RandAugment, AugMix and ColOut insert one into the dataset of a DataLoader."""
    plain, changed = loader(split='val'), loader(split='val')
    add_vision_dataset_transform(changed.dataset, ImageOps.invert)
    normalize = changed.dataset.transform.normalize
    inverted = normalize(255 - (epoch(plain)[0] * normalize.std + normalize.mean).mul(255).round().to(torch.uint8))
    assert torch.equal(epoch(changed)[0], inverted)
    assert 'invert' in repr(changed.dataset.transform)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")  # Pillow's, about Composer's transforms
@pytest.mark.parametrize('algorithm', ['augmix', 'randaugment'])
def test_algorithms_that_change_single_images_train_in_memory_and_repeat(algorithm, folder, tmp_path):
    """Two runs with one seed have equal weights, unlike a run without the algorithm."""
    data = {'local': folder, 'in_memory': True}
    weights = []
    for number, algorithms in enumerate([{algorithm: {}}, {algorithm: {}}, {}]):
        recipe = load(RECIPE)
        recipe = dataclasses.replace(
            recipe,
            algorithms=algorithms,
            train_dataset=recipe.train_dataset | data,
            eval_dataset=recipe.eval_dataset | data,
            max_duration='4ba',
            save_folder=str(tmp_path / str(number)),
            progress_bar=False,
        )
        state = train(recipe).state
        weights.append(torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
