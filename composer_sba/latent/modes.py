"""Training and evaluation mode of a network, for a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Put a network into training or evaluation mode, and put modes and parameters back afterwards.

    A module may do more than change its mode: LoRA's merges its weights in ``eval()``. A network that is already in
    training mode is left alone, since its layers in evaluation mode are frozen on purpose.
    """
    modes = {module: module.training for module in network.modules()}
    if network.training == training and (training or not any(modes.values())):
        yield
        return
    values = {parameter: parameter.detach().clone() for parameter in network.parameters()}
    network.train(training)
    try:
        yield
    finally:
        for module, training in modes.items():  # a module before those in it
            if module.training != training:
                module.train(training)
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
