"""Numbers that go wrong: a run stops before a weight is lost, or stays finite. Odd arguments are taken or refused.

pytest tests/faults/test_numbers.py
"""

import json
import math
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, Trainer
from composer.core import Precision
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, BatchAugmentation, LatentExpander, MajorityVote, Vicinity
from composer_sba.algorithms import LastEpochsMedian, ManifoldMixup, RDrop
from composer_sba.errors import NonFiniteError, UserError

CLASSES = 5
pytestmark = [
    # Composer's, about a last batch that is shorter than a microbatch, and a Trainer that was never closed
    pytest.mark.filterwarnings('ignore:Cannot split tensor of length'),
    pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning'),
]


class Poison(nn.Module):
    """Multiplies the rows that reach it in training by a number: all of them, or those behind the first ``after``."""

    def __init__(self, value: float, after: int = 0) -> None:
        super().__init__()
        self.value, self.after, self.active = value, after, True

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not (self.active and self.training):
            return rows
        return torch.cat([rows[: self.after], rows[self.after :] * self.value])


def network(poison: nn.Module | None = None, above: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {'stem': nn.Linear(6, 8), 'act': nn.ReLU(), 'poison': poison or nn.Identity(), 'mid': nn.Linear(8, 8)}
    return nn.Sequential(nn.Sequential(), *layers.values(), above or nn.Identity(), nn.Linear(8, CLASSES))


def trainer(net: nn.Module, *algorithms, rows: int = 12, **options) -> Trainer:
    data = TensorDataset(torch.randn(rows, 6), torch.randint(CLASSES, (rows,)))
    model = ComposerClassifier(net, num_classes=CLASSES)
    return Trainer(
        model=model,
        train_dataloader=DataLoader(data, 4),
        max_duration='1ep',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=list(algorithms),
        device='cpu',
        progress_bar=False,
        **options,
    )


class After(Callback):
    """Turns the poison on at a batch."""

    def __init__(self, poison: Poison, batch: int) -> None:
        self.poison, self.batch = poison, batch
        poison.active = False

    def batch_start(self, state, logger) -> None:
        self.poison.active = state.timestamp.batch == self.batch


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_network_that_diverges_stops_before_a_weight_is_lost(value: float) -> None:
    """NaN or Inf in the latent batch, and therefore in all logits."""
    poison = Poison(value)
    run = trainer(network(poison), SBA(augment_prob=1.0), callbacks=[After(poison, 2)])
    with pytest.raises(NonFiniteError) as caught:
        run.fit()
    expected = r"Expected a finite divergence, got (nan|inf) in batch 2 at layer 'head'; the raw predictions are "
    assert re.match(expected + r'not finite either: lower the learning rate', str(caught.value)), str(caught.value)
    weights = run.state.model.state_dict()
    assert all(value.isfinite().all() for value in weights.values()), weights
    assert run.state.timestamp.batch == 2


@pytest.mark.parametrize('target', ['soft', 'hard'])
def test_virtual_samples_that_overflow_are_distinguished_from_the_network(target: str) -> None:
    poison = Poison(math.nan, after=4)  # the four raw rows of a batch stay as they are
    poison.active = False
    run = trainer(network(poison), SBA('1', augment_prob=1.0, target=target), callbacks=[After(poison, 1)])
    with pytest.raises(NonFiniteError, match="nan in batch 1 at layer '1'; the raw predictions are finite: lower the "):
        run.fit()
    assert all(value.isfinite().all() for value in run.state.model.state_dict().values())
    run.state.model.eval()
    assert run.state.model.module(torch.zeros(3, 6)).shape == (3, CLASSES), 'the cut is still armed'


@pytest.mark.parametrize('target', ['soft', 'hard'])
def test_no_checkpoint_is_written_after_a_divergence(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the value is read at the end of the batch, as on a GPU, weights are lost, but not the last checkpoint."""
    poison = Poison(math.nan)
    monkeypatch.setattr('composer_sba.sba.is_on_cpu', lambda loss: False)
    sba = SBA(augment_prob=1.0, target=target)
    saving = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_overwrite': True}
    run = trainer(network(poison), sba, callbacks=[After(poison, 2)], **saving)
    with pytest.raises(NonFiniteError, match='in batch 2'):
        run.fit()
    saved = torch.load(tmp_path / 'latest-rank0.pt', weights_only=False)['state']
    assert saved['timestamp']['Timestamp']['batch'] == 2
    assert all(value.isfinite().all() for value in saved['model'].values()), 'the last checkpoint is not whole'


def test_updates_that_a_grad_scaler_skips_end_the_run_after_ten_in_a_row() -> None:
    """Composer has no amp_fp16 on the CPU; here only the state says so."""
    run = trainer(network(), SBA(augment_prob=1.0))
    (sba,) = [each for each in run.state.algorithms if isinstance(each, SBA)]
    sba.fit_start(run.state, run.logger)
    run.state._precision = Precision.AMP_FP16
    with pytest.warns(RuntimeWarning, match='in batch 0 at layer .*GradScaler skips the update'):
        sba._check_finite(math.inf, run.state, 0)
    for batch in range(1, 9):
        sba._check_finite(math.nan, run.state, batch)
    sba._check_finite(0.1, run.state, 9)
    with pytest.warns(RuntimeWarning):
        for batch in range(10, 19):
            sba._check_finite(math.nan, run.state, batch)
    with pytest.raises(NonFiniteError, match='in batch 19'):
        sba._check_finite(math.nan, run.state, 19)


@pytest.mark.parametrize('basis', ['identity', 'normalized', 'orthogonal', 'hadamard'])
def test_activations_without_variance_have_no_noise(basis: str) -> None:
    """RMS 0: Gaussian points equal the raw ones, and so do dropout points."""
    for latent in (torch.zeros(4, 8), torch.zeros(4, 8).to(torch.bfloat16)):
        virtual = Vicinity(sigma=0.5, basis=basis).sample(latent.requires_grad_(), 4)
        assert virtual.eq(0).all(), virtual
        virtual.float().sum().backward()
        assert latent.grad.isfinite().all()


def test_training_continues_with_a_dead_layer() -> None:
    run = trainer(network(Poison(0.0)), SBA(augment_prob=1.0))
    run.state.model.module[4].bias.data.zero_()
    run.fit()
    assert all(value.isfinite().all() for value in run.state.model.state_dict().values())


def test_the_divergence_of_one_class_is_zero() -> None:
    logits, virtual = torch.randn(3, 1, requires_grad=True), torch.randn(4, 3, 1, requires_grad=True)
    kl = sbaf.soft_label_kl(logits, virtual, stop_gradient=False)
    kl.backward()
    assert kl == 0 and virtual.grad.eq(0).all()
    assert sbaf.hard_label_loss(virtual, torch.zeros(3, dtype=torch.int64)) == 0


@pytest.mark.parametrize('norm_stats', ['raw', 'all'])
@pytest.mark.parametrize('basis', ['identity', 'hadamard'])
def test_one_row_is_a_batch(basis: str, norm_stats: str) -> None:
    """Batch statistics above the cut are those of its pixels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    expander = LatentExpander(model, '0', 3, Vicinity(basis=basis), norm_stats=norm_stats)
    with expander.armed(0):
        raw, virtual = expander.split(model(torch.randn(1, 3, 8, 8)))
    kl = sbaf.soft_label_kl(raw, virtual)
    kl.backward()
    assert (raw.shape, virtual.shape) == ((1, 5), (3, 1, 5))
    assert 0 <= kl < math.inf
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_one_row_that_a_layer_cannot_take_raises_as_without_sba() -> None:
    run = trainer(network(above=nn.BatchNorm1d(8)), SBA('1', augment_prob=1.0), rows=9)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        run.fit()
    assert run.state.timestamp.batch == 2


@pytest.mark.parametrize('rows', [9, 11])
@pytest.mark.parametrize('microbatch', [None, 2])
def test_a_last_batch_that_is_short(rows: int, microbatch: int | None) -> None:
    run = trainer(network(), SBA(['1', 'head'], augment_prob=1.0), rows=rows, device_train_microbatch_size=microbatch)
    run.fit()
    assert (run.state.timestamp.batch, run.state.timestamp.sample) == (3, rows)
    assert all(value.isfinite().all() for value in run.state.model.state_dict().values())


@pytest.mark.parametrize(('scale', 'finite'), [(1e4, True), (1e30, False)])
def test_an_overflow_in_bfloat16_shows_in_the_divergence(scale: float, finite: bool) -> None:
    """The square of 1e30 overflows float32, in which the unit of the noise is computed; the divergence shows it."""
    model = network(Poison(scale))
    expander = LatentExpander(model, '3', 4)
    with torch.autocast('cpu', torch.bfloat16), expander.armed(0):
        raw, virtual = expander.split(model(torch.randn(4, 6)))
    assert raw.dtype == torch.bfloat16 and raw.isfinite().all()
    kl = sbaf.soft_label_kl(raw, virtual)
    assert bool(kl.isfinite()) == finite, f'{kl}, rms {virtual.float().square().mean().sqrt()}'


def test_a_vote_with_nan_is_nan() -> None:
    logits = torch.randn(3, 2, 4)
    logits[1, 0, 2] = math.nan
    voted = sbaf.majority_vote(logits)
    assert voted[0].isnan().any() and voted[1].isfinite().all(), voted


# Every numeric argument: of real numbers, and of integers. A next one is one word here
REAL = [
    *((Vicinity, name) for name in ('gaussian_fraction', 'sigma', 'tau', 'dropout')),
    *((SBA, name) for name in ('augment_prob', 'eta')),
    *((method, 'alpha') for method in (ManifoldMixup, RDrop)),
]
INTEGER = [
    *((SBA, name) for name in ('fold', 'seed')),
    *((MajorityVote, name) for name in ('fold', 'seed')),
    (BatchAugmentation, 'fold'),
    (ManifoldMixup, 'seed'),
    (LastEpochsMedian, 'num_epochs'),
]
TAKEN = [np.float16(0.25), np.float32(0.1), np.float64(0.1), np.longdouble(0.25), Fraction(1, 4), np.float32(1e-40)]
TAKEN_INTEGERS = [np.int8(3), np.int64(3), np.uint64(3)]
REFUSED = [True, np.True_, torch.tensor(0.1), np.array(0.1), '0.1', 0.1j, Decimal('0.1'), math.nan, -1, 2**70, [0.1]]
REFUSED_INTEGERS = [np.True_, 2.0, np.float32(3), torch.tensor(3), np.array(3), '3', 2**63, np.uint64(2**63), 10**30]


@pytest.mark.parametrize(
    ('build', 'name', 'values', 'kind'),
    [(build, name, TAKEN, float) for build, name in REAL]
    + [(build, name, TAKEN_INTEGERS, int) for build, name in INTEGER],
    ids=lambda value: value if isinstance(value, str) else getattr(value, '__name__', ''),
)
def test_numbers_of_other_libraries_become_python_s(build: Any, name: str, values: list[Any], kind: type) -> None:
    for value in values:
        built = build(**{name: value})
        kept = getattr(built, name)
        assert type(kept) is kind and kept == value, f'{name}={value!r} is kept as {kept!r}'
        json.dumps(getattr(built, 'local_hparams', kept))
        assert 'np.' not in repr(built), repr(built)


@pytest.mark.parametrize(
    ('build', 'name', 'values'),
    [(*each, REFUSED) for each in REAL] + [(*each, REFUSED_INTEGERS) for each in INTEGER],
    ids=lambda value: value if isinstance(value, str) else getattr(value, '__name__', ''),
)
def test_what_is_not_a_number_is_refused_in_one_line(build: Any, name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f'^Expected {name} to be .*, got .*') as refused:
            build(**{name: value})
        assert refused.value.argument == name and '\n' not in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    'vicinity',
    [
        Vicinity(1.0, sigma=1.0, tau=1e-9),
        Vicinity(1.0, sigma=1.0, tau=0.0),
        Vicinity(1.0, sigma=1e-30, tau=1e-300),
        Vicinity(1.0, sigma=1.0, tau=1e300),
        Vicinity(1.0, sigma=1e30, tau=1.0),
        Vicinity(np.float32(0.5), sigma=np.float32(0.1), tau=np.float64(0.2), dropout=np.float16(0.5)),
    ],
    ids=repr,
)
@pytest.mark.parametrize('layers', ['head', '0'])
@pytest.mark.filterwarnings('ignore:SBA at the head with a vicinity without noise')
def test_a_vicinity_of_odd_numbers_trains(vicinity: Vicinity, layers: str) -> None:
    """Also at a wide head, whose Gaussian points may be drawn as noise of its logits."""
    net = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, CLASSES))
    run = trainer(net, SBA(layers, augment_prob=np.float32(1.0), eta=np.float64(0.1), vicinity=vicinity))
    run.fit()
    assert all(value.isfinite().all() for value in run.state.model.state_dict().values())
