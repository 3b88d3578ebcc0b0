"""LatentExpander: the armed forward pass against reference.py (float64, 1e-10), and the network it leaves behind.

Run: pytest tests/test_latent.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

import composer_sba.functional as sbaf
import reference
from composer_sba import LatentExpander, Vicinity
from composer_sba.errors import CutLayerError
from composer_sba.operators import draw_by_seed, packed

N, M = 6, 3
GAUSSIAN = Vicinity(1.0, sigma=0.5, noise_scale='absolute')


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.norm(self.trunk(x)))))


def make(dropout=0.0, dtype=torch.float64):
    model = Net(dropout).to(dtype)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model, torch.randn(N, 4, dtype=dtype), torch.randint(3, (N,))


def predict(model, x, layers, step=0, vicinity=GAUSSIAN, **options):
    expander = LatentExpander(model, layers, M, vicinity, **options)
    with expander.armed(step):
        out = model(x)
    expander.remove()
    return expander.split(out)


def test_the_loss_and_its_gradients_are_eq_11_with_batch_norm_above_the_cut():
    model, x, target = make()
    raw, virtual = predict(model, x, 'trunk')
    ours = F.cross_entropy(raw, target) + 0.7 * sbaf.soft_label_kl(raw, virtual)

    latent = model.trunk(x)
    stream = LatentExpander(model, 'trunk', M, GAUSSIAN)
    stream.arm(0)
    noise = torch.empty(M, N, 5, dtype=torch.float64).normal_(
        0, 0.5, generator=torch.Generator().manual_seed(stream.seed(0))
    )
    stream.remove()
    rows = [latent[i] for i in range(N)]
    rows += [reference.gaussian_point(latent[i], noise[j, i], 1.0, torch.eye(5)) for j in range(M) for i in range(N)]
    normed = reference.batch_norm_by_raw_rows(torch.stack(rows), N, model.norm.weight, model.norm.bias, model.norm.eps)
    logits = torch.relu(normed) @ model.fc.weight.T + model.fc.bias
    theirs = reference.sba_loss(logits[:N], logits[N:].view(M, N, 3), target, eta=0.7)

    assert abs(ours.item() - theirs.item()) < 1e-10, f'{ours.item()} against {theirs.item()}'
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert (a - b).abs().max() < 1e-10, f'gradients differ by {(a - b).abs().max()}'


@pytest.mark.parametrize('layers', ['input', 'trunk', 'norm', 'head'])
def test_raw_rows_and_running_statistics_are_those_of_a_plain_step(layers):
    model, x, _ = make(dropout=0.5)
    plain = copy.deepcopy(model)
    torch.manual_seed(5)
    expected = plain(x)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    raw, _ = predict(model, x, layers)
    assert torch.equal(raw, expected), f'raw rows differ by {(raw - expected).abs().max()}'
    assert torch.equal(torch.get_rng_state(), after), 'the global random stream moved differently'
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_norm_stats_all_uses_every_row():
    model, x, _ = make()
    plain = copy.deepcopy(model)
    raw, _ = predict(model, x, 'trunk', norm_stats='all')
    assert not torch.allclose(raw, plain(x))
    assert not torch.equal(model.norm.running_mean, plain.norm.running_mean)


@pytest.mark.parametrize(
    'norm', [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False),
             nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4)]
)  # fmt: skip
def test_virtual_rows_equal_to_raw_rows_are_normalized_alike(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    x = torch.randn(N, 3, 8, 8, dtype=torch.float64)
    raw, virtual = predict(model, x, '0', vicinity=Vicinity(1.0, sigma=0.0))
    assert torch.allclose(virtual, raw.expand(M, N, 3), atol=1e-12), f'{(virtual - raw).abs().max()}'


def test_evaluation_mode_normalizes_with_running_statistics():
    model, x, _ = make()
    model.eval()
    raw, virtual = predict(model, x, 'trunk', vicinity=Vicinity(1.0, sigma=0.0))
    assert torch.equal(raw, model(x))
    assert torch.allclose(virtual, raw.expand(M, N, 3))


class Activated(nn.BatchNorm2d):
    """Does more than normalize, as timm's fused layers do."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Ghost(nn.Module):
    """Normalizes chunks of the batch, as Composer's GhostBatchNorm does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.cat([self.norm(chunk) for chunk in x.split(N)])


@pytest.mark.parametrize(
    ('norm', 'reason'), [(Activated(4), 'Activated does more than normalize'), (Ghost(), 'it sees 6 rows, not 24')]
)
def test_normalization_whose_raw_rows_cannot_be_kept_is_refused_before_training(norm, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(N, 3, 8, 8)
    expander = LatentExpander(model, '0', M)
    with pytest.raises(CutLayerError, match=f"norm_stats='raw' cannot be had in '1[.norm]*': {reason}"):
        expander.check(lambda: model(x))
    expander.remove()
    LatentExpander(model, '0', M, norm_stats='all').check(lambda: model(x))
    LatentExpander(model, 'head', M).check(lambda: model(x))


def test_a_dropout_module_that_runs_twice_draws_twice():
    drop = nn.Dropout(0.5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop = nn.Identity(), drop

        def forward(self, x):
            h = self.body(x)
            return (self.drop(h) > 0).float() * 2 + (self.drop(h) > 0).float()  # 0 to 3: which of the masks kept it

    _, virtual = predict(Twice(), torch.ones(64, 100), 'body', vicinity=Vicinity(1.0, sigma=0.0))
    agree = ((virtual == 0) | (virtual == 3)).float().mean().item()
    assert agree == pytest.approx(0.5, abs=0.03), f'masks agree in {agree:.3f} of the places'


@pytest.mark.parametrize('layer', [nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.RReLU(), StochasticDepth(0.5, 'row')])
def test_random_layers_above_the_cut_leave_raw_rows_and_the_global_stream_alone(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 3)).double()
    x = torch.randn(N, 8, dtype=torch.float64)
    torch.manual_seed(3)
    expected, after = model(x), torch.get_rng_state()
    torch.manual_seed(3)
    raw, virtual = predict(model, x, '0', vicinity=Vicinity(1.0, sigma=0.0))
    assert torch.allclose(raw, expected, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.allclose(virtual[0], virtual[1]), 'virtual rows draw their own'


def test_a_forward_pass_that_breaks_above_the_cut_leaves_nothing_behind():
    model, x, _ = make()
    expander = LatentExpander(model, 'trunk', M)
    handle = model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError), expander.armed(0):
        model(x)
    handle.remove()
    assert len(model(x)) == N
    model.eval()
    assert len(model(x)) == N


@pytest.mark.parametrize('layer', [nn.Dropout(0.4), nn.Dropout1d(0.4), nn.Dropout(0.4, inplace=True), nn.Dropout(1.0)])
def test_dropout_above_the_cut_drops_and_rescales_virtual_rows(layer):
    model = nn.Sequential(nn.Identity(), layer, nn.Flatten())
    x = torch.ones(64, 32, 32)
    _, virtual = predict(model, x, '0', vicinity=Vicinity(1.0, sigma=0.0))
    values = virtual.view(M, 64, 32, 32)
    dropped = (values == 0).double().mean().item()
    assert dropped == pytest.approx(layer.p, abs=0.02), f'{dropped:.3f} dropped'
    if layer.p < 1:
        assert values.max().item() == pytest.approx(1 / 0.6)
    whole_channels = (values == values[..., :1]).all().item()
    assert whole_channels == (isinstance(layer, nn.Dropout1d) or layer.p == 1)


def test_noise_repeats_with_the_step_and_differs_otherwise():
    model, x, _ = make()
    first = predict(model, x, 'head', step=3)[1]
    torch.manual_seed(123)
    assert torch.equal(first, predict(model, x, 'head', step=3)[1])
    assert not torch.equal(first, predict(model, x, 'head', step=4)[1])
    assert not torch.equal(first, predict(model, x, 'head', step=3, seed=1)[1])
    assert not torch.equal(first[0], first[1]), 'copies differ from one another'


def test_unarmed_the_network_is_what_it_was():
    model, x, _ = make()
    expected = copy.deepcopy(model)(x)
    expander = LatentExpander(model, ['trunk', 'head'], M)
    assert torch.equal(model(x), expected)
    with pytest.raises(ZeroDivisionError), expander.armed(0):
        model(x)
        raise ZeroDivisionError
    assert len(model(x)) == N, 'an exception inside the block leaves the network armed'
    expander.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_layer_of_the_set_is_cut_and_only_one_at_a_time():
    model, x, _ = make()
    expander = LatentExpander(model, ['input', 'trunk', 'head'], M)
    chosen = set()
    for step in range(20):
        chosen.add(expander.arm(step))
        raw, virtual = expander.split(model(x))
        assert raw.shape == (N, 3) and virtual.shape == (M, N, 3)
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_activation_checkpointing_repeats_the_noise(use_reentrant):
    def gradients(checkpointed):
        torch.manual_seed(0)
        model, x, target = make(dropout=0.3)
        body = nn.Sequential(model.trunk, model.norm, nn.ReLU(), model.drop)
        expander = LatentExpander(model, 'trunk', M, Vicinity())
        with expander.armed(step=2):
            x.requires_grad_()  # reentrant checkpointing asks for it
            hidden = checkpoint(body, x, use_reentrant=use_reentrant) if checkpointed else body(x)
            raw, virtual = expander.split(model.fc(hidden))
            (F.cross_entropy(raw, target) + sbaf.soft_label_kl(raw, virtual)).backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-12), f'{(plain - checkpointed).abs().max()}'


@pytest.mark.parametrize('layers', ['head', 'conv'])
def test_channels_last_and_autocast_give_the_float32_kl(layers):
    class ConvNet(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.add_module('conv', nn.Conv2d(3, 16, 3))
            self.add_module('norm', nn.BatchNorm2d(16))
            self.add_module('pool', nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()))
            self.add_module('fc', nn.Linear(64, 10))

    model, x = ConvNet(), torch.randn(16, 3, 12, 12)
    exact = sbaf.soft_label_kl(*predict(model, x, layers, vicinity=Vicinity(sigma=0.5))).item()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    ours = sbaf.soft_label_kl(*predict(last, x_last, layers, vicinity=Vicinity(sigma=0.5))).item()
    assert ours == pytest.approx(exact, rel=1e-4), 'channels_last'
    for dtype, tolerance in (torch.bfloat16, 0.05), (torch.float16, 0.01):
        with torch.autocast('cpu', dtype):
            raw, virtual = predict(model, x, layers, vicinity=Vicinity(sigma=0.5))
        assert raw.dtype == dtype
        assert sbaf.soft_label_kl(raw, virtual).item() == pytest.approx(exact, rel=tolerance), dtype


@pytest.mark.parametrize('first_armed', [True, False])
@pytest.mark.parametrize(('layers', 'graphs'), [('head', 2), ('trunk', 2), ('norm', 2), (['trunk', 'head'], 3)])
def test_compiled_models_expand_with_one_graph_for_plain_steps_and_one_for_each_cut(layers, graphs, first_armed):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    model, x, _ = make(dtype=torch.float32)
    eager = copy.deepcopy(model)
    expander = LatentExpander(model, layers, M, GAUSSIAN)
    compiled = torch.compile(model, backend=counter)
    for step in range(10):
        if (step % 2 == 0) == first_armed:
            with expander.armed(step):
                raw, virtual = expander.split(compiled(x))
            expected = predict(eager, x, layers, step=step)
            assert torch.allclose(raw, expected[0], atol=1e-5) and torch.allclose(virtual, expected[1], atol=1e-5)
        else:
            assert torch.allclose(compiled(x), eager(x), atol=1e-5)
    assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_the_operator_of_compiled_models_is_the_eager_expansion():
    latent, seed = torch.randn(N, 5, requires_grad=True), torch.tensor(7)
    vicinity = Vicinity(dropout=0.3)
    arguments = (latent, seed, M, packed(vicinity))
    torch.library.opcheck(draw_by_seed, arguments)
    ours, theirs = draw_by_seed(*arguments)[0], vicinity.expand(latent, M, torch.Generator().manual_seed(7))
    assert torch.equal(ours, theirs)
    gradient = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(rows, latent, gradient)[0] for rows in (ours, theirs)))


@pytest.mark.parametrize(
    ('layers', 'hooked'), [('head', set()), ('norm', {'drop'}), (['norm', 'input'], {'drop', 'norm'})]
)
def test_after_the_check_no_hooks_are_left_on_layers_below_every_cut(layers, hooked):
    model, x, _ = make(dropout=0.5)
    expander = LatentExpander(model, layers, M)

    def hooked_layers():
        return {name for name in ('norm', 'drop') if getattr(model, name)._forward_pre_hooks}

    expander.check(lambda: model(x))
    assert hooked_layers() == hooked
    plain = copy.deepcopy(Net(dropout=0.5).double())
    plain.load_state_dict(model.state_dict())
    for step in range(3):
        torch.manual_seed(step)
        expected = plain(x)
        torch.manual_seed(step)
        with expander.armed(step):
            raw, _ = expander.split(model(x))
        assert torch.equal(raw, expected), f'raw rows differ by {(raw - expected).abs().max()}'
    assert torch.equal(model.norm.running_var, plain.norm.running_var)
    expander.attach()
    assert hooked_layers() == {'norm', 'drop'}


def test_a_layer_that_does_not_run_in_the_check_keeps_its_hooks():
    class InTraining(Net):
        def forward(self, x):
            h = torch.relu(self.norm(self.trunk(x)))
            return self.fc(self.drop(h) if self.training else h)

    model, x = InTraining(0.5).double(), torch.randn(N, 4, dtype=torch.float64)
    expander = LatentExpander(model, 'norm', M)
    expander.check(lambda: model(x))
    torch.manual_seed(0)
    expected, after = model(x), torch.get_rng_state()
    torch.manual_seed(0)
    with expander.armed(0):
        assert torch.equal(expander.split(model(x))[0], expected)
    assert torch.equal(torch.get_rng_state(), after), 'virtual rows draw from the global random stream'


def test_a_layer_above_the_cut_may_work_in_place():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    raw, virtual = predict(model, x, '0', vicinity=Vicinity(1.0, sigma=0.0))
    (virtual.sum() / M).backward()
    ours = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert torch.allclose(ours, model[0].weight.grad, atol=1e-12)
    assert torch.equal(raw, model(x))


def test_an_armed_pass_without_the_layer_is_an_error_not_silence():
    model, x, _ = make()
    expander = LatentExpander(model, 'trunk', M)
    expander.remove()
    with expander.armed(0):
        out = model(x)
    with pytest.raises(
        RuntimeError, match=r"No virtual samples: no layer of \['trunk'\] ran in the armed forward pass"
    ):
        expander.split(out)


def test_a_copied_model_is_not_tied_to_the_original():
    model, x, _ = make()
    expander = LatentExpander(model, 'head', M)
    copied = copy.deepcopy(model)  # as Composer's SWA does
    with expander.armed(0):
        assert len(model(x)) == (1 + M) * N
        assert len(copied(x)) == N


@pytest.mark.parametrize(('fold', 'got'), [(0, '0'), (-1, '-1'), (2.0, r'2\.0'), (True, 'True')])
def test_fold_is_checked(fold, got):
    with pytest.raises(ValueError, match=rf'^Expected fold to be an integer >= 1, got {got}\.$'):
        LatentExpander(Net(), fold=fold)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'seed': -1}, 'Expected seed to be an integer >= 0, got -1'),
        ({'seed': 1.5}, 'Expected seed to be an integer >= 0, got 1.5'),
        ({'layers': []}, r'Expected layers to be a layer name or a list of them, got \[\]'),
        ({'vicinity': {'sigma': -1}}, 'Expected sigma to be a finite number >= 0, got -1'),
        ({'norm_stats': 'none'}, "Expected norm_stats to be one of raw, all, got 'none'"),
    ],
)
def test_other_arguments_are_checked_too(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        LatentExpander(Net(), **arguments)
