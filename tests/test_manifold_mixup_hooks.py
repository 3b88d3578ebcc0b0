"""ManifoldMixup's hooks on a network that is evaluated, fails, is compiled, checkpointed or has other algorithms.

Run: pytest tests/test_manifold_mixup_hooks.py
"""

import pytest
import torch
from composer.algorithms import SAM, LabelSmoothing
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from composer_sba import SBA, sort_sba_last
from composer_sba.algorithms.manifold_mixup import ManifoldMixup, draw_mixing
from composer_sba.errors import CutLayerError
from mixup_training import BATCH, CLASSES, LAYERS, ROWS, fit, make_network, make_trainer
from small_training import SEED, logged

# Composer's, about mixed labels whose sum is rounded below 1; it warns about its MixUp too
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')


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


def test_with_label_smoothing_and_below_sba():
    smoothed, _ = fit([ManifoldMixup(LAYERS), LabelSmoothing(0.1)])
    assert torch.isfinite(smoothed).all()
    algorithms = [SBA(augment_prob=1.0), ManifoldMixup(['input', '1'])]
    both, log = fit(algorithms, algorithm_passes=[sort_sba_last])
    assert torch.isfinite(both).all() and min(logged(log, 'sba/kl')) > 0
    assert logged(log, 'manifold_mixup/mixing') == [draw_mixing(2.0, SEED, step) for step in range(6)]
    with pytest.raises(
        CutLayerError, match="^Layer 'head' has 40 rows for a batch of 8. ManifoldMixup can mix only at layers below"
    ):
        fit([SBA('1', augment_prob=1.0), ManifoldMixup('head')], algorithm_passes=[sort_sba_last])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(x + self.branch(x))


def test_a_layer_that_a_skip_connection_bypasses_stops_the_first_batch():
    with pytest.raises(CutLayerError, match="^Layer 'branch' cannot be cut: .* as in a residual branch"):
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
