"""The operators that PyTorch dispatches in a training step, views included."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import composer_sba.functional as sbaf


class Operators(TorchDispatchMode):
    """Records operators, and counts those that read or write as many values as ``activation`` or more."""

    def __init__(self, activation=0):
        super().__init__()
        self.activation, self.names, self.of_activations = activation, [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        values = (*args, *(kwargs or {}).values(), *(result if isinstance(result, tuple) else (result,)))
        sizes = [value.numel() for value in values if isinstance(value, torch.Tensor)]
        self.names.append(str(operator))
        self.of_activations += not operator.is_view and max(sizes, default=0) >= self.activation
        return result


def operators_of_step(network, x, y, expander=None, activation=0):
    """Record forward, loss and backward: a plain step, or an augmented one if there is an expander."""
    network.zero_grad()
    with Operators(activation) as recorded:
        if expander is None:
            F.cross_entropy(network(x), y).backward()
        else:
            with expander.armed(3):
                raw, virtual = expander.split(network(x))
                torch.add(F.cross_entropy(raw, y), sbaf.soft_label_kl(raw, virtual), alpha=0.1).backward()
    return recorded
