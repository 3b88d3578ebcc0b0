"""What ``python -m composer_sba.study`` does with its arguments."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from composer_sba.errors import UserError, one_line
from composer_sba.recipe.redact import redact
from composer_sba.robustness.attacks import require_toolbox
from composer_sba.study.flops import training_flops
from composer_sba.study.plan import plan
from composer_sba.study.records import Record, read_records
from composer_sba.study.runner import run_all
from composer_sba.study.runs import Run
from composer_sba.study.step_report import Options, benchmark

SCRATCH = Path('runs/study')
# The assumed rate of one run, for a dry run on a machine that has no results yet
ASSUMED_TFLOPS = {'cpu': 0.05, 'gpu': 15.0}


def run(arguments: argparse.Namespace) -> int:
    """Train the runs of a study, or report what has been trained.

    Args:
        arguments (argparse.Namespace): From :func:`composer_sba.study.arguments.study_parser`.

    Returns:
        int: The exit code.
    """
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
        return _train(arguments)
    except (UserError, OSError) as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: run the same command again to continue', file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace) -> int:
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
    """List the missing runs by network, dataset and method, with their operations and their hours on one device."""
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
