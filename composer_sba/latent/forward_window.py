"""class ForwardWindow: the forward pass, of the network within wrappers, in which armed hooks act."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle


class ForwardWindow:
    """The forward pass for which hooks in a network are armed.

    This is the next pass that begins in the network's current mode, training or evaluation, and what activation
    checkpointing runs again of it in the backward pass. It ends with the pass, even if an exception or Ctrl-C
    interrupts the pass, or if the hooks are not disarmed afterwards.

    Args:
        model (torch.nn.Module): The network. Attach hooks at its input after those of the window.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> window = ForwardWindow(model)
        >>> window.attach()
        >>> seen = []
        >>> handle = model.register_forward_pre_hook(lambda *_: seen.append(window.open))
        >>> window.arm()
        >>> for _ in range(2):
        ...     output = model(torch.zeros(1, 2))
        >>> seen, window.open
        ([True, False], False)
    """

    _sole: 'list[ForwardWindow | None]' = []  # while not empty, every other window is closed

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._network = network_in(model)
        self._armed = self._begun = self._over = self._mode = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Attach the hooks that see a pass begin and end."""
        self.remove()
        self._handles = [
            self._network.register_forward_pre_hook(self._begin),
            self._network.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arm(self) -> None:
        """Arm the hooks for the next forward pass."""
        self._armed, self._begun, self._over, self._mode = True, False, False, self._network.training

    def disarm(self) -> None:
        """Disarm the hooks."""
        self._armed = self._begun = self._over = self._mode = False

    @property
    def broken(self) -> bool:
        """Whether an armed pass has begun and did not end: an exception broke it off."""
        return self._begun and not self._over

    @property
    def open(self) -> bool:
        """Whether armed hooks act now."""
        return self._counts and (not self._over or in_backward())

    @property
    def _counts(self) -> bool:
        """Whether a pass that runs now is one for which the hooks may be armed."""
        closed = bool(self._sole) and self._sole[-1] is not self
        return self._armed and not closed and self._network.training == self._mode

    def _begin(self, module: nn.Module, args: tuple) -> None:
        if self._counts and not in_backward():
            self._begun, self._over = True, self._begun

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._counts and not in_backward():
            self._over = True


@contextmanager
def only(window: ForwardWindow | None) -> Iterator[None]:
    """Keep every other window closed: trial passes are not those for which an algorithm armed its hooks."""
    ForwardWindow._sole.append(window)
    try:
        yield
    finally:
        ForwardWindow._sole.pop()


def in_backward() -> bool:
    """Whether activation checkpointing is running layers again; its compiled form is not a call from Python."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def network_in(model: nn.Module) -> nn.Module:
    """Return the network inside DDP and torch.compile, which may call it past the hooks of the wrapper."""
    while isinstance(model, DistributedDataParallel | DataParallel | OptimizedModule):
        model = model._orig_mod if isinstance(model, OptimizedModule) else model.module
    return model
