"""Layers above the cut that depend on the batch: raw rows pass them as in a plain step, virtual rows by rules.

Run: pytest tests/test_batch_layers.py
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchvision.ops import StochasticDepth

from composer_sba import LatentExpander, Vicinity
from composer_sba.errors import CutLayerError
from cut_network import M, N, Net, make, predict


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
    """Batch norm that does more than normalize, as timm's fused layers do."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Ghost(nn.Module):
    """Batch norm of parts of the batch, as in Composer's GhostBatchNorm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.cat([self.norm(chunk) for chunk in x.split(N)])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(norm):
    """A layer whose weight is computed: reading it may have effects."""
    nn.utils.parametrize.register_parametrization(norm, 'weight', Doubled())
    return norm


@pytest.mark.parametrize(
    ('norm', 'reason'),
    [
        (Activated(4), 'Activated does more than normalize'),
        (Ghost(), 'it sees 6 rows, not 24'),
        (doubled(nn.BatchNorm2d(4)), 'ParametrizedBatchNorm2d does more than normalize'),
    ],
)
def test_normalization_whose_raw_rows_cannot_be_kept_is_refused_before_training(norm, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 3))
    x = torch.randn(N, 3, 8, 8)
    expander = LatentExpander(model, '0', M)
    with pytest.raises(CutLayerError, match=f"norm_stats='raw' is not possible in '1[.norm]*': {reason}"):
        expander.check(lambda: model(x))
    expander.remove()
    LatentExpander(model, '0', M, norm_stats='all').check(lambda: model(x))
    LatentExpander(model, 'head', M).check(lambda: model(x))


@pytest.mark.parametrize(
    'norm', [Activated(4), Ghost(), doubled(nn.BatchNorm2d(4))], ids=lambda norm: type(norm).__name__
)
@pytest.mark.parametrize('whole', [True, False], ids=['evaluation', 'frozen'])
def test_normalization_with_running_statistics_is_left_alone(norm, whole):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 3))
    (model if whole else norm).eval()
    x = torch.randn(N, 3, 8, 8)
    expander = LatentExpander(model, '0', M, Vicinity(1.0, sigma=0.0))
    expander.check(lambda: model(x))
    with expander.armed(0):
        raw, virtual = expander.split(model(x))
    expander.remove()
    assert torch.allclose(raw, model(x), atol=1e-6) and torch.allclose(virtual, raw.expand(M, N, 3), atol=1e-6)


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


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('layer', [nn.Dropout(0.5), nn.AlphaDropout(0.5)])
def test_segments_that_share_a_random_layer_draw_again_what_they_drew(layer, reentrant):
    """Checkpointing runs the segments again in the reverse order, so that the first call of each pass is another."""

    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.shared, self.head = nn.Linear(8, 64), layer, nn.Linear(64, 3)
            self.used = [[], []]

        def segment(self, number, h):
            h = self.shared(torch.tanh(h))
            self.used[number].append(h.detach().clone())
            return 2 * h

        def forward(self, x):
            h = self.trunk(x)
            for number in range(2):
                h = checkpoint(partial(self.segment, number), h, use_reentrant=reentrant)
            return self.head(h)

    model = Segments()
    expander = LatentExpander(model, 'trunk', M)
    expander.arm(0)
    with set_checkpoint_early_stop(False):
        raw, virtual = expander.split(model(torch.randn(N, 8)))
    (raw.square().sum() + virtual.square().sum()).backward()
    expander.disarm()
    for number, (drawn, again) in enumerate(model.used):
        assert torch.equal(drawn, again), f'segment {number} draws other masks when it runs again'


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


@pytest.mark.parametrize(
    ('layers', 'hooked'), [('head', set()), ('norm', {'drop'}), (['norm', 'input'], {'drop', 'norm'})]
)
def test_after_the_check_no_hooks_are_left_on_layers_below_every_cut(layers, hooked):
    model, x, _ = make(dropout=0.5)
    expander = LatentExpander(model, layers, M)

    def hooked_layers():
        return {name for name in ('norm', 'drop') if 'forward' in vars(getattr(model, name))}

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
