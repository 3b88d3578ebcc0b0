"""class LatentExpander: expand the batch at a cut layer and split the predictions. Plain PyTorch, without Composer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from composer_sba.errors import CutLayerError, check_choice, check_fold, check_seed
from composer_sba.latent.batch_layers import BatchLayer, find_below, hook_batch_layers
from composer_sba.latent.cut_check import Forward, check_cut, repeatable
from composer_sba.latent.forward_window import ForwardWindow, in_backward
from composer_sba.latent.head import returned_positions
from composer_sba.latent.layers import find_layers, forget_compiled_code
from composer_sba.latent.operators import draw_by_seed, to_json
from composer_sba.schedule import choose_layer, noise_seed
from composer_sba.vicinity import Vicinity, as_vicinity

NormStats = Literal['raw', 'all']


class LatentExpander:
    r"""Hooks that add virtual samples to a network's latent batch while armed, and split the predictions again.

    At the cut layer k the latent batch :math:`X_k` of N rows becomes :math:`[X_k; V_g; V_d]` (Eq. 6 of `Li et al., 2020
    <https://arxiv.org/abs/2006.15284>`_): the N raw rows, then M copies of all N rows, drawn from the vicinity. The
    layers above run once, on (1 + M) N rows. The network does not change while the expander is not armed.

    At ``'head'`` only the head runs on (1 + M) N rows. Its hooks keep the virtual samples' logits and return those of
    the raw rows to the network, which may return them in any form and compute its loss itself.

    Args:
        model (torch.nn.Module): The network. It gets hooks, which :meth:`remove` removes, and no parameters.
        layers (str | Sequence[str], optional): The set S of eligible cut layers. ``'head'`` is the input of the last
            ``nn.Linear``, and ``'input'`` is the network's input. A module name is the output of that module. Default:
            ``'head'``.
        fold (int, optional): M >= 1, virtual samples per raw sample. Default: ``4``.
        vicinity (Vicinity | Mapping, optional): The distribution of the virtual samples, or a mapping of its arguments.
            Default: ``Vicinity()``.
        norm_stats (str, optional): Whose batch statistics normalization layers above the cut use: ``'raw'``: the raw
            rows' for every row, and running statistics see raw rows only; ``'all'``: those of all rows. Default:
            ``'raw'``.
        seed (int, optional): Seed of the layer and of the noise, >= 0. Default: ``0``.

    Raises:
        CutLayerError: If the model has no layer of a given name, or is a DataParallel of several devices.
        ValueError: If another argument is out of its range.

    Note:
        In each forward pass, a generator seeded by (seed, rank, step, microbatch, layer) draws the noise. The global
        random stream is not used. Dropout, RReLU and stochastic depth modules above the cut use that stream for raw
        rows only, as without SBA; functions such as ``F.dropout`` use it for all rows. Under activation checkpointing,
        stay armed until the backward pass is over.

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
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise CutLayerError(
                'DataParallel runs copies of the network, whose virtual samples cannot be told apart: use '
                'DistributedDataParallel.'
            )
        self.model = model
        self.cuts = find_layers(model, layers)
        self.fold = fold
        self.vicinity = as_vicinity(vicinity)
        self.norm_stats = norm_stats
        self._seed = seed
        self._raw_rows: int | None = None  # N, once an augmented batch has passed the cut
        self._above_cut = False  # whether it is still augmented
        self._armed: int | None = None  # index of the cut that is armed
        self._window = ForwardWindow(model)
        self._key = (seed, 0, 0, 0, 0)
        self._noise_seed = np.zeros((), dtype=np.uint64)  # and the same memory as compiled code reads it
        self._noise_seed_tensor = torch.from_numpy(self._noise_seed.view(np.int64))
        self._vicinity_json = to_json(self.vicinity)
        self._split_rows: int | None = None
        self._head_logits: tuple[torch.Tensor, torch.Tensor] | None = None  # raw and virtual, if the head was cut
        self._handles: list[RemovableHandle] = []
        self._batch_layers: list[BatchLayer] = []
        forget_compiled_code(model)
        self.attach()

    def attach(self) -> None:
        """Attach the hooks, as the constructor does, and remove those that are there."""
        self.remove()
        self._window.attach()
        self._handles = [cut.hook(partial(self._at_cut, index)) for index, cut in enumerate(self.cuts)]
        self._handles += [
            cut.module.register_forward_hook(partial(self._after_head, index))
            for index, cut in enumerate(self.cuts)
            if cut.name == 'head'
        ]
        self._batch_layers = hook_batch_layers(self.model, self, self.norm_stats)

    @property
    def raw_rows(self) -> int | None:
        """N, while an augmented batch is above the cut; also when activation checkpointing runs a layer again."""
        return self._raw_rows if self._window.open and (self._above_cut or in_backward()) else None

    def arm(self, step: int, microbatch: int = 0) -> int:
        """Arm the hooks: the next forward pass expands the latent batch at the layer k(t).

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
        self._split_rows = self._head_logits = None
        self._key = (self._seed, rank, step, microbatch, layer)
        self._noise_seed[...] = self.seed(0)
        self._armed = layer
        self._window.arm()

    def disarm(self) -> None:
        """Disarm the hooks. An expanded batch can still be split, if its forward pass ended."""
        if self._window.broken:
            self._split_rows = self._head_logits = None  # of a failed attempt, and its graph
        self._armed = self._raw_rows = None
        self._above_cut = False
        self._window.disarm()

    @contextmanager
    def armed(self, step: int, microbatch: int = 0) -> Iterator[None]:
        """Arm the hooks within a ``with`` block; arguments as for :meth:`arm`."""
        self.arm(step, microbatch)
        try:
            yield
        finally:
            self.disarm()

    def split(self, outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the predictions of an armed forward pass.

        Args:
            outputs (torch.Tensor): What the network returned. Shape ``((1 + M) * N, K)``. If the head was cut, the
                hooks have split the logits already: ``outputs`` is what the network makes of N rows, in any form.

        Returns:
            tuple: Raw logits, shape ``(N, K)``, and virtual logits, shape ``(M, N, K)``. A head of N sequences of T
            tokens gives ``(N, T, K)`` and ``(M, N, T, K)``, unless the network returned those of one token of each.

        Raises:
            RuntimeError: If no layer was expanded since :meth:`arm`, or the rows are not those of the expanded batch.
        """
        if self._split_rows is None:
            raise RuntimeError(
                f'No virtual samples: no layer of {[cut.name for cut in self.cuts]} ran in the armed forward pass, or '
                'its outputs were split before. Either forward bypasses the layer, or code ran that was compiled '
                'before the hooks were attached: call torch._dynamo.reset() first.',
            )
        if self._head_logits is not None:
            (raw, virtual), self._head_logits = self._head_logits, None  # their graph ends with the caller
            self._split_rows = None
            positions = returned_positions(raw.detach(), outputs) if raw.ndim > 2 else None
            if positions is None:
                return raw, virtual
            rows = torch.arange(len(raw), device=raw.device)
            return raw[rows, positions], virtual[:, rows, positions]
        expected = (1 + self.fold) * self._split_rows
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != expected:
            got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise RuntimeError(f'Expected logits of shape ({expected}, K) from the armed forward pass, got {got}.')
        return self._split(outputs, self._split_rows)

    def check(self, forward: Forward) -> None:
        """Refuse layers that cannot be cut, by running the model on a real batch.

        The check runs in the model's current mode, training or evaluation, and leaves no trace
        (:func:`.check_cut`). Call it in the mode in which the hooks will be armed. Afterwards, hooks that
        keep raw rows apart are removed from layers below every cut, until :meth:`attach` attaches them again.

        Args:
            forward (Callable): Runs the model on a batch of at least two rows and returns its logits.

        Raises:
            CutLayerError: If a layer cannot be cut; the message names the layer, the reason and the nearest cut points.
        """
        below = set(self._batch_layers)
        for index, cut in enumerate(self.cuts):
            check_cut(self.model, cut, forward)
            with repeatable(self.model, self._window) as run:
                self._arm(index, step=0, microbatch=0)
                try:  # layers above the cut also refuse rows that they cannot separate
                    below &= find_below(self._batch_layers, self, partial(run, forward))
                finally:
                    self.disarm()
        for layer in below:
            layer.remove()
        self._batch_layers = [layer for layer in self._batch_layers if layer not in below]

    def remove(self) -> None:
        """Disarm and remove all hooks. Calling it again has no effect."""
        self.disarm()
        self._window.remove()
        for handle in self._handles:
            handle.remove()
        for layer in self._batch_layers:
            layer.remove()
        self._handles, self._batch_layers = [], []

    def seed(self, stream: int) -> int:
        """Return the seed of this microbatch's noise (stream 0) or of one call of a layer above the cut."""
        return noise_seed(*self._key, stream)

    def _at_cut(self, index: int, latent: Any) -> torch.Tensor | None:
        if self._armed != index or not self._window.open:
            return None
        if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
            got = latent.dtype if isinstance(latent, torch.Tensor) else type(latent).__name__
            raise CutLayerError(f'Expected a floating tensor at layer {self.cuts[index].name!r}, got {got}.')
        self._raw_rows = self._split_rows = len(latent)
        self._above_cut = True
        if torch.compiler.is_compiling():  # which cannot trace a generator; otherwise an operator only costs time
            return draw_by_seed(latent, self._noise_seed_tensor, self.fold, self._vicinity_json)[0]
        return self.vicinity.expand(latent, self.fold, self.seed(0))

    def _after_head(self, index: int, module: nn.Module, args: tuple, output: Any) -> torch.Tensor | None:
        """Keep the virtual samples' logits and return the raw rows', as if the head had seen no others."""
        if self._armed != index or self.raw_rows is None:
            return None
        logits = self._split(output, self.raw_rows)
        self._above_cut = False
        if not in_backward():
            self._head_logits = logits
        return logits[0]

    def _split(self, rows: torch.Tensor, raw_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        raw, virtual = rows.split([raw_rows, self.fold * raw_rows])
        return raw, virtual.unflatten(0, (self.fold, raw_rows))
