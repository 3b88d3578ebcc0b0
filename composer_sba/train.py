"""``composer train.py -f FILE [-f FILE ...] [key.sub=value ...]``: read a recipe, train what it says, sum up.

Exit codes: 0 trained, 2 a mistake in the recipe or its data (one line on stderr says which), 130 interrupted.
"""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from composer import Trainer
from composer.loggers import LoggerDestination, ProgressBarLogger
from composer.utils import dist, format_name_with_dist, maybe_create_object_store_from_uri, parse_uri
from rich.console import Console

from composer_sba.build import build_components, build_trainer
from composer_sba.errors import AlreadyTrainedError, UserError
from composer_sba.recipe import Recipe, load, save, to_yaml
from composer_sba.redaction import redact
from composer_sba.refusal import nothing_half_made, one_line, refusal
from composer_sba.summary import Summary

RECIPE_FILE = 'recipe.yaml'


def main(argv: Sequence[str] | None = None, prog: str = 'composer train.py') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): What the help calls the program.

    Returns:
        int: The exit code.
    """
    arguments = _parser(prog).parse_args(argv)
    try:
        recipe = load(arguments.file, arguments.overrides)
        if arguments.dry_run:
            with torch.device('meta'):
                build_components(recipe)
            print(to_yaml(recipe), end='')
        else:
            train(recipe)
    except UserError as error:
        if arguments.traceback:
            raise
        # Every rank says it: the launcher may end rank 0 before it speaks, and shows what the others said.
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    except (SystemExit, RuntimeError) as error:
        if not _is_interrupt(error):
            raise
        print('interrupted', file=sys.stderr)
        return 130
    return 0


def train(recipe: Recipe, *destinations: LoggerDestination) -> Trainer:
    """Train a recipe, save it beside its checkpoints and print the summary.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        *destinations (LoggerDestination): Loggers beside the recipe's own.

    Returns:
        Trainer: Composer's, closed, with the trained model in its state.

    Raises:
        UserError: If something in the recipe or its data cannot be used.
    """
    folder = _folder(recipe)
    summary = Summary()
    with warnings.catch_warnings(), nothing_half_made(folder, RECIPE_FILE):
        # Composer, of the last batch of every epoch, which is as short as the data makes it
        warnings.filterwarnings('ignore', message='Cannot split tensor of length', category=UserWarning)
        trainer = build_trainer(recipe, summary, *destinations)
        try:
            _fit(trainer, recipe, folder)
        finally:
            trainer.close()
    if dist.get_global_rank() == 0:
        Console().print(summary.table(trainer.state, _places(recipe, folder)))
    return trainer


def _fit(trainer: Trainer, recipe: Recipe, folder: str | None) -> None:
    if trainer.state.max_duration is not None and trainer.state.timestamp >= trainer.state.max_duration:
        problem = f'{folder} has {trainer.state.max_duration} behind it; raise it, or give another run_name'
        raise AlreadyTrainedError(*recipe.sources.error('max_duration', problem).args)
    if folder is not None and dist.get_global_rank() == 0:
        _save_recipe(recipe, folder)
    trainer.logger.log_hyperparameters(redact(recipe.to_dict()))
    for logger in trainer.logger.destinations:
        if isinstance(logger, ProgressBarLogger):
            # It would print every hyperparameter before its first bar, burying what a reader looks for
            logger.hparams_already_logged_to_console = True
    begins_at = trainer.state.timestamp.batch
    try:
        trainer.fit()
    except Exception as error:
        refused = refusal(recipe, error, begun=trainer.state.timestamp.batch > begins_at)
        if refused is None or refused is error:
            raise
        raise refused from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root: Composer makes it a SystemExit, and dying DataLoader workers bury that one."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGINT
    return error is not None and _is_interrupt(error.__context__)


def _parser(prog: str = 'composer train.py') -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description='Train what a recipe says.')
    parser.add_argument(
        *('-f', '--file'),
        required=True,
        action='append',
        help='the recipe: a YAML file, or the name of one that comes with the package (digits_sba.yaml). Given again: '
        'a file merged over it (methods/sba.yaml)',
    )
    parser.add_argument('--dry-run', action='store_true', help='check and print the resolved recipe, train nothing')
    parser.add_argument('--traceback', action='store_true', help='show where a refusal came from')
    parser.add_argument('overrides', nargs='*', metavar='key.sub=value', help='what to change in the recipe')
    return parser


def _folder(recipe: Recipe) -> str | None:
    """The run's folder; refused where it holds the recipe of another run, which this one would replace."""
    if recipe.save_folder is None:
        return None
    folder = format_name_with_dist(recipe.save_folder, str(recipe.run_name))
    if os.path.exists(f'{folder}/{RECIPE_FILE}') and not (recipe.save_overwrite or recipe.autoresume):
        problem = f'{folder} holds a run: give another run_name, or autoresume=true to resume, or save_overwrite=true'
        raise recipe.sources.error('save_folder', problem)
    return folder


def _save_recipe(recipe: Recipe, folder: str) -> None:
    store = maybe_create_object_store_from_uri(folder)
    if store is None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save(recipe, Path(folder) / RECIPE_FILE)
        return
    with TemporaryDirectory() as scratch:
        save(recipe, Path(scratch) / RECIPE_FILE)
        _, _, path = parse_uri(folder)
        store.upload_object(f'{path}/{RECIPE_FILE}', f'{scratch}/{RECIPE_FILE}')


def _places(recipe: Recipe, folder: str | None) -> Iterator[tuple[str, str]]:
    if folder is not None:
        latest = recipe.save_latest_filename or recipe.save_filename
        yield 'checkpoint', f'{folder}/{latest.replace("{rank}", "0")}'
        yield 'recipe', f'{folder}/{RECIPE_FILE}'


if __name__ == '__main__':
    sys.exit(main())
