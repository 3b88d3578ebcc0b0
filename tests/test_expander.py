"""LatentExpander: the armed forward pass against reference.py (float64, 1e-10), and the network afterwards.

Run: pytest tests/test_expander.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import composer_sba.functional as sbaf
import reference
from composer_sba import LatentExpander, Vicinity
from cut_network import GAUSSIAN, M, N, Net, make, predict


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


def test_noise_repeats_with_the_step_and_differs_otherwise():
    model, x, _ = make()
    first = predict(model, x, 'head', step=3)[1]
    torch.manual_seed(123)
    assert torch.equal(first, predict(model, x, 'head', step=3)[1])
    assert not torch.equal(first, predict(model, x, 'head', step=4)[1])
    assert not torch.equal(first, predict(model, x, 'head', step=3, seed=1)[1])
    assert not torch.equal(first[0], first[1]), 'copies differ from one another'


def test_the_network_does_not_change_while_the_expander_is_not_armed():
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


def test_an_armed_pass_in_which_no_layer_ran_is_an_error():
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
    expander = LatentExpander(model, 'norm', M)
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
        ({'vicinity': {'sigma': -1}}, r'Expected sigma to be a number in \[0, 1e30\], got -1'),
        ({'norm_stats': 'none'}, "Expected norm_stats to be one of raw, all, got 'none'"),
    ],
)
def test_other_arguments_are_checked_too(arguments, message):
    with pytest.raises(ValueError, match=f'^{message}'):
        LatentExpander(Net(), **arguments)
