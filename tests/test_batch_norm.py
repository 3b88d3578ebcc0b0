"""Batch norm of an augmented batch in one pass: values, statistics and gradients of any order, and its operators.

Run: pytest tests/test_batch_norm.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import composer_sba.functional as sbaf
from composer_sba import LatentExpander, Vicinity
from composer_sba.errors import CutLayerError
from composer_sba.latent.batch_norm import normalize
from operator_count import operators_of_step

RAW, ROWS, CHANNELS = 6, 15, 5


def two_passes(module, rows):
    """The layer on the raw rows, and the virtual rows with the raw rows' statistics, by operators of autograd."""
    raw = module(rows[:RAW])
    dims = [0, *range(2, rows.ndim)]
    variance, mean = torch.var_mean(rows[:RAW], dims, correction=0, keepdim=True)
    virtual = (rows[RAW:] - mean) / (variance + module.eps).sqrt()
    if module.affine:
        per_channel = (-1, *[1] * (rows.ndim - 2))
        virtual = virtual * module.weight.view(per_channel) + module.bias.view(per_channel)
    return torch.cat([raw, virtual])


def filled(module):
    """A layer whose parameters are not those of a new one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


LAYERS = {
    '1d': (lambda: nn.BatchNorm1d(CHANNELS), ()),
    'sequences': (lambda: nn.BatchNorm1d(CHANNELS), (4,)),
    '2d': (lambda: nn.BatchNorm2d(CHANNELS), (4, 3)),
    '3d': (lambda: nn.BatchNorm3d(CHANNELS), (2, 3, 2)),
    'synchronized, one rank': (lambda: nn.SyncBatchNorm(CHANNELS), (4, 3)),
    'without parameters': (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (4, 3)),
    'without running statistics': (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (4, 3)),
    'neither': (lambda: nn.BatchNorm2d(CHANNELS, affine=False, track_running_stats=False), (4, 3)),
    'cumulative': (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (4, 3)),
    'frozen parameters': (lambda: nn.BatchNorm2d(CHANNELS).requires_grad_(False), (4, 3)),
    'evaluation without running statistics': (
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False).eval(),
        (4, 3),
    ),
}


@pytest.mark.parametrize(
    ('layer', 'layout'),
    [(layer, torch.contiguous_format) for layer in LAYERS]
    + [(layer, torch.channels_last) for layer, (_, space) in LAYERS.items() if len(space) == 2],
)
def test_one_pass_is_the_layer_on_raw_rows_and_their_statistics_on_virtual_ones(layer, layout, monkeypatch):
    # Trainers of other tests leave a process group of one rank, in which SyncBatchNorm accepts no tensor on the CPU.
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: False)
    make, space = LAYERS[layer]
    module = filled(make().double())
    slow = copy.deepcopy(module)
    weight = torch.randn(ROWS, CHANNELS, *space, dtype=torch.float64)
    for _ in range(2):  # the average of a cumulative layer depends on the number of batches
        rows = 3 * torch.randn(ROWS, CHANNELS, *space, dtype=torch.float64) + 1
        rows = rows.to(memory_format=layout)
        ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        got, expected = normalize(module, ours, RAW), two_passes(slow, theirs)
        assert torch.equal(got[:RAW], expected[:RAW]), f'raw rows differ by {(got - expected)[:RAW].abs().max()}'
        assert torch.allclose(got, expected, atol=1e-12), f'{(got - expected).abs().max()}'
        assert got.stride() == rows.stride()
        for name, buffer in slow.named_buffers():
            assert torch.equal(module.get_buffer(name), buffer), name
        (got.tanh() * weight).sum().backward()
        (expected.tanh() * weight).sum().backward()
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12), f'{(ours.grad - theirs.grad).abs().max()}'
        for name, parameter in slow.named_parameters():
            grad = module.get_parameter(name).grad
            assert (grad is None) == (parameter.grad is None), name
            assert grad is None or torch.allclose(grad, parameter.grad, atol=1e-11), name


def test_gradients_of_the_parameters_alone_need_none_of_the_rows():
    module = filled(nn.BatchNorm2d(CHANNELS).double())
    rows, slow = torch.randn(ROWS, CHANNELS, 4, 3, dtype=torch.float64), copy.deepcopy(module)
    normalize(module, rows, RAW).square().sum().backward()
    two_passes(slow, rows).square().sum().backward()
    for ours, theirs in zip(module.parameters(), slow.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-11)


@pytest.mark.parametrize('layer', ['2d', 'without parameters', 'frozen parameters'])
def test_second_derivatives_are_exact(layer):
    make, space = LAYERS[layer]
    module = filled(make().double())
    rows = torch.randn(ROWS, CHANNELS, *space, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: normalize(module, rows, RAW), rows, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda rows: normalize(module, rows, RAW), rows, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('parameters', ['float32', 'of the rows'])
@pytest.mark.parametrize('layer', ['2d', 'neither'])
def test_half_precision_is_rounded_once_more_than_the_kernels_do(layer, dtype, parameters):
    """The channels' means are 30 standard deviations from zero, where products with them cancel."""
    make, space = LAYERS[layer]
    module = filled(make()).to(torch.float32 if parameters == 'float32' else dtype)
    exact = copy.deepcopy(module).double()
    rows = (30 + torch.randn(ROWS, CHANNELS, *space)).to(dtype)
    weight = torch.randn(rows.shape).to(dtype)
    ours, theirs = rows.clone().requires_grad_(), rows.double().requires_grad_()
    got, expected = normalize(module, ours, RAW), two_passes(exact, theirs)
    got.backward(weight)
    expected.backward(weight.double())
    assert got.dtype == ours.grad.dtype == dtype
    plain = copy.deepcopy(module)
    own = rows[:RAW].clone().requires_grad_()
    plain(own).backward(weight[:RAW])
    slow_own = rows[:RAW].double().requires_grad_()
    copy.deepcopy(exact)(slow_own).backward(weight[:RAW].double())

    def error(one, other):
        return ((one.double() - other).abs().max() / other.abs().max()).item()

    allowed = 3 * error(own.grad, slow_own.grad) + 4 * torch.finfo(dtype).eps
    assert error(ours.grad, theirs.grad) < allowed, f'{error(ours.grad, theirs.grad):.2g} of {allowed:.2g}'


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), filled(nn.BatchNorm2d(4)), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    network = network.double()
    x, y = torch.randn(RAW, 3, 8, 8, dtype=torch.float64), torch.randint(3, (RAW,))

    def gradients(forward):
        model = copy.deepcopy(network)
        parameters = list(model.parameters())
        expander = LatentExpander(model, 'input', 2)
        expander.arm(0)
        raw, virtual = expander.split(forward(model))
        (F.cross_entropy(raw, y) + sbaf.soft_label_kl(raw, virtual)).backward()
        expander.disarm()
        return [parameter.grad for parameter in parameters]

    def in_segments(model):
        class Segment(nn.Module):
            def forward(self, x):
                return checkpoint(body, x, use_reentrant=reentrant)

        body = nn.Sequential(*model[1:3])
        model[1], model[2] = Segment(), nn.Identity()
        return model(x)

    for ours, theirs in zip(gradients(in_segments), gradients(lambda model: model(x)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_one_raw_value_per_channel_is_refused_as_without_sba():
    with pytest.raises(ValueError) as plain:
        nn.BatchNorm1d(CHANNELS)(torch.randn(1, CHANNELS))
    with pytest.raises(ValueError) as augmented:
        normalize(nn.BatchNorm1d(CHANNELS), torch.randn(3, CHANNELS), 1)
    assert str(augmented.value) == str(plain.value)


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_expanders_of_one_network_are_removed_in_any_order(order):
    network = nn.Sequential(nn.Linear(4, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Dropout(0.5), nn.Linear(CHANNELS, 3))
    x = torch.randn(RAW, 4)
    expanders = [LatentExpander(network, '0', fold, Vicinity(1.0)) for fold in (1, 3)]
    with expanders[0].armed(0):
        assert expanders[0].split(network(x))[1].shape == (1, RAW, 3)
    expanders[order[0]].remove()
    left = expanders[order[1]]
    with left.armed(0):
        assert left.split(network(x))[1].shape == (left.fold, RAW, 3)
    left.remove()
    assert [name for name, module in network.named_modules() if 'forward' in vars(module)] == []


def test_a_norm_whose_forward_somebody_replaced_is_refused():
    network = nn.Sequential(nn.Linear(4, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Linear(CHANNELS, 3))
    norm = network[1]
    norm.forward = lambda x: 2 * nn.BatchNorm1d.forward(norm, x)
    theirs, x = norm.forward, torch.randn(RAW, 4)
    expander = LatentExpander(network, '0', 2)
    plain = network(x)
    with pytest.raises(CutLayerError, match="in '1': BatchNorm1d does more than normalize"), expander.armed(0):
        network(x)
    expander.remove()
    assert norm.forward is theirs and torch.equal(network(x), plain)


@pytest.mark.parametrize('fold', [1, 3])
def test_a_batch_norm_above_the_cut_costs_few_operators(fold):
    """The operators that an augmented step has and a plain one has not, with batch norm minus without it."""
    batch = torch.randn(RAW, 3, 8, 8), torch.randint(3, (RAW,))

    def count(norm, augmented, attached=True):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        expander = LatentExpander(network, '0', fold) if attached else None
        if attached:
            expander.check(lambda: network(batch[0]))
        found = operators_of_step(network, *batch, expander if augmented else None, activation=RAW * 4 * 36)
        return torch.tensor([len(found.names), found.of_activations])

    def more(make):
        return count(make(), augmented=True) - count(make(), augmented=False)

    found = (more(lambda: nn.BatchNorm2d(4)) - more(nn.Identity)).tolist()
    print(f'M = {fold}: {found[0]} operators more for a batch norm, {found[1]} of them on activations')
    assert found[0] <= 15 and found[1] <= 4
    plain = [count(nn.BatchNorm2d(4), augmented=False, attached=attached).tolist() for attached in (True, False)]
    assert plain[0] == plain[1], 'a plain step has other operators when layers are attached'
