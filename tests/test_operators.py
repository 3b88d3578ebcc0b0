"""Draws in compiled networks against those in eager ones: the same points, in the fewest possible graphs.

Run: pytest tests/test_operators.py
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from composer_sba import LatentExpander, Vicinity
from composer_sba.latent.operators import draw_by_seed, to_json
from cut_network import GAUSSIAN, M, N, make, predict


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
    arguments = (latent, seed, M, to_json(vicinity))
    torch.library.opcheck(draw_by_seed, arguments)
    ours, theirs = draw_by_seed(*arguments)[0], vicinity.expand(latent, M, torch.Generator().manual_seed(7))
    assert torch.equal(ours, theirs)
    gradient = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(rows, latent, gradient)[0] for rows in (ours, theirs)))
