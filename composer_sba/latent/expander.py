"""LatentExpander: multiplies the batch at a cut layer and splits what comes out. Plain PyTorch, without Composer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError, check_choice, check_fold, check_seed
from composer_sba.latent.batch_layers import RawRows, keep_raw_rows, run_below
from composer_sba.latent.cut_check import Forward, check_cut, evaluation
from composer_sba.latent.forward_window import OnePass
from composer_sba.latent.head import ROWS_A_CLASS, draw_logit_noise, suits
from composer_sba.latent.kernels import draw_by_seed, draw_logit_noise_by_seed, packed
from composer_sba.latent.layers import CutLayer, find_layers
from composer_sba.schedule import choose_layer, noise_seed
from composer_sba.vicinity import Vicinity, as_vicinity

NormStats = Literal['raw', 'all']


class LatentExpander:
    r"""Turns the latent batch of a network into raw and virtual rows while armed, and splits the predictions again.

    At the cut layer k the latent batch :math:`X_k` of N rows becomes :math:`[X_k; V_g; V_d]` (Eq. 6 of `Li et al., 2020
    <https://arxiv.org/abs/2006.15284>`_): the N raw rows, then M copies of all N rows, drawn from the vicinity. The
    layers above run once, on (1 + M) N rows. Unarmed, the network is what it was.

    Args:
        model (torch.nn.Module): The network. It gets hooks, which :meth:`remove` takes away, and no parameters.
        layers (str | Sequence[str], optional): The set S of eligible cut layers: ``'head'``: the input of the last
            ``nn.Linear``; ``'input'``: the network's input; or module names, meaning those modules' outputs. Default:
            ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``4``.
        vicinity (Vicinity | Mapping, optional): The law of the virtual samples, or a mapping of its arguments. Default:
            ``Vicinity()``.
        norm_stats (str, optional): Whose batch statistics normalization layers above the cut use: ``'raw'``: the raw
            rows' for every row, and running statistics see raw rows only; ``'all'``: those of all rows. Default:
            ``'raw'``.
        seed (int, optional): Seed of the layer and of the noise, >= 0. Default: ``0``.

    Raises:
        CutLayerError: If a name is no layer of the model.
        ValueError: If another argument lies outside its range.

    Note:
        The noise comes from a generator seeded by (seed, rank, step, microbatch, layer) in each forward pass, never
        from the global random stream. Dropout, RReLU and stochastic depth above the cut, as modules, move that stream
        for raw rows alone, as without SBA; functions such as ``F.dropout`` move it for all rows. Under activation
        checkpointing, stay armed until the backward pass is over.

        At the head, where the clip and the width allow, Gaussian copies are drawn as noise of its outputs
        (:mod:`composer_sba.latent.head`): the head runs on raw rows and dropout copies alone.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> expander = LatentExpander(model, layers='head', fold=4)
        >>> with expander.armed(step=0):
        ...     out = model(torch.zeros(2, 8))
        >>> raw, virtual = expander.split(out)
        >>> raw.shape, virtual.shape
        (torch.Size([2, 3]), torch.Size([4, 2, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = 'head',
        fold: int = 4,
        vicinity: Vicinity | Mapping[str, Any] = Vicinity(),
        *,
        norm_stats: NormStats = 'raw',
        seed: int = 0,
    ) -> None:
        check_fold(fold)
        check_choice('norm_stats', norm_stats, NormStats)
        check_seed(seed)
        self.model = model
        self.cuts = find_layers(model, layers)
        self.fold = fold
        self.vicinity = as_vicinity(vicinity)
        self.norm_stats = norm_stats
        self._seed = seed
        self._raw_rows: int | None = None  # N, once an augmented batch has passed the cut
        self._armed: int | None = None  # index of the cut that is armed
        self._pass = OnePass(model)
        self._key = (seed, 0, 0, 0, 0)
        self._noise_seeds = torch.zeros(2, dtype=torch.int64)
        drawn_there = any(cut.name == 'head' and suits(cut.linear, self.vicinity) for cut in self.cuts)
        self._gaussian_at_head = self.vicinity.num_gaussian(fold) if drawn_there else 0
        self._dropout_alone = replace(self.vicinity, gaussian_fraction=0.0)
        self._law, self._dropout_law = packed(self.vicinity), packed(self._dropout_alone)
        self._late_copies = 0  # Gaussian copies that wait for the head to have run, while an augmented batch passes it
        self._split_rows: int | None = None
        self._handles: list[RemovableHandle] = []
        self._tail: list[RawRows] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks in, as the constructor does, in place of those that are there."""
        self.remove()
        self._pass.attach()
        self._handles = [cut.hook(partial(self._at_cut, index)) for index, cut in enumerate(self.cuts)]
        self._handles += [cut.hook_linear(self._at_head) for cut in self.cuts if cut.name == 'head']
        self._tail = keep_raw_rows(self.model, self, self.norm_stats)

    @property
    def raw_rows(self) -> int | None:
        """N, while an augmented batch is above the cut; also when activation checkpointing runs a layer again."""
        return self._raw_rows if self._pass.on else None

    def arm(self, step: int, microbatch: int = 0) -> int:
        """Have the next forward pass expand the latent batch at the layer k(t).

        Args:
            step (int): The batch index t, >= 0.
            microbatch (int, optional): Index of the microbatch within the batch. Default: ``0``.

        Returns:
            int: Index of the chosen layer in ``cuts``.
        """
        layer = choose_layer(len(self.cuts), self._seed, step)
        self._arm(layer, step, microbatch)
        return layer

    def _arm(self, layer: int, step: int, microbatch: int) -> None:
        self.disarm()
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._split_rows = None
        self._key = (self._seed, rank, step, microbatch, layer)
        for stream in range(2):
            self._noise_seeds[stream] = (self.seed(stream) + 2**63) % 2**64 - 2**63  # 64 bits, in int64
        self._armed = layer
        self._pass.arm()

    def disarm(self) -> None:
        """Leave the network as it was. What was expanded can still be split."""
        self._armed = self._raw_rows = None
        self._late_copies = 0
        self._pass.disarm()
        for layer in self._tail:
            layer.virtual = None  # of a forward pass that did not come to its end

    @contextmanager
    def armed(self, step: int, microbatch: int = 0) -> Iterator[None]:
        """Be armed within a ``with`` block; arguments as for :meth:`arm`."""
        self.arm(step, microbatch)
        try:
            yield
        finally:
            self.disarm()

    def split(self, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the predictions of an armed forward pass.

        Args:
            outputs (torch.Tensor): What the network returned. Shape ``((1 + M) * N, K)``.

        Returns:
            tuple: Raw logits, shape ``(N, K)``, and virtual logits, shape ``(M, N, K)``.

        Raises:
            RuntimeError: If no layer was expanded since :meth:`arm`, or the rows are not those of the expanded batch.
        """
        if self._split_rows is None:
            raise RuntimeError(
                f'No virtual samples: no layer of {[cut.name for cut in self.cuts]} ran in the armed forward pass. '
                f'Was the model compiled before the LatentExpander was made, or does forward bypass the layer?',
            )
        expected = (1 + self.fold) * self._split_rows
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != expected:
            got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise RuntimeError(f'Expected logits of shape ({expected}, K) from the armed forward pass, got {got}.')
        virtual = outputs[self._split_rows :].unflatten(0, (self.fold, self._split_rows))
        return outputs[: self._split_rows], virtual

    def check(self, forward: Forward) -> None:
        """Refuse layers that are no cut points, by running the model on a real batch.

        Layers below every cut then lose the hooks that would keep raw rows apart, until :meth:`attach` puts them back.

        Args:
            forward (Callable): Runs the model on a batch of at least two rows and returns its logits.

        Raises:
            CutLayerError: Naming the layer, the reason and the nearest layers that would do.
        """
        below = set(self._tail)
        with evaluation(self.model):
            for index, cut in enumerate(self.cuts):
                check_cut(self.model, cut, forward)
                self._arm(index, step=0, microbatch=0)
                try:
                    below &= run_below(self._tail, self, forward)  # and layers above the cut look at the rows they get
                finally:
                    self.disarm()
        for layer in below:
            layer.remove()
        self._tail = [layer for layer in self._tail if layer not in below]

    def remove(self) -> None:
        """Take all hooks off the network."""
        self._pass.remove()
        for handle in self._handles:
            handle.remove()
        for layer in self._tail:
            layer.remove()
        self._handles, self._tail = [], []

    def seed(self, stream: int) -> int:
        """Give the seed of this microbatch's noise (streams 0 and 1) or of one call of a layer above the cut."""
        return noise_seed(*self._key, stream)

    def _at_cut(self, index: int, latent: Any) -> torch.Tensor | None:
        if self._armed != index or not self._pass.on:
            return None
        if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
            got = latent.dtype if isinstance(latent, torch.Tensor) else type(latent).__name__
            raise CutLayerError(f'Expected a floating tensor at layer {self.cuts[index].name!r}, got {got}.')
        self._raw_rows = self._split_rows = len(latent)
        vicinity, law, copies = self.vicinity, self._law, self.fold
        self._late_copies = self._count_late_copies(self.cuts[index], latent)
        if self._late_copies > 0:
            vicinity, law, copies = self._dropout_alone, self._dropout_law, copies - self._late_copies
        if copies == 0:
            return None
        if torch.compiler.is_compiling():  # which cannot trace a generator; elsewhere an operator only costs time
            return draw_by_seed(latent, self._noise_seeds[0], copies, law)[0]
        return vicinity.expand(latent, copies, torch.Generator(latent.device).manual_seed(self.seed(0)))

    def _count_late_copies(self, cut: CutLayer, latent: torch.Tensor) -> int:
        if cut.name != 'head' or latent.ndim != 2:
            return 0
        pays = self._gaussian_at_head * len(latent) >= ROWS_A_CLASS * cut.linear.out_features
        return self._gaussian_at_head if pays else 0

    def _at_head(self, linear: nn.Linear, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """Put the Gaussian copies between the raw rows and the dropout copies, if none were made of the features."""
        if self._late_copies == 0 or self.raw_rows is None:
            return None
        latent = args[0][: self.raw_rows].detach()
        raw, dropout = output.split([self.raw_rows, len(output) - self.raw_rows])
        if torch.compiler.is_compiling():
            weight, seed = linear.weight.detach(), self._noise_seeds[1]
            xi, directions = draw_logit_noise_by_seed(latent, weight, seed, self._late_copies, self._law)
        else:
            generator = torch.Generator(latent.device).manual_seed(self.seed(1))
            xi, directions = draw_logit_noise(latent, linear.weight, self._late_copies, self.vicinity, generator)
        with torch.autocast(latent.device.type, enabled=False):
            points = raw + xi @ (linear.weight.to(xi.dtype) @ directions).T
        return torch.cat([raw, points.flatten(0, 1).to(output.dtype), dropout])
