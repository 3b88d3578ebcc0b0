"""class OnePass: hooks that are armed act in one forward pass, whatever becomes of it."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class OnePass:
    """Tells hooks in a network whether they are in the forward pass that they were armed for.

    That is the next one that begins in the mode, training or evaluation, that the network is in, and what activation
    checkpointing runs again of it in the backward pass. Should it break off, by an exception or Ctrl-C, or should
    nobody disarm after it, the pass after it is none of theirs.

    Args:
        model (torch.nn.Module): The network. Hooks that ask at its input must be attached after this one's.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> armed = OnePass(model)
        >>> armed.attach()
        >>> seen = []
        >>> handle = model.register_forward_pre_hook(lambda *_: seen.append(armed.on))
        >>> armed.arm()
        >>> for _ in range(2):
        ...     output = model(torch.zeros(1, 2))
        >>> seen, armed.on
        ([True, False], False)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._armed = self._begun = self._over = self._mode = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks in that watch passes begin and end."""
        self.remove()
        self._handles = [
            self.model.register_forward_pre_hook(self._begin),
            self.model.register_forward_hook(self._end),
        ]

    def remove(self) -> None:
        """Take them off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arm(self) -> None:
        """Mean the next pass."""
        self._armed, self._begun, self._over, self._mode = True, False, False, self.model.training

    def disarm(self) -> None:
        """Mean none."""
        self._armed = self._begun = self._over = self._mode = False

    @property
    def on(self) -> bool:
        """Whether armed hooks shall act now."""
        return self._meant and (not self._over or in_backward())

    @property
    def _meant(self) -> bool:
        return self._armed and self.model.training == self._mode

    def _begin(self, module: nn.Module, args: tuple) -> None:
        if self._meant and not in_backward():
            self._begun, self._over = True, self._begun

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._meant and not in_backward():
            self._over = True


def in_backward() -> bool:
    """Whether this is activation checkpointing running layers again; its compiled form is no call from Python."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
