"""class ManifoldMixup: pairs of rows mixed at a random layer (Verma et al.), as a Composer algorithm."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger
from composer.loss.utils import ensure_targets_one_hot
from composer.utils import dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from composer_sba.algorithms._attachment import HookedAlgorithm
from composer_sba.algorithms._composer import forward_on_batch, network_of
from composer_sba.errors import CutLayerError, check_layers, check_number, check_seed
from composer_sba.latent.cut_check import check_cut
from composer_sba.latent.forward_window import ForwardWindow
from composer_sba.latent.layers import CutLayer, find_layers
from composer_sba.schedule import choose_layer, noise_seed

_MIXING, _PARTNERS = 1, 2  # streams of noise_seed; 0 is that of SBA's vicinity


def mix_rows(rows: torch.Tensor, partners: torch.Tensor, mixing: float | torch.Tensor) -> torch.Tensor:
    r"""Mix every row with its partner: :math:`Mix_\lambda(a, b) = \lambda a + (1 - \lambda) b`.

    Args:
        rows (torch.Tensor): Latent rows or label distributions. Shape ``(N, *)``, floating.
        partners (torch.Tensor): Index of each row's partner. Shape ``(N,)``, int64.
        mixing (float | torch.Tensor): λ in [0, 1], the share of the row itself. Shape ``()``.

    Returns:
        torch.Tensor: Shape ``(N, *)``. Gradients flow through both shares.

    Example:
        >>> mix_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0]), 0.75)
        tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]])
    """
    return mixing * rows + (1 - mixing) * rows[partners]


def draw_mixing(alpha: float, seed: int, step: int) -> float:
    r"""Draw the share :math:`\lambda \sim Beta(\alpha, \alpha)` of batch ``step``, the same on all ranks.

    Example:
        >>> [round(draw_mixing(2.0, seed=17, step=t), 3) for t in range(4)]
        [0.393, 0.452, 0.366, 0.133]
    """
    return float(np.random.default_rng(noise_seed(seed, 0, step, 0, 0, _MIXING)).beta(alpha, alpha))


def draw_partners(rows: int, seed: int, rank: int, step: int, microbatch: int) -> torch.Tensor:
    """Draw the partner of each row of one microbatch, a permutation of its rows. Shape ``(rows,)``, int64.

    Example:
        >>> draw_partners(4, seed=17, rank=0, step=0, microbatch=0)
        tensor([0, 1, 3, 2])
    """
    generator = torch.Generator().manual_seed(noise_seed(seed, rank, step, microbatch, 0, _PARTNERS))
    return torch.randperm(rows, generator=generator)


class ManifoldMixup(HookedAlgorithm):
    r"""A regularizer: the layers above a random layer train on mixtures of two rows, whose labels are mixed alike.

    Implements `Verma et al., 2019 <https://arxiv.org/abs/1806.05236>`_:

    .. math::
        L = \mathbb{E}_{(x, y), (x', y')} \; \mathbb{E}_{\lambda \sim Beta(\alpha, \alpha)} \; \mathbb{E}_{k \sim S} \;
        CE(f_k(Mix_\lambda(g_k(x), g_k(x'))), Mix_\lambda(y, y'))

    where :math:`g_k` are the layers up to layer k of a set S, :math:`f_k` those above, and :math:`Mix_\lambda(a, b) =
    \lambda a + (1 - \lambda) b`. Each batch has one λ and one layer, and pairs rows of the same microbatch. With
    ``layers='input'`` it is Input Mixup (Zhang et al., 2018).

    Args:
        layers (str | Sequence[str], optional): The set S, as in :class:`.SBA`: ``'input'``, ``'head'`` or names of
            modules, meaning their outputs. The authors' code for ResNets has the input and the first two stages, as
            ``['input', 'stage1', 'stage2']``. Default: ``'input'``.
        alpha (float, optional): α > 0 of the Beta distribution, 2 in the authors' runs on CIFAR. Default: ``2.0``.
        seed (int, optional): Seed of λ, the layer and the pairs, >= 0. Default: ``None``, the Trainer's seed.
        target_key (str | int | Callable, optional): Where a batch holds its labels, class indices ``(N,)`` or
            distributions ``(N, K)``. Default: ``1``.

    Raises:
        ValueError: If ``alpha`` or ``seed`` is out of range.
        UserError: When the Trainer is built, if its list of algorithms has two ManifoldMixup: name all layers in one.
        CutLayerError: When the Trainer is built or at the first batch, if the rows of a layer cannot be mixed.

    Note:
        Runs on AFTER_LOAD (finds the layers), FIT_START (installs hooks), BEFORE_FORWARD (draws), BEFORE_LOSS (labels
        in the batch become mixed ones, float, and stay so, as with Composer's MixUp; train metrics see the original
        ones), BATCH_END (logs ``manifold_mixup/mixing``, which is λ, and ``manifold_mixup/layer``, an index in
        ``layers``) and FIT_END (removes hooks). Rows are mixed once in training's forward pass, and again in the
        backward pass if activation checkpointing repeats it. At any other time, and after an exception, the hooks do
        nothing. Those of an interrupted fit are removed by the Trainer's next ``fit()``, ``eval()``, ``predict()`` or
        ``close()``. Draws are functions of (seed, rank, batch, microbatch), never of the global random stream. State
        saved: none.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model, train_dataloader=dataloader, max_duration='1ep', algorithms=[ManifoldMixup(['input', '0'])]
        ... )
    """

    instead_of_two = 'name all layers in one'

    def __init__(
        self,
        layers: str | Sequence[str] = 'input',
        alpha: float = 2.0,
        seed: int | None = None,
        target_key: str | int | Callable = 1,
    ) -> None:
        check_layers(layers)
        self.layers = layers
        self.alpha = check_number('alpha', alpha, 'a finite number > 0', lambda value: 0 < value < math.inf)
        self.seed = None if seed is None else check_seed(seed)
        self.target_key = target_key
        self._pass = ForwardWindow(nn.Identity())
        self._cuts: list[CutLayer] = []
        self._handles: list[RemovableHandle] = []
        self._cuts_checked = False
        self._microbatch = 0
        self._layer = 0  # k
        self._armed: int | None = None  # k, until the rows there are mixed
        # Tensors: torch.compile would make one graph for every number.
        self._mixing, self._partners = torch.zeros(()), torch.zeros(0, dtype=torch.int64)

    def __repr__(self) -> str:
        return f'ManifoldMixup(layers={self.layers!r}, alpha={self.alpha}, seed={self.seed})'

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse layers that the network does not have."""
        super().after_load(state, logger)
        find_layers(network_of(state.model), self.layers)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Install the hooks again if a callback has predicted or evaluated."""
        if not self.is_attached_to(state):
            self.attach(state)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start from the first microbatch, also when a batch is tried again after running out of memory."""
        self._microbatch = 0

    def before_forward(self, state: State, logger: Logger) -> None:
        """Draw λ, k and the pairs; before the first batch of a fit, check that the layers' rows can be mixed."""
        assert self._network is not None
        self._armed = None  # after an attempt that failed
        if not self._cuts_checked:
            for cut in self._cuts:
                check_cut(self._network, cut, forward_on_batch(state), rows_may_mix=True)
            self._cuts_checked = True
        seed, step = state.rank_zero_seed if self.seed is None else self.seed, state.timestamp.batch.value
        labels = state.batch_get_item(self.target_key)
        partners = draw_partners(len(labels), seed, dist.get_global_rank(), step, self._microbatch)
        self._partners = partners.to(labels.device)
        self._mixing = torch.tensor(draw_mixing(self.alpha, seed, step), dtype=torch.float64)
        self._pass.arm()
        self._armed = self._layer = choose_layer(len(self._cuts), seed, step)
        self._microbatch += 1

    def before_loss(self, state: State, logger: Logger) -> None:
        """Mix the labels."""
        if self._armed is not None:
            name = self._cuts[self._armed].name
            raise RuntimeError(f'No rows were mixed: layer {name!r} did not run in training mode in the forward pass.')
        outputs: Any = state.outputs  # one tensor, as the check of the layers has shown
        labels = ensure_targets_one_hot(outputs, state.batch_get_item(self.target_key))
        labels = labels.to(torch.promote_types(outputs.dtype, torch.float32))
        state.batch_set_item(self.target_key, mix_rows(labels, self._partners, self._mixing))

    def before_backward(self, state: State, logger: Logger) -> None:
        """Arm again, for activation checkpointing."""
        self._armed = self._layer

    def after_backward(self, state: State, logger: Logger) -> None:
        """Disarm, if no layer was run again."""
        self._armed = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log what was drawn."""
        logger.log_metrics({'manifold_mixup/mixing': self._mixing.item(), 'manifold_mixup/layer': self._layer})

    def _install(self, state: State) -> None:
        assert self._network is not None
        if self._pass.model is not self._network:
            self._pass = ForwardWindow(self._network)
        self._pass.attach()
        self._cuts = find_layers(self._network, self.layers)
        self._handles = [cut.hook(partial(self._at_cut, index)) for index, cut in enumerate(self._cuts)]
        self._cuts_checked = False

    def _uninstall(self, state: State | None) -> None:
        self._pass.remove()
        for handle in self._handles:
            handle.remove()
        self._handles, self._armed = [], None

    def _at_cut(self, index: int, latent: torch.Tensor) -> torch.Tensor | None:
        # A network that is fitted in evaluation mode is looked at, not trained.
        if self._armed != index or not self._pass.open or self._network is None or not self._network.training:
            return None
        if len(latent) != len(self._partners):
            raise CutLayerError(
                f'Layer {self._cuts[index].name!r} has {len(latent)} rows for a batch of {len(self._partners)}. '
                'ManifoldMixup can mix only at layers below the cut of SBA.',
            )
        self._armed = None
        return mix_rows(latent, self._partners, self._mixing)
