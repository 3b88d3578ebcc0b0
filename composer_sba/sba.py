"""class SBA: Stochastic Batch Augmentation as a Composer algorithm. No mathematics: that is in functional.py."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from composer.algorithms.warnings import NoEffectWarning, NotIntendedUseWarning
from composer.core import Algorithm, Event, State
from composer.core.passes import sort_to_back, sort_to_front
from composer.loggers import Logger

from composer_sba import functional as sbaf
from composer_sba.algorithms._composer import (
    BatchMeans,
    FiniteGuard,
    add_term,
    at_epoch_start,
    first_forward,
    network_of,
    read_at_once,
    refuse_model,
)
from composer_sba.errors import (
    NonFiniteError,
    UserError,
    check_choice,
    check_flag,
    check_fold,
    check_layers,
    check_number,
    check_seed,
)
from composer_sba.latent.expander import LatentExpander, NormStats
from composer_sba.vicinity import Vicinity, as_vicinity

Target = Literal['soft', 'hard']
Granularity = Literal['batch', 'epoch']

_WITHIN_BATCH = (
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.BEFORE_BACKWARD,
    Event.AFTER_BACKWARD,
)


class SBA(Algorithm):
    r"""Trains the layers above a cut to predict for points around a latent batch what they predict for the batch.

    Implements `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, Eq. (11):

    .. math::
        L = \frac{1}{N} \sum_i CE(y_i, Y_i) + \frac{\eta\,\lambda(t)}{M N} \sum_i \sum_j D_{KL}(Y_i \parallel Y_{ij})

    where λ(t) ~ Bernoulli(cos ω) decides whether batch t is augmented, and :math:`Y_{ij}` is the prediction for the
    j-th of M virtual samples of raw sample i, drawn from the vicinity of its latent representation at a random layer of
    a set S.

    Args:
        layers (str | Sequence[str], optional): The set S of eligible cut layers: ``'head'``: the input of the model's
            last ``nn.Linear``; ``'input'``: the network's input; or module names as in the unwrapped model, ``module.``
            optional, meaning those modules' outputs. Default: ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``4``.
        augment_prob (float | Callable[[State], float], optional): cos ω in [0, 1], the probability that a batch is
            augmented: a number, or any Composer scheduler, whose value is the probability at that time.
            Default: ``0.5``.
        eta (float, optional): η >= 0, the weight of the virtual samples' loss. Default: ``0.1``.
        vicinity (Vicinity | Mapping, optional): The law of the virtual samples, or a mapping of its arguments. Default:
            ``Vicinity()``.
        target (str, optional): ``'soft'``: the KL term of Eq. (10); ``'hard'``: cross-entropy with the raw sample's
            label, Eq. (9), as in Bamboo: the label that the batch holds when the loss is known, mixed by MixUp and no
            longer smoothed by LabelSmoothing. Default: ``'soft'``.
        granularity (str, optional): Whether the coin is drawn for each ``'batch'`` (Alg. 1) or for each ``'epoch'``
            (Sec. 3). Default: ``'batch'``.
        stop_gradient (bool, optional): Let no gradient flow through the soft label :math:`Y_i`. Default: ``True``.
        norm_stats (str, optional): Whose batch statistics normalization layers above the cut use, ``'raw'`` rows' or
            those of ``'all'`` rows. Default: ``'raw'``.
        seed (int, optional): Seed of the coin, the layer and the noise, >= 0. Default: ``None``, the Trainer's seed.
        target_key (str | int | Callable, optional): Where a batch holds its labels; read by ``target='hard'`` alone.
            Default: ``1``.

    Raises:
        ValueError: If an argument lies outside its range; the message names it, its range and its value.
        CutLayerError: When the Trainer is built or at the first batch, if a layer or the model cannot be cut.
        NonFiniteError: In training, if the virtual samples' loss is NaN or infinite; the message names the batch and
            the layer.

    Note:
        A loss that is not finite ends the fit: on the CPU before it can reach a weight; on other devices, whose values
        are read once a batch, after the update but before a checkpoint is written. Under ``amp_fp16``, whose GradScaler
        leaves such an update out, the fit goes on with a warning, and ends when 10 augmented batches in a row are lost.
        Logits of minus infinity, as of classes that are masked, have no finite divergence: mask with a large negative
        number. Activations that are all zero have no noise in units of their RMS, so that Gaussian points equal them; a
        network of one class has a divergence of 0; a batch may have one row, if the layers above the cut take one.

    Note:
        Runs on AFTER_LOAD (hooks go in), BATCH_START (coin), BEFORE_FORWARD to AFTER_BACKWARD (armed), AFTER_FORWARD
        (``state.outputs`` is the raw rows' again), BEFORE_BACKWARD (``state.loss`` gains the term, in float32) and
        BATCH_END (logs). State saved: none; the coin, the layer and the noise are functions of (seed, batch), so a
        resumed run and a retried batch repeat them. It should run last: see :func:`sort_sba_last`.

        Logs once a batch: ``sba/augmented`` (0 or 1) and ``sba/augment_prob``; on augmented batches also ``sba/kl``
        (nats, this rank's mean), ``sba/layer`` (index in ``layers``) and ``sba/virtual_agreement`` (share of virtual
        rows whose most probable class is the raw row's).

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=dataloader, max_duration='1ep', algorithms=[SBA()]
        ... )
    """

    def __init__(
        self,
        layers: str | Sequence[str] = 'head',
        fold: int = 4,
        augment_prob: float | Callable[[State], float] = 0.5,
        eta: float = 0.1,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        *,
        target: Target = 'soft',
        granularity: Granularity = 'batch',
        stop_gradient: bool = True,
        norm_stats: NormStats = 'raw',
        seed: int | None = None,
        target_key: str | int | Callable = 1,
    ) -> None:
        self.layers = layers
        self.fold = fold
        self.augment_prob = augment_prob
        self.eta = eta
        self.vicinity = as_vicinity(vicinity)
        self.target = target
        self.granularity = granularity
        self.stop_gradient = stop_gradient
        self.norm_stats = norm_stats
        self.seed = seed
        self.target_key = target_key
        self._check_arguments()
        self.local_hparams = self._hparams()  # the name under which Composer logs hyperparameters
        # The engine asks for it at every event, and checkpoints keep it: cheap, and without a memory address.
        self._repr = f'SBA({", ".join(f"{name}={value!r}" for name, value in self.local_hparams.items())})'

        self._expander: LatentExpander | None = None
        self._run_seed = 0
        self._checked = False
        self._warned = False
        self._prob = 0.0
        self._augment = False  # λ(t)
        self._layer = 0  # k(t)
        self._microbatch = 0
        self._logits: tuple[torch.Tensor, torch.Tensor] | None = None  # raw and virtual, of one microbatch
        self._loss: Any = None
        self._means = BatchMeans()
        self._guard = FiniteGuard()
        self._unchecked: torch.Tensor | int = 0  # the sum of a batch's virtual samples' losses, on the device

    def __repr__(self) -> str:
        return self._repr

    def match(self, event: Event, state: State) -> bool:
        """Run on every event that a method below is named after, but for those that are idle in a plain batch."""
        if self._augment or event not in _WITHIN_BATCH:
            return hasattr(self, event.value)
        if event is Event.BEFORE_FORWARD:
            return not self._checked
        return event is Event.BEFORE_BACKWARD and isinstance(state.loss, dict)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the method that has the name of the event."""
        getattr(self, event.value)(state, logger)

    def after_load(self, state: State, logger: Logger) -> None:
        """Put the hooks in: surgery and loading are over, DDP and torch.compile are still to come."""
        if self._expander is not None:
            self._expander.remove()
        refuse_model(state.model, state.algorithms, self.target)
        self._run_seed = state.rank_zero_seed if self.seed is None else self.seed
        self._expander = LatentExpander(
            network_of(state.model),
            self.layers,
            self.fold,
            self.vicinity,
            norm_stats=self.norm_stats,
            seed=self._run_seed,
        )
        self._checked = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Put the hooks back for another fit, all of them: which ones it needs is seen at its first batch."""
        self._attached.attach()
        self._checked = False

    def batch_start(self, state: State, logger: Logger) -> None:
        """Draw λ(t), once a batch, whatever becomes of the batch."""
        if self.granularity == 'batch':
            self._prob, time = self._probability(state), state.timestamp.batch
        else:
            with at_epoch_start(state):
                self._prob, time = self._probability(state), state.timestamp.epoch
        self._augment = sbaf.should_augment(self._prob, self._run_seed, time.value)
        self.before_train_batch(state, logger)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start from the first microbatch, also when a batch is tried again after running out of memory."""
        self._disarm()  # and let go of the graph of that attempt
        self._microbatch = 0
        self._unchecked = 0
        self._means = BatchMeans()

    def before_forward(self, state: State, logger: Logger) -> None:
        """Arm the cut layer, if λ(t) = 1; before the first batch of all, see whether the layers can be cut."""
        if not self._checked:
            self._attached.check(first_forward(state))
            self._checked = True
        if self._augment:
            self._layer = self._attached.arm(state.timestamp.batch.value, self._microbatch)
        self._microbatch += 1

    def after_forward(self, state: State, logger: Logger) -> None:
        """Hand the raw rows' predictions to the loss, the metrics and every other algorithm."""
        self._logits = self._attached.split(state.outputs)
        state.outputs = self._logits[0].clone()  # whoever changes it in place leaves the soft label alone

    def before_backward(self, state: State, logger: Logger) -> None:
        """Add the second term of Eq. (11)."""
        if not self._augment:
            state.loss = add_term(state.loss, None)
            return
        assert self._logits is not None
        raw, virtual = self._logits
        if self.target == 'soft':
            loss = sbaf.soft_label_kl(raw, virtual, stop_gradient=self.stop_gradient)
        else:
            loss = sbaf.hard_label_loss(virtual, self._labels(state))
        self._measure(raw.detach(), virtual.detach(), loss.detach())
        if read_at_once(loss):
            self._check_finite(loss.item(), state, state.timestamp.batch.value)
        else:
            self._unchecked = self._unchecked + loss.detach()
        self._loss = state.loss = add_term(state.loss, self.eta * loss)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Disarm, now that activation checkpointing has recomputed what it had to."""
        if self._loss is not None and state.loss is not self._loss and not self._warned:
            others = [type(other).__name__ for other in state.algorithms if getattr(other, 'interpolate_loss', False)]
            warnings.warn(
                f'{" and ".join(others) or "Another algorithm"} changed the loss after SBA added its term, which is '
                'then scaled too. Put SBA last in the list of algorithms, or give the Trainer '
                'algorithm_passes=[sort_sba_last].',
                NotIntendedUseWarning,
                stacklevel=2,
            )
            self._warned = True
        self._disarm()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log what the batch was, once."""
        metrics: dict[str, float] = {'sba/augmented': int(self._augment), 'sba/augment_prob': self._prob}
        if self._augment:
            metrics['sba/layer'] = self._layer
            metrics |= {f'sba/{name}': mean for name, mean in self._means.values().items()}
        if isinstance(self._unchecked, torch.Tensor):
            self._check_finite(self._unchecked.item(), state, state.timestamp.batch.value - 1)
        logger.log_metrics(metrics)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Take the hooks off, so that the trained model is exported and copied as it was given."""
        self._disarm()
        self._attached.remove()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Disarm, should an exception have broken off a fit."""
        self._disarm()

    predict_start = eval_start

    def _probability(self, state: State) -> float:
        if not callable(self.augment_prob):
            return self.augment_prob
        prob = float(self.augment_prob(state))
        if not 0 <= prob <= 1:
            source = f'{type(self.augment_prob).__name__} at batch {state.timestamp.batch.value}'
            raise UserError(f'Expected augment_prob in [0, 1], got {prob} from {source}.', 'augment_prob')
        return prob

    def _labels(self, state: State) -> torch.Tensor:
        try:
            labels: torch.Tensor = state.batch_get_item(self.target_key)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            problem = f'Expected target_key to find the labels in a batch, got {self.target_key!r}.'
            raise UserError(problem, 'target_key') from error
        return labels

    def _measure(self, raw: torch.Tensor, virtual: torch.Tensor, loss: torch.Tensor) -> None:
        kl = loss if self.target == 'soft' else sbaf.soft_label_kl(raw, virtual)
        agreement = (virtual.argmax(-1) == raw.argmax(-1)).float().mean()
        self._means.add(len(raw), kl=kl, virtual_agreement=agreement)

    def _check_finite(self, kl: float, state: State, batch: int) -> None:
        try:
            self._guard.check(kl, state, batch, self._attached.cuts[self._layer].name)
        except NonFiniteError:
            self._disarm()
            raise

    def _disarm(self) -> None:
        self._attached.disarm()
        self._logits = self._loss = None

    @property
    def _attached(self) -> LatentExpander:
        if self._expander is None:
            raise RuntimeError('SBA has no model yet: give it to a Trainer, which attaches it.')
        return self._expander

    def _hparams(self) -> dict[str, Any]:
        names = (
            'layers',
            'fold',
            'augment_prob',
            'eta',
            'target',
            'granularity',
            'stop_gradient',
            'norm_stats',
            'seed',
        )
        hparams = {name: getattr(self, name) for name in names}
        if callable(self.augment_prob):
            hparams['augment_prob'] = type(self.augment_prob).__name__
        return {**hparams, 'vicinity': asdict(self.vicinity)}

    def _check_arguments(self) -> None:
        check_layers(self.layers)
        check_fold(self.fold)
        if not callable(self.augment_prob):
            expected = 'a number in [0, 1] or a Composer scheduler'
            check_number('augment_prob', self.augment_prob, expected, lambda value: 0 <= value <= 1)
        check_number('eta', self.eta, 'a finite number >= 0', lambda value: 0 <= value < math.inf)
        check_choice('target', self.target, Target)
        check_choice('granularity', self.granularity, Granularity)
        check_flag('stop_gradient', self.stop_gradient)
        check_choice('norm_stats', self.norm_stats, NormStats)
        if self.seed is not None:
            check_seed(self.seed)
        for name in ('eta', 'augment_prob'):
            if getattr(self, name) == 0:
                warnings.warn(f'SBA with {name}=0 does not change training.', NoEffectWarning, stacklevel=3)


def sort_sba_last(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Run SBA last before things happen and first after them: a pass for ``Trainer(algorithm_passes=[sort_sba_last])``.

    MixUp and CutMix with ``interpolate_loss=True`` rescale the whole loss at BEFORE_BACKWARD; SBA's term comes after
    that.

    Example:
        >>> from composer.algorithms import MixUp
        >>> [type(algorithm).__name__ for algorithm in sort_sba_last([SBA(), MixUp()], Event.BEFORE_BACKWARD)]
        ['MixUp', 'SBA']
    """
    sort = sort_to_front if event.name.startswith('AFTER_') else sort_to_back
    return sort(algorithms, SBA)
