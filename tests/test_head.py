"""The head cut aside: virtual samples pass the head alone, whatever it is made of and whatever the model returns.

Run: pytest tests/test_head.py
"""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import composer_sba.functional as sbaf
from composer_sba import SBA, LatentExpander, Vicinity
from composer_sba.errors import CutLayerError, UserError
from operator_count import operators_of_step
from small_training import logged, trainer_of, weights

N, K, Q = 6, 5, 128
GAUSSIAN = Vicinity(gaussian_fraction=1.0, sigma=0.7)


class Net(nn.Sequential):
    """Counts the rows that reach the layers after the head."""

    def __init__(self):
        super().__init__(nn.Linear(8, Q), nn.ReLU(), nn.Linear(Q, K), nn.LogSoftmax(-1))
        self.rows = []
        self[3].register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.rows.append(len(args[0]))


def expanded(model, x, vicinity, step=0):
    expander = LatentExpander(model, 'head', 4, vicinity, seed=3)
    try:
        with expander.armed(step):
            raw, virtual = expander.split(model(x))
    finally:
        expander.remove()
    return raw, virtual


def test_virtual_rows_pass_the_head_alone():
    model, x = Net().double(), torch.randn(N, 8, dtype=torch.float64)
    latent = model[1](model[0](x))
    outputs = model(x)
    expander = LatentExpander(model, 'head', 4, Vicinity(sigma=1e-4), seed=3)
    with expander.armed(0):
        armed = model(x)
    raw, virtual = expander.split(armed)
    seed = expander.seed(0)
    expander.remove()
    assert model.rows == [N, N]
    assert torch.allclose(armed, outputs, atol=1e-12)
    expected = model[2](Vicinity(sigma=1e-4).sample(latent, 4, torch.Generator().manual_seed(seed)))
    assert torch.allclose(virtual, expected, atol=1e-12), f'{(virtual - expected).abs().max()}'
    assert torch.allclose(raw, model[2](latent), atol=1e-12)
    moved = (virtual - raw).abs().amax((1, 2))
    assert (moved[:2] < 0.01).all() and (moved[2:] > 0.05).all(), moved


def test_steps_draw_anew_and_repeat():
    model, x = Net(), torch.randn(N, 8)
    first = expanded(model, x, GAUSSIAN)[1]
    assert torch.equal(first, expanded(model, x, GAUSSIAN)[1])
    assert not torch.equal(first, expanded(model, x, GAUSSIAN, step=1)[1])
    state = torch.get_rng_state()
    expanded(model, x, GAUSSIAN)
    assert torch.equal(state, torch.get_rng_state())


def test_activation_checkpointing_repeats_the_points():
    x = torch.randn(N, 8, dtype=torch.float64)
    plain = Net().double()
    checkpointed = copy.deepcopy(plain)
    for model, forward in (plain, plain), (checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=False)):
        expander = LatentExpander(model, 'head', 4, seed=3)
        with expander.armed(0):
            sbaf.soft_label_kl(*expander.split(forward(x))).backward()
        expander.remove()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), f'{(a.grad - b.grad).abs().max()}'


def test_bfloat16_gives_the_float32_divergence():
    model, x = Net(), torch.randn(64, 8)
    exact = sbaf.soft_label_kl(*expanded(model, x, Vicinity(sigma=0.5))).item()
    with torch.autocast('cpu', torch.bfloat16):
        raw, virtual = expanded(model, x, Vicinity(sigma=0.5))
    assert raw.dtype == virtual.dtype == torch.bfloat16
    assert sbaf.soft_label_kl(raw, virtual).item() == pytest.approx(exact, rel=0.05)


def test_a_compiled_network_draws_the_same_points():
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, Q), nn.ReLU(), nn.Linear(Q, K)), torch.randn(N, 8)
    expected = expanded(model, x, Vicinity(sigma=0.5))
    expander = LatentExpander(model, 'head', 4, Vicinity(sigma=0.5), seed=3)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    with expander.armed(0):
        ours = expander.split(compiled(x))
    sbaf.soft_label_kl(*ours).backward()
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5), f'{(mine - theirs).abs().max()}'
    assert model[2].weight.grad.abs().sum() > 0
    torch._dynamo.reset()


class Lora(nn.Module):
    """A linear layer and a low-rank term beside it, as PEFT builds them."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank term of its own, as loralib builds them."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 8)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) / 8)

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class LoraWeight(nn.Module):
    """A low-rank term as a parametrization."""

    def __init__(self, base):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features) / 8), nn.Parameter(torch.randn(3, 2) / 8)

    def forward(self, weight):
        return weight + self.b @ self.a


def lora_weight(base):
    nn.utils.parametrize.register_parametrization(base, 'weight', LoraWeight(base))
    return base


HEADS = {
    'Linear': lambda base: base,
    'spectral norm': parametrizations.spectral_norm,
    'spectral norm by hooks': nn.utils.spectral_norm,
    'weight norm': parametrizations.weight_norm,
    'weight norm by hooks': nn.utils.weight_norm,
    'orthogonal': parametrizations.orthogonal,
    'spectral norm of a weight norm': lambda base: parametrizations.spectral_norm(parametrizations.weight_norm(base)),
    'LoRA around the layer': Lora,
    'LoRA in the layer': LoraLinear,
    'LoRA of the weight': lora_weight,
    'checkpointed': checkpoint_wrapper,
}


@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated')
@pytest.mark.parametrize('head', HEADS)
def test_a_vanishing_eta_changes_no_weight_and_no_buffer_whatever_the_head_is_made_of(head):
    def fit(algorithms):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), HEADS[head](nn.Linear(256, 3))).double()
        data = TensorDataset(torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,)))
        trainer, log = trainer_of(ComposerClassifier(network, num_classes=3), data, 8, algorithms, max_duration='3ep')
        trainer.fit()
        return weights(trainer), logged(log, 'sba/kl')

    plain, _ = fit([])
    ours, kl = fit([SBA(augment_prob=1.0, eta=1e-30)])
    assert len(kl) == 12 and min(kl) > 0
    assert torch.allclose(ours, plain, rtol=0, atol=1e-13), f'weights differ by {(ours - plain).abs().max()}'


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


torch.utils._pytree.register_pytree_node(
    Output, lambda output: ([output.logits, output.features], None), lambda values, _: Output(*values)
)
Pair = namedtuple('Pair', ['logits', 'auxiliary'])
OUTPUTS = {
    'a dict': lambda logits, features: {'features': features, 'logits': logits},
    'a tuple': lambda logits, features: (features, logits),
    'a named tuple': Pair,
    'a dataclass': Output,
    'log-probabilities': lambda logits, features: logits.log_softmax(-1),
    'tokens': lambda logits, features: logits[:, None],
}


class Structured(ComposerModel):
    """Returns its logits in a structure, and computes its loss in forward."""

    def __init__(self, structure):
        super().__init__()
        self.auxiliary, self.trunk, self.fc = nn.Linear(6, 3), nn.Linear(6, 16), nn.Linear(16, 3)
        self.structure = structure

    def forward(self, batch):
        features = self.trunk(batch[0]).relu()
        logits = self.fc(features)
        self.cross_entropy = F.cross_entropy(logits, batch[1])
        return OUTPUTS[self.structure](logits, features)

    def loss(self, outputs, batch):
        return self.cross_entropy

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch) if outputs is None else outputs


def fit_structured(structure, algorithms):
    torch.manual_seed(0)
    model = Structured(structure).double()
    data = TensorDataset(torch.randn(32, 6, dtype=torch.float64), torch.randint(3, (32,)))
    trainer, log = trainer_of(model, data, 8, algorithms, max_duration='3ep')
    trainer.fit()
    return weights(trainer), logged(log, 'sba/kl')


@pytest.mark.parametrize('structure', OUTPUTS)
def test_a_model_may_return_its_logits_in_any_structure_and_compute_its_loss_itself(structure):
    plain, _ = fit_structured(structure, [])
    vanishing, kl = fit_structured(structure, [SBA(augment_prob=1.0, eta=1e-30)])
    assert len(kl) == 12 and min(kl) > 0
    assert torch.allclose(vanishing, plain, rtol=0, atol=1e-12), f'weights differ by {(vanishing - plain).abs().max()}'
    trained, ours = fit_structured(structure, [SBA(augment_prob=1.0, eta=10.0)])
    assert not torch.allclose(trained, plain, atol=1e-4)
    assert sum(ours[-4:]) < sum(kl[-4:]), f'divergence {ours[-4:]} with eta = 10, {kl[-4:]} without'


class Changed(Structured):
    def forward(self, batch):
        return {'logits': super().forward(batch)[1] / 2}


class Twice(Structured):
    def forward(self, batch):
        super().forward(batch)
        return super().forward(batch)[1]


@pytest.mark.parametrize(
    ('model', 'message'),
    [(Changed, "makes (8, 3), which is not among the model's outputs, (8, 3): it is not the head"),
     (Twice, 'the last nn.Linear runs 2 times in one forward pass')],
)  # fmt: skip
def test_a_last_linear_layer_that_is_not_the_head_is_refused(model, message):
    data = TensorDataset(torch.randn(8, 6), torch.randint(3, (8,)))
    trainer, _ = trainer_of(model('a tuple'), data, 8, [SBA(augment_prob=1.0)], max_duration='1ep')
    with pytest.raises(CutLayerError) as refusal:
        trainer.fit()
    assert message in str(refusal.value) and '\n' not in str(refusal.value), refusal.value


class Reentrant(Structured):
    def forward(self, batch):
        features = self.trunk(batch[0]).relu()
        logits = checkpoint(lambda rows: self.fc(rows), features, use_reentrant=True)
        self.cross_entropy = F.cross_entropy(logits, batch[1])
        return logits


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad=True')  # in the check, without gradients
def test_a_head_in_reentrant_checkpointing_is_refused_as_no_gradient_would_leave_it():
    data = TensorDataset(torch.randn(8, 6), torch.randint(3, (8,)))
    trainer, _ = trainer_of(Reentrant('a tuple'), data, 8, [SBA(augment_prob=1.0)], max_duration='1ep')
    with pytest.raises(CutLayerError, match='reentrant activation checkpointing'):
        trainer.fit()


def test_a_hard_loss_needs_one_tensor_of_logits():
    with pytest.raises(UserError, match="^target='hard' needs a model whose output is one tensor of logits, got dict"):
        fit_structured('a dict', [SBA(augment_prob=1.0, target='hard')])


class Tokens(ComposerModel):
    """Returns the logits of each token, (N, T, K), and computes its loss from them."""

    def __init__(self, scale):
        super().__init__()
        self.trunk, self.fc, self.scale = nn.Linear(6, 16), nn.Linear(16, 3), scale

    def forward(self, batch):
        return self.fc(self.trunk(batch[0]).relu())

    def loss(self, outputs, batch):
        return self.scale * F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())

    def eval_forward(self, batch, outputs=None):
        return self.forward(batch) if outputs is None else outputs


def test_a_hard_loss_of_tokens_is_the_models_own():
    def fit(eta, scale):
        torch.manual_seed(0)
        model = Tokens(scale).double()
        data = TensorDataset(torch.randn(32, 5, 6, dtype=torch.float64), torch.randint(3, (32, 5)))
        sba = SBA(augment_prob=1.0, eta=eta, target='hard', vicinity=Vicinity(1.0, sigma=0.0))
        trainer, _ = trainer_of(model, data, 8, [sba], max_duration='3ep')
        trainer.fit()
        return weights(trainer)

    without_noise, twice = fit(1.0, 1.0), fit(1e-30, 2.0)  # the loss of the copies is that of the raw rows
    assert torch.allclose(without_noise, twice, atol=1e-12), f'{(without_noise - twice).abs().max()}'


@pytest.mark.parametrize('fold', [1, 4, 32])
def test_an_augmented_step_dispatches_few_operators_at_any_fold(fold):
    network = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 10))
    batch = torch.randn(128, 32), torch.randint(10, (128,))
    plain = operators_of_step(network, *batch).names
    expander = LatentExpander(network, 'head', fold)
    idle = operators_of_step(network, *batch).names
    augmented = operators_of_step(network, *batch, expander).names
    expander.remove()
    more = len(augmented) - len(plain)
    print(f'M = {fold}: {len(plain)} operators in a plain step, {more} more in an augmented one')
    assert idle == plain
    assert more <= 36, sorted(augmented)
