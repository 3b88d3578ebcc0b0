"""SBA in Composer's Trainer: against plain training, against itself under other settings, and against bad input.

Run: pytest tests/test_sba.py
"""

import copy
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.algorithms import SAM, SWA, CutMix, GyroDropout, LabelSmoothing, MixUp
from composer.algorithms.warnings import NoEffectWarning, NotIntendedUseWarning
from composer.core import Algorithm, Event
from composer.loggers import InMemoryLogger
from composer.loss import binary_cross_entropy_with_logits
from composer.models import ComposerClassifier
from composer.optim import LinearScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity, sort_sba_last
from composer_sba.errors import CutLayerError, UserError

# What Composer says of its own algorithms, and of a model without an optimizer, is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in ('SAM has', 'SWA has', 'GyroDropout is', 'Some targets have less', 'No optimizer was specified')
]
ROWS, BATCH, CLASSES = 48, 16, 5
NO_NOISE = Vicinity(1.0, sigma=0.0)


class Net(nn.Module):
    """Dropout below the cuts 'block' and 'head', batch norm above 'block'."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.block = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.block(self.stem(x)))).mean((2, 3)))


def make_trainer(algorithms, *, dtype=torch.float32, loss_fn=None, duration='2ep', **options):
    """Net and its data, from one fixed start; return the Trainer and what it will log."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(ROWS, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (ROWS,)))
    model = ComposerClassifier(Net().to(dtype), num_classes=CLASSES, **({'loss_fn': loss_fn} if loss_fn else {}))
    log = InMemoryLogger()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, BATCH, shuffle=True),
        max_duration=duration,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        algorithms=algorithms,
        loggers=[log],
        device='cpu',
        seed=17,
        progress_bar=False,
        **options,
    )
    return trainer, log


def train(algorithms, **options):
    """Train Net for a few batches; return the Trainer and what it logged."""
    trainer, log = make_trainer(algorithms, **options)
    trainer.fit()
    return trainer, log


def logged(log, name):
    return [float(value) for _, value in log.data.get(name, [])]


def weights(trainer):
    return torch.cat([value.double().flatten() for value in trainer.state.model.state_dict().values()])


@pytest.mark.parametrize('layers', ['head', 'block', ['input', 'stem', 'head']])
def test_an_infinitesimal_eta_changes_nothing(layers):
    plain, _ = train([], dtype=torch.float64, duration='20ba')
    sba, log = train([SBA(layers, eta=1e-30)], dtype=torch.float64, duration='20ba')
    assert 0 < sum(logged(log, 'sba/augmented')) < 20
    difference = (weights(plain) - weights(sba)).abs().max().item()
    assert difference < 1e-9, f'weights differ by {difference} after 20 steps'


def test_one_step_descends_the_gradient_of_eq_11():
    """The update of one augmented step, against autograd on the loss written out on a copy of the model."""
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


def test_coins_are_those_of_should_augment_and_metrics_are_logged_once_a_batch():
    _, log = train([SBA(['block', 'head'])], duration='8ba', device_train_microbatch_size=4)
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(8)]
    layers = [float(sbaf.choose_layer(2, 17, t)) for t in range(8)]
    assert logged(log, 'sba/augmented') == coins
    assert logged(log, 'sba/augment_prob') == [0.5] * 8
    assert logged(log, 'sba/layer') == [layer for layer, coin in zip(layers, coins, strict=True) if coin]
    assert len(logged(log, 'sba/kl')) == sum(coins) and min(logged(log, 'sba/kl')) > 0
    assert all(0 <= share <= 1 for share in logged(log, 'sba/virtual_agreement'))


def test_epoch_granularity_keeps_the_coin_within_an_epoch():
    _, log = train([SBA(granularity='epoch')], duration='6ep')
    per_epoch = torch.tensor(logged(log, 'sba/augmented')).view(6, ROWS // BATCH)
    assert per_epoch[:, 0].tolist() == [float(sbaf.should_augment(0.5, 17, epoch)) for epoch in range(6)]
    assert (per_epoch == per_epoch[:, :1]).all()


def test_epoch_granularity_asks_a_scheduler_once_an_epoch():
    linear = LinearScheduler(alpha_i=0.0, alpha_f=1.0)
    _, log = train([SBA(granularity='epoch', augment_prob=linear)], duration='6ep')
    assert logged(log, 'sba/augment_prob') == pytest.approx([epoch / 6 for epoch in range(6) for _ in range(3)])
    per_epoch = torch.tensor(logged(log, 'sba/augmented')).view(6, 3)
    assert (per_epoch == per_epoch[:, :1]).all()


def test_a_composer_scheduler_is_the_probability_of_its_time():
    _, log = train([SBA(augment_prob=LinearScheduler(alpha_i=0.0, alpha_f=1.0))], duration='6ba')
    assert logged(log, 'sba/augment_prob') == pytest.approx([t / 6 for t in range(6)])


def test_a_scheduler_that_leaves_0_1_is_named():
    with pytest.raises(
        ValueError, match=r'^Expected augment_prob in \[0, 1\], got 1\.5 from LinearScheduler at batch 3\.$'
    ):
        train([SBA(augment_prob=LinearScheduler(alpha_i=0.0, alpha_f=3.0))], duration='6ba')


def test_microbatches_do_not_change_the_expectation():
    """With noise off and statistics from running averages, 1 and 4 microbatches take the same steps, to 1e-6."""

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


def test_hard_target_without_noise_is_the_task_loss_again():
    _, log = train(
        [SBA(target='hard', augment_prob=1.0, eta=0.5, vicinity=NO_NOISE)], duration='3ba', loss_fn=cross_entropy_log
    )
    totals, plain = logged(log, 'loss/train/total'), cross_entropy_log.values
    assert totals == pytest.approx([1.5 * value for value in plain], rel=1e-5)


class _LoggedCrossEntropy:
    def __init__(self):
        self.values = []

    def __call__(self, outputs, target):
        assert outputs.shape == (len(target), CLASSES), 'the task loss sees raw rows only'
        loss = F.cross_entropy(outputs, target)
        self.values.append(loss.item())
        return loss


cross_entropy_log = _LoggedCrossEntropy()


Losses = namedtuple('Losses', ['a', 'b'])


@pytest.mark.parametrize('kind', ['dict with total', 'dict', 'tuple', 'namedtuple'])
def test_the_loss_keeps_its_kind(kind):
    def loss_fn(outputs, target):
        loss = F.cross_entropy(outputs, target)
        if 'tuple' in kind:
            return (loss, 0.1 * loss) if kind == 'tuple' else Losses(loss, 0.1 * loss)
        return {'a': loss, 'b': 0.1 * loss, **({'total': 1.1 * loss} if kind == 'dict with total' else {})}

    trainer, log = train([SBA(eta=1.0)], duration='8ba', loss_fn=loss_fn)
    assert type(trainer.state.loss) is {'tuple': tuple, 'namedtuple': Losses}.get(kind, dict)
    totals, kls = logged(log, 'loss/train/total'), iter(logged(log, 'sba/kl'))
    added = [next(kls) if coin else 0.0 for coin in logged(log, 'sba/augmented')]
    first = logged(log, 'loss/train/loss0' if 'tuple' in kind else 'loss/train/a')
    if 'tuple' in kind:  # the term joins the first loss
        first = [value - term for value, term in zip(first, added, strict=True)]
    else:
        assert logged(log, 'loss/train/sba') == pytest.approx(added, abs=1e-5), (
            'a key on every step, zero when not augmented'
        )
    assert totals == pytest.approx([1.1 * a + term for a, term in zip(first, added, strict=True)], rel=1e-4)


def test_training_improves_and_the_term_makes_predictions_consistent():
    """The loss falls, and virtual predictions come closer to raw ones than without the term's gradient."""
    kls = {}
    for eta in (1e-30, 1.0):
        sba = SBA('block', augment_prob=1.0, eta=eta, vicinity=Vicinity(sigma=0.5))
        trainer, log = train([sba], duration='40ep')
        losses, kl = logged(log, 'loss/train/total'), logged(log, 'sba/kl')
        kls[eta] = sum(kl[-6:]) / 6
        start, end = sum(losses[:6]) / 6, sum(losses[-6:]) / 6
        assert end < 0.8 * start, f'eta {eta}: loss {start:.3f} -> {end:.3f}'
    assert kls[1.0] < 0.5 * kls[1e-30], f'mean KL {kls[1.0]:.4f} with the term, {kls[1e-30]:.4f} without its gradient'


OTHERS = {
    'label smoothing': lambda: LabelSmoothing(0.1),
    'mixup': MixUp,
    'mixup, interpolated loss': lambda: MixUp(interpolate_loss=True),
    'cutmix': CutMix,
    'sam': lambda: SAM(rho=0.05, interval=2),
    'swa': lambda: SWA(swa_start='1ep', swa_end='2ep'),
}


@pytest.mark.parametrize('other', list(OTHERS))
@pytest.mark.parametrize('sba_first', [True, False])
def test_composes_in_either_order(other, sba_first):
    algorithms = [SBA(), OTHERS[other]()] if sba_first else [OTHERS[other](), SBA()]
    trainer, log = train(algorithms, algorithm_passes=[sort_sba_last], duration='3ep')
    without, _ = train([OTHERS[other]()], duration='3ep')
    assert torch.isfinite(weights(trainer)).all()
    assert not torch.equal(weights(trainer), weights(without)), 'SBA had no effect'
    assert logged(log, 'sba/augmented') == [float(sbaf.should_augment(0.5, 17, t)) for t in range(9)]
    assert min(logged(log, 'sba/kl')) > 0


def test_both_passes_of_sam_see_one_coin_and_one_noise():
    seen = []

    class Watch(Algorithm):
        """Keeps what enters the head; with a vanishing rho SAM's second pass has the weights of its first."""

        def match(self, event, state):
            return event == Event.FIT_START

        def apply(self, event, state, logger):
            state.model.module.stem[3].p = 0.0
            state.model.module.fc.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))

    train([SAM(rho=1e-12, interval=1), SBA(vicinity=Vicinity(sigma=1.0)), Watch()], duration='6ba')
    passes = [rows for rows in seen if len(rows) in (BATCH, 5 * BATCH)][-12:]
    assert {len(rows) for rows in passes} == {BATCH, 5 * BATCH}
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        assert torch.allclose(first, second, atol=1e-5)


def test_a_loss_rescaled_after_sba_warns_once_and_names_the_algorithm():
    with pytest.warns(NotIntendedUseWarning, match='^MixUp changed the loss after SBA added its term') as caught:
        train([SBA(augment_prob=1.0), MixUp(interpolate_loss=True)])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error', NotIntendedUseWarning)
        train([SBA(augment_prob=1.0), MixUp(interpolate_loss=True)], algorithm_passes=[sort_sba_last])


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


def test_a_loss_that_changes_logits_in_place_leaves_the_soft_label_alone():
    def loss_fn(outputs, target):
        return F.cross_entropy(outputs.mul_(2.0), target)

    def plain_loss_fn(outputs, target):
        return F.cross_entropy(outputs * 2.0, target)

    runs = [train([SBA(augment_prob=1.0)], loss_fn=fn)[1] for fn in (loss_fn, plain_loss_fn)]
    assert logged(runs[0], 'sba/kl') == logged(runs[1], 'sba/kl')


def test_compiled_by_the_trainer_it_trains_as_eagerly():
    torch._dynamo.reset()
    eager, compiled = (
        weights(train([SBA('block')], compile_config=config)[0]) for config in (None, {'backend': 'eager'})
    )
    torch._dynamo.reset()
    assert torch.allclose(eager, compiled, atol=1e-5), f'weights differ by {(eager - compiled).abs().max()}'


def test_after_a_fit_the_model_has_no_hooks_and_another_fit_augments_again():
    trainer, log = train([SBA(augment_prob=1.0)], duration='1ep')
    torch.jit.script(trainer.state.model.module)  # what an export does; hooks would not pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.state.model.modules())
    trainer.fit(duration='1ep')
    assert len(logged(log, 'sba/kl')) == 6


def test_attached_to_a_second_trainer_it_leaves_the_first_model():
    sba = SBA(augment_prob=1.0)
    first, _ = train([sba])
    train([sba])
    hooks = [module for module in first.state.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


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
        ({'vicinity': {'sigma': -1}}, r'Expected sigma to be a finite number >= 0, got -1\.'),
        ({'vicinity': {'sgima': 1}}, r"Expected vicinity to be a Vicinity or a mapping of .*, got \{'sgima': 1\}\."),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        SBA(**arguments)


@pytest.mark.parametrize('name', ['eta', 'augment_prob'])
def test_settings_without_effect_warn(name):
    with pytest.warns(NoEffectWarning, match=f'^SBA with {name}=0 does not change training'):
        SBA(**{name: 0})


def test_a_misspelt_layer_stops_the_trainer_before_training():
    with pytest.raises(CutLayerError, match="The model has no layer 'blok'; it has 'block'"):
        train([SBA('blok')])


def test_a_layer_that_is_no_cut_point_stops_the_first_batch():
    with pytest.raises(CutLayerError, match="^Layer 'fc' is no cut point: it is the model's output"):
        train([SBA('fc', augment_prob=0.01)])


def test_hard_labels_that_interpolation_does_not_mix_are_refused():
    with pytest.raises(UserError, match="^target='hard' needs the mixed labels of MixUp in the batch"):
        train([MixUp(interpolate_loss=True), SBA(target='hard')])


def test_a_target_key_that_is_not_in_the_batch_is_named():
    with pytest.raises(UserError, match="^Expected target_key to find the labels in a batch, got 'label'"):
        train([SBA(target='hard', augment_prob=1.0, target_key='label')])


def test_gyro_dropout_is_refused():
    with pytest.raises(CutLayerError, match='^SBA and GyroDropout exclude each other'):
        train([GyroDropout(p=0.5, sigma=4, tau=2), SBA()])


def test_binary_cross_entropy_warns():
    with pytest.warns(NotIntendedUseWarning, match='trained with binary cross-entropy'):
        train([SBA()], loss_fn=binary_cross_entropy_with_logits, duration='1ba')


def test_hugging_face_models_are_refused():
    transformers = pytest.importorskip('transformers')
    from composer.models import HuggingFaceModel

    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = HuggingFaceModel(transformers.BertForSequenceClassification(config))
    with pytest.raises(CutLayerError, match='^SBA cannot cut a HuggingFaceModel'):
        Trainer(model=model, algorithms=[SBA()], device='cpu')
