"""``python -m composer_sba.study STUDY``: run the paper's experiments and comparisons, and report the results.

Exit codes: 0 success, 1 some runs failed, 2 an error in the arguments, the recipes or the files, 130 interrupted.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from composer_sba.arguments import with_examples
from composer_sba.errors import UserError, one_line
from composer_sba.recipe.redact import redact
from composer_sba.robustness.attacks import require_toolbox
from composer_sba.shipped import shipped
from composer_sba.study.flops import training_flops
from composer_sba.study.plan import MAX_COST, STUDIES, plan
from composer_sba.study.records import Record, read_records
from composer_sba.study.runner import run_all
from composer_sba.study.runs import Run
from composer_sba.study.step_report import DTYPES, Options, benchmark
from composer_sba.study.step_timing import STEP_KINDS
from composer_sba.vicinity import Basis

RECIPES = shipped()
SCRATCH = Path('runs/study')
# The assumed rate of one run, for a dry run on a machine that has no results yet
ASSUMED_TFLOPS = {'cpu': 0.05, 'gpu': 15.0}


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.study') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, the arguments of the
            process.
        prog (str, optional): The name of the program in the help.

    Returns:
        int: The exit code.
    """
    arguments = _parser(prog).parse_args(argv)
    try:
        if arguments.study == 'report':
            from composer_sba.study.report import report  # needs Matplotlib and SciPy, unlike the other studies

            for path in report(arguments.results, arguments.page):
                print(path)
            return 0
        if arguments.study == 'vicinity':
            from composer_sba.study.vicinity_figure import draw_vicinity  # needs Matplotlib

            print(*draw_vicinity(arguments.out), arguments.out, sep='\n')
            return 0
        if arguments.study == 'step':
            options = Options(**{each.name: getattr(arguments, each.name) for each in fields(Options)})
            print(benchmark(arguments.recipes, arguments.out, options))
            return 0
        return _study(arguments)
    except (UserError, OSError) as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: run the same command again to continue', file=sys.stderr)
        return 130


def _study(arguments: argparse.Namespace) -> int:
    overrides = ['progress_bar=false', *arguments.overrides]
    if arguments.device:
        overrides.append(f'device={arguments.device}')
    runs = plan(
        arguments.study,
        arguments.recipes,
        networks=arguments.networks,
        datasets=arguments.datasets,
        methods=arguments.methods,
        seeds=arguments.seeds,
        trials=getattr(arguments, 'trials', 0),
        forms=getattr(arguments, 'forms', False),
        epochs_scale=arguments.epochs_scale,
        overrides=overrides,
        scratch=SCRATCH,
    )
    results = arguments.results / f'{arguments.study}.jsonl'
    records = read_records(results)
    finished = {record['hash'] for record in records}
    missing = [run for run in runs if run.hash not in finished]
    flops = [training_flops(run.recipe) for run in missing]
    if arguments.study == 'robustness':
        require_toolbox()
    print(f'{len(runs)} runs, {len(runs) - len(missing)} of them in {results}', flush=True)
    if arguments.dry_run:
        device = runs[0].recipe.device or ('gpu' if torch.cuda.is_available() else 'cpu')
        Console().print(_cost_table(missing, flops, records, device, arguments.tflops, arguments.jobs))
        return 0
    return 1 if run_all(missing, flops, results, arguments.jobs, SCRATCH) else 0


def _cost_table(
    runs: Sequence[Run], flops: Sequence[float], records: Sequence[Record], device: str, tflops: float | None, jobs: int
) -> Table:
    """List the missing runs by network, data set and method, with their operations and their hours on one device."""
    table = Table('network', 'data', 'method', 'runs', 'TFLOP', 'hours', 'at TFLOP/s', title_justify='left')
    total = 0.0
    for key in dict.fromkeys((run.network, run.dataset, run.method) for run in runs):
        costs = [cost for run, cost in zip(runs, flops, strict=True) if (run.network, run.dataset, run.method) == key]
        rates = [
            record['flops'] / record['train_seconds'] / 1e12
            for record in records
            if (record['network'], record['device']) == (key[0], device) and record['flops'] and record['train_seconds']
        ]
        rate = tflops or (sum(rates) / len(rates) if rates else ASSUMED_TFLOPS.get(device, ASSUMED_TFLOPS['gpu']))
        source = 'given' if tflops else f'measured, n={len(rates)}' if rates else 'assumed'
        hours = sum(costs) / rate / 1e12 / 3600
        total += hours
        cells = (str(len(costs)), f'{sum(costs) / 1e12:,.1f}', f'{hours:,.2f}', f'{rate:.3g} {source}')
        table.add_row(*key, *cells)
    together = timedelta(hours=round(total / jobs, 2))
    table.caption = f'{sum(flops) / 1e12:,.1f} TFLOP, {total:,.1f} hours with one process, {together} with {jobs}'
    return table


def _parser(prog: str = 'python -m composer_sba.study') -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition('\n')[0], allow_abbrev=False)
    commands = parser.add_subparsers(
        dest='study', required=True, metavar='{table1,eta,layers,methods,search,robustness,step,vicinity,report}'
    )
    helps = {
        'table1': "the cells of the paper's Table 1",
        'eta': 'SBA with each η of Fig. 2',
        'layers': 'SBA and latent BA at each layer, as in Fig. 3',
        'methods': 'every method that has a recipe',
        'search': f'SBA at random settings that cost up to {MAX_COST} times the baseline',
        'robustness': 'SBA at the input and what it is compared with, under noise, corruptions and an attack',
    }
    for study in STUDIES:
        command = _command(commands, study, helps[study], f'Train {helps[study]}.')
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
        command.add_argument('--recipes', type=_path, default=RECIPES, metavar='DIR', help='folder of the recipes')
        command.add_argument('--results', type=_path, default=Path('results'), metavar='DIR', help='one line for a run')
    _add_step(_command(commands, 'step', 'the cost of a training step with and without SBA', 'Time training steps.'))
    command = _command(commands, 'vicinity', 'a figure of raw and virtual points and of their effect')
    command.add_argument('--out', type=_path, default=Path('docs/figures/vicinity.png'), metavar='FILE', help='the PNG')
    command = _command(commands, 'report', 'tables and figures of all finished runs')
    command.add_argument('--results', type=_path, default=Path('results'), metavar='DIR', help='folder of the runs')
    command.add_argument('--page', type=_path, default=Path('docs/results.md'), metavar='FILE', help='page to write')
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
    command.add_argument('--basis', choices=get_args(Basis), help="Σ of the Gaussian virtual samples (the recipe's)")
    _add_list(command, '--fold', type=_positive_int, dest='folds', metavar='M', help="(1, 4, the recipe's)")
    command.add_argument('--device', choices=('cpu', 'gpu'), help='where to train; a GPU if there is one')
    command.add_argument('--dtype', choices=list(DTYPES), default='fp32', help='of autocast (fp32: none)')
    command.add_argument('--compile', action='store_true', dest='compiled', help='use torch.compile')
    command.add_argument('--channels-last', action='store_true', help='memory format')
    command.add_argument('--checkpointing', action='store_true', help='recompute the activations of each stage')
    command.add_argument('--batch', type=_positive_int, metavar='N', help="images of a batch (the recipe's)")
    command.add_argument('--rounds', type=_positive_int, default=20, metavar='N', help='times to run each step (20)')
    command.add_argument('--recipes', type=_path, default=RECIPES, metavar='DIR', help='folder of the recipes')
    command.add_argument('--out', type=_path, default=Path('benchmarks'), metavar='DIR', help='folder of the report')


def _add_list(command: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an option with several values, which may be given several times."""
    command.add_argument(*names, nargs='+', action='extend', default=[], **options)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


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


if __name__ == '__main__':
    sys.exit(main())
