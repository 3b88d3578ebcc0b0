"""What one step costs: plain, with SBA and with its relatives, taken in turn, beside what the arithmetic asks for."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import accumulate
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
from composer_sba.recipe.recipe import Recipe, component_arguments, load
from composer_sba.recipe.registry import construct
from composer_sba.study.display_names import name
from composer_sba.study.plan import cut_layers
from composer_sba.study.recipe_index import Regime, regimes
from composer_sba.study.runner import hardware, shared_facts
from composer_sba.vicinity import Basis, Vicinity

KINDS = ('plain', 'unarmed', 'sba', 'latent_ba', 'naive', 'ba')
PARTS = {  # what an operator of a profile, or the first around it that fits any of these, belongs to
    'noise and Σ': ('Expansion', 'composer_sba::'),
    'rows': ('aten::cat', 'CatBackward'),
    'batch norm': ('batch_norm', 'BatchNorm', 'var_mean', 'VarMean', 'addcmul', 'Addcmul'),
    'tail and trunk': ('convolution', 'addmm', 'aten::mm', 'aten::bmm', 'pool'),
    'loss': ('softmax', 'nll_loss', 'kl_div'),
}


@dataclass(frozen=True)
class Cost:
    """What a kind of step costs beside a plain one.

    Args:
        kind (str): One of ``KINDS``.
        ratio (float): Time ÷ plain, the median over rounds.
        low, high (float): Its quartiles.
        ideal (float): Operations ÷ plain, as they were executed.
        memory (float): Peak memory of the step ÷ plain, what the process held before it left out.
        seconds (float): Its time, the median over rounds.
    """

    kind: str
    ratio: float
    low: float
    high: float
    ideal: float
    memory: float
    seconds: float


class Steps:
    """The steps of one network on one batch of random images, each kind on the same weights.

    ``plain``: cross-entropy. ``unarmed``: the same with SBA's hooks in, as at λ(t) = 0. ``sba``: Eq. 11.
    ``latent_ba``: the hard loss of Eq. 9. ``naive``: SBA whose virtual rows get a forward pass of their own from the
    input on. ``ba``: Hoffer et al.'s, M copies of the input.

    Args:
        network (torch.nn.Module): On its device.
        images (torch.Tensor): Shape ``(N, 3, H, W)``.
        labels (torch.Tensor): Shape ``(N,)``.
        layer (str): The cut layer.
        fold (int): M.
        vicinity (Vicinity, optional): The law of the virtual rows. Default: ``Vicinity()``.
        dtype (torch.dtype, optional): That of autocast; float32 for none. Default: ``torch.float32``.
        compiled (bool, optional): Whether ``torch.compile`` takes the network. Default: ``False``.
        checkpointing (bool, optional): Whether each stage's activations are computed again in the backward pass.
            Default: ``False``.
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
        self.count = 0

    def run(self, kind: str) -> None:
        """Train for one step of a kind; hooks come and go where they would cost a plain step its time."""
        self.count += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self._loss(kind)
        loss.backward()
        self.expander.disarm()  # not before activation checkpointing has computed again what it has to
        self.optimizer.step()

    @contextmanager
    def hooked(self, kind: str) -> Iterator[None]:
        """Have the hooks that a kind of step needs; under compilation all kinds share a graph that has them."""
        if self.compiled:
            yield
            return
        if kind in ('plain', 'ba'):
            self.expander.remove()
        try:
            yield
        finally:
            self.expander.attach()

    def _loss(self, kind: str) -> torch.Tensor:
        if kind in ('plain', 'unarmed'):
            return F.cross_entropy(self.forward(self.images), self.labels)
        if kind == 'ba':
            images = self.images.repeat_interleave(self.fold, 0)
            return F.cross_entropy(self.forward(images), self.labels.repeat_interleave(self.fold))
        own = self.forward(self.images) if kind == 'naive' else None
        self.expander.arm(self.count)
        logits, virtual = self.expander.split(self.forward(self.images))
        logits = logits if own is None else own
        if kind == 'latent_ba':
            return F.cross_entropy(logits, self.labels) + sbaf.hard_label_loss(virtual, self.labels)
        return F.cross_entropy(logits, self.labels) + 0.1 * sbaf.soft_label_kl(logits, virtual)


def measure(steps: Steps, kinds: Sequence[str], rounds: int) -> list[Cost]:
    """Time kinds of steps in turn, so that each ratio compares neighbours in time.

    Args:
        steps (Steps): The network and its batch.
        kinds (Sequence[str]): Of ``KINDS``; ``'plain'`` is taken in any case.
        rounds (int): How often, after one round to warm up.

    Returns:
        list[Cost]: One for each kind but ``'plain'``, in the order of ``kinds``.
    """
    kinds = ['plain', *(kind for kind in kinds if kind != 'plain')]
    operations = {kind: _operations(steps, kind) for kind in kinds}
    memory = {kind: _memory(steps, kind) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind in kinds if turn % 2 else kinds[::-1]:  # no kind always follows the same one
            with steps.hooked(kind):
                begun = time.perf_counter()
                steps.run(kind)
                _wait(steps)
                seconds[kind].append(time.perf_counter() - begun)
    costs = []
    for kind in kinds[1:]:
        ratios = [own / plain for own, plain in zip(seconds[kind][1:], seconds['plain'][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        ideal = operations[kind] / operations['plain']
        taken = statistics.median(seconds[kind][1:])
        costs.append(Cost(kind, middle, low, high, ideal, memory[kind] / memory['plain'], taken))
    return costs


def profiled(steps: Steps, kind: str, rounds: int) -> dict[str, float]:
    """Where the time beyond a plain step goes.

    Args:
        steps (Steps): The network and its batch.
        kind (str): The kind of step.
        rounds (int): Steps to average over.

    Returns:
        dict[str, float]: Part of a step -> milliseconds more than in a plain step.
    """
    parts: dict[str, dict[str, float]] = {}
    for each in ('plain', kind):
        with steps.hooked(each), profile(activities=_activities(steps)) as record:
            for _ in range(rounds):
                steps.run(each)
            _wait(steps)
        parts[each] = _by_part(record, steps, rounds)
    return {part: parts[kind][part] - parts['plain'][part] for part in parts[kind]}


def _by_part(record: profile, steps: Steps, rounds: int) -> dict[str, float]:
    parts: dict[str, float] = dict.fromkeys([*PARTS, 'other'], 0.0)
    for event in record.events():
        own = event.self_device_time_total if steps.images.is_cuda else event.self_cpu_time_total
        around, part = event, None
        while around is not None and part is None:
            part = next((name for name, words in PARTS.items() if any(word in around.name for word in words)), None)
            around = around.cpu_parent
        parts[part or 'other'] += own / 1000 / rounds
    return parts


def _activities(steps: Steps) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if steps.images.is_cuda else [])]


def _operations(steps: Steps, kind: str) -> float:
    # Counted without compilation, which hides the operators
    forward, steps.forward = steps.forward, steps.network
    with steps.hooked(kind), FlopCounterMode(display=False) as counter:
        steps.run(kind)
    steps.forward = forward
    return float(counter.get_total_flops())


def _memory(steps: Steps, kind: str) -> float:
    """Peak of a step above what is held between steps, in bytes."""
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
    # The events themselves: what the profiler sums up over operators has no peak
    assert record.profiler is not None and record.profiler.kineto_results is not None
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    changes.sort(key=lambda event: event.start_ns())
    return float(max(accumulate(event.nbytes() for event in changes)))


def _wait(steps: Steps) -> None:
    if steps.images.is_cuda:
        torch.cuda.synchronize()


DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_BA_FOLD = 4  # beyond it Hoffer et al.'s BA would take most of the benchmark's time to show that it costs M


@dataclass(frozen=True)
class Options:
    """What the command line of ``study step`` says."""

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
        recipes (Path): The folder of the recipes, which give network, size of images, batch and the paper's M.
        folder (Path): Where the report goes, as ``step-<date>-<device>.md``; a second one of a day gets a number.
        options (Options): What to time.

    Returns:
        Path: The report.

    Raises:
        UserError: If a network, data set or layer is unknown, or nothing could be timed.
    """
    console = Console(highlight=False)
    device = get_device(options.device)
    rows, profiles, left_out = [], [], []
    for regime in regimes(recipes, options.networks, options.datasets):
        if not regime.own('sba').exists():
            continue
        recipe = load(regime.own('sba'))
        for cut in options.cuts or _default_cuts(recipe):
            try:
                for fold in options.folds or sorted({1, 4, recipe.algorithms['sba'].get('fold', 4)}):
                    steps = _steps(recipe, cut, fold, device, options)
                    costs = measure(steps, options.kinds or _default_kinds(fold), options.rounds)
                    rows += [_row(regime, len(steps.images), cut, fold, cost) for cost in costs]
                    console.print(f'{" ".join(regime.names)} {cut} M={fold}: {_brief(costs)}', soft_wrap=True)
                    steps.expander.remove()
                parts = profiled(_steps(recipe, cut, fold, device, options), 'sba', min(options.rounds, 5))
                profiles.append([_title(regime), cut, str(fold), *(f'{value:.2f}' for value in parts.values())])
            except TooWideError as error:  # the other layers need not suffer
                left_out.append(f'Left out: {_title(regime)}, {cut}: {error}')
                console.print(left_out[-1], soft_wrap=True)
    if not rows:
        raise UserError('\n'.join(left_out) or 'No network has a recipe for SBA among these.')
    text = _HEAD.format(
        date=datetime.now(timezone.utc).date(),
        hardware=hardware(device.name),
        facts=_facts(),
        rounds=options.rounds,
        settings=f'{options.dtype}{", torch.compile" if options.compiled else ""}'
        f'{", channels_last" if options.channels_last else ""}'
        f'{", activation checkpointing" if options.checkpointing else ""}, basis {options.basis or "as in the recipe"}',
        table=_markdown(_COLUMNS, rows),
        profile=_markdown(['network', 'cut', 'M', *PARTS, 'other'], profiles),
    )
    return _write(folder, device.name, '\n'.join([text, *left_out]))


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
_HEAD = """# Cost of a step, {date}

{hardware}; {settings}; {facts}; n = {rounds} rounds.

Every kind of step is taken in turn, so that ratios compare neighbours in time: median over rounds [quartiles]. Ideal
is the ratio of the operations (convolutions, matrix products, Σ) that were executed. Memory is the peak of a step above
what is held between steps. A plain step has no hooks; an unarmed one has SBA's, as at λ(t) = 0. Naive SBA predicts for
the virtual rows in a forward pass of their own, from the input on. An SBA step is one with λ(t) = 1.

{table}

## Where the time beyond a plain step goes

Milliseconds of an SBA step less those of a plain one, by operator, under the profiler, which adds its own.

{profile}
"""


def _steps(recipe: Recipe, cut: str, fold: int, device: Any, options: Options) -> Steps:
    torch.manual_seed(recipe.seed)
    network = construct('model', recipe.model['name'], component_arguments(recipe.model))
    config = DatasetConfig(**recipe.train_dataset)
    rows = options.batch or recipe.global_train_batch_size
    images = torch.randn(rows, 3, image_size(config), image_size(config))
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


def _default_cuts(recipe: Recipe) -> list[str]:
    """The head, and the stage that has one more stage above it."""
    layers = cut_layers(recipe)
    return ['head', *layers[-3:-2]]


def _default_kinds(fold: int) -> list[str]:
    left_out = {'plain'}
    if fold > _BA_FOLD:
        left_out.add('ba')
    return [kind for kind in KINDS if kind not in left_out]


def _row(regime: Regime, batch: int, cut: str, fold: int, cost: Cost) -> list[str]:
    pixels = image_size(DatasetConfig(regime.names[1]))
    own = f'{1000 * cost.seconds:.1f}'
    times = f'{cost.ratio:.3f} [{cost.low:.3f}, {cost.high:.3f}]'
    ratios = [own, times, f'{cost.ideal:.4f}', f'{cost.ratio / cost.ideal:.3f}', f'{cost.memory:.2f}']
    return [_title(regime), str(pixels), str(batch), cut, str(fold), cost.kind.replace('_', ' '), *ratios]


def _title(regime: Regime) -> str:
    return ', '.join(dict.fromkeys(name(each) for each in regime.names))


def _brief(costs: Sequence[Cost]) -> str:
    return ', '.join(f'{cost.kind} {cost.ratio:.3f} (ideal {cost.ideal:.3f})' for cost in costs)


def _facts() -> str:
    shared = shared_facts(1)
    versions = ', '.join(f'{package} {version}' for package, version in shared['versions'].items())
    return f'{versions}; commit {shared["commit"]}'


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: Iterator[Sequence[str]] = iter([columns, ['---'] * len(columns), *rows])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _write(folder: Path, device: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f'step-{datetime.now(timezone.utc).date()}-{device}'
    taken = len(list(folder.glob(f'{stem}*.md')))
    path = folder / f'{stem}{f"-{taken + 1}" if taken else ""}.md'
    path.write_text(text, encoding='utf-8')
    return path
