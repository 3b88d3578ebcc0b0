"""The cost of a training step: plain, with SBA and with related methods, compared with the cost in operations.

:class:`Steps` runs each kind of step on one network, and :func:`measure` times them in turn.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from composer_sba import functional as sbaf
from composer_sba.latent.expander import LatentExpander
from composer_sba.vicinity import Vicinity

# Part of a step -> substrings of the operators that belong to it. An operator without a match belongs to the part of
# the innermost operator around it that has one.
PROFILE_PARTS = {
    'noise and Σ': ('Expansion', 'composer_sba::'),
    'rows': ('aten::cat', 'CatBackward'),
    'batch norm': ('batch_norm', 'BatchNorm', 'var_mean', 'VarMean', 'addcmul', 'Addcmul'),
    'tail and trunk': ('convolution', 'addmm', 'aten::mm', 'aten::bmm', 'pool'),
    'loss': ('softmax', 'nll_loss', 'kl_div'),
}


@dataclass(frozen=True)
class StepCost:
    """The cost of a kind of step relative to a plain one.

    Args:
        kind (str): One of ``STEP_KINDS``.
        ratio (float): Time ÷ plain, the median over rounds.
        low, high (float): The quartiles of that ratio.
        ideal (float): Executed operations ÷ plain.
        memory (float): Peak memory of the step ÷ plain, without the memory that is held between steps.
        seconds (float): The time of a step, the median over rounds.
    """

    kind: str
    ratio: float
    low: float
    high: float
    ideal: float
    memory: float
    seconds: float


class Steps:
    """Training steps of one network on one batch of random images; all kinds share the weights.

    ``plain``: cross-entropy. ``unarmed``: the same with SBA's hooks attached, as at λ(t) = 0. ``sba``: Eq. 11.
    ``latent_ba``: the hard loss of Eq. 9. ``naive``: SBA with two forward passes, one for the raw rows and one that
    predicts for the virtual rows from the input on. ``ba``: Hoffer et al.'s BA, with M copies of the input. ``twice``:
    cross-entropy of twice the rows, which are as many as SBA has above a cut at the input with M = 1.

    Args:
        network (torch.nn.Module): The network, on its device.
        images (torch.Tensor): Shape ``(N, 3, H, W)``.
        labels (torch.Tensor): Shape ``(N,)``.
        layer (str): The cut layer.
        fold (int): M, virtual samples per raw sample.
        vicinity (Vicinity, optional): The distribution of the virtual samples. Default: ``Vicinity()``.
        dtype (torch.dtype, optional): The dtype of autocast; float32 means no autocast. Default: ``torch.float32``.
        compiled (bool, optional): Whether to use ``torch.compile``. Default: ``False``.
        checkpointing (bool, optional): Whether the backward pass recomputes the activations of each stage. Default:
            ``False``.
    """

    def __init__(
        self,
        network: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        layer: str,
        fold: int,
        vicinity: Vicinity = Vicinity(),
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        checkpointing: bool = False,
    ) -> None:
        if checkpointing:
            apply_activation_checkpointing(network, check_fn=lambda module: module in network.children())
        self.network, self.images, self.labels, self.fold = network, images, labels, fold
        self.expander = LatentExpander(network, layer, fold, vicinity)
        with torch.no_grad():
            self.expander.check(lambda: network(images[:2]))
        self.forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(network) if compiled else network
        self.compiled = compiled
        self.dtype = dtype
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
        self.index = 0

    def run(self, kind: str) -> None:
        """Train for one step of a kind. The hooks must be as :meth:`hooked` sets them."""
        self.index += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self._loss(kind)
        loss.backward()
        self.expander.disarm()  # after the backward pass, in which activation checkpointing runs the hooks again
        self.optimizer.step()

    @contextmanager
    def hooked(self, kind: str) -> Iterator[None]:
        """Attach the hooks that a kind of step needs; a compiled network keeps them, since all kinds share a graph."""
        if self.compiled:
            yield
            return
        if kind in ('plain', 'ba', 'twice'):
            self.expander.remove()
        try:
            yield
        finally:
            self.expander.attach()

    def _loss(self, kind: str) -> torch.Tensor:
        if kind in ('plain', 'unarmed'):
            return F.cross_entropy(self.forward(self.images), self.labels)
        if kind in ('ba', 'twice'):
            copies = self.fold if kind == 'ba' else 2
            images = self.images.repeat_interleave(copies, 0)
            return F.cross_entropy(self.forward(images), self.labels.repeat_interleave(copies))
        own = self.forward(self.images) if kind == 'naive' else None
        self.expander.arm(self.index)
        logits, virtual = self.expander.split(self.forward(self.images))
        logits = logits if own is None else own
        if kind == 'latent_ba':
            return F.cross_entropy(logits, self.labels) + sbaf.hard_label_loss(virtual, self.labels)
        return F.cross_entropy(logits, self.labels) + 0.1 * sbaf.soft_label_kl(logits, virtual)


def measure(steps: Steps, kinds: Sequence[str], rounds: int) -> list[StepCost]:
    """Time kinds of steps in turn, which compares each step with a plain one of about the same time.

    Args:
        steps (Steps): The network and its batch.
        kinds (Sequence[str]): Some of ``STEP_KINDS``. ``'plain'`` is always measured.
        rounds (int): The number of rounds after one round of warm-up.

    Returns:
        list[StepCost]: One for each kind except ``'plain'``, in the order of ``kinds``.
    """
    kinds = ['plain', *(kind for kind in dict.fromkeys(kinds) if kind != 'plain')]
    operations = {kind: _operations(steps, kind) for kind in kinds}
    memory = {kind: _memory(steps, kind) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind in kinds if turn % 2 else kinds[::-1]:  # vary which kind precedes which
            with steps.hooked(kind):
                begun = time.perf_counter()
                steps.run(kind)
                _synchronize(steps)
                seconds[kind].append(time.perf_counter() - begun)
    costs = []
    for kind in kinds[1:]:
        ratios = [own / plain for own, plain in zip(seconds[kind][1:], seconds['plain'][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        ideal = operations[kind] / operations['plain']
        median = statistics.median(seconds[kind][1:])
        costs.append(StepCost(kind, middle, low, high, ideal, memory[kind] / memory['plain'], median))
    return costs


def profile_difference(steps: Steps, kind: str, rounds: int) -> dict[str, float]:
    """Profile a kind of step and a plain one, and return the difference of each part.

    Args:
        steps (Steps): The network and its batch.
        kind (str): The kind of step.
        rounds (int): The number of steps to average over.

    Returns:
        dict[str, float]: Part of a step -> time beyond that of a plain step. Unit: milliseconds.
    """
    parts: dict[str, dict[str, float]] = {}
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if steps.images.is_cuda else [])]
    for each in ('plain', kind):
        with steps.hooked(each), profile(activities=activities) as record:
            for _ in range(rounds):
                steps.run(each)
            _synchronize(steps)
        parts[each] = _milliseconds_by_part(record, steps, rounds)
    return {part: parts[kind][part] - parts['plain'][part] for part in parts[kind]}


def _milliseconds_by_part(record: profile, steps: Steps, rounds: int) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys([*PROFILE_PARTS, 'other'], 0.0)
    for event in record.events():
        own = event.self_device_time_total if steps.images.is_cuda else event.self_cpu_time_total
        around, part = event, None
        while around is not None and part is None:
            matches = (part for part, texts in PROFILE_PARTS.items() if any(text in around.name for text in texts))
            part = next(matches, None)
            around = around.cpu_parent
        parts[part or 'other'] += own / 1000 / rounds
    return parts


def _operations(steps: Steps, kind: str) -> float:
    # A compiled network hides its operators from the counter
    forward, steps.forward = steps.forward, steps.network
    with steps.hooked(kind), FlopCounterMode(display=False) as counter:
        steps.run(kind)
    steps.forward = forward
    return float(counter.get_total_flops())


def _memory(steps: Steps, kind: str) -> float:
    """Return the peak memory of a step beyond what is held between steps. Unit: bytes."""
    with steps.hooked(kind):
        steps.run(kind)
        steps.optimizer.zero_grad()
        if steps.images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            steps.run(kind)
            return float(torch.cuda.max_memory_allocated() - held)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            steps.run(kind)
    # The profiler's own sums over operators have no peak
    assert record.profiler is not None and record.profiler.kineto_results is not None
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    changes.sort(key=lambda event: event.start_ns())
    return float(max(accumulate(event.nbytes() for event in changes)))


def _synchronize(steps: Steps) -> None:
    if steps.images.is_cuda:
        torch.cuda.synchronize()
