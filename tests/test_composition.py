"""SBA with each of Composer's algorithms for images, and each class of ours: it trains and resumes.

The last checkpoint is the same bit by bit whether the run was resumed or not, in either order of the list. With a
vanishing eta the weights are those of the run without SBA.

Run: pytest tests/test_composition.py
"""

import composer.algorithms
import numpy as np
import pytest
import torch
from composer import Trainer
from composer.core import Algorithm
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.optim import CosineAnnealingScheduler, LinearScheduler
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import VisionDataset
from torchvision.models.resnet import Bottleneck
from torchvision.transforms import Compose, ConvertImageDtype, PILToTensor

from composer_sba import SBA, BatchAugmentation, MajorityVote, SeedEachBatch, sort_sba_last, sort_seed_first
from composer_sba.algorithms.last_epochs_median import LastEpochsMedian
from composer_sba.algorithms.manifold_mixup import ManifoldMixup
from composer_sba.algorithms.r_drop import RDrop
from composer_sba.errors import CutLayerError

# Composer's, about its own algorithms and about a checkpoint's algorithms in another order
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in (
        'SAM has known issues of weight mismatch',
        'SWA has known issues when resuming',
        'Some targets have less',
        'GyroDropout is not implemented',
        'Checkpoints with layer freezing cannot reliably be used',
        'Low Precision (Group|Layer)Norm only applies to AMP',  # which Composer has only on GPUs
        "'mode' parameter is deprecated",  # Pillow's, about RandAugment and AugMix
        'Cannot split tensor of length',
        'No batches were trained',  # about an epoch whose last batch is in the checkpoint
        'The ``compute`` method of metric',
    )
]

OF_IMAGES = {
    'AugMix': {'severity': 2, 'depth': 1},
    'BlurPool': {'min_channels': 3},
    'ChannelsLast': {},
    'ColOut': {'p_row': 0.2, 'p_col': 0.2},
    'CutMix': {},
    'CutOut': {'length': 0.3},
    'EMA': {'half_life': '2ba'},
    'Factorize': {'min_features': 8, 'latent_features': 4, 'min_channels': 8, 'latent_channels': 4},
    'GhostBatchNorm': {'ghost_batch_size': 4},
    'GradientClipping': {'clipping_type': 'norm', 'clipping_threshold': 0.1},
    'LabelSmoothing': {},
    'LayerFreezing': {'freeze_start': 0.2, 'freeze_level': 0.5},
    'LowPrecisionGroupNorm': {},
    'LowPrecisionLayerNorm': {},
    'MixUp': {},
    'ProgressiveResizing': {'delay_fraction': 0.1, 'size_increment': 2},
    'RandAugment': {'severity': 3},
    'SAM': {'rho': 0.05, 'interval': 2},
    'SelectiveBackprop': {'start': 0.0, 'end': 1.0, 'keep': 0.5, 'interrupt': 2},
    'SqueezeExcite': {'min_channels': 8},
    'StochasticDepth': {'target_layer_name': 'ResNetBottleneck', 'drop_rate': 0.5},
    'SWA': {'swa_start': '0.25dur', 'swa_end': '0.9dur', 'update_interval': '1ba'},
    'WeightStandardization': {},
}
REFUSED = {
    'GyroDropout': ({'p': 0.5, 'sigma': 4, 'tau': 2}, 'SBA and GyroDropout exclude each other'),
    'NoOpModel': ({}, "layers='head' is the input of a model's last nn.Linear, and NoOpModelClass has none"),
}
NOT_OF_IMAGES = {  # they change transformers for text
    'Alibi': 'position embeddings of attention',
    'GatedLinearUnits': 'feed-forward layers of BERT',
    'SeqLengthWarmup': 'the length of token sequences',
}
NO_ALGORITHMS = {  # transforms and layers of the algorithms
    *('AugmentAndMixTransform', 'ColOutTransform', 'RandAugmentTransform', 'SqueezeExcite2d', 'SqueezeExciteConv2d'),
}
NOT_RESUMED = {  # by Composer, with or without SBA, about which it warns
    'LayerFreezing': 'parameters that froze have left the optimizer',
    'SAM': 'its optimizer cannot be loaded',
}

OURS = {
    'SBA': lambda: SBA(),
    'SBA, coins of epochs': lambda: SBA(granularity='epoch', augment_prob=LinearScheduler(0.2, 0.9)),
    'SBA, several layers': lambda: SBA(['input', 'stem', 'block', 'head'], augment_prob=1.0, norm_stats='all'),
    'SBA, hard labels': lambda: SBA('block', augment_prob=1.0, target='hard'),
    'BatchAugmentation': lambda: BatchAugmentation(fold=2),
    'MajorityVote': lambda: MajorityVote(fold=3),
    'ManifoldMixup': lambda: ManifoldMixup(['input', 'stem']),
    'RDrop': lambda: RDrop(),
    'SeedEachBatch': lambda: SeedEachBatch(),
    'LastEpochsMedian': lambda: LastEpochsMedian(),
}


class Net(nn.Module):
    """Layers that the algorithms change: strides, groups, a bottleneck, dropout, every normalization, two Linears."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.block = Bottleneck(16, 4)
        self.norm = nn.GroupNorm(4, 16)
        self.neck = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 16), nn.LayerNorm(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.neck(torch.relu(self.norm(self.block(self.stem(x)))).mean((2, 3))))


class Images(VisionDataset):
    """Random pixels, 24 images of 16x16, with a transform that algorithms can change."""

    def __init__(self, dtype):
        super().__init__('', transform=Compose([PILToTensor(), ConvertImageDtype(dtype)]))
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
        self.images = [Image.fromarray(each) for each in pixels]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), index % 5


def fit(*parts, dtype=torch.float32, passes=(sort_sba_last, sort_seed_first), **options):
    """Train four batches, the last of them in the second epoch."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # for layers that algorithms add
    model = ComposerClassifier(Net(), num_classes=5)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(Images(dtype), 8),
        eval_dataloader=DataLoader(Images(dtype), 8),
        eval_interval='1ba',
        eval_subset_num_batches=1,
        max_duration='4ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        schedulers=CosineAnnealingScheduler(),
        algorithms=[each for each in parts if isinstance(each, Algorithm)] + [SeedEachBatch()],
        callbacks=[each for each in parts if not isinstance(each, Algorithm)],
        algorithm_passes=list(passes),
        device='cpu',
        seed=17,
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()
    return trainer


@pytest.fixture(autouse=True)
def _default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def make(name):
    return getattr(composer.algorithms, name)(**(OF_IMAGES | {each: REFUSED[each][0] for each in REFUSED})[name])


def saved(path):
    """What a checkpoint holds, without wall-clock times and paths, which differ between runs."""
    state = torch.load(path, weights_only=False)['state']
    state['algorithms'] = {name: each | {'repr': ''} for name, each in state['algorithms']}  # Composer's has an address
    state.get('callbacks', {}).pop('CheckpointSaver', None)
    return {key: state[key] for key in ('model', 'optimizers', 'schedulers', 'algorithms', 'callbacks')}


def differing(one, other, at=''):
    """Return where two nested objects differ, to the bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differing(one[key], other[key], f'{at}.{key}')]
    if isinstance(one, list | tuple) and len(one) == len(other):
        return [
            found for i, (a, b) in enumerate(zip(one, other, strict=True)) for found in differing(a, b, f'{at}.{i}')
        ]
    equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if equal else [at]


def test_the_table_has_all_of_composers_algorithms():
    listed = set(OF_IMAGES) | set(REFUSED) | set(NOT_OF_IMAGES) | NO_ALGORITHMS
    assert listed == set(composer.algorithms.__all__)


# By day, algorithms that keep a state or change the network are resumed, and the others are compared with themselves
# alone. The nightly tests do both with all.
RESUMED_BY_DAY = {
    *('BlurPool', 'EMA', 'Factorize', 'GhostBatchNorm', 'ProgressiveResizing', 'SelectiveBackprop', 'SqueezeExcite'),
    *('StochasticDepth', 'SWA', 'WeightStandardization'),
}


def by_day(names, chosen):
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.nightly]) for name in names]


@pytest.mark.parametrize('name', by_day(OF_IMAGES, OF_IMAGES.keys() - RESUMED_BY_DAY))
def test_with_sba_another_algorithm_does_what_it_does_alone(name):
    """With a vanishing eta the weights are those of the other algorithm alone."""
    ours, parameters = (
        torch.cat([each.flatten() for each in fit(*parts, dtype=torch.float64).state.model.state_dict().values()])
        for parts in ([SBA(augment_prob=1.0, eta=1e-30), make(name)], [make(name)])
    )
    assert (ours - parameters).abs().max() < 1e-9, f'weights differ by {(ours - parameters).abs().max()}'


@pytest.mark.parametrize('name', by_day([name for name in OF_IMAGES if name not in NOT_RESUMED], RESUMED_BY_DAY))
def test_with_sba_another_algorithm_resumes_to_the_same_checkpoint(name, tmp_path):
    """Resumed in the middle of an epoch; SBA is first in the list of one run and last in the other's."""
    sba = SBA(['stem', 'head'] if name != 'GhostBatchNorm' else 'head', augment_prob=1.0, eta=1.0)
    fit(sba, make(name), save_folder=str(tmp_path), save_interval='2ba')
    again = SBA(sba.layers, augment_prob=1.0, eta=1.0)
    resumed = tmp_path / 'resumed'
    fit(make(name), again, save_folder=str(resumed), load_path=str(tmp_path / 'ep0-ba2-rank0.pt'))
    assert differing(saved(tmp_path / 'ep1-ba4-rank0.pt'), saved(resumed / 'ep1-ba4-rank0.pt')) == []


@pytest.mark.parametrize('name', list(REFUSED))
def test_algorithms_that_sba_excludes_are_refused(name):
    with pytest.raises(CutLayerError, match=REFUSED[name][1]):
        fit(SBA(), make(name))


@pytest.mark.parametrize('name', list(OURS))
def test_ours_resume_to_the_same_checkpoint(name, tmp_path):
    log = InMemoryLogger()
    fit(OURS[name](), save_folder=str(tmp_path), save_interval='1ba', loggers=[log])
    if name.startswith('SBA'):
        assert sum(value for _, value in log.data['sba/augmented']) > 0, 'no batch was augmented'
    for batch in (2, 3):  # in mid-epoch, and at its end
        (path,) = tmp_path.glob(f'ep*-ba{batch}-rank0.pt')
        fit(OURS[name](), save_folder=f'{tmp_path}/{batch}', load_path=str(path), loggers=[InMemoryLogger()])
        last = 'ep1-ba4-rank0.pt'
        assert differing(saved(tmp_path / last), saved(tmp_path / str(batch) / last)) == [], f'from batch {batch}'
