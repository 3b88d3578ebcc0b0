"""SBA in Composer's Trainer, compared with plain training and with other settings of SBA; bad arguments.

Run: pytest tests/test_sba.py
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Algorithm, Callback, Event
from composer.models import ComposerClassifier
from composer.optim import LinearScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity
from composer_sba.errors import CutLayerError
from small_training import BATCH, CLASSES, logged, make_trainer, train, weights

NO_NOISE = Vicinity(1.0, sigma=0.0)


@pytest.mark.parametrize('layers', ['head', 'block', ['input', 'stem', 'head']])
def test_an_infinitesimal_eta_changes_nothing(layers):
    plain, _ = train([], dtype=torch.float64, duration='20ba')
    sba, log = train([SBA(layers, eta=1e-30)], dtype=torch.float64, duration='20ba')
    assert 0 < sum(logged(log, 'sba/augmented')) < 20
    difference = (weights(plain) - weights(sba)).abs().max().item()
    assert difference < 1e-9, f'weights differ by {difference} after 20 steps'


def test_robust_is_one_gaussian_sample_at_the_input_with_a_weight_of_one_on_average():
    algorithm = SBA.robust(sigma=0.3, augment_prob=0.25)
    assert (
        algorithm.local_hparams == SBA('input', 1, 0.25, 4.0, Vicinity(gaussian_fraction=1.0, sigma=0.3)).local_hparams
    )
    for wrong in (0, 1.5, '0.5'):
        with pytest.raises(ValueError, match=r'Expected augment_prob to be a number in \(0, 1\]'):
            SBA.robust(augment_prob=wrong)
    trainer, log = train([SBA.robust(augment_prob=1.0)])
    assert all(value > 0 for value in logged(log, 'sba/kl')), 'the virtual samples equal the raw ones'


def test_one_step_descends_the_gradient_of_eq_11():
    """One augmented step, compared with autograd on the loss that is written out on a copy of the model."""
    eta, lr = 3.0, 0.1
    torch.manual_seed(0)
    model = ComposerClassifier(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double(), num_classes=CLASSES
    )
    before = copy.deepcopy(model.module)
    x, y = torch.randn(BATCH, 6, dtype=torch.float64), torch.randint(CLASSES, (BATCH,))
    vicinity = Vicinity(1.0, sigma=0.5, noise_scale='absolute')
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(TensorDataset(x, y), BATCH),
        max_duration='1ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=lr),
        algorithms=[SBA(augment_prob=1.0, eta=eta, vicinity=vicinity)],
        device='cpu',
        seed=17,
        progress_bar=False,
    )
    trainer.fit()

    latent = before[:2](x)
    expander = LatentExpander(before, 'head', 4, vicinity, seed=17)
    with expander.armed(step=0):
        logits, virtual = expander.split(before(x))
        noise = torch.empty(4, BATCH, 8, dtype=torch.float64)
        noise.normal_(0, 0.5, generator=torch.Generator().manual_seed(expander.seed(0))).clamp_(-1, 1)
    assert torch.allclose(virtual, before[2](latent + noise), atol=1e-12)
    (F.cross_entropy(before[2](latent), y) + eta * sbaf.soft_label_kl(logits, before[2](latent + noise))).backward()
    for start, end in zip(before.parameters(), model.module.parameters(), strict=True):
        error = (start - lr * start.grad - end).abs().max().item()
        assert error < 1e-10, f'the step differs by {error}'


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    first, again, other = (weights(train([SBA(seed=seed)])[0]) for seed in (None, None, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_microbatches_do_not_change_the_expectation():
    """Without noise and with running statistics, 1 and 4 microbatches take the same steps, to 1e-6."""

    class FrozenNorm(Algorithm):
        """Evaluation mode for every module: no batch statistics, no dropout."""

        def match(self, event, state):
            return event == Event.BEFORE_FORWARD

        def apply(self, event, state, logger):
            state.model.module.eval()

    def final(microbatch):
        sba = SBA(augment_prob=1.0, eta=2.0, target='hard', vicinity=NO_NOISE)
        return weights(
            train([FrozenNorm(), sba], duration='4ba', dtype=torch.float64, device_train_microbatch_size=microbatch)[0]
        )

    difference = (final(16) - final(4)).abs().max().item()
    assert difference < 1e-6, f'weights differ by {difference}'


def test_training_improves_and_the_term_makes_predictions_consistent():
    """The loss falls, and virtual predictions are closer to raw ones than without the term's gradient."""
    kls = {}
    for eta in (1e-30, 1.0):
        sba = SBA('block', augment_prob=1.0, eta=eta, vicinity=Vicinity(sigma=0.5))
        trainer, log = train([sba], duration='30ep')
        losses, kl = logged(log, 'loss/train/total'), logged(log, 'sba/kl')
        kls[eta] = sum(kl[-6:]) / 6
        start, end = sum(losses[:6]) / 6, sum(losses[-6:]) / 6
        assert end < 0.8 * start, f'eta {eta}: loss {start:.3f} -> {end:.3f}'
    assert kls[1.0] < 0.5 * kls[1e-30], f'mean KL {kls[1.0]:.4f} with the term, {kls[1e-30]:.4f} without its gradient'


def test_evaluation_and_prediction_see_the_plain_model():
    trainer, _ = train([SBA(augment_prob=1.0)])
    data = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)), 4)
    assert [len(out) for out in trainer.predict(data)] == [4, 4]
    trainer.eval(data)
    assert trainer.state.eval_metric_values['CrossEntropy'].isfinite()


def test_a_step_that_fails_leaves_no_expanded_rows():
    class Broken(Exception):
        pass

    def loss_fn(outputs, target):
        raise Broken

    trainer, _ = make_trainer([SBA(augment_prob=1.0)], loss_fn=loss_fn)
    with pytest.raises(Broken):
        trainer.fit()
    trainer.eval(DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), 4))
    assert len(trainer.state.model.module(torch.randn(4, 3, 8, 8))) == 4


def test_compiled_by_the_trainer_it_trains_as_eagerly():
    torch._dynamo.reset()
    eager, compiled = (
        weights(train([SBA('block')], compile_config=config)[0]) for config in (None, {'backend': 'eager'})
    )
    torch._dynamo.reset()
    assert torch.allclose(eager, compiled, atol=1e-5), f'weights differ by {(eager - compiled).abs().max()}'


def test_another_fit_augments_again():
    trainer, log = train([SBA(augment_prob=1.0)], duration='1ep')
    trainer.fit(duration='1ep')
    assert len(logged(log, 'sba/kl')) == 6


def test_another_fit_has_hooks_above_the_cut_alone():
    """As in the first fit: the first batch of each shows which layers are below the cut."""

    class Hooked(Callback):
        def __init__(self):
            self.seen = []

        def batch_end(self, state, logger):
            self.seen.append([n for n, layer in state.model.named_modules() if layer._forward_pre_hooks])

    hooked = Hooked()
    trainer, _ = make_trainer([SBA()], duration='1ba', callbacks=[hooked])
    trainer.fit()
    trainer.fit(duration='1ba')
    assert len(hooked.seen) == 2 and hooked.seen[0] == hooked.seen[1], hooked.seen


def test_nothing_is_saved_but_the_repr():
    trainer, _ = train([SBA()])
    name, state = trainer.state.state_dict()['algorithms'][0]
    assert name == 'SBA' and state == {'repr': repr(SBA())}
    assert '0x' not in repr(SBA(augment_prob=LinearScheduler(0.0, 1.0)))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'fold': 0}, r'Expected fold to be an integer >= 1, got 0\.'),
        ({'fold': 2.5}, r'Expected fold to be an integer >= 1, got 2\.5\.'),
        ({'augment_prob': 1.5}, r'Expected augment_prob to be a number in \[0, 1\] or a .* scheduler, got 1\.5\.'),
        ({'augment_prob': True}, r'Expected augment_prob to be a number in \[0, 1\] or a .* scheduler, got True\.'),
        ({'eta': -1}, r'Expected eta to be a finite number >= 0, got -1\.'),
        ({'eta': float('nan')}, r'Expected eta to be a finite number >= 0, got nan\.'),
        ({'layers': []}, r'Expected layers to be a layer name or a list of them, got \[\]\.'),
        ({'target': 'medium'}, r"Expected target to be one of soft, hard, got 'medium'\."),
        ({'granularity': 'step'}, r"Expected granularity to be one of batch, epoch, got 'step'\."),
        ({'norm_stats': 'both'}, r"Expected norm_stats to be one of raw, all, got 'both'\."),
        ({'stop_gradient': 'yes'}, r"Expected stop_gradient to be true or false, got 'yes'\."),
        ({'seed': -3}, r'Expected seed to be an integer >= 0, got -3\.'),
        ({'vicinity': {'sigma': -1}}, r'Expected sigma to be a number in \[0, 1e30\], got -1\.'),
        ({'vicinity': {'sgima': 1}}, r"Expected vicinity to be .*, got \{'sgima': 1\}; did you mean 'sigma'\?"),
        ({'vicinity': 0.1}, r'Expected vicinity to be a Vicinity or a mapping of gaussian_fraction, .*, got 0\.1\.'),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        SBA(**arguments)


@pytest.mark.parametrize('name', ['eta', 'augment_prob'])
def test_settings_without_effect_warn(name):
    with pytest.warns(NoEffectWarning, match=f'^SBA with {name}=0 does not change training'):
        SBA(**{name: 0})


NOISELESS = [
    Vicinity(1.0, sigma=0.0),
    Vicinity(1.0, tau=0.0),
    Vicinity(0.0, dropout=0.0),
    Vicinity(0.5, sigma=0, dropout=0),
]


@pytest.mark.parametrize('vicinity', NOISELESS, ids=repr)
def test_a_vicinity_without_noise_warns_at_the_head(vicinity):
    with pytest.warns(NoEffectWarning, match='^SBA at the head with a vicinity without noise does not change training'):
        sba = SBA(augment_prob=1.0, eta=1.0, vicinity=vicinity)
    _, log = train([sba], duration='2ba')
    assert logged(log, 'sba/kl') == [0.0] * 2


@pytest.mark.parametrize(
    ('layers', 'arguments'),
    [
        ('head', {'target': 'hard'}),
        ('block', {}),
        (['stem', 'head'], {}),
        ('head', {'vicinity': Vicinity(0.5, sigma=0)}),
    ],
)
def test_other_settings_do_not_warn(layers, arguments):
    """The raw label is another target, and dropout above a cut differs between rows."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SBA(layers, **({'vicinity': NO_NOISE} | arguments))


def test_a_misspelt_layer_stops_the_trainer_before_training():
    with pytest.raises(CutLayerError, match="The model has no layer 'blok'; it has 'block'"):
        train([SBA('blok')])


def test_a_layer_that_is_no_cut_point_stops_the_first_batch():
    with pytest.raises(CutLayerError, match="^Layer 'fc' cannot be cut: it is the model's output"):
        train([SBA('fc', augment_prob=0.01)])
