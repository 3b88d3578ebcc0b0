"""Base classes of the algorithms: how they attach to a Trainer for a fit, and leave nothing behind."""

import weakref
from abc import abstractmethod
from typing import ClassVar

from composer.core import Algorithm, Callback, Event, State
from composer.loggers import Logger
from torch import nn

from composer_sba.algorithms._composer import network_of
from composer_sba.errors import UserError


class AttachedAlgorithm(Algorithm):
    """An algorithm that changes a Trainer's model or state for the length of a fit.

    A subclass implements :meth:`_install` and :meth:`_uninstall`, and one method for each further event, named after
    the event. The change is undone when the fit ends, and when the Trainer is closed. Composer runs no event when a fit
    raises; the change of such a fit is undone before the next one.
    """

    instead_of_two: ClassVar[str]  # what to write instead of two of these in one list of algorithms

    _all_attached: ClassVar[weakref.WeakSet['AttachedAlgorithm']] = weakref.WeakSet()
    _network: nn.Module | None = None
    _state: weakref.ref[State] | None = None  # of the Trainer attached to; weak, as SWA copies a model with its hooks

    def match(self, event: Event, state: State) -> bool:
        """Run on every event that a method is named after."""
        return hasattr(self, event.value)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the method that has the name of the event."""
        getattr(self, event.value)(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a second algorithm of this class, and ask to be detached when the Trainer is closed."""
        twins = [other for other in state.algorithms if isinstance(other, type(self))]
        if len(twins) > 1:
            name = type(self).__name__
            raise UserError(
                f'One list of algorithms has {len(twins)} {name}, which would act on each other: {self.instead_of_two}.'
            )
        state.callbacks.append(DetachOnClose(self))  # after loading: checkpoints of earlier versions do not have it

    def fit_start(self, state: State, logger: Logger) -> None:
        """Attach to the Trainer that fits; another one may have been built with this algorithm since."""
        self.attach(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Detach."""
        self.detach()

    def is_attached_to(self, state: State) -> bool:
        """Return whether the algorithm is attached to the Trainer of this state."""
        return self._state is not None and self._state() is state

    def attach(self, state: State) -> None:
        """Attach to a Trainer, after undoing what interrupted fits left on the same network."""
        self.detach()
        network = network_of(state.model)
        for other in list(self._all_attached):
            if other._network is network and other not in state.algorithms:
                other.detach()
        self._network, self._state = network, weakref.ref(state)
        self._all_attached.add(self)
        self._install(state)

    def detach(self) -> None:
        """Undo what :meth:`attach` changed, if anything."""
        state = None if self._state is None else self._state()
        self._uninstall(state)
        self._network = self._state = None
        self._all_attached.discard(self)

    @abstractmethod
    def _install(self, state: State) -> None:
        """Change the model or the state of the Trainer."""

    @abstractmethod
    def _uninstall(self, state: State | None) -> None:
        """Undo the change; nothing may be installed, and the state may be gone."""


class DetachOnClose(Callback):
    """A callback that detaches an algorithm, since Composer closes callbacks and not algorithms. State saved: none."""

    def __init__(self, algorithm: AttachedAlgorithm) -> None:
        self.algorithm = algorithm

    def close(self, state: State, logger: Logger) -> None:
        """Detach the algorithm, unless it is attached to another Trainer."""
        if self.algorithm.is_attached_to(state):
            self.algorithm.detach()


class HookedAlgorithm(AttachedAlgorithm):
    """An algorithm with hooks in the network; those of an interrupted fit are also removed before an evaluation."""

    def eval_standalone_start(self, state: State, logger: Logger) -> None:
        """Detach before ``Trainer.eval()``; evaluations within a fit have no such event."""
        self.detach()

    def predict_start(self, state: State, logger: Logger) -> None:
        """Detach before ``Trainer.predict()``."""
        self.detach()


class RowMultiplier(AttachedAlgorithm):
    """An algorithm that makes several rows of each input, while ``device_train_microbatch_size`` counts inputs.

    One microbatch holds all rows of that many inputs, whether the user or ``'auto'`` set the number. ``'auto'`` halves
    the rows whenever they do not fit in memory.
    """

    rows_per_input: int
    _rows: int | float | None = None  # the state's microbatch size at the last batch, in rows

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Record the microbatch size, which ``'auto'`` may have halved before this attempt at the batch."""
        self._rows = state.device_train_microbatch_size

    def fit_end(self, state: State, logger: Logger) -> None:
        """Restore the microbatch size, in inputs."""
        self._rows = state.device_train_microbatch_size
        self.detach()

    def _install(self, state: State) -> None:
        if isinstance(state.device_train_microbatch_size, int):
            state.device_train_microbatch_size *= self.rows_per_input
        self._rows = state.device_train_microbatch_size

    def _uninstall(self, state: State | None) -> None:
        # Another size than ours is one that the user gave to the next fit.
        if state is not None and isinstance(self._rows, int) and state.device_train_microbatch_size == self._rows:
            state.device_train_microbatch_size = max(self._rows // self.rows_per_input, 1)
        self._rows = None
