"""soft_label_kl and hard_label_loss, compared with the loops of reference.py in float64: values and gradients to 1e-10.

Run: pytest tests/test_functional.py
"""

import pytest
import torch
import torch.nn.functional as F

import composer_sba.functional as sbaf
import reference

N, M, K = 5, 3, 7


def make_logits():
    logits = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    virtual = torch.randn(M, N, K, dtype=torch.float64, requires_grad=True)
    return logits, virtual


def gradients(loss, *tensors):
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def assert_equal(ours, theirs, *tensors):
    assert abs(ours.item() - theirs.item()) < 1e-10, f'{ours.item()} against {theirs.item()}'
    for a, b in zip(gradients(ours, *tensors), gradients(theirs, *tensors), strict=True):
        assert (a - b).abs().max() < 1e-10, f'gradients differ by {(a - b).abs().max()}'


@pytest.mark.parametrize('stop_gradient', [True, False])
def test_soft_label_kl_is_the_reference(stop_gradient):
    logits, virtual = make_logits()
    ours = sbaf.soft_label_kl(logits, virtual, stop_gradient=stop_gradient)
    assert_equal(ours, reference.soft_loss(logits, virtual, stop_gradient), logits, virtual)


def test_hard_label_loss_is_the_reference():
    _, virtual = make_logits()
    target = torch.randint(K, (N,))
    assert_equal(sbaf.hard_label_loss(virtual, target), reference.hard_loss(virtual, target), virtual)


def test_the_sum_is_eq_11():
    logits, virtual = make_logits()
    target = torch.randint(K, (N,))
    ours = F.cross_entropy(logits, target) + 0.3 * sbaf.soft_label_kl(logits, virtual)
    assert_equal(ours, reference.sba_loss(logits, virtual, target, eta=0.3), logits, virtual)


def test_no_gradient_reaches_the_soft_label():
    logits, virtual = make_logits()
    assert gradients(sbaf.soft_label_kl(logits, virtual), logits)[0].abs().max() == 0
    assert gradients(sbaf.soft_label_kl(logits, virtual, stop_gradient=False), logits)[0].abs().max() > 0


def test_a_term_without_gradient_leaves_the_others_alone():
    logits = torch.randn(2, 3, requires_grad=True)
    (logits.sum() + sbaf.soft_label_kl(logits, torch.randn(4, 2, 3))).backward()
    assert torch.equal(logits.grad, torch.ones(2, 3))


def test_no_rows_have_no_divergence():
    virtual = torch.zeros(4, 0, 3, requires_grad=True)
    kl = sbaf.soft_label_kl(torch.zeros(0, 3), virtual)
    kl.backward()
    assert kl == 0 and virtual.grad.shape == (4, 0, 3)


def test_kl_is_zero_for_equal_predictions_and_positive_otherwise():
    logits, virtual = make_logits()
    assert sbaf.soft_label_kl(logits, logits.expand(M, N, K)).item() == pytest.approx(0, abs=1e-15)
    assert sbaf.soft_label_kl(logits, virtual).item() > 0


def test_hard_labels_may_be_distributions():
    _, virtual = make_logits()
    target = torch.randint(K, (N,))
    one_hot = F.one_hot(target, K).double()
    assert sbaf.hard_label_loss(virtual, one_hot).item() == pytest.approx(sbaf.hard_label_loss(virtual, target).item())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    logits, virtual = (t.detach().to(dtype) for t in make_logits())
    ours = sbaf.soft_label_kl(logits, virtual)
    assert ours.dtype == torch.float32
    exact = sbaf.soft_label_kl(logits.double(), virtual.double())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


def test_shapes_that_do_not_match_are_refused():
    logits, virtual = make_logits()
    with pytest.raises(
        ValueError, match=r'virtual_logits of shape \(M, N, K\) for \(N, K\) = \(4, 7\), got \(3, 5, 7\)'
    ):
        sbaf.soft_label_kl(logits[:4], virtual)
    with pytest.raises(ValueError, match=r'for the target \(4,\), got \(3, 5, 7\)'):
        sbaf.hard_label_loss(virtual, torch.zeros(4, dtype=torch.long))
