"""class SBA: Stochastic Batch Augmentation as a Composer algorithm. The mathematics is in functional.py and vicinity.py."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, Optional, Union, get_args

import torch
from composer.algorithms import GyroDropout
from composer.algorithms.warnings import NoEffectWarning, NotIntendedUseWarning
from composer.core import Algorithm, Event, State
from composer.core.passes import sort_to_back, sort_to_front
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.models import ComposerClassifier, HuggingFaceModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_sba import functional as sbaf
from composer_sba.errors import CutLayerError
from composer_sba.latent import LatentExpander, NormStats
from composer_sba.vicinity import Vicinity

Target = Literal['soft', 'hard']
Granularity = Literal['batch', 'epoch']


class SBA(Algorithm):
    r"""Trains the layers above a cut to predict for points around a latent batch what they predict for the batch itself.

    Implements `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, Eq. (11):

    .. math::
        L = \frac{1}{N} \sum_i CE(y_i, Y_i) + \frac{\eta\,\lambda(t)}{M N} \sum_i \sum_j D_{KL}(Y_i \parallel Y_{ij})

    where λ(t) ~ Bernoulli(cos ω) decides whether batch t is augmented, and :math:`Y_{ij}` is the prediction for the j-th of M
    virtual samples of raw sample i, drawn from the vicinity of its latent representation at a random layer of a set S.

    Args:
        layers (str | Sequence[str], optional): The set S of eligible cut layers: ``'head'``: the input of the model's last
            ``nn.Linear``; ``'input'``: the network's input; or module names as in the unwrapped model, ``module.`` optional,
            meaning those modules' outputs. Default: ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``4``.
        augment_prob (float | Callable[[State], float], optional): cos ω in [0, 1], the probability that a batch is augmented:
            a number, or any Composer scheduler, whose value is the probability at that time. Default: ``0.5``.
        eta (float, optional): η >= 0, the weight of the virtual samples' loss. Default: ``0.1``.
        vicinity (Vicinity | Mapping, optional): The law of the virtual samples, or a mapping of its arguments. Default:
            ``Vicinity()``.
        target (str, optional): ``'soft'``: the KL term of Eq. (10); ``'hard'``: cross-entropy with the raw sample's label,
            Eq. (9), as in Bamboo. Default: ``'soft'``.
        granularity (str, optional): Whether the coin is drawn for each ``'batch'`` (Alg. 1) or for each ``'epoch'`` (Sec. 3).
            Default: ``'batch'``.
        stop_gradient (bool, optional): Let no gradient flow through the soft label :math:`Y_i`. Default: ``True``.
        norm_stats (str, optional): Whose batch statistics normalization layers above the cut use, ``'raw'`` rows' or those of
            ``'all'`` rows. Default: ``'raw'``.
        seed (int, optional): Seed of the coin, the layer and the noise, >= 0. Default: ``None``, the Trainer's seed.
        target_key (str | int | Callable, optional): Where a batch holds its labels; read by ``target='hard'`` alone. Default:
            ``1``.

    Raises:
        ValueError: If an argument lies outside its range; the message names it, its range and its value.
        CutLayerError: When the Trainer is built or at the first batch, if a layer or the model cannot be cut.

    Note:
        Runs on AFTER_LOAD (hooks go in), BATCH_START (coin), BEFORE_FORWARD to AFTER_BACKWARD (armed), AFTER_FORWARD
        (``state.outputs`` is the raw rows' again), BEFORE_BACKWARD (``state.loss`` gains the term, in float32) and BATCH_END
        (logs). State saved: none; the coin, the layer and the noise are functions of (seed, batch), so a resumed run and a
        retried batch repeat them. It should run last: see :func:`sort_sba_last`.

        Logs once a batch: ``sba/augmented`` (0 or 1) and ``sba/augment_prob``; on augmented batches also ``sba/kl`` (nats,
        this rank's mean), ``sba/layer`` (index in ``layers``) and ``sba/virtual_agreement`` (share of virtual rows whose most
        probable class is the raw row's).

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=dataloader, max_duration='1ep', algorithms=[SBA()]
        ... )
    """

    def __init__(
        self,
        layers: Union[str, Sequence[str]] = 'head',
        fold: int = 4,
        augment_prob: Union[float, Callable[[State], float]] = 0.5,
        eta: float = 0.1,
        vicinity: Union[Vicinity, Mapping[str, Any]] = Vicinity(),
        *,
        target: Target = 'soft',
        granularity: Granularity = 'batch',
        stop_gradient: bool = True,
        norm_stats: NormStats = 'raw',
        seed: Optional[int] = None,
        target_key: Union[str, int, Callable] = 1,
    ) -> None:
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        self.fold = fold
        self.augment_prob = augment_prob
        self.eta = eta
        self.vicinity = _vicinity(vicinity)
        self.target = target
        self.granularity = granularity
        self.stop_gradient = stop_gradient
        self.norm_stats = norm_stats
        self.seed = seed
        self.target_key = target_key
        self._check_arguments()
        self.local_hparams = self._arguments()  # the name under which Composer logs hyperparameters
        # The engine asks for it at every event, and checkpoints keep it: cheap, and without a memory address.
        self._repr = f'SBA({", ".join(f"{name}={value!r}" for name, value in self.local_hparams.items())})'

        self._expander: Optional[LatentExpander] = None
        self._checked = False
        self._warned = False
        self._prob = 0.0
        self._augment = False  # λ(t)
        self._microbatch = 0
        self._layer = 0
        self._logits: Optional[tuple[torch.Tensor, torch.Tensor]] = None  # raw and virtual, of one microbatch
        self._loss: Any = None
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = 0

    def __repr__(self) -> str:
        return self._repr

    def match(self, event: Event, state: State) -> bool:
        return event in _ACTIONS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        _ACTIONS[event](self, state, logger)

    def _attach(self, state: State, logger: Logger) -> None:
        """Put the hooks in: surgery and loading are over, DDP and torch.compile are still to come."""
        if self._expander is not None:
            self._expander.remove()
        _refuse(state.model, state.algorithms)
        network = state.model.module if isinstance(state.model, ComposerClassifier) else state.model
        seed = state.rank_zero_seed if self.seed is None else self.seed
        self._expander = LatentExpander(
            network, self.layers, self.fold, self.vicinity, norm_stats=self.norm_stats, seed=seed
        )
        self._checked = False

    def _draw(self, state: State, logger: Logger) -> None:
        """Draw λ(t), once a batch, whatever becomes of the batch."""
        time = state.timestamp.batch if self.granularity == 'batch' else state.timestamp.epoch
        self._disarm(state, logger)
        self._prob = self._probability(state)
        self._augment = sbaf.should_augment(self._prob, self._attached.seed, time.value)

    def _probability(self, state: State) -> float:
        if not callable(self.augment_prob):
            return self.augment_prob
        prob = float(self.augment_prob(state))
        if not 0 <= prob <= 1:
            name = type(self.augment_prob).__name__
            raise ValueError(f'Expected augment_prob in [0, 1], got {prob} from {name} at batch {state.timestamp.batch.value}.')
        return prob

    def _begin(self, state: State, logger: Logger) -> None:
        """Start a batch from its first microbatch, also when it is tried again after running out of memory."""
        self._microbatch = 0
        self._sums = {}
        self._rows = 0

    def _arm(self, state: State, logger: Logger) -> None:
        self._disarm(state, logger)  # what an attempt that failed in between may have left
        if not self._checked:
            self._check_cuts(state)
        if self._augment:
            self._layer = self._attached.arm(state.timestamp.batch.value, self._microbatch)
        self._microbatch += 1

    def _check_cuts(self, state: State) -> None:
        """Try every layer on the first batch, before anything is trained."""
        model, batch = state.model, state.batch
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if isinstance(model, ComposerClassifier) and len(batch[0]) == 1:
            batch = (batch[0].expand(2, *batch[0].shape[1:]), *batch[1:])

        def forward() -> torch.Tensor:
            with get_precision_context(state.precision, state.precision_config):
                return model(batch)

        self._attached.check(forward)
        self._checked = True

    def _split(self, state: State, logger: Logger) -> None:
        if self._augment:
            self._logits = self._attached.split(state.outputs)
            state.outputs = self._logits[0]

    def _add_loss(self, state: State, logger: Logger) -> None:
        """Add the second term of Eq. (11). A dict of losses gains its key at every step: Composer reduces key by key."""
        if self._logits is None:
            if isinstance(state.loss, dict):
                state.loss = {**state.loss, 'sba': next(iter(state.loss.values())).new_zeros(())}
            return
        raw, virtual = self._logits
        if self.target == 'soft':
            loss = sbaf.soft_label_kl(raw, virtual, stop_gradient=self.stop_gradient)
        else:
            loss = sbaf.hard_label_loss(virtual, state.batch_get_item(self.target_key))
        self._loss = state.loss = _add(state.loss, self.eta * loss)
        self._measure(raw.detach(), virtual.detach(), loss.detach())

    def _measure(self, raw: torch.Tensor, virtual: torch.Tensor, loss: torch.Tensor) -> None:
        # Sums stay on the device until the batch is over, when the Trainer waits for the device anyway.
        kl = loss if self.target == 'soft' else sbaf.soft_label_kl(raw, virtual)
        agreement = (virtual.argmax(-1) == raw.argmax(-1)).float().mean()
        for name, value in {'sba/kl': kl, 'sba/virtual_agreement': agreement}.items():
            self._sums[name] = self._sums.get(name, 0) + value * len(raw)
        self._rows += len(raw)

    def _end_backward(self, state: State, logger: Logger) -> None:
        if self._loss is not None and state.loss is not self._loss and not self._warned:
            others = [type(other).__name__ for other in state.algorithms if getattr(other, 'interpolate_loss', False)]
            warnings.warn(
                f'{" and ".join(others) or "Another algorithm"} changed the loss after SBA added its term, which is then scaled '
                f'too. Put SBA last in the list of algorithms, or give the Trainer algorithm_passes=[sort_sba_last].',
                NotIntendedUseWarning,
                stacklevel=2,
            )
            self._warned = True
        self._disarm(state, logger)

    def _disarm(self, state: State, logger: Logger) -> None:
        self._attached.disarm()
        self._logits = self._loss = None

    def _log(self, state: State, logger: Logger) -> None:
        metrics: dict[str, float] = {'sba/augmented': int(self._augment), 'sba/augment_prob': self._prob}
        if self._augment:
            metrics['sba/layer'] = self._layer
            metrics |= {name: float(total) / self._rows for name, total in self._sums.items()}
        logger.log_metrics(metrics)

    @property
    def _attached(self) -> LatentExpander:
        if self._expander is None:
            raise RuntimeError('SBA has no model yet: give it to a Trainer, which attaches it.')
        return self._expander

    def _arguments(self) -> dict[str, Any]:
        prob = type(self.augment_prob).__name__ if callable(self.augment_prob) else self.augment_prob
        vicinity = {field.name: getattr(self.vicinity, field.name) for field in fields(self.vicinity)}
        names = ('layers', 'fold', 'eta', 'target', 'granularity', 'stop_gradient', 'norm_stats', 'seed')
        return {**{name: getattr(self, name) for name in names}, 'augment_prob': prob, 'vicinity': vicinity}

    def _check_arguments(self) -> None:
        if not self.layers or not all(isinstance(name, str) and name for name in self.layers):
            raise ValueError(f'Expected layers to be a layer name or a list of them, got {self.layers!r}.')
        _check_number('fold', self.fold, 'an integer >= 1', isinstance(self.fold, int) and self.fold >= 1)
        _check_number('eta', self.eta, 'a finite number >= 0', _is_real(self.eta) and 0 <= self.eta < float('inf'))
        if not callable(self.augment_prob):
            valid = _is_real(self.augment_prob) and 0 <= self.augment_prob <= 1
            _check_number('augment_prob', self.augment_prob, 'a number in [0, 1] or a Composer scheduler', valid)
        if self.seed is not None:
            _check_number('seed', self.seed, 'an integer >= 0', isinstance(self.seed, int) and self.seed >= 0)
        choices = {'target': Target, 'granularity': Granularity, 'norm_stats': NormStats}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f'Expected {name} to be one of {", ".join(get_args(literal))}, got {getattr(self, name)!r}.')
        if not isinstance(self.stop_gradient, bool):
            raise ValueError(f'Expected stop_gradient to be true or false, got {self.stop_gradient!r}.')
        if self.eta == 0 or self.augment_prob == 0:
            name = 'eta' if self.eta == 0 else 'augment_prob'
            warnings.warn(f'SBA with {name}=0 does not change training.', NoEffectWarning, stacklevel=3)


_ACTIONS: dict[Event, Callable[[SBA, State, Logger], None]] = {
    Event.AFTER_LOAD: SBA._attach,
    Event.BATCH_START: SBA._draw,
    Event.BEFORE_TRAIN_BATCH: SBA._begin,
    Event.BEFORE_FORWARD: SBA._arm,
    Event.AFTER_FORWARD: SBA._split,
    Event.BEFORE_BACKWARD: SBA._add_loss,
    Event.AFTER_BACKWARD: SBA._end_backward,
    Event.BATCH_END: SBA._log,
    Event.EVAL_START: SBA._disarm,  # after a fit that an exception broke off
    Event.PREDICT_START: SBA._disarm,
}


def sort_sba_last(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Run SBA last before things happen and first after them: a pass for ``Trainer(algorithm_passes=[sort_sba_last])``.

    MixUp and CutMix with ``interpolate_loss=True`` rescale the whole loss at BEFORE_BACKWARD; SBA's term comes after that.

    Example:
        >>> from composer.algorithms import MixUp
        >>> [type(algorithm).__name__ for algorithm in sort_sba_last([SBA(), MixUp()], Event.BEFORE_BACKWARD)]
        ['MixUp', 'SBA']
    """
    sort = sort_to_front if event.name.startswith('AFTER_') else sort_to_back
    return sort(algorithms, SBA)


def _add(loss: Any, term: torch.Tensor) -> Any:
    """Add a term to the loss that Composer will sum up from a tensor, a dict or a sequence, which it stays."""
    if isinstance(loss, dict):
        total = {'total': loss['total'] + term} if 'total' in loss else {}
        return {**loss, **total, 'sba': term}
    if isinstance(loss, (list, tuple)):
        return type(loss)((loss[0] + term, *loss[1:]))
    return loss + term


def _refuse(model: nn.Module, algorithms: Sequence[Algorithm]) -> None:
    if isinstance(model, HuggingFaceModel):
        raise CutLayerError(
            'SBA cannot cut a HuggingFaceModel, which computes its loss inside forward from labels of the raw rows. Wrap the '
            'network in a ComposerClassifier whose forward returns logits.',
        )
    if any(isinstance(algorithm, GyroDropout) for algorithm in algorithms):
        raise CutLayerError(
            'SBA and GyroDropout exclude each other: GyroDropout keeps its masks by row over many batches. Use nn.Dropout.',
        )
    loss_fn = getattr(model, '_loss_fn', None)
    name = getattr(loss_fn, '__name__', type(loss_fn).__name__).lower()
    if 'binary_cross_entropy' in name or name.startswith('bce'):
        warnings.warn(
            'SBA compares softmax distributions; this model is trained with binary cross-entropy, whose classes do not exclude '
            'each other.',
            NotIntendedUseWarning,
            stacklevel=2,
        )


def _vicinity(vicinity: Union[Vicinity, Mapping[str, Any]]) -> Vicinity:
    if isinstance(vicinity, Vicinity):
        return vicinity
    known = [field.name for field in fields(Vicinity)]
    if not isinstance(vicinity, Mapping) or not set(vicinity) <= set(known):
        raise ValueError(f'Expected vicinity to be a Vicinity or a mapping of {", ".join(known)}, got {vicinity!r}.')
    return Vicinity(**vicinity)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float))


def _check_number(name: str, value: Any, expected: str, valid: bool) -> None:
    if isinstance(value, bool) or not valid:
        raise ValueError(f'Expected {name} to be {expected}, got {value!r}.')
