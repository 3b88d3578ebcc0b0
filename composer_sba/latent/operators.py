"""The draw of virtual samples as an operator, because torch.compile cannot trace a generator.

An operator takes neither a dataclass nor a generator. It gets the vicinity as JSON (:func:`to_json`) and the seed as 64
bits in a tensor of shape ``()`` on the CPU, since torch.compile would compile a number in.
"""

import json
from dataclasses import asdict
from typing import Any

import torch

from composer_sba.vicinity import Drawn, Expansion, Vicinity, buffers


def to_json(vicinity: Vicinity) -> str:
    """Write a vicinity as an operator takes it.

    Example:
        >>> _from_json(to_json(Vicinity(tau=float('inf')))) == Vicinity(tau=float('inf'))
        True
    """
    return json.dumps(asdict(vicinity))


def _from_json(vicinity: str) -> Vicinity:
    return Vicinity(**json.loads(vicinity))


@torch.library.custom_op('composer_sba::draw', mutates_args=())
def draw_by_seed(latent: torch.Tensor, seed: torch.Tensor, fold: int, vicinity: str) -> Drawn:
    """Run :meth:`.Vicinity.draw`; the backward pass is that of :meth:`.Vicinity.expand`."""
    generator = torch.Generator(latent.device).manual_seed(int(seed) % 2**64)
    return _from_json(vicinity).draw(latent, fold, generator)


@draw_by_seed.register_fake
def _(latent: torch.Tensor, seed: torch.Tensor, fold: int, vicinity: str) -> Drawn:
    return buffers(latent, fold, _from_json(vicinity))


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: Drawn) -> None:
    ctx.save_for_backward(output[1])
    ctx.dropout_scale = _from_json(inputs[3]).dropout_scale
    ctx.set_materialize_grads(False)  # the mask's would be one more block


draw_by_seed.register_autograd(Expansion.backward, setup_context=_keep_mask)
