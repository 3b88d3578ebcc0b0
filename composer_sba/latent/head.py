"""The logits of the head among what a model returns, which may be a structure of tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors of what a model returned: a tensor, or a tuple, a mapping or a dataclass of them."""
    leaves = tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def returned_positions(logits: torch.Tensor, outputs: Any) -> torch.Tensor | None:
    """Return the position in each row whose logits a model returned; None unless it returned those of one position.

    Args:
        logits (torch.Tensor): The head's output. Shape ``(N, *, K)``.
        outputs: What the model returned.

    Returns:
        torch.Tensor | None: Int64, shape ``(N,)``, for ``logits`` of shape ``(N, T, K)``.
    """
    if logits.ndim != 3:
        return None
    for tensor in tensors_in(outputs):
        if tensor.shape == (len(logits), logits.shape[-1]):
            equal = (logits == tensor[:, None]).all(-1)
            if equal.any(1).all():
                return equal.int().argmax(1)
    return None
