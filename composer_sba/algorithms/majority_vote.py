"""class MajorityVote: inference by vote over raw and virtual predictions, as a Composer algorithm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from composer_sba import functional as sbaf
from composer_sba.algorithms._composer import first_forward, network_of
from composer_sba.errors import check_fold, check_layers, check_seed
from composer_sba.latent.expander import LatentExpander
from composer_sba.vicinity import Vicinity, as_vicinity


class MajorityVote(Algorithm):
    """Lets virtual samples vote with the raw sample on its class, in evaluation and prediction.

    Sec. 3.4 of `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_: the class with most votes among the predictions
    for a raw sample and its M virtual samples wins, as :func:`composer_sba.functional.majority_vote` counts them.
    Training is left alone.

    Args:
        layers (str | Sequence[str], optional): The cut layer, as in :class:`.SBA`; of several, one is drawn for each
            batch. Default: ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``16``.
        vicinity (Vicinity | Mapping, optional): Their law, or a mapping of its arguments. Default: ``Vicinity()``.
        seed (int, optional): Seed of the layer and of the noise, >= 0: evaluating twice gives the same votes. Default:
            ``0``.

    Raises:
        ValueError: If an argument lies outside its range.
        CutLayerError: When the Trainer is built or at the first batch, if a layer or the model cannot be cut.

    Note:
        Runs on AFTER_LOAD (hooks go in) and, in evaluation and prediction, around the forward pass; ``state.outputs``
        is then log-probabilities, shape ``(N, K)``. State saved: none.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, eval_dataloader=dataloader, algorithms=[MajorityVote(fold=16)]
        ... )
    """

    def __init__(
        self,
        layers: str | Sequence[str] = 'head',
        fold: int = 16,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        seed: int = 0,
    ) -> None:
        check_layers(layers)
        check_fold(fold)
        check_seed(seed)
        self.layers = layers
        self.fold = fold
        self.vicinity = as_vicinity(vicinity)
        self.seed = seed
        self._expander: LatentExpander | None = None
        self._checked = False
        self._microbatch = 0

    def __repr__(self) -> str:
        return f'MajorityVote(layers={self.layers!r}, fold={self.fold}, vicinity={self.vicinity}, seed={self.seed})'

    def match(self, event: Event, state: State) -> bool:
        """Run on every event that a method below is named after; evaluation's serve prediction too."""
        return hasattr(self, event.value.replace('predict_', 'eval_'))

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the method that has the name of the event."""
        getattr(self, event.value.replace('predict_', 'eval_'))(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        """Put the hooks in, before DDP and torch.compile."""
        if self._expander is not None:
            self._expander.remove()
        self._expander = LatentExpander(network_of(state.model), self.layers, self.fold, self.vicinity, seed=self.seed)
        self._checked = False

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Start from the first microbatch."""
        self._microbatch = 0

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        """Arm the cut layer."""
        assert self._expander is not None
        if not self._checked:
            self._expander.check(first_forward(state))
            self._checked = True
        predicting = state.dataloader_label == 'predict'
        step = (state.predict_timestamp if predicting else state.eval_timestamp).batch.value
        self._expander.arm(step, self._microbatch)
        self._microbatch += 1

    def eval_after_forward(self, state: State, logger: Logger) -> None:
        """Count the votes."""
        assert self._expander is not None
        raw, virtual = self._expander.split(state.outputs)
        self._expander.disarm()
        state.outputs = sbaf.majority_vote(torch.cat([raw[None], virtual]))
