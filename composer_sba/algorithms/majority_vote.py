"""class MajorityVote: inference by vote over raw and virtual predictions, as a Composer algorithm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger

from composer_sba import functional as sbaf
from composer_sba.algorithms._attachment import HookedAlgorithm
from composer_sba.algorithms._composer import forward_on_batch, network_of
from composer_sba.errors import CutLayerError, check_fold, check_layers, check_seed
from composer_sba.latent.expander import LatentExpander
from composer_sba.latent.layers import find_layers
from composer_sba.vicinity import Vicinity, as_vicinity


class MajorityVote(HookedAlgorithm):
    """A vote of the virtual samples and the raw sample on its class, in evaluation and prediction.

    Sec. 3.4 of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_: the class with most votes among the predictions
    for a raw sample and its M virtual samples wins, as :func:`composer_sba.functional.majority_vote` counts them.
    Training is unchanged.

    Args:
        layers (str | Sequence[str], optional): The cut layer, as in :class:`.SBA`; of several, one is drawn for each
            batch. Default: ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``16``.
        vicinity (Vicinity | Mapping, optional): Their distribution, or a mapping of its arguments. Default:
            ``Vicinity()``.
        seed (int, optional): Seed of the layer and of the noise, >= 0: evaluating twice gives the same votes. Default:
            ``0``.

    Raises:
        ValueError: If an argument is out of range.
        UserError: When the Trainer is built, if its list of algorithms has two MajorityVote.
        CutLayerError: When the Trainer is built or at the first batch, if a layer or the model cannot be cut.

    Note:
        Runs on AFTER_LOAD (finds the layers), at the start of an evaluation or a prediction (installs hooks), before
        and after its forward passes (``state.outputs`` becomes log-probabilities, shape ``(N, K)``), and at its end
        (removes hooks). The hooks of an interrupted evaluation are removed by the next fit, evaluation or prediction,
        or by ``Trainer.close()``. State saved: none.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, eval_dataloader=dataloader, algorithms=[MajorityVote(fold=16)]
        ... )
    """

    instead_of_two = 'name all layers in one'

    def __init__(
        self,
        layers: str | Sequence[str] = 'head',
        fold: int = 16,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        seed: int = 0,
    ) -> None:
        check_layers(layers)
        self.layers = layers
        self.fold = check_fold(fold)
        self.vicinity = as_vicinity(vicinity)
        self.seed = check_seed(seed)
        self._expander: LatentExpander | None = None
        self._cuts_checked = False
        self._microbatch = 0

    def __repr__(self) -> str:
        return f'MajorityVote(layers={self.layers!r}, fold={self.fold}, vicinity={self.vicinity}, seed={self.seed})'

    def match(self, event: Event, state: State) -> bool:
        """Run on every event that a method is named after; evaluation's methods also serve prediction."""
        return hasattr(self, event.value.replace('predict_', 'eval_'))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the method that has the name of the event."""
        getattr(self, event.value.replace('predict_', 'eval_'))(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse layers that the network does not have."""
        super().after_load(state, logger)
        find_layers(network_of(state.model), self.layers)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Detach from an interrupted evaluation."""
        self.detach()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Install the hooks."""
        self.attach(state)

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Start from the first microbatch."""
        self._microbatch = 0

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Arm the cut layer."""
        assert self._expander is not None
        if not self._cuts_checked:
            self._expander.check(forward_on_batch(state))
            self._cuts_checked = True
        predicting = state.dataloader_label == 'predict'
        step = (state.predict_timestamp if predicting else state.eval_timestamp).batch.value
        self._expander.arm(step, self._microbatch)
        self._microbatch += 1

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Count the votes."""
        assert self._expander is not None
        raw, virtual = self._expander.split(state.outputs)
        self._expander.disarm()
        if not isinstance(state.outputs, torch.Tensor):
            raise CutLayerError(
                f'MajorityVote replaces the logits that eval_forward returns, got {type(state.outputs).__name__}: give '
                'a HuggingFaceModel use_logits=True.'
            )
        votes = sbaf.majority_vote(torch.cat([raw[None], virtual]).flatten(1, -2))
        state.outputs = votes.view(raw.shape)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Remove the hooks."""
        self.detach()

    def _install(self, state: State) -> None:
        network = network_of(state.model)
        if self._expander is not None and self._expander.model is network:
            self._expander.attach()
        else:
            self._expander = LatentExpander(network, self.layers, self.fold, self.vicinity, seed=self.seed)
            self._cuts_checked = False

    def _uninstall(self, state: State | None) -> None:
        if self._expander is not None:
            self._expander.disarm()
            self._expander.remove()
