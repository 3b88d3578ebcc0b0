"""The report of ``study step``: the steps of each network that has a recipe for SBA, timed and tabulated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import Any

import torch
from composer.utils import get_device
from rich.console import Console

from composer_sba.data.loader import DatasetConfig, image_size
from composer_sba.errors import TooWideError, UserError
from composer_sba.provenance import hardware, software
from composer_sba.recipe.recipe import Recipe, component_arguments, load
from composer_sba.recipe.registry import construct
from composer_sba.study.arguments import STEP_KINDS
from composer_sba.study.display_names import display_name
from composer_sba.study.recipe_index import families
from composer_sba.study.runs import cut_layers
from composer_sba.study.step_timing import PROFILE_PARTS, StepCost, Steps, measure, profile_difference
from composer_sba.vicinity import Basis

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
_BA_FOLD = 4  # beyond it, BA would take most of the benchmark's time only to show that it costs M


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
        UserError: If a network, dataset or layer is unknown, if there is no such device, or if nothing could be timed.
        OSError: If the folder cannot be created.
    """
    if options.device == 'gpu' and not torch.cuda.is_available():
        raise UserError('--device gpu: PyTorch finds no GPU on this machine')
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be created should not cost a benchmark first
    console = Console(highlight=False)
    device = get_device(options.device)
    rows, profiles, left_out = [], [], []
    for family in families(recipes, options.networks, options.datasets):
        files = family.files('sba')
        if files is None:
            continue
        recipe = load(files)
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
        compiled=' A compiled network keeps its hooks in every kind of step, also in a plain one.'
        if options.compiled
        else '',
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
plain step of twice the rows, as many as an SBA step has with M = 1 at the input.{compiled}

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
