"""The cost of a training step: plain, with SBA and with related methods, compared with the cost in operations.

:class:`Steps` runs each kind of step on one network, :func:`measure` times them in turn, and :func:`benchmark` writes
the report of ``study step``.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from composer.utils import get_device
from rich.console import Console
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from composer_sba import functional as sbaf
from composer_sba.data.loader import DatasetConfig, image_size
from composer_sba.errors import TooWideError, UserError
from composer_sba.latent.expander import LatentExpander
from composer_sba.provenance import hardware, software
from composer_sba.recipe.recipe import Recipe, component_arguments, load
from composer_sba.recipe.registry import construct
from composer_sba.study.display_names import display_name
from composer_sba.study.recipe_index import families
from composer_sba.study.runs import cut_layers
from composer_sba.vicinity import Basis, Vicinity

STEP_KINDS = ('plain', 'unarmed', 'sba', 'twice', 'latent_ba', 'naive', 'ba')
# Part of a step -> substrings of the operators that belong to it. An operator without a match belongs to the part of
# the innermost operator around it that has one.
PROFILE_PARTS = {
    'noise and Σ': ('Expansion', 'composer_sba::'),
    'rows': ('aten::cat', 'CatBackward'),
    'batch norm': ('batch_norm', 'BatchNorm', 'var_mean', 'VarMean', 'addcmul', 'Addcmul'),
    'tail and trunk': ('convolution', 'addmm', 'aten::mm', 'aten::bmm', 'pool'),
    'loss': ('softmax', 'nll_loss', 'kl_div'),
}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_BA_FOLD = 4  # beyond it, BA would take most of the benchmark's time only to show that it costs M


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


@dataclass(frozen=True)
class Options:
    """The options of ``study step``; an empty one means its default."""

    networks: Sequence[str] = ()
    datasets: Sequence[str] = ()
    cuts: Sequence[str] = ()
    folds: Sequence[int] = ()
    kinds: Sequence[str] = ()
    basis: Basis | None = None
    device: str | None = None
    dtype: str = 'fp32'
    compiled: bool = False
    channels_last: bool = False
    checkpointing: bool = False
    batch: int | None = None
    rounds: int = 20


def benchmark(recipes: Path, folder: Path, options: Options) -> Path:
    """Time the steps of every network that has a recipe for SBA, and write the report.

    Args:
        recipes (Path): The folder of the recipes, which give the network, the size of images, the batch and M.
        folder (Path): The folder of the report ``step-<date>-<device>.md``. Further reports of a day get a number.
        options (Options): What to time.

    Returns:
        Path: The report.

    Raises:
        UserError: If a network, data set or layer is unknown, if there is no such device, or if nothing could be timed.
        OSError: If the folder cannot be created.
    """
    if options.device == 'gpu' and not torch.cuda.is_available():
        raise UserError('--device gpu: PyTorch finds no GPU on this machine')
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be created should not cost a benchmark first
    console = Console(highlight=False)
    device = get_device(options.device)
    rows, profiles, left_out = [], [], []
    for family in families(recipes, options.networks, options.datasets):
        if not family.own('sba').exists():
            continue
        recipe = load(family.own('sba'))
        title = ', '.join(dict.fromkeys(map(display_name, family.names)))
        for cut in options.cuts or ['head', *cut_layers(recipe)[-3:-2]]:  # the head and the last stage but one
            try:
                for fold in options.folds or sorted({1, 4, recipe.algorithms['sba'].get('fold', 4)}):
                    steps = _steps(recipe, cut, fold, device, options)
                    costs = measure(steps, options.kinds or _default_kinds(fold), options.rounds)
                    rows += [[title, *_cells(steps, cut, cost)] for cost in costs]
                    brief = ', '.join(f'{cost.kind} {cost.ratio:.3f} (ideal {cost.ideal:.3f})' for cost in costs)
                    console.print(f'{" ".join(family.names)} {cut} M={fold}: {brief}', soft_wrap=True)
                    steps.expander.remove()
                parts = profile_difference(_steps(recipe, cut, fold, device, options), 'sba', min(options.rounds, 5))
                profiles.append([title, cut, str(fold), *(f'{value:.2f}' for value in parts.values())])
            except TooWideError as error:  # the other layers can still be timed
                left_out.append(f'Left out: {title}, {cut}: {error}')
                console.print(left_out[-1], soft_wrap=True)
    if not rows:
        raise UserError('\n'.join(left_out) or 'No network has a recipe for SBA among these.')
    text = _REPORT.format(
        date=datetime.now(timezone.utc).date(),
        hardware=hardware(device.name),
        software=software(),
        rounds=options.rounds,
        settings=f'{options.dtype}{", torch.compile" if options.compiled else ""}'
        f'{", channels_last" if options.channels_last else ""}'
        f'{", activation checkpointing" if options.checkpointing else ""}, basis {options.basis or "as in the recipe"}',
        table=_markdown(_COLUMNS, rows),
        profile=_markdown(['network', 'cut', 'M', *PROFILE_PARTS, 'other'], profiles),
    )
    stem = f'step-{datetime.now(timezone.utc).date()}-{device.name}'
    paths = (folder / f'{stem if number == 1 else f"{stem}-{number}"}.md' for number in count(1))
    path = next(path for path in paths if not path.exists())
    path.write_text('\n'.join([text, *left_out]), encoding='utf-8')
    return path


_COLUMNS = [
    'network',
    'px',
    'batch',
    'cut',
    'M',
    'step',
    'ms',
    'measured ÷ plain',
    'ideal',
    'measured ÷ ideal',
    'memory ÷ plain',
]
_REPORT = """# Cost of a step, {date}

{hardware}; {settings}; {software}; n = {rounds} rounds.

The kinds of step take turns, which compares each with a plain step of about the same time. Ratios are medians over
rounds [quartiles]. Ideal is the ratio of the executed operations (convolutions, matrix products, Σ). Memory is the peak
of a step beyond what is held between steps. A plain step has no hooks. An unarmed step has SBA's hooks, as at λ(t) = 0.
An SBA step has λ(t) = 1. Naive SBA uses a second forward pass, from the input on, for the virtual rows. Twice is a
plain step of twice the rows, as many as an SBA step has with M = 1 at the input.

{table}

## Time beyond a plain step

Milliseconds of an SBA step minus those of a plain step, by operator, under the profiler, which adds time of its own.

{profile}
"""


def _steps(recipe: Recipe, cut: str, fold: int, device: Any, options: Options) -> Steps:
    torch.manual_seed(recipe.seed)
    network = construct('model', recipe.model['name'], component_arguments(recipe.model))
    size = image_size(DatasetConfig(**recipe.train_dataset))
    rows = options.batch or recipe.global_train_batch_size
    images = torch.randn(rows, 3, size, size)
    labels = torch.randint(recipe.model['num_classes'], (rows,))
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    network = device.module_to_device(network.to(memory_format=layout))
    vicinity = construct('algorithms', 'sba', recipe.algorithms['sba']).vicinity
    if options.basis is not None:
        vicinity = replace(vicinity, basis=options.basis)
    return Steps(
        network,
        device.tensor_to_device(images.to(memory_format=layout)),
        device.tensor_to_device(labels),
        cut,
        fold,
        vicinity,
        dtype=DTYPES[options.dtype],
        compiled=options.compiled,
        checkpointing=options.checkpointing,
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(line)} |' for line in (columns, ['---'] * len(columns), *rows))


def _default_kinds(fold: int) -> list[str]:
    left_out = {'plain', *(['ba'] if fold > _BA_FOLD else []), *(['twice'] if fold > 1 else [])}
    return [kind for kind in STEP_KINDS if kind not in left_out]


def _cells(steps: Steps, cut: str, cost: StepCost) -> list[str]:
    size = [str(steps.images.shape[-1]), str(len(steps.images)), cut, str(steps.fold)]
    times = [f'{1000 * cost.seconds:.1f}', f'{cost.ratio:.3f} [{cost.low:.3f}, {cost.high:.3f}]']
    ratios = [f'{cost.ideal:.4f}', f'{cost.ratio / cost.ideal:.3f}', f'{cost.memory:.2f}']
    return [*size, cost.kind.replace('_', ' '), *times, *ratios]
