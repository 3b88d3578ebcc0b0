"""The step benchmark: :mod:`composer_sba.study.step` over the recipes' networks, as a dated report in Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from composer.utils import get_device
from rich.console import Console

from composer_sba.basis import Basis
from composer_sba.data import DatasetConfig, image_size
from composer_sba.errors import TooWideError, UserError
from composer_sba.recipe import Recipe, component_arguments, load
from composer_sba.registry import construct
from composer_sba.study.names import name
from composer_sba.study.plan import cut_layers
from composer_sba.study.regimes import Regime, regimes
from composer_sba.study.step import KINDS, PARTS, Cost, Steps, measure, profiled
from composer_sba.study.worker import hardware, shared_facts

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
                    costs = measure(steps, options.kinds or _default_kinds(cut, fold, options), options.rounds)
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
the virtual rows in a forward pass of their own, from the input on. An SBA step is one with λ(t) = 1; an analytic one
has `estimator='analytic'`, M → ∞ and nothing drawn.

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


def _default_kinds(cut: str, fold: int, options: Options) -> list[str]:
    left_out = {'plain'}
    if cut != 'head' or options.compiled:
        left_out.add('analytic')
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
