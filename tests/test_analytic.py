"""AnalyticHead and SBA(estimator='analytic'): against the function itself, and against plain steps.

Run: pytest tests/test_analytic.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from composer.algorithms import SAM, SWA, MixUp
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, Vicinity, sort_sba_last
from composer_sba.analytic import AnalyticHead
from composer_sba.errors import CutLayerError
from small_training import logged, trainer_of, weights

ROWS, CLASSES = 16, 5
NOT_RESCALED = Vicinity(0.25, sigma=0.5, dropout=0.3, rescale=False)


class Net(nn.Module):
    """A convolutional head behind pooling, with batch norm and dropout below it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))


def gradients_of(model, x, y, head=None, body=None):
    """Gradients of cross-entropy plus twice the divergence: by the head's hook, or by the function itself."""
    model.zero_grad()
    torch.manual_seed(1)
    if head is None:
        latent = model.stem(x).mean((2, 3))
        logits = model.fc(latent)
        kl = sbaf.expected_soft_label_kl(latent, model.fc, logits, NOT_RESCALED)
    else:
        head.arm(0)
        logits = (body or model)(x)
        kl = head.kl()
    (2 * kl + F.cross_entropy(logits, y)).backward()
    if head is not None:
        head.disarm()
    return [parameter.grad.clone() for parameter in model.parameters()]


def make_net(dtype=torch.float64):
    return Net().to(dtype), torch.randn(6, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (6,))


@pytest.mark.parametrize('how', ['eager', 'checkpointed', 'compiled', 'copied'])
def test_the_hook_gives_the_gradients_of_the_function(how):
    torch._dynamo.reset()
    model, x, y = make_net()
    expected = gradients_of(model, x, y)
    head = AnalyticHead(model, NOT_RESCALED)
    if how == 'copied':  # as Composer's SWA does
        head.arm(0)
        copy.deepcopy(model)(x)
        with pytest.raises(RuntimeError, match="the layer 'head' did not run in the armed forward pass"):
            head.kl()
    body = {
        'checkpointed': lambda x: checkpoint(model, x, use_reentrant=False),
        'compiled': torch.compile(model, backend='eager'),
    }.get(how)
    for _ in range(2):
        for a, b in zip(gradients_of(model, x, y, head, body), expected, strict=True):
            assert (a - b).abs().max() < 1e-10, f'{(a - b).abs().max()}'
        model(x)
        with pytest.raises(RuntimeError, match='No expected divergence'):
            head.kl()
    head.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch._dynamo.reset()


def test_a_head_without_gradients_is_refused():
    model, x, _ = make_net()
    AnalyticHead(model).arm(0)
    with pytest.raises(CutLayerError, match="^estimator='analytic' cannot learn from a head that runs without"):
        checkpoint(model, x.requires_grad_(), use_reentrant=True)


def test_a_scaled_loss_keeps_small_gradients_of_half_precision():
    """With float16 gradients computed before the GradScaler's factor, these would be zero."""
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 3)).half()
    latent = torch.rand(4, 8).half().requires_grad_()
    head = AnalyticHead(model, Vicinity(1.0, sigma=1e-3))
    head.arm(0)
    model(latent)
    (head.kl() * 2**16).backward()
    assert latent.grad.dtype == torch.float16 and latent.grad.abs().max() > 0


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), "the model's predictions are not those that its last"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Flatten(), nn.Unflatten(1, (2, 3)), Mean()),
         r'the last nn.Linear gets an input of shape \(5, 2, 2\), not \(N, Q\)'),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU()), 'has 6 outputs, the model 3 logits: it is not the head'),
    ],
)  # fmt: skip
def test_models_whose_logits_are_not_the_heads_are_refused(build, message):
    model, x = build(), torch.randn(5, 4)
    with pytest.raises(CutLayerError, match=message) as refusal:
        AnalyticHead(model).check(lambda: model(x))
    assert '\n' not in str(refusal.value)
    log_softmax = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1))
    AnalyticHead(log_softmax).check(lambda: log_softmax(x))  # the same predictions


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


def make_trainer(algorithms, *, dtype=torch.float32, duration='4ba', **options):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2 * ROWS, 3, 8, 8, dtype=dtype), torch.randint(CLASSES, (2 * ROWS,)))
    model = ComposerClassifier(Net().to(dtype), num_classes=CLASSES, **options.pop('model', {}))
    return trainer_of(model, data, ROWS, algorithms, max_duration=duration, **options)


def train(algorithms, **options):
    trainer, log = make_trainer(algorithms, **options)
    trainer.fit()
    return trainer, log


def test_one_step_descends_the_gradient():
    trainer, log = make_trainer(
        [SBA(augment_prob=1.0, eta=3.0, estimator='analytic')], dtype=torch.float64, duration='1ba'
    )
    before = copy.deepcopy(trainer.state.model.module)
    before.stem[3].p = trainer.state.model.module.stem[3].p = 0.0
    x, y = next(iter(trainer.state.train_dataloader))
    trainer.fit()
    latent = before.stem(x).mean((2, 3))
    logits = before.fc(latent)
    kl = sbaf.expected_soft_label_kl(latent, before.fc, logits, Vicinity())
    (F.cross_entropy(logits, y) + 3 * kl).backward()
    for start, end in zip(before.parameters(), trainer.state.model.module.parameters(), strict=True):
        assert (start - 0.1 * start.grad - end).abs().max() < 1e-10
    assert logged(log, 'sba/kl') == pytest.approx([kl.item()])
    assert logged(log, 'loss/train/total') == pytest.approx([(F.cross_entropy(logits, y) + 3 * kl).item()])


def test_what_is_logged_and_that_raw_rows_are_those_of_a_plain_step():
    plain, _ = train([], dtype=torch.float64, duration='20ba')
    sba, log = train([SBA(eta=1e-30, estimator='analytic')], dtype=torch.float64, duration='20ba')
    coins = [float(sbaf.should_augment(0.5, 17, t)) for t in range(20)]
    assert torch.allclose(weights(plain), weights(sba), atol=1e-12, rtol=0)
    assert logged(log, 'sba/augmented') == coins
    assert len(logged(log, 'sba/kl')) == sum(coins) and min(logged(log, 'sba/kl')) > 0
    assert logged(log, 'sba/layer') == [0.0] * int(sum(coins))
    assert 'sba/virtual_agreement' not in log.data


def test_microbatches_change_nothing():
    """Nothing is random in the term; noise in absolute units, since the root mean square is that of a microbatch."""

    def final(microbatch):
        vicinity = Vicinity(sigma=0.5, noise_scale='absolute')
        sba = SBA(augment_prob=1.0, eta=2.0, vicinity=vicinity, estimator='analytic')
        trainer, log = make_trainer([sba], dtype=torch.float64, device_train_microbatch_size=microbatch)
        trainer.state.model.module.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double().requires_grad_(False)
        for parameter in trainer.state.model.module.stem.parameters():
            nn.init.constant_(parameter, 0.1)
        trainer.fit()
        return trainer.state.model.module.fc.weight.detach(), logged(log, 'sba/kl')

    (whole, kls), (parts, kls_of_parts) = final(16), final(4)
    assert (whole - parts).abs().max() < 1e-9
    assert kls == pytest.approx(kls_of_parts)


@pytest.mark.parametrize(
    'other', [lambda: SAM(rho=0.05), lambda: SWA(swa_start='1ep', swa_end='2ep'), lambda: MixUp(interpolate_loss=True)]
)
@pytest.mark.filterwarnings('ignore:SAM has', 'ignore:SWA has', 'ignore:Some targets have less')
def test_composes(other):
    sba = SBA(augment_prob=1.0, estimator='analytic')
    trainer, log = train([sba, other()], duration='3ep', algorithm_passes=[sort_sba_last])
    assert torch.isfinite(weights(trainer)).all()
    assert len(logged(log, 'sba/kl')) == 6 and min(logged(log, 'sba/kl')) > 0
    assert not any(module._forward_hooks for module in trainer.state.model.modules())


def test_a_step_that_fails_leaves_nothing_behind():
    def loss_fn(outputs, target):
        raise ZeroDivisionError

    sba = SBA(augment_prob=1.0, estimator='analytic')
    trainer, _ = make_trainer([sba], model={'loss_fn': loss_fn})
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    trainer.eval(DataLoader(TensorDataset(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), 4))
    with pytest.raises(RuntimeError, match='No expected divergence'):
        sba._attached.kl()


def test_compiled_by_the_trainer_it_trains_as_eagerly():
    torch._dynamo.reset()
    eager, compiled = (
        weights(train([SBA(estimator='analytic')], compile_config=config)[0]) for config in (None, {'backend': 'eager'})
    )
    torch._dynamo.reset()
    assert torch.allclose(eager, compiled, atol=1e-5), f'weights differ by {(eager - compiled).abs().max()}'


def test_the_estimator_is_in_repr_and_hyperparameters():
    sba = SBA(estimator='analytic')
    assert "estimator='analytic'" in repr(sba) and sba.local_hparams['estimator'] == 'analytic'
    assert SBA().local_hparams['estimator'] == 'sampled'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'estimator': 'exact'}, r"Expected estimator to be one of sampled, analytic, got 'exact'\."),
        ({'layers': 'stem'}, r"Expected layers to be 'head' for estimator='analytic', got 'stem'\."),
        ({'layers': ['head', 'stem']}, r"Expected layers to be 'head' for .*, got \['head', 'stem'\]\."),
        ({'target': 'hard'}, r"Expected target to be 'soft' for estimator='analytic', got 'hard'\."),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}$'):
        SBA(**{'estimator': 'analytic', **arguments})
    SBA(layers=['head'], estimator='analytic')
