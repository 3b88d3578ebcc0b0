"""ManifoldMixup against a slow reference, row by row from the equation, and in Composer's Trainer.

Run: pytest tests/test_manifold_mixup.py
"""

import copy
import random
from pathlib import Path

import numpy
import pytest
import torch
from composer import Trainer
from composer.algorithms import SAM, LabelSmoothing
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
import reference
from composer_sba import SBA, sort_sba_last
from composer_sba.errors import CutLayerError, UserError
from composer_sba.manifold_mixup import ManifoldMixup, draw_mixing, draw_partners, mix_rows
from composer_sba.recipe import load
from composer_sba.train import train

# Composer says it of mixed labels whose sum is rounded below 1; of MixUp's too.
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
RECIPE = str(Path(__file__).parent.parent / 'yamls' / 'digits_baseline.yaml')
ROWS, BATCH, CLASSES, SEED = 24, 8, 5, 17
LAYERS = ['input', '1', 'head']


def make_network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def make_trainer(algorithms, *, network=make_network, duration='2ep', dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = ComposerClassifier(network().to(dtype), num_classes=CLASSES)
    data = TensorDataset(torch.randn(ROWS, 6, dtype=dtype), torch.randint(CLASSES, (ROWS,)))
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, BATCH),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=algorithms,
        loggers=[log],
        device='cpu',
        seed=SEED,
        progress_bar=False,
        **options,
    )
    return trainer, log, data


def fit(algorithms, **options):
    trainer, log, _ = make_trainer(algorithms, **options)
    trainer.fit()
    return weights(trainer), log


def weights(trainer):
    return torch.cat([each.detach().flatten() for each in trainer.state.model.parameters()])


def logged(log, name):
    return [float(value) for _, value in log.data.get(name, [])]


def slow_loss(network, x, y, cut, mixing, partners):
    """The loss of one microbatch: h'_i = λ h_i + (1 - λ) h_j and Σ_k (λ y_ik + (1 - λ) y_jk) (-log p_k), by scalars."""
    below, above = network[:cut], network[cut:]
    latent = [below(row[None])[0] for row in x]
    total = torch.zeros((), dtype=x.dtype)
    for i, j in enumerate(partners.tolist()):
        mixed = torch.stack([mixing * a + (1 - mixing) * b for a, b in zip(latent[i], latent[j], strict=True)])
        predicted = reference.softmax(above(mixed[None])[0])
        for k in range(CLASSES):
            label = mixing * float(y[i] == k) + (1 - mixing) * float(y[j] == k)
            total = total - label * torch.log(predicted[k])
    return total / len(x)


@pytest.mark.parametrize('microbatch', [8, 3])
def test_every_step_descends_the_gradient_of_the_slow_loss(microbatch):
    algorithm = ManifoldMixup(LAYERS)
    trainer, _, data = make_trainer([algorithm], device_train_microbatch_size=microbatch)
    slow = copy.deepcopy(trainer.state.model.module)
    trainer.fit()
    chosen = set()
    for step in range(2 * ROWS // BATCH):
        at = step % 3 * BATCH
        x, y = data.tensors[0][at : at + BATCH], data.tensors[1][at : at + BATCH]
        layer, mixing = sbaf.choose_layer(3, SEED, step), draw_mixing(2.0, SEED, step)
        chosen.add(layer)
        loss = 0.0
        for index, (part, labels) in enumerate(zip(x.split(microbatch), y.split(microbatch), strict=True)):
            partners = draw_partners(len(part), SEED, 0, step, index)
            loss = loss + slow_loss(slow, part, labels, [0, 2, 4][layer], mixing, partners) * len(part) / BATCH
        slow.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in slow.parameters():
                parameter -= 0.1 * parameter.grad
    assert chosen == {0, 1, 2}
    error = (torch.cat([each.flatten() for each in slow.parameters()]) - weights(trainer)).abs().max().item()
    assert error < 1e-12, f'weights differ by {error} after 6 steps'


def test_mix_rows_mixes_every_row_with_its_partner():
    rows, partners = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([3, 1, 0, 4, 2])
    mixed = mix_rows(rows, partners, 0.3)
    for i in range(5):
        for value, own, other in zip(mixed[i].flatten(), rows[i].flatten(), rows[partners[i]].flatten(), strict=True):
            assert abs(value - (0.3 * own + 0.7 * other)) < 1e-15
    half = mix_rows(rows.bfloat16(), partners, torch.tensor(0.3, dtype=torch.float64))
    assert half.dtype == torch.bfloat16


def test_the_share_has_the_moments_of_its_beta_distribution():
    for alpha in (0.2, 2.0):
        drawn = numpy.array([draw_mixing(alpha, 3, step) for step in range(4000)])
        assert abs(drawn.mean() - 0.5) < 0.02, f'mean {drawn.mean():.3f}'
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(drawn.var() / variance - 1) < 0.1, f'variance {drawn.var():.4f}, not {variance:.4f}'


def test_pairs_are_permutations_of_their_own_on_every_rank_batch_and_microbatch():
    places = [(seed, rank, step, part) for seed in (0, 1) for rank in (0, 1) for step in (0, 1) for part in (0, 1)]
    drawn = [tuple(draw_partners(64, *place).tolist()) for place in places]
    assert all(sorted(each) == list(range(64)) for each in drawn)
    assert len(set(drawn)) == len(places)
    assert drawn == [tuple(draw_partners(64, *place).tolist()) for place in places]


def test_share_and_layer_are_those_of_seed_and_batch_and_logged_once_a_batch():
    _, log = fit([ManifoldMixup(LAYERS, alpha=0.5)], duration='12ba', device_train_microbatch_size=2)
    assert logged(log, 'manifold_mixup/mixing') == [draw_mixing(0.5, SEED, step) for step in range(12)]
    assert logged(log, 'manifold_mixup/layer') == [sbaf.choose_layer(3, SEED, step) for step in range(12)]


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, again, other = (fit([ManifoldMixup(LAYERS, seed=seed)])[0] for seed in (None, None, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_streams_are_left_alone():
    states = []
    for algorithms in ([], [ManifoldMixup(LAYERS)]):
        fit(algorithms)
        states.append((torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()))
    assert states[0] == states[1]


def test_a_run_resumed_within_an_epoch_takes_the_same_steps(tmp_path):
    options = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': -1}
    whole, _ = fit([ManifoldMixup(LAYERS)], **options)
    resumed, log = fit([ManifoldMixup(LAYERS)], load_path=str(tmp_path / 'ep1-ba4-rank0.pt'))
    assert len(logged(log, 'manifold_mixup/layer')) == 2
    assert torch.equal(whole, resumed)


def test_train_metrics_see_the_original_labels_and_evaluation_the_plain_network():
    trainer, _, data = make_trainer([ManifoldMixup(LAYERS)], duration='1ba')
    seen = []
    update = trainer.state.model.update_metric

    def watch(batch, outputs, metric):
        seen.append(batch[1].clone())
        update(batch, outputs, metric)

    trainer.state.model.update_metric = watch
    trainer.fit()
    assert torch.equal(seen[0], data.tensors[1][:BATCH])
    (predicted,) = trainer.predict(DataLoader(data, ROWS))
    assert torch.equal(predicted, trainer.state.model.module(data.tensors[0]))


def test_after_a_fit_no_hook_is_left_and_another_fit_mixes_again():
    trainer, log, _ = make_trainer([ManifoldMixup(LAYERS)], duration='1ep')
    trainer.fit()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in trainer.state.model.modules())
    trainer.fit(duration='1ep')
    assert len(logged(log, 'manifold_mixup/layer')) == 6


def assert_plain(network, x):
    """The network predicts what its layers say without hooks."""
    expected = x
    for layer in network:
        expected = layer.forward(expected)
    assert torch.equal(network(x), expected)


class Failing(nn.Module):
    """Raises in one of its forward passes in training."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        self.at -= self.training
        if self.at == 0:
            raise ArithmeticError('in the network')
        return x


@pytest.mark.parametrize('below', [True, False])
def test_after_an_exception_in_the_network_its_hooks_do_nothing(below):
    layers = [Failing(2), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    if not below:
        layers.insert(2, layers.pop(0))
    trainer, log, data = make_trainer([ManifoldMixup('2' if below else '0')], network=lambda: nn.Sequential(*layers))
    with pytest.raises(ArithmeticError):
        trainer.fit()
    assert_plain(trainer.state.model.module.train(), data.tensors[0][:BATCH])
    trainer.fit()
    assert len(logged(log, 'manifold_mixup/layer')) > 1, 'the next fit mixes'
    assert not any(each._forward_hooks for each in trainer.state.model.modules())


def test_after_an_exception_in_the_loss_hooks_do_nothing():
    trainer, _, data = make_trainer([ManifoldMixup('0')])
    trainer.state.model._loss_fn = lambda outputs, target: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert_plain(trainer.state.model.module.train(), data.tensors[0][:BATCH])


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing_repeats_the_mixture(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant) if x.requires_grad else super().forward(x)

    def final(kind):
        def network():
            layers = list(make_network())
            return nn.Sequential(layers[0], kind(*layers[1:4]), layers[4])

        return fit([ManifoldMixup('1.0')], network=network)[0]

    plain, checkpointed = final(nn.Sequential), final(Checkpointed)
    assert torch.allclose(plain, checkpointed, atol=1e-12), f'weights differ by {(plain - checkpointed).abs().max()}'


def test_compiled_by_the_trainer_it_trains_as_eagerly():
    torch._dynamo.reset()
    runs = [
        fit([ManifoldMixup(LAYERS)], duration='4ep', compile_config=config) for config in (None, {'backend': 'eager'})
    ]
    torch._dynamo.reset()
    eager, compiled = (final for final, _ in runs)
    assert torch.allclose(eager, compiled, atol=1e-10), f'weights differ by {(eager - compiled).abs().max()}'
    assert len(set(logged(runs[1][1], 'manifold_mixup/layer'))) == 3


def test_both_passes_of_sam_mix_alike():
    """With a vanishing rho the second pass is the first again, and the step that of plain descent."""
    with pytest.warns(UserWarning, match='SAM has'):
        sam, _ = fit([SAM(rho=1e-30, interval=1), ManifoldMixup(LAYERS)], duration='3ba')
    plain, _ = fit([ManifoldMixup(LAYERS)], duration='3ba')
    assert torch.allclose(sam, plain, atol=1e-9), f'weights differ by {(sam - plain).abs().max()}'


def test_beside_label_smoothing_and_below_sba():
    smoothed, _ = fit([ManifoldMixup(LAYERS), LabelSmoothing(0.1)])
    assert torch.isfinite(smoothed).all()
    algorithms = [SBA(augment_prob=1.0), ManifoldMixup(['input', '1'])]
    both, log = fit(algorithms, algorithm_passes=[sort_sba_last])
    assert torch.isfinite(both).all() and min(logged(log, 'sba/kl')) > 0
    assert logged(log, 'manifold_mixup/mixing') == [draw_mixing(2.0, SEED, step) for step in range(6)]
    with pytest.raises(CutLayerError, match="^Layer 'head' has 40 rows for a batch of 8. Beside SBA, ManifoldMixup"):
        fit([SBA('1', augment_prob=1.0), ManifoldMixup('head')], algorithm_passes=[sort_sba_last])


def test_training_improves_on_mixtures():
    _, log = fit([ManifoldMixup(LAYERS)], duration='150ep')
    losses = logged(log, 'loss/train/total')
    start, end = sum(losses[:30]) / 30, sum(losses[-30:]) / 30
    assert end < 0.9 * start, f'loss {start:.3f} -> {end:.3f}'


def test_in_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ['max_duration=3ep', 'progress_bar=false', 'save_folder=null']
    trainer = train(load(RECIPE, [*settings, 'algorithms.manifold_mixup.layers=[input,conv1,conv2]']))
    accuracy = trainer.state.eval_metric_values['MulticlassAccuracy'].item()
    assert accuracy > 0.7, f'{100 * accuracy:.1f} %'


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(x + self.branch(x))


def test_a_layer_beside_a_skip_connection_stops_the_first_batch():
    with pytest.raises(CutLayerError, match="^Layer 'branch' is no cut point: .* as in a residual branch"):
        fit([ManifoldMixup('branch')], network=Residual)


def test_a_misspelt_layer_stops_the_trainer_before_training():
    with pytest.raises(CutLayerError, match="^The model has no layer 'haed'; it has '0', '1', '2', '3', '4'"):
        make_trainer([ManifoldMixup('haed')])


def test_a_network_in_evaluation_mode_is_not_trained_on_mixed_labels():
    trainer, _, _ = make_trainer([ManifoldMixup('1')])
    trainer.state.model.module.train = lambda mode=True: None
    trainer.state.model.module.training = False
    with pytest.raises(RuntimeError, match="^No rows were mixed: layer '1' did not run in training mode"):
        trainer.fit()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'alpha': 0}, r'Expected alpha to be a finite number > 0, got 0\.'),
        ({'alpha': float('inf')}, r'Expected alpha to be a finite number > 0, got inf\.'),
        ({'seed': -1}, r'Expected seed to be an integer >= 0, got -1\.'),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        ManifoldMixup(**arguments)


def test_a_recipe_names_the_key_of_what_is_refused():
    with pytest.raises(UserError, match=r'algorithms\.manifold_mixup\.alpha: expected float, got'):
        load(RECIPE, ['algorithms.manifold_mixup.alpha=high'])
