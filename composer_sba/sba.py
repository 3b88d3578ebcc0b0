"""class SBA: Stochastic Batch Augmentation as a Composer algorithm. The equations are in functional.py."""

import inspect
import logging
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
from torch import nn

from composer_sba import functional as sbaf
from composer_sba.algorithms._attachment import HookedAlgorithm
from composer_sba.algorithms._composer import (
    BatchMeans,
    FiniteGuard,
    add_term,
    at_epoch_start,
    check_model,
    counted_positions,
    forward_on_batch,
    image_shape,
    is_on_cpu,
    network_of,
    schedule_ratio,
    task_loss_of_copies,
)
from composer_sba.errors import (
    CutLayerError,
    NonFiniteError,
    UserError,
    check_choice,
    check_flag,
    check_fold,
    check_layers,
    check_number,
    check_seed,
)
from composer_sba.latent.cut_survey import measure
from composer_sba.latent.expander import LatentExpander, NormStats
from composer_sba.latent.head import tensors_in
from composer_sba.latent.layers import find_layers, forget_compiled_code, is_head_alone
from composer_sba.vicinity import Vicinity, as_vicinity

Target = Literal['soft', 'hard']
_log = logging.getLogger(__name__)
Granularity = Literal['batch', 'epoch']

_WITHIN_BATCH = (
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.BEFORE_BACKWARD,
    Event.AFTER_BACKWARD,
)


class SBA(HookedAlgorithm):
    r"""A regularizer that adds noise at one layer on random training steps and penalizes changes of the predictions.

    Implements `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_, Eq. (11):

    .. math::
        L = \frac{1}{N} \sum_i CE(y_i, Y_i) + \frac{\eta\,\lambda(t)}{M N} \sum_i \sum_j D_{KL}(Y_i \parallel Y_{ij})

    where λ(t) ~ Bernoulli(cos ω) decides whether batch t is augmented, and :math:`Y_{ij}` is the prediction for the
    j-th of M virtual samples of raw sample i. Virtual samples are drawn around the raw sample's activations at a random
    layer of a set S. On CIFAR-10, the default lowered the calibration error at two of three training set sizes
    and the error at none (``docs/results.md``).

    Args:
        layers (str | Sequence[str], optional): The set S of eligible cut layers. ``'head'`` is the input of the model's
            last ``nn.Linear``, and ``'input'`` is the network's input. A module name, as in the unwrapped model and
            with or without ``module.``, is the output of that module. Default: ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``4``.
        augment_prob (float | Callable[[State], float], optional): cos ω in [0, 1], the probability that a batch is
            augmented: a number, or any Composer scheduler, whose value is the probability at that time. It follows the
            Trainer's ``scale_schedule_ratio``, as the learning rate's Composer schedulers do; if the learning rate has
            PyTorch's schedulers instead, the ratio is unknown, so give times in ``'dur'``. Default: ``0.5``.
        eta (float, optional): η >= 0, the weight of the virtual samples' loss. Default: ``0.1``.
        vicinity (Vicinity | Mapping, optional): The distribution of the virtual samples, or a mapping of its arguments.
            Default: ``Vicinity()``.
        target (str, optional): ``'soft'``: the KL term of Eq. (10); ``'hard'``: the model's own loss of the virtual
            samples with the raw sample's label, for cross-entropy Eq. (9), as in Bamboo. The label includes
            the mixing by MixUp, but not the smoothing by LabelSmoothing, which is undone before. Default: ``'soft'``.
        granularity (str, optional): Whether the coin is drawn for each ``'batch'`` (Alg. 1) or for each ``'epoch'``
            (Sec. 3). Default: ``'batch'``.
        stop_gradient (bool, optional): Let no gradient flow through the soft label :math:`Y_i`. Default: ``True``.
        norm_stats (str, optional): Whose batch statistics normalization layers above the cut use, ``'raw'`` rows' or
            those of ``'all'`` rows. Default: ``'raw'``.
        seed (int, optional): Seed of the coin, the layer and the noise, >= 0. Default: ``None``, the Trainer's seed.

    Raises:
        ValueError: If an argument is out of range; the message names it, its range and its value.
        UserError: When the Trainer is built, if its list of algorithms has two SBA: name all layers in one. At the
            start of a fit, if ``augment_prob`` takes the state alone and ``scale_schedule_ratio`` is not 1.
        CutLayerError: When the Trainer is built or at the first batch, if a layer or the model cannot be cut.
        NonFiniteError: In training, if the virtual samples' loss is NaN or infinite; the message names the batch and
            the layer.

    Note:
        A loss that is not finite ends the fit. On the CPU, the fit ends before the loss changes a weight. On other
        devices, SBA reads the loss once a batch: after the update, but before a checkpoint is written. Under
        ``amp_fp16``, the GradScaler skips such an update: SBA warns, and ends the fit after 10 such augmented batches
        in a row. The divergence of logits of minus infinity is not finite: mask classes with a large negative number
        instead. If all activations are zero, noise in units of their RMS is zero too. If the network has one logit, the
        divergence is 0 and SBA warns. A batch may have one row if the layers above the cut accept one.

    Note:
        Runs on AFTER_LOAD (finds the layers), FIT_START (installs hooks), BATCH_START (draws the coin), BEFORE_FORWARD
        to AFTER_BACKWARD (hooks are armed), AFTER_FORWARD (``state.outputs`` is cut to the raw rows), BEFORE_BACKWARD
        (adds the term to ``state.loss``, in float32), BATCH_END (logs) and FIT_END (removes hooks). The hooks of an
        interrupted fit are removed by the Trainer's next ``fit()``, ``eval()``, ``predict()`` or ``close()``. State
        saved: none; the coin, the layer and the noise are functions of (seed, batch), so a resumed run and a retried
        batch repeat them. SBA should run last: see :func:`sort_sba_last`.

        Logs once a batch: ``sba/augmented`` (0 or 1) and ``sba/augment_prob``; on augmented batches also ``sba/kl``
        (nats, this rank's mean), ``sba/layer`` (index in ``layers``) and ``sba/virtual_agreement`` (share of virtual
        rows whose most probable class is the raw row's). Before the first batch of a fit, it logs the cut and
        the cost of an augmented step in one line, with Python's ``logging`` at level INFO.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=dataloader, max_duration='1ep', algorithms=[SBA()]
        ... )
    """

    instead_of_two = "name all layers in one, SBA(layers=['layer1', 'head']), which cuts one of them in each batch"

    def __init__(
        self,
        layers: str | Sequence[str] = 'head',
        fold: int = 4,
        augment_prob: float | Callable[..., float] = 0.5,
        eta: float = 0.1,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        *,
        target: Target = 'soft',
        granularity: Granularity = 'batch',
        stop_gradient: bool = True,
        norm_stats: NormStats = 'raw',
        seed: int | None = None,
    ) -> None:
        check_layers(layers)
        if not callable(augment_prob):
            expected = 'a number in [0, 1] or a Composer scheduler'
            augment_prob = check_number('augment_prob', augment_prob, expected, lambda value: 0 <= value <= 1)
        check_choice('target', target, Target)
        check_choice('granularity', granularity, Granularity)
        check_flag('stop_gradient', stop_gradient)
        check_choice('norm_stats', norm_stats, NormStats)
        self.layers = layers
        self.fold = check_fold(fold)
        self.augment_prob = augment_prob
        self.eta = check_number('eta', eta, 'a finite number >= 0', lambda value: 0 <= value < math.inf)
        self.vicinity = as_vicinity(vicinity)
        self.target = target
        self.granularity = granularity
        self.stop_gradient = stop_gradient
        self.norm_stats = norm_stats
        self.seed = None if seed is None else check_seed(seed)
        for name in ('eta', 'augment_prob'):
            if getattr(self, name) == 0:
                warnings.warn(f'SBA with {name}=0 does not change training.', NoEffectWarning, stacklevel=2)
        if target == 'soft' and is_head_alone(layers) and not self.vicinity.has_noise(self.fold):
            problem = 'SBA at the head with a vicinity without noise does not change training.'
            warnings.warn(problem, NoEffectWarning, stacklevel=2)
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
        hparams = {name: getattr(self, name) for name in names} | {'vicinity': asdict(self.vicinity)}
        if callable(augment_prob):
            hparams['augment_prob'] = type(augment_prob).__name__
        self.local_hparams = hparams  # the name under which Composer logs hyperparameters
        # The engine asks for it at every event, and checkpoints keep it: cheap, and without a memory address.
        self._repr = f'SBA({", ".join(f"{name}={value!r}" for name, value in hparams.items())})'

        self._expander: LatentExpander | None = None
        self._run_seed = 0
        self._schedule_ratio: tuple[float, ...] = ()  # the second argument of augment_prob, if it takes one
        self._cuts_checked = False
        self._warned: set[str] = set()
        self._prob = 0.0
        self._augment = False  # λ(t)
        self._layer = 0  # k(t)
        self._microbatch = 0
        self._logits: tuple[torch.Tensor, torch.Tensor] | None = None  # raw and virtual, of one microbatch
        self._loss: Any = None
        self._means = BatchMeans()
        self._guard = FiniteGuard('divergence' if target == 'soft' else 'loss of the virtual samples')
        self._unchecked: torch.Tensor | int = 0  # the sum of a batch's virtual samples' losses, on the device

    @classmethod
    def robust(cls, sigma: float = 0.4, augment_prob: float = 0.5) -> 'SBA':
        """Return the setting that trains for robustness to noise: one Gaussian virtual sample at the network's input.

        It has ``layers='input'``, ``fold=1``, Gaussian points only, and η = 1 / ``augment_prob``, which gives the
        virtual samples' loss a weight of 1 on average. An augmented step has twice the operations of a plain one.

        In the study of robustness (``docs/robustness_study.md``), it lowers the error under strong noise and an attack,
        compared with the baseline. Gaussian noise on half of the training images is free. Trained for as many
        operations, and with twice the noise, it is better than SBA in short trainings. After convergence on CIFAR-10,
        SBA is better than such noise of each strength in some columns, and worse in none. On the digits, SBA is better
        on clean images and the noise under corruptions.

        Args:
            sigma (float, optional): σ of the noise in units of the images' RMS. For images that are normalized with
                their own mean and standard deviation, 0.4 is about 0.1 of the pixel range. Default: ``0.4``.
            augment_prob (float, optional): Probability that a batch is augmented, in (0, 1]. Default: ``0.5``.

        Returns:
            SBA: The algorithm; in a recipe, ``methods/sba_robust.yaml``.

        Raises:
            ValueError: If an argument is out of range.

        Example:
            >>> SBA.robust(augment_prob=0.25).eta
            4.0
        """
        check_number('augment_prob', augment_prob, 'a number in (0, 1]', lambda value: 0 < value <= 1)
        vicinity = Vicinity(gaussian_fraction=1.0, sigma=sigma)
        return cls('input', fold=1, augment_prob=augment_prob, eta=1 / augment_prob, vicinity=vicinity)

    def __repr__(self) -> str:
        return self._repr

    def describe(self, network: nn.Module, shape: Sequence[int] | None = None) -> str:
        """Describe the cut, the virtual samples and the cost of an augmented step in one line.

        Args:
            network (torch.nn.Module): The network that is trained.
            shape (Sequence[int], optional): Shape of an image, ``(C, H, W)``; without it, the line has neither widths
                nor cost. Default: ``None``.

        Returns:
            str: The line.

        Example:
            >>> SBA(fold=2).describe(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
            'cuts head (12 features), M = 2 (1 Gaussian, 1 dropout), ...; an augmented step costs 3.000 plain ones'
        """
        _, cuts = (None, {}) if shape is None else measure(network, self.layers, shape)
        names = [self.layers] if isinstance(self.layers, str) else self.layers
        widths = {name: f'{name} ({math.prod(cut.shape):,} features)' for name, cut in cuts.items()}
        gaussian = self.vicinity.num_gaussian(self.fold)
        prob = type(self.augment_prob).__name__ if callable(self.augment_prob) else f'{self.augment_prob:g}'
        line = f'cuts {" or ".join(widths.get(name, name) for name in names)}, '
        line += f'M = {self.fold} ({gaussian} Gaussian, {self.fold - gaussian} dropout), p = {prob}, η = {self.eta:g}'
        ratios = sorted({f'{ratio:.3f}' for cut in cuts.values() if (ratio := cut.ratio(self.fold)) is not None})
        return f'{line}; an augmented step costs {" or ".join(ratios)} plain ones' if ratios else line

    def match(self, event: Event, state: State) -> bool:
        """Return whether a method is named after the event and has something to do in this batch."""
        if self._augment or event not in _WITHIN_BATCH:
            return super().match(event, state)
        if event is Event.BEFORE_FORWARD:
            return not self._cuts_checked
        return event is Event.BEFORE_BACKWARD and isinstance(state.loss, dict)

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a model, algorithms or layers that SBA cannot train, after model surgery and loading."""
        super().after_load(state, logger)
        check_model(state.model, state.algorithms, self.layers, self.target)
        find_layers(network_of(state.model), self.layers)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Install the hooks before the first forward pass, in which torch.compile compiles them."""
        self.attach(state)
        if callable(self.augment_prob):
            ratio, parameters = schedule_ratio(state), inspect.signature(self.augment_prob).parameters
            takes_ratio = 'ssr' in parameters or len([p for p in parameters.values() if p.default is p.empty]) > 1
            if ratio != 1 and not takes_ratio:
                raise UserError(
                    f'augment_prob takes only the state, so scale_schedule_ratio={ratio} cannot scale it: '
                    "give it a second parameter, ssr, as Composer's schedulers have.",
                    'augment_prob',
                )
            self._schedule_ratio = (ratio,) if takes_ratio else ()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Draw λ(t) once a batch, even if the batch is retried."""
        if not self.is_attached_to(state):  # a callback has predicted or evaluated
            self.attach(state)
        if self.granularity == 'batch':
            self._prob, time = self._probability(state), state.timestamp.batch
        else:
            with at_epoch_start(state):
                self._prob, time = self._probability(state), state.timestamp.epoch
        self._augment = sbaf.should_augment(self._prob, self._run_seed, time.value)
        self.before_train_batch(state, logger)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start from the first microbatch, also when a batch is retried after running out of memory."""
        self._disarm()  # and free the graph of the failed attempt
        self._microbatch = 0
        self._unchecked = 0
        self._means = BatchMeans()

    def before_forward(self, state: State, logger: Logger) -> None:
        """Arm the cut layer if λ(t) = 1; before the first batch of a fit, check that the layers can be cut."""
        assert self._expander is not None
        if not self._cuts_checked:
            self._expander.check(forward_on_batch(state))
            self._cuts_checked = True
            if _log.isEnabledFor(logging.INFO):
                _log.info('SBA %s', self.describe(self._expander.model, image_shape(state)))
        if self._augment:
            self._layer = self._expander.arm(state.timestamp.batch.value, self._microbatch)
        self._microbatch += 1

    def after_forward(self, state: State, logger: Logger) -> None:
        """Reduce the outputs to the raw rows' predictions, for the loss, the metrics and every other algorithm."""
        assert self._expander is not None
        self._logits = self._expander.split(state.outputs)
        if self._expander.cuts[self._layer].name != 'head':
            state.outputs = self._logits[0]
        elif not self._logits[1].requires_grad and any(each.requires_grad for each in tensors_in(state.outputs)):
            raise CutLayerError(
                "Layer 'head' is under reentrant activation checkpointing, which loses the gradient of the virtual "
                'samples: set activation_checkpointing_reentrant: false, or checkpoint only blocks below the head.'
            )
        if isinstance(state.outputs, torch.Tensor):
            state.outputs = state.outputs.clone()  # a loss that changes it in place leaves the soft label alone

    def before_backward(self, state: State, logger: Logger) -> None:
        """Add the second term of Eq. (11)."""
        if not self._augment:
            state.loss = add_term(state.loss, None)
            return
        assert self._logits is not None
        raw, virtual = self._logits
        counted = counted_positions(state, raw)
        if counted is not None:
            raw, virtual = raw[counted], virtual[:, counted]
        elif raw.ndim > 2:
            raw, virtual = raw.flatten(0, -2), virtual.flatten(1, -2)
        if self.target == 'hard':
            if not isinstance(state.outputs, torch.Tensor):
                raise UserError(
                    f"target='hard' needs a model whose output is one tensor of logits, got "
                    f"{type(state.outputs).__name__}: use target='soft'.",
                    'target',
                )
            loss = task_loss_of_copies(state, self._logits[1])
        else:
            loss = sbaf.soft_label_kl(raw, virtual, stop_gradient=self.stop_gradient)
            if raw.shape[1] == 1:
                self._warn(
                    'SBA compares softmax distributions, and a network with one logit has only one distribution: the '
                    "divergence is 0 and does not change training. Use target='hard', the model's own loss.",
                    NoEffectWarning,
                )
        kl = loss if self.target == 'soft' else sbaf.soft_label_kl(raw.detach(), virtual.detach())
        agreement = (virtual.argmax(-1) == raw.argmax(-1)).float().mean()
        if len(raw) > 0:
            self._means.add(len(raw), kl=kl, virtual_agreement=agreement)
        if is_on_cpu(loss):
            self._check_finite(loss.item(), state, state.timestamp.batch.value)
        else:
            self._unchecked = self._unchecked + loss.detach()
        self._loss = state.loss = add_term(state.loss, self.eta * loss)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Disarm the hooks, after activation checkpointing has recomputed its layers."""
        if self._loss is not None and state.loss is not self._loss:
            others = [type(other).__name__ for other in state.algorithms if getattr(other, 'interpolate_loss', False)]
            self._warn(
                f'{" and ".join(others) or "Another algorithm"} changed the loss after SBA added its term, which is '
                'then scaled too. Put SBA last in the list of algorithms, or give the Trainer '
                'algorithm_passes=[sort_sba_last].',
                NotIntendedUseWarning,
            )
        self._disarm()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the batch, once."""
        metrics: dict[str, float] = {'sba/augmented': int(self._augment), 'sba/augment_prob': self._prob}
        if self._augment:
            metrics['sba/layer'] = self._layer
            metrics |= {f'sba/{name}': mean for name, mean in self._means.values().items()}
        if isinstance(self._unchecked, torch.Tensor):
            self._check_finite(self._unchecked.item(), state, state.timestamp.batch.value - 1)
        logger.log_metrics(metrics)

    def _install(self, state: State) -> None:
        run_seed = state.rank_zero_seed if self.seed is None else self.seed
        network = network_of(state.model)
        if self._expander is not None and self._expander.model is network and self._run_seed == run_seed:
            self._expander.attach()  # the same hooks again, which code that was compiled in an earlier fit calls
        else:
            forget_compiled_code(state.model)
            self._expander = LatentExpander(
                network, self.layers, self.fold, self.vicinity, norm_stats=self.norm_stats, seed=run_seed
            )
        self._run_seed = run_seed
        self._cuts_checked = False

    def _uninstall(self, state: State | None) -> None:
        if self._expander is not None:
            self._disarm()
            self._expander.remove()

    def _disarm(self) -> None:
        assert self._expander is not None
        self._expander.disarm()
        self._logits = self._loss = None

    def _probability(self, state: State) -> float:
        if not callable(self.augment_prob):
            return self.augment_prob
        prob = float(self.augment_prob(state, *self._schedule_ratio))
        if not 0 <= prob <= 1:
            source = f'{type(self.augment_prob).__name__} at batch {state.timestamp.batch.value}'
            raise UserError(f'Expected augment_prob in [0, 1], got {prob} from {source}.', 'augment_prob')
        return prob

    def _check_finite(self, value: float, state: State, batch: int) -> None:
        assert self._expander is not None
        try:
            self._guard.check(value, state, batch, self._expander.cuts[self._layer].name)
        except NonFiniteError:
            self._disarm()
            raise

    def _warn(self, message: str, category: type[Warning]) -> None:
        """Warn once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, category, stacklevel=3)


def sort_sba_last(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Sort SBA last, or first on ``AFTER_*`` events; a pass for ``Trainer(algorithm_passes=[sort_sba_last])``.

    MixUp and CutMix with ``interpolate_loss=True`` rescale the whole loss at BEFORE_BACKWARD. SBA's term must come
    after that.

    Example:
        >>> from composer.algorithms import MixUp
        >>> [type(algorithm).__name__ for algorithm in sort_sba_last([SBA(), MixUp()], Event.BEFORE_BACKWARD)]
        ['MixUp', 'SBA']
    """
    sort = sort_to_front if event.name.startswith('AFTER_') else sort_to_back
    return sort(algorithms, SBA)
