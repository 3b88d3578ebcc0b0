"""The parser of ``study``; it imports nothing that imports PyTorch."""

import argparse
import math
from pathlib import Path
from typing import Any

from composer_sba.arguments import path, with_examples
from composer_sba.shipped import shipped

MAX_COST = 1.3  # of a setting of `search`, as a multiple of the baseline's operations
STUDIES = {
    'table1': "the cells of the paper's Table 1",
    'eta': 'SBA with each η of Fig. 2',
    'layers': 'SBA and latent BA at each layer, as in Fig. 3',
    'methods': 'every method that has a recipe',
    'search': f'SBA at random settings that cost up to {MAX_COST} times the baseline',
    'robustness': 'SBA at the input and what it is compared with, under noise, corruptions and an attack',
}
STEP_KINDS = ('plain', 'unarmed', 'sba', 'twice', 'latent_ba', 'naive', 'ba')
DTYPES = ('fp32', 'bf16', 'fp16')
BASES = ('identity', 'normalized', 'orthogonal', 'hadamard')


def study_parser(prog: str = 'python -m composer_sba.study') -> argparse.ArgumentParser:
    """Return the parser of ``study``."""
    description = "Run the paper's experiments and comparisons, and report the results."
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest='study', required=True, metavar='STUDY')
    for study, what in STUDIES.items():
        command = _command(commands, study, what, f'Train {what}.')
        for option in ('networks', 'datasets', 'methods'):
            _add_list(command, f'--{option}', metavar='NAME', help='only these')
        command.add_argument('--seeds', type=_positive_int, default=3, metavar='N', help='seeds of each run (3)')
        if study == 'search':
            command.add_argument('--trials', type=_positive_int, default=20, metavar='N', help='settings to try (20)')
        if study == 'robustness':
            command.add_argument('--forms', action='store_true', help='add other forms of SBA at the input')
        command.add_argument('--jobs', type=_positive_int, default=1, metavar='N', help='runs at a time (1)')
        command.add_argument('--epochs-scale', type=_positive, default=1.0, metavar='F', help='scale all durations (1)')
        command.add_argument('--device', choices=('cpu', 'gpu'), help='where to train; a GPU if there is one')
        _add_list(command, '--set', dest='overrides', metavar='key.sub=value', help='change every recipe')
        command.add_argument('--dry-run', action='store_true', help='list runs, operations and hours; train nothing')
        command.add_argument('--tflops', type=_positive, metavar='RATE', help='TFLOP/s of one run, for --dry-run')
        command.add_argument('--recipes', type=path, default=shipped(), metavar='DIR', help='folder of the recipes')
        command.add_argument('--results', type=path, default=Path('results'), metavar='DIR', help='one line for a run')
    _add_step(_command(commands, 'step', 'the cost of a training step with and without SBA', 'Time training steps.'))
    command = _command(commands, 'vicinity', 'a figure of raw and virtual points and of their effect')
    command.add_argument('--out', type=path, default=Path('docs/figures/vicinity.png'), metavar='FILE', help='the PNG')
    command = _command(commands, 'report', 'tables and figures of all finished runs')
    command.add_argument('--results', type=path, default=Path('results'), metavar='DIR', help='folder of the runs')
    command.add_argument('--page', type=path, default=Path('docs/results.md'), metavar='FILE', help='page to write')
    return with_examples(
        parser,
        ('methods --datasets digits --methods baseline sba --seeds 5', 'two methods, five seeds of each'),
        ('report --page report.md', 'tables and figures of what has been trained'),
    )


def _command(
    commands: 'argparse._SubParsersAction[argparse.ArgumentParser]', name: str, summary: str, description: str = ''
) -> argparse.ArgumentParser:
    # An abbreviation would turn --seed 18 into 18 seeds
    return commands.add_parser(name, help=summary, description=description or None, allow_abbrev=False)


def _add_step(command: argparse.ArgumentParser) -> None:
    for option in ('networks', 'datasets'):
        _add_list(command, f'--{option}', metavar='NAME', help='only these')
    _add_list(command, '--cuts', metavar='LAYER', help='cut layers (head, and a stage below)')
    _add_list(command, '--kinds', choices=STEP_KINDS, metavar='KIND', help=f'of {", ".join(STEP_KINDS)}')
    command.add_argument('--basis', choices=BASES, help="Σ of the Gaussian virtual samples (the recipe's)")
    _add_list(command, '--fold', type=_positive_int, dest='folds', metavar='M', help="(1, 4, the recipe's)")
    command.add_argument('--device', choices=('cpu', 'gpu'), help='where to train; a GPU if there is one')
    command.add_argument('--dtype', choices=DTYPES, default='fp32', help='of autocast (fp32: none)')
    command.add_argument('--compile', action='store_true', dest='compiled', help='use torch.compile')
    command.add_argument('--channels-last', action='store_true', help='memory format')
    command.add_argument('--checkpointing', action='store_true', help='recompute the activations of each stage')
    command.add_argument('--batch', type=_positive_int, metavar='N', help="images of a batch (the recipe's)")
    command.add_argument('--rounds', type=_positive_int, default=20, metavar='N', help='times to run each step (20)')
    command.add_argument('--recipes', type=path, default=shipped(), metavar='DIR', help='folder of the recipes')
    command.add_argument('--out', type=path, default=Path('benchmarks'), metavar='DIR', help='folder of the report')


def _add_list(command: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an option with several values, which may be given several times."""
    command.add_argument(*names, nargs='+', action='extend', default=[], **options)


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer >= 1, got {text!r}')
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f'must be positive and finite, got {text!r}')
    return number
