"""LastEpochsMedian, compared with medians of the values that Composer logged, in resumed runs too.

Run: pytest tests/test_last_epochs_median.py
"""

import math
import random
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.core import Evaluator
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from composer_sba.algorithms.last_epochs_median import LastEpochsMedian, last_epochs_median
from composer_sba.errors import UserError
from composer_sba.recipe.recipe import load
from composer_sba.train import train

RECIPE = str(Path(__file__).parent.parent / 'yamls' / 'digits_baseline.yaml')
ACCURACY, LOSS = 'eval/MulticlassAccuracy', 'eval/CrossEntropy'


def make_trainer(median, *, epochs='7ep', evaluators=None, metrics=None, **options):
    """Six batches an epoch; labels are noise, and every evaluation has another value."""
    torch.manual_seed(0)
    x, y = torch.randn(48, 6), torch.randint(4, (48,))
    model = ComposerClassifier(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), num_classes=4)
    if metrics is not None:
        model.val_metrics = metrics
    log = InMemoryLogger()
    evaluation = DataLoader(TensorDataset(torch.randn(64, 6), torch.randint(4, (64,))), 32)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), 8),
        eval_dataloader=evaluation if evaluators is None else evaluators(evaluation),
        max_duration=epochs,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.5),
        callbacks=median,
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
        **options,
    )
    return trainer, log


def values(log, name):
    return [float(value) for _, value in log.data.get(name, [])]


def middle(numbers):
    """The median, by counting the numbers on either side."""
    sides = [(sum(a < n for a in numbers), sum(a > n for a in numbers), n) for n in numbers]
    half = len(numbers) / 2
    middles = {n for below, above, n in sides if below <= half and above <= half}
    return (min(middles) + max(middles)) / 2


def test_the_median_is_that_of_the_last_epochs_alone():
    rng = random.Random(0)
    for _ in range(200):
        epochs = rng.sample(range(20), rng.randint(1, 12))
        seen = {epoch: rng.choice([rng.random(), 0.5]) for epoch in epochs}
        num_epochs = rng.randint(1, 6)
        window = [seen[e] for e in seen if max(seen) - e < num_epochs]
        assert last_epochs_median(seen, num_epochs) == pytest.approx(middle(window)), (seen, num_epochs)
    assert math.isnan(last_epochs_median({1: 0.5, 2: math.nan, 3: 0.6}))
    assert last_epochs_median({1: math.nan, 2: 0.5, 3: 0.6}, num_epochs=2) == pytest.approx(0.55)


def test_every_metric_is_the_median_of_what_the_last_five_epochs_logged():
    median = LastEpochsMedian()
    trainer, log = make_trainer(median)
    trainer.fit()
    for name in (ACCURACY, LOSS):
        seen = values(log, f'metrics/{name}')
        assert len(seen) == 7
        assert median.medians[name] == pytest.approx(sorted(seen[2:])[2]), f'{name}: {seen}'
        assert values(log, f'median_last5/{name}') == [median.medians[name]], 'logged once, when training is over'
    assert set(median.medians) == {ACCURACY, LOSS}
    assert values(log, f'metrics/{LOSS}')[0] != median.medians[LOSS]


def test_the_latest_evaluation_of_an_epoch_counts():
    median = LastEpochsMedian(num_epochs=3)
    trainer, log = make_trainer(median, eval_interval='4ba')  # after batches 4, 8, ..., 40 and at the end, 42
    trainer.fit()
    after = dict(zip([*range(4, 44, 4), 42], values(log, f'metrics/{LOSS}'), strict=True))
    expected = middle([after[28], after[36], after[42]])  # of epochs 4 (25 to 30), 5 (31 to 36) and 6 (37 to 42)
    assert median.medians[LOSS] == pytest.approx(expected), after


def test_an_evaluation_within_the_last_batch_and_one_at_the_epochs_end_are_one():
    median = LastEpochsMedian(num_epochs=2)
    trainer, log = make_trainer(median, epochs='3ep', evaluators=lambda data: [
        Evaluator(label='eval', dataloader=data, eval_interval=lambda state, event: state.timestamp.batch % 6 == 0),
    ])  # fmt: skip
    trainer.fit()
    seen = values(log, f'metrics/{LOSS}')
    assert len(seen) == 7, 'BATCH_END and EPOCH_END of three epochs, and FIT_END'
    assert median.medians[LOSS] == pytest.approx((seen[2] + seen[6]) / 2), seen
    assert values(log, f'median_last2/{LOSS}')[-1] == median.medians[LOSS]


def test_the_evaluation_after_fit_end_counts_and_is_logged():
    median = LastEpochsMedian(num_epochs=3)
    trainer, log = make_trainer(median, eval_interval='2ep')  # epochs 2, 4, 6, and 7 after FIT_END
    trainer.fit()
    seen = values(log, f'metrics/{LOSS}')
    assert len(seen) == 4
    assert median.medians[LOSS] == pytest.approx((seen[2] + seen[3]) / 2), 'of epochs 5, 6 and 7, two were evaluated'
    assert values(log, f'median_last3/{LOSS}')[-1] == median.medians[LOSS]


def test_evaluators_are_kept_apart_and_evaluation_outside_a_fit_is_ignored():
    median = LastEpochsMedian(num_epochs=2)
    other = DataLoader(TensorDataset(torch.randn(40, 6), torch.randint(4, (40,))), 40)
    trainer, log = make_trainer(median, epochs='3ep', evaluators=lambda data: [
        Evaluator(label='val', dataloader=data, metric_names=['CrossEntropy']),
        Evaluator(label='test', dataloader=other, metric_names=['MulticlassAccuracy', 'CrossEntropy']),
    ])  # fmt: skip
    trainer.eval()
    assert median.medians == {}
    trainer.fit()
    medians = median.medians
    assert set(medians) == {'val/CrossEntropy', 'test/MulticlassAccuracy', 'test/CrossEntropy'}
    for name, value in medians.items():
        assert value == pytest.approx(sum(values(log, f'metrics/{name}')[-2:]) / 2)
    trainer.eval()
    trainer.eval(DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8, dtype=torch.long)), 8))
    assert median.medians == medians


def test_another_fit_continues_and_a_reset_clock_starts_again():
    median = LastEpochsMedian(num_epochs=2)
    trainer, log = make_trainer(median, epochs='2ep')
    trainer.fit()
    trainer.fit(duration='1ep')
    seen = values(log, f'metrics/{LOSS}')
    assert median.medians[LOSS] == pytest.approx((seen[1] + seen[2]) / 2)
    trainer.fit(reset_time=True, duration='1ep')
    assert median.medians[LOSS] == pytest.approx(values(log, f'metrics/{LOSS}')[-1])


def test_metrics_that_are_several_numbers_are_ignored():
    median = LastEpochsMedian()
    trainer, _ = make_trainer(median, epochs='1ep', metrics=MulticlassAccuracy(4, average=None))
    trainer.fit()
    assert trainer.state.eval_metric_values['MulticlassAccuracy'].shape == (4,)
    assert median.medians == {}


@pytest.mark.parametrize(('interval', 'file', 'epochs'), [('1ep', 'ep4-ba24', 4), ('5ba', 'ep4-ba25', 5)])
def test_a_resumed_run_reports_the_same(tmp_path, interval, file, epochs):
    """Resumed at the end of an epoch, and within one that is evaluated before and after."""
    whole, parts = LastEpochsMedian(), LastEpochsMedian()
    saving = {'save_folder': str(tmp_path), 'save_interval': interval}
    trainer, _ = make_trainer(whole, eval_interval=interval, **saving)
    trainer.fit()
    checkpoint = tmp_path / f'{file}-rank0.pt'
    saved = dict(torch.load(checkpoint, weights_only=False)['state']['callbacks'])['LastEpochsMedian']
    assert {len(each) for each in saved['values'].values()} == {epochs}, saved
    trainer, log = make_trainer(parts, eval_interval=interval, load_path=str(checkpoint))
    trainer.fit()
    assert len(values(log, f'metrics/{LOSS}')) == (3 if interval == '1ep' else 4)  # after 30, 35, 40 and 42 batches
    assert parts.medians == whole.medians
    assert parts.state_dict() == whole.state_dict()


def test_no_more_is_kept_than_reported():
    median = LastEpochsMedian(num_epochs=2)
    trainer, _ = make_trainer(median)
    trainer.fit()
    assert [list(each) for each in median.state_dict()['values'].values()] == [[5, 6], [5, 6]]


def test_training_is_unchanged():
    def final(median):
        trainer, _ = make_trainer(median)
        trainer.fit()
        return torch.cat([each.flatten() for each in trainer.state.model.parameters()]), torch.get_rng_state()

    for plain, reported in zip(final([]), final(LastEpochsMedian()), strict=True):
        assert torch.equal(plain, reported)


def test_a_recipe_reports_it(tmp_path, digits_folder):
    settings = ['max_duration=3ep', 'progress_bar=false', 'save_folder=null', f'loggers.file.filename={tmp_path}/log']
    settings += [f'train_dataset.local={digits_folder}', f'eval_dataset.local={digits_folder}']
    settings += ['train_dataset.in_memory=true', 'eval_dataset.in_memory=true']
    trainer = train(load(RECIPE, [*settings, 'callbacks.last_epochs_median.num_epochs=2']))
    (median,) = (each for each in trainer.state.callbacks if isinstance(each, LastEpochsMedian))
    assert 0.5 < median.medians[ACCURACY] <= 1, median.medians
    assert f'median_last2/{ACCURACY}' in (tmp_path / 'log').read_text()


@pytest.mark.parametrize('num_epochs', [0, 2.5, True, '5'])
def test_a_number_of_epochs_below_1_or_not_an_integer_is_refused(num_epochs):
    with pytest.raises(ValueError, match=rf'^Expected num_epochs to be an integer >= 1, got {num_epochs!r}\.$'):
        LastEpochsMedian(num_epochs)


def test_a_recipe_s_error_names_the_key():
    with pytest.raises(UserError, match=r"callbacks\.last_epochs_median\.epochs: unknown key; .* 'num_epochs'"):
        load(RECIPE, ['callbacks.last_epochs_median.epochs=3'])
