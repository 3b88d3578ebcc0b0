"""The draws as operators, because torch.compile cannot trace a generator. They return what the functions return.

An operator takes neither a dataclass nor a generator. It gets the vicinity as JSON (:func:`to_json`) and the seed as 64
bits in a tensor of shape ``()`` on the CPU, since torch.compile would compile a number in.
"""

import json
from dataclasses import asdict
from typing import Any

import torch

from composer_sba.latent.head import draw_logit_noise
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


def _generator(device: torch.device, seed: torch.Tensor) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(seed) % 2**64)


@torch.library.custom_op('composer_sba::draw', mutates_args=())
def draw_by_seed(latent: torch.Tensor, seed: torch.Tensor, fold: int, vicinity: str) -> Drawn:
    """Run :meth:`.Vicinity.draw`; the backward pass is that of :meth:`.Vicinity.expand`."""
    return _from_json(vicinity).draw(latent, fold, _generator(latent.device, seed))


@draw_by_seed.register_fake
def _(latent: torch.Tensor, seed: torch.Tensor, fold: int, vicinity: str) -> Drawn:
    return buffers(latent, fold, _from_json(vicinity))


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: Drawn) -> None:
    ctx.save_for_backward(output[1])
    ctx.dropout_scale = _from_json(inputs[3]).dropout_scale
    ctx.set_materialize_grads(False)  # the mask's would be one more block


draw_by_seed.register_autograd(Expansion.backward, setup_context=_keep_mask)


@torch.library.custom_op('composer_sba::draw_logits', mutates_args=())
def draw_logit_noise_by_seed(
    latent: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, copies: int, vicinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run :func:`.draw_logit_noise`."""
    xi, directions = draw_logit_noise(latent, weight, copies, _from_json(vicinity), _generator(latent.device, seed))
    return xi, directions.contiguous()


@draw_logit_noise_by_seed.register_fake
def _(
    latent: torch.Tensor, weight: torch.Tensor, seed: torch.Tensor, copies: int, vicinity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(latent.dtype, torch.float32)
    xi = latent.new_empty(copies, len(latent), len(weight), dtype=dtype)
    return xi, weight.new_empty(weight.shape[1], len(weight), dtype=dtype)
