"""BatchAugmentation's copies: of training samples alone, whatever else reads the dataset, and how they are split.

Run: pytest tests/test_batch_augmentation.py
"""

import pytest
import torch
import torch.nn.functional as F
from composer.algorithms import RandAugment
from composer.algorithms.warnings import NoEffectWarning
from composer.models import ComposerClassifier
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import ToTensor

from composer_sba import SBA, BatchAugmentation
from composer_sba.algorithms import RDrop
from composer_sba.algorithms.batch_augmentation import CopyingLoader
from small_training import trainer_of

# Composer's, of 'auto' and of a batch that did not fit
pytestmark = [
    pytest.mark.filterwarnings('ignore:CUDA out of memory or excessive memory allocation retries:RuntimeWarning'),
    pytest.mark.filterwarnings("ignore:`device_train_microbatch_size='auto'` may potentially fail"),
]
ROWS, BATCH, CLASSES = 24, 8, 3


def add_noise(row):
    return row + torch.rand(())


class Rows(Dataset):
    def __init__(self, transform=add_noise):
        self.rows, self.labels = torch.arange(6.0 * ROWS).view(ROWS, 6), torch.arange(ROWS) % CLASSES
        self.transform = transform

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return self.transform(self.rows[index]), self.labels[index]


class Stream(Rows, IterableDataset):
    def __iter__(self):
        return (self[index] for index in range(ROWS))


class Batches(Rows):
    """Fetches a whole batch, as a dataset in memory does."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Property(Rows):
    """Whose transform is kept elsewhere."""

    @property
    def transform(self):
        return self.kept[0]

    @transform.setter
    def transform(self, transform):
        self.kept = [transform]


class Net(nn.Sequential):
    """Keeps the number of rows of every forward pass, and may run out of memory in one of them."""

    def __init__(self, fail_at=None):
        super().__init__(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, CLASSES))
        self.rows, self.fail_at = [], fail_at

    def forward(self, rows):
        if self.fail_at is not None and len(self.rows) == self.fail_at:
            self.fail_at = None
            raise RuntimeError('CUDA out of memory. Tried to allocate 20.00 MiB.')
        self.rows.append(len(rows))
        return super().forward(rows)


def make_trainer(algorithms, data=None, *, network=None, duration='1ep', **options):
    model = ComposerClassifier(Net() if network is None else network, num_classes=CLASSES)
    data = Rows() if data is None else data
    trainer, _ = trainer_of(model, data, BATCH, algorithms, max_duration=duration, **options)
    return trainer, next(each.rows for each in model.modules() if isinstance(each, Net))


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', [Rows, Stream, Batches, Property])
def test_copies_are_those_of_the_training_loader_alone(kind, workers):
    data = kind()
    persistent = {'num_workers': workers, 'persistent_workers': workers > 0}
    loader = DataLoader(data, BATCH, **persistent)
    assert len(next(iter(loader))[0]) == BATCH  # workers, if any, live on
    copies = CopyingLoader(loader, 3)
    for _ in range(2):
        batches = list(copies)
        inputs = torch.cat([inputs for inputs, _ in batches])
        assert inputs.shape == (ROWS, 3, 6) and len(copies) == len(loader) == 3
        assert torch.equal(inputs.floor(), data.rows[:, None].expand(ROWS, 3, 6)), 'of every input, in its place'
        assert len((inputs - data.rows[:, None])[..., 0].unique()) == 3 * ROWS, 'with draws of their own'
        assert [tuple(inputs.shape) for inputs, _ in loader] == [(BATCH, 6)] * 3
        assert data.transform is add_noise


def test_a_user_s_worker_init_fn_runs_first():
    seen = []

    def init(worker):
        torch.utils.data.get_worker_info().dataset.rows += 1000
        seen.append(worker)

    loader = DataLoader(Rows(), BATCH, num_workers=1, worker_init_fn=init)
    inputs = torch.cat([inputs for inputs, _ in CopyingLoader(loader, 2)])
    assert inputs.min() >= 1000
    assert seen == [], 'in the worker'


@pytest.mark.parametrize('error', [ArithmeticError, KeyboardInterrupt])
def test_an_exception_while_a_sample_is_read_leaves_the_dataset(error):
    def fail(row):
        raise error

    data = Rows(fail)
    trainer, _ = make_trainer([BatchAugmentation(2)], data)
    with pytest.raises(error):
        trainer.fit()
    assert data.transform is fail


@pytest.mark.parametrize('then', ['another fold', 'sba', 'plain', 'the same trainer'])
@pytest.mark.parametrize('ended', [True, False])
def test_a_later_fit_on_the_same_dataset_has_its_own_rows(then, ended):
    def interrupt(outputs, target):
        if not ended:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, target)

    data = Rows()
    first, rows = make_trainer([BatchAugmentation(2)], data)
    first.state.model._loss_fn = interrupt
    if ended:
        first.fit()
    else:
        with pytest.raises(KeyboardInterrupt):
            first.fit()
    if then == 'the same trainer':
        first.state.model._loss_fn = F.cross_entropy
        rows.clear()
        first.fit(duration='1ep')
    else:
        algorithms = {'another fold': [BatchAugmentation(5)], 'sba': [SBA(augment_prob=0.01)], 'plain': []}[then]
        second, rows = make_trainer(algorithms, data)
        second.fit()
    expected = {'another fold': 40, 'the same trainer': 16}.get(then, BATCH)
    assert rows[-3:] == [expected] * 3


@pytest.mark.parametrize('workers', [0, 2])
def test_evaluation_on_the_training_dataset_sees_no_copies(workers):
    data = Rows()
    trainer, rows = make_trainer(
        [BatchAugmentation(2)],
        data,
        eval_dataloader=DataLoader(data, ROWS, num_workers=workers),
        eval_interval='1ba',
    )
    trainer.fit()
    trainer.eval()
    trainer.predict(DataLoader(data, ROWS))
    assert rows == [2 * BATCH, ROWS] * 3 + [ROWS, ROWS]


class Images(VisionDataset):
    def __init__(self):
        super().__init__('', transform=ToTensor())

    def __len__(self):
        return BATCH

    def __getitem__(self, index):
        return self.transform(Image.new('RGB', (1, 2), (index, 100, 200))), index % CLASSES


@pytest.mark.parametrize('order', [1, -1])
def test_algorithms_that_add_to_the_transform_go_before_or_after_it(order):
    network = nn.Sequential(nn.Flatten(), Net())
    algorithms = [BatchAugmentation(2), RandAugment(severity=1)]
    trainer, rows = make_trainer(algorithms[::order], Images(), network=network)
    trainer.fit()
    assert rows == [2 * BATCH]


def test_one_copy_warns():
    with pytest.warns(NoEffectWarning, match='^BatchAugmentation with fold=1 does not change training'):
        BatchAugmentation(1)


# What a microbatch size means: inputs. (algorithms, size that is given, batches of inputs): rows of each forward pass
MICROBATCHES = [
    ([lambda: BatchAugmentation(3)], None, [24]),
    ([lambda: BatchAugmentation(3)], 8, [24]),
    ([lambda: BatchAugmentation(3)], 4, [12, 12]),
    ([lambda: BatchAugmentation(3)], 'auto', [24]),
    ([RDrop], None, [16]),
    ([RDrop], 3, [6, 6, 4]),
    ([RDrop], 'auto', [16]),
    ([RDrop, lambda: BatchAugmentation(3)], 4, [24, 24]),
    ([lambda: BatchAugmentation(3), RDrop], 'auto', [48]),
]


@pytest.fixture
def auto_on_a_cpu(monkeypatch):
    monkeypatch.setattr('composer.trainer.trainer._is_auto_microbatching', lambda size, device: size == 'auto')


@pytest.mark.parametrize(('algorithms', 'size', 'passes'), MICROBATCHES)
@pytest.mark.usefixtures('auto_on_a_cpu')
def test_a_microbatch_size_counts_inputs(algorithms, size, passes):
    options = {} if size is None else {'device_train_microbatch_size': size}
    trainer, rows = make_trainer([make() for make in algorithms], **options)
    given = trainer.state.device_train_microbatch_size
    for _ in range(2):
        trainer.fit(duration='1ep')
        assert rows[-3 * len(passes) :] == passes * 3
        assert trainer.state.device_train_microbatch_size == given, 'after the fit it is what it was'
    trainer.fit(duration='1ep', device_train_microbatch_size=2)
    per_input = sum(passes) // BATCH
    assert rows[-12:] == [2 * per_input] * 12


@pytest.mark.parametrize(
    ('algorithm', 'passes', 'inputs'),
    [(lambda: BatchAugmentation(3), [12, 12] * 3, 4), (RDrop, [8, 8] * 3, 4)],
)
@pytest.mark.usefixtures('auto_on_a_cpu')
def test_auto_halves_the_rows_that_do_not_fit(algorithm, passes, inputs):
    trainer, rows = make_trainer([algorithm()], network=Net(fail_at=0), device_train_microbatch_size='auto')
    trainer.fit()
    assert rows == passes
    assert trainer.state.device_train_microbatch_size == inputs


@pytest.mark.parametrize('size', [None, 4, 'auto'])
@pytest.mark.usefixtures('auto_on_a_cpu')
def test_after_a_fit_that_broke_off_a_microbatch_has_as_many_rows(size):
    def fail(outputs, target):
        raise ArithmeticError

    options = {} if size is None else {'device_train_microbatch_size': size}
    trainer, rows = make_trainer([BatchAugmentation(3), RDrop()], **options)
    trainer.state.model._loss_fn = fail
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            trainer.fit()
    trainer.state.model._loss_fn = F.cross_entropy
    trainer.fit()
    assert set(rows) == {24 if size == 4 else 48}


@pytest.mark.parametrize('order', [1, -1])
def test_r_drop_pairs_passes_of_one_copy(order):
    """In either order: not passes of two copies of an input."""
    seen = []

    class Watched(Net):
        def forward(self, rows):
            seen.append(rows)
            return super().forward(rows)

    trainer, _ = make_trainer([BatchAugmentation(3), RDrop()][::order], network=Watched())
    trainer.fit()
    for rows in seen:
        assert len(rows) == 6 * BATCH and torch.equal(rows[0::2], rows[1::2])
        assert len(rows[0::2].unique(dim=0)) == 3 * BATCH
