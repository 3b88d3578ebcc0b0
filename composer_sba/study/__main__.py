"""``python -m composer_sba.study STUDY``: run the paper's experiments and those beyond it, and report on them.

Exit codes: 0 all is done, 1 some runs failed, 2 a mistake in what was asked for, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from composer_sba.errors import UserError, one_line
from composer_sba.recipe.merge import shipped
from composer_sba.recipe.redact import redact
from composer_sba.study.flops import training_flops
from composer_sba.study.plan import MAX_COST, STUDIES, Run, plan
from composer_sba.study.records import Record, read
from composer_sba.study.runner import run_all
from composer_sba.study.step_timing import DTYPES, KINDS, Options, benchmark
from composer_sba.vicinity import Basis

RECIPES = shipped()
SCRATCH = Path('runs/study')
# For a dry run on a machine that has no results yet: sustained rates of a first guess, per run.
ASSUMED_TFLOPS = {'cpu': 0.05, 'gpu': 15.0}


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.study') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): What the help calls the program.

    Returns:
        int: The exit code.
    """
    arguments = _parser(prog).parse_args(argv)
    try:
        if arguments.study == 'report':
            from composer_sba.study.report import report  # matplotlib and SciPy, which a study does not need

            for path in report(arguments.results, arguments.page):
                print(path)
            return 0
        if arguments.study == 'vicinity':
            from composer_sba.study.plane import draw_vicinity  # matplotlib

            print(*draw_vicinity(arguments.out), arguments.out, sep='\n')
            return 0
        if arguments.study == 'step':
            print(benchmark(arguments.recipes, arguments.out, _options(arguments)))
            return 0
        return _study(arguments)
    except UserError as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: the same command goes on with what is missing', file=sys.stderr)
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
        epochs_scale=arguments.epochs_scale,
        overrides=overrides,
        scratch=SCRATCH,
    )
    results = arguments.results / f'{arguments.study}.jsonl'
    done = read(results)
    finished = {record['hash'] for record in done}
    missing = [run for run in runs if run.hash not in finished]
    flops = [training_flops(run.recipe) for run in missing]
    print(f'{len(runs)} runs, {len(runs) - len(missing)} of them in {results}', flush=True)
    if arguments.dry_run:
        Console().print(_costs(missing, flops, done, arguments.device or 'cpu', arguments.tflops, arguments.jobs))
        return 0
    return 1 if run_all(missing, flops, results, arguments.jobs, SCRATCH) else 0


def _costs(
    runs: Sequence[Run], flops: Sequence[float], done: Sequence[Record], device: str, tflops: float | None, jobs: int
) -> Table:
    """What is to be run, by network, data set and method, and the hours that one device needs for it."""
    table = Table('network', 'data', 'method', 'runs', 'TFLOP', 'hours', 'at TFLOP/s', title_justify='left')
    total = 0.0
    for key in dict.fromkeys((run.network, run.dataset, run.method) for run in runs):
        costs = [cost for run, cost in zip(runs, flops, strict=True) if (run.network, run.dataset, run.method) == key]
        rates = [
            record['flops'] / record['train_seconds'] / 1e12
            for record in done
            if (record['network'], record['device']) == (key[0], device) and record['flops'] and record['train_seconds']
        ]
        rate = tflops or (sum(rates) / len(rates) if rates else ASSUMED_TFLOPS[device])
        source = 'given' if tflops else f'measured, n={len(rates)}' if rates else 'assumed'
        hours = sum(costs) / rate / 1e12 / 3600
        total += hours
        cells = (str(len(costs)), f'{sum(costs) / 1e12:,.1f}', f'{hours:,.2f}', f'{rate:.3g} {source}')
        table.add_row(*key, *cells)
    together = timedelta(hours=round(total / jobs, 2))
    table.caption = f'{sum(flops) / 1e12:,.1f} TFLOP, {total:,.1f} hours of one process, {together} at {jobs} a time'
    return table


def _options(arguments: argparse.Namespace) -> Options:
    return Options(**{each.name: getattr(arguments, each.name) for each in fields(Options)})


def _add_step(command: argparse.ArgumentParser) -> None:
    for option in ('networks', 'datasets'):
        command.add_argument(f'--{option}', nargs='+', default=(), metavar='NAME', help='only these')
    command.add_argument(
        '--cuts', nargs='+', default=(), metavar='LAYER', help='where to cut (head, and a stage below)'
    )
    command.add_argument('--kinds', nargs='+', choices=KINDS, default=(), metavar='KIND', help=f'of {", ".join(KINDS)}')
    command.add_argument('--basis', choices=get_args(Basis), help="Σ of the Gaussian virtual samples (the recipe's)")
    command.add_argument(
        '--fold', nargs='+', type=_count, default=(), dest='folds', metavar='M', help="(1, 4, paper's)"
    )
    command.add_argument('--device', choices=('cpu', 'gpu'), help='where to train; a GPU if there is one')
    command.add_argument('--dtype', choices=list(DTYPES), default='fp32', help='of autocast (fp32: none)')
    command.add_argument('--compile', action='store_true', dest='compiled', help='by torch.compile')
    command.add_argument('--channels-last', action='store_true', help='memory format')
    command.add_argument('--checkpointing', action='store_true', help='compute activations again, stage by stage')
    command.add_argument('--batch', type=_count, metavar='N', help="images of a batch (the recipe's)")
    command.add_argument('--rounds', type=_count, default=20, metavar='N', help='how often each step is timed (20)')
    command.add_argument('--recipes', type=Path, default=RECIPES, metavar='DIR', help='where the recipes are')
    command.add_argument('--out', type=Path, default=Path('benchmarks'), metavar='DIR', help='where the report goes')


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected an integer >= 1, got {text!r}')
    return int(text)


def _parser(prog: str = 'python -m composer_sba.study') -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(
        dest='study', required=True, metavar='{table1,eta,layers,rivals,search,step,vicinity,report}'
    )
    helps = {
        'table1': "the cells of the paper's Table 1",
        'eta': 'SBA for each η of Fig. 2',
        'layers': 'SBA and latent BA at each layer, as in Fig. 3',
        'rivals': 'every method there is a recipe for',
        'search': f'SBA at settings drawn at random that cost up to {MAX_COST} times the baseline',
    }
    for study in STUDIES:
        command = commands.add_parser(study, help=helps[study], description=f'Train {helps[study]}.')
        for option in ('networks', 'datasets', 'methods'):
            command.add_argument(f'--{option}', nargs='+', default=(), metavar='NAME', help='only these')
        command.add_argument('--seeds', type=_count, default=3, metavar='N', help='seeds of each run (3)')
        if study == 'search':
            command.add_argument('--trials', type=_count, default=20, metavar='N', help='settings to try (20)')
        command.add_argument('--jobs', type=_count, default=1, metavar='N', help='runs at a time on the one device (1)')
        command.add_argument('--epochs-scale', type=float, default=1.0, metavar='F', help='factor of all durations (1)')
        command.add_argument('--device', choices=('cpu', 'gpu'), help='where to train; a GPU if there is one')
        command.add_argument('--set', nargs='+', default=(), dest='overrides', metavar='key.sub=value', help='for all')
        command.add_argument('--dry-run', action='store_true', help='list runs, operations and hours; train nothing')
        command.add_argument('--tflops', type=float, metavar='RATE', help='TFLOP/s of one run, for --dry-run')
        command.add_argument('--recipes', type=Path, default=RECIPES, metavar='DIR', help='where the recipes are')
        command.add_argument('--results', type=Path, default=Path('results'), metavar='DIR', help='for one line a run')
    _add_step(commands.add_parser('step', help='what a step costs, with SBA and without', description='Time steps.'))
    command = commands.add_parser('vicinity', help='a picture of raw and virtual points and what they change')
    figure = Path('docs/figures/vicinity.png')
    command.add_argument('--out', type=Path, default=figure, metavar='FILE', help='the figure to write')
    command = commands.add_parser('report', help='tables and figures of all that has been run')
    command.add_argument('--results', type=Path, default=Path('results'), metavar='DIR', help='where the lines are')
    command.add_argument('--page', type=Path, default=Path('docs/results.md'), metavar='FILE', help='what to write')
    return parser


if __name__ == '__main__':
    sys.exit(main())
