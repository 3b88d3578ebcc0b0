"""The command ``composer train.py -f FILE [-f FILE ...] [key.sub=value ...]``: read a recipe, train, print a summary.

Exit codes: 0 trained, 2 a mistake in the recipe or its data (described in one line on stderr), 130 interrupted.
"""

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from composer_sba.arguments import parse_train

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    parse_train(None, 'composer train.py')

import torch
from composer import Trainer
from composer.core import State
from composer.loggers import ConsoleLogger, LoggerDestination
from composer.utils import dist, format_name_with_dist, maybe_create_object_store_from_uri, parse_uri
from rich.console import Console

from composer_sba.algorithms._composer import network_of
from composer_sba.data.loader import DatasetConfig, image_size
from composer_sba.data.shared_memory import fail_together
from composer_sba.errors import AlreadyTrainedError, UserError, one_line
from composer_sba.model_card import model_card
from composer_sba.progress import SMALL_STEP, WIDTH, EpochLines, device, facts, operations_of_step
from composer_sba.recipe.build import build_components, build_trainer, for_evaluation
from composer_sba.recipe.explain import explained
from composer_sba.recipe.recipe import RECIPE_FILE, Recipe, load, save, to_yaml
from composer_sba.recipe.redact import redact
from composer_sba.summary import Summary, counted
from composer_sba.trained import DATASET_FILE, dataset_record

CARD_FILE = 'model_card.md'


def main(argv: Sequence[str] | None = None, prog: str = 'composer train.py') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    arguments = parse_train(argv, prog)
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
        # Every rank prints it: the launcher may end rank 0 first, and then shows what the others printed
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    except (SystemExit, RuntimeError) as error:
        if not _is_interrupt(error):
            raise
        print(f'interrupted{error.advice if isinstance(error, _InterruptedError) else ""}', file=sys.stderr)
        return 130
    return 0


def train(recipe: Recipe, *destinations: LoggerDestination, summary: 'Summary | None' = None) -> Trainer:
    """Train a recipe, save the recipe next to its checkpoints and print a summary.

    A recipe with a ``max_duration`` of 0 only evaluates what it would start from, and saves nothing.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        *destinations (LoggerDestination): Loggers in addition to the recipe's own.
        summary (Summary, optional): Collects the run's metrics. Default: ``None``, a new :class:`.Summary`.

    Returns:
        Trainer: Composer's, closed, with the trained model in its state.

    Raises:
        UserError: If the recipe or its data cannot be used.
    """
    only_evaluates = recipe.only_evaluates
    recipe = for_evaluation(recipe) if only_evaluates else recipe
    folder = None if only_evaluates else _folder(recipe)
    summary = summary or Summary()
    with warnings.catch_warnings(), _without_empty_folders(folder):
        # Composer warns of the last batch of an epoch, which is shorter than a microbatch in most datasets
        warnings.filterwarnings('ignore', message='Cannot split tensor of length', category=UserWarning)
        # and of mixed labels, whose probabilities add up to a little less than 1 after rounding. Only algorithms mix
        # them: the labels of a recipe's data are class indices
        warnings.filterwarnings('ignore', message='Some targets have less than 1 total', category=UserWarning)
        # and of a checkpoint of a run that printed no lines; they have no state
        warnings.filterwarnings('ignore', message='EpochLines is not in the state_dict', category=UserWarning)
        lines = [] if recipe.progress_bar is False else [EpochLines(bar=recipe.progress_bar or sys.stderr.isatty())]
        trainer = build_trainer(recipe, summary, *lines, *destinations)
        resumed = None if only_evaluates else _resumed(trainer.state)
        if only_evaluates:
            summary.load_state_dict({})  # without the training that the checkpoint reports
        try:
            with _threads(trainer, recipe) as threads:
                if only_evaluates:
                    with explained(recipe.sources):
                        trainer.eval()
                else:
                    if dist.get_global_rank() == 0:
                        title = f'{recipe.run_name}: {resumed}' if resumed else f'{recipe.run_name}'
                        _print(title, facts(recipe, trainer.state, threads))
                    _fit(trainer, recipe, folder)
        except (SystemExit, RuntimeError) as error:
            if _is_interrupt(error):
                raise _InterruptedError(_advice(trainer.state, recipe)) from error
            raise
        finally:
            trainer.close()
    if dist.get_global_rank() == 0:
        weights = trainer.state.load_path or ('pretrained' if recipe.model.get('pretrained') else 'untrained')
        rows = [('device', f'{device(trainer.state)}{threads}'), *([('resumed', resumed)] if resumed else [])]
        rows += [('weights', weights)] if only_evaluates else _written_files(recipe, folder)
        _print(summary.table(trainer.state, rows), *_next(recipe, folder))
        if folder is not None:
            try:
                results = summary.rows(trainer.state)
                card = model_card(recipe, dataset_record(recipe), _checkpoint_name(recipe), results)
                _save_file(recipe, folder, CARD_FILE, lambda path: path.write_text(card, 'utf-8', 'replace'))
            except (UserError, OSError) as error:  # which must not spoil a training that has finished
                print(f'no model card was written: {redact(one_line(error))}', file=sys.stderr)
    return trainer


def _print(*parts: Any) -> None:
    """Print without buffering, which keeps the order with lines of stderr, and without wrapping commands."""
    console = Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)
    console.file.flush()


@contextmanager
def _threads(trainer: Trainer, recipe: Recipe) -> Iterator[str]:
    """Train a small network on one thread of the CPU, unless OMP_NUM_THREADS is set; yield a remark about it."""
    before, remark = torch.get_num_threads(), ''
    is_chosen = trainer.state.device.name == 'cpu' and 'OMP_NUM_THREADS' not in os.environ
    dataset = recipe.train_dataset or recipe.eval_dataset  # a recipe that only evaluates has no other
    if is_chosen and before > 1 and dataset is not None:
        size = image_size(DatasetConfig(**dataset))
        rows = recipe.global_train_batch_size // dist.get_world_size()
        operations = operations_of_step(network_of(trainer.state.model), (3, size, size), rows)
        if operations is not None and operations < SMALL_STEP:
            torch.set_num_threads(1)
            remark = f' (1 of {before} threads, enough for {operations / 1e9:.1f} GFLOP a step)'
    if trainer.state.device.name == 'cpu' and not remark:
        remark = f' ({counted(before, "thread")})'
    try:
        yield remark
    finally:
        torch.set_num_threads(before)


def _resumed(state: State) -> str | None:
    """Describe where a run resumes; None if it begins."""
    epoch, batch = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch)
    if not int(state.timestamp.batch):
        return None
    return f'resumed from epoch {epoch + 1}, batch {batch}' if batch else f'resumed after epoch {epoch}'


def _advice(state: State, recipe: Recipe) -> str:
    """Describe where a run was interrupted and how to resume it."""
    where = f' in epoch {int(state.timestamp.epoch) + 1}'
    if recipe.save_folder is None:
        return where
    return f'{where}: {"the same command" if recipe.autoresume else "the same command with autoresume=true"} resumes it'


def _next(recipe: Recipe, folder: str | None) -> Iterator[str]:
    """Yield commands that use what was trained, and the one of the baseline."""
    if folder is None or '://' in folder:
        return
    if recipe.save_latest_filename is not None and recipe.parallelism is None:  # not in parts
        checkpoint = f'{folder}/{_checkpoint_name(recipe)}'
        yield f'to use it:\n{_command("predict", "--checkpoint", checkpoint, "FOLDER")}'
        if recipe.eval_dataset is not None:
            yield f'to measure it:\n{_command("evaluate", "--checkpoint", checkpoint)}'
    if 'sba' in recipe.algorithms:
        changes = ['algorithms.sba=null', f'run_name={recipe.run_name}_baseline']
        if not folder.endswith(f'/{recipe.run_name}'):
            changes.append(f'save_folder={folder}_baseline')
        yield f'its baseline:\n{_command("train", "-f", f"{folder}/{RECIPE_FILE}", *changes)}'


def _command(*arguments: str) -> str:
    """Write a command of the package for a shell, in lines of a terminal."""
    line, *words = [shlex.quote(each) for each in ('composer-sba', *arguments)]
    lines = [f'  {line}']
    for word in words:
        if len(lines[-1]) + len(word) + len('  \\') > WIDTH:
            lines[-1] += ' \\'
            lines.append(f'     {word}')
        else:
            lines[-1] += f' {word}'
    return '\n'.join(lines)


def _checkpoint_name(recipe: Recipe) -> str:
    """Return the name of the latest checkpoint's file; a pattern if every checkpoint has a name of its own."""
    return (recipe.save_latest_filename or recipe.save_filename).replace('{rank}', '0')


@contextmanager
def _without_empty_folders(folder: str | None) -> Iterator[None]:
    """Remove the folders that a run has created if a mistake ends it before its first checkpoint.

    Args:
        folder (str, optional): The run's folder. A folder in an object store is left alone.
    """
    path = Path(str(folder))
    is_ours = folder is not None and '://' not in folder and dist.get_global_rank() == 0
    created = [each for each in (path, *path.parents) if is_ours and not os.path.exists(each)]
    before = set(os.listdir(path)) if is_ours and os.path.isdir(path) else set()
    try:
        yield
    except UserError:
        ours = {RECIPE_FILE, DATASET_FILE}
        if is_ours and os.path.isdir(path) and set(os.listdir(path)) <= before | ours:
            for name in ours - before:
                (path / name).unlink(missing_ok=True)
            for each in created:
                if any(each.iterdir()):
                    break
                each.rmdir()
        raise


def _fit(trainer: Trainer, recipe: Recipe, folder: str | None) -> None:
    state = trainer.state
    if state.max_duration is not None and state.timestamp >= state.max_duration:
        problem = f'the run in {folder} has reached {state.max_duration}: raise max_duration, or change run_name'
        raise AlreadyTrainedError(str(recipe.sources.error('max_duration', problem)), trainer)
    with fail_together():
        if folder is not None and dist.get_global_rank() == 0:
            _save_file(recipe, folder, RECIPE_FILE, lambda path: save(recipe, path))
            _save_file(recipe, folder, DATASET_FILE, lambda path: path.write_text(json.dumps(dataset_record(recipe))))
    for logger in trainer.logger.destinations:
        if isinstance(logger, ConsoleLogger):
            # Otherwise it prints every hyperparameter before its first line
            logger.hparams_already_logged_to_console = True
    first = state.timestamp.batch
    with explained(recipe.sources, lambda: state.timestamp.batch > first):
        trainer.logger.log_hyperparameters(redact(recipe.to_dict()))
        trainer.fit()


class _InterruptedError(SystemExit):
    """Ctrl-C during training; ``advice`` says where, and how to resume the run."""

    def __init__(self, advice: str) -> None:
        super().__init__(128 + signal.SIGINT)
        self.advice = advice


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error: Composer raises SystemExit, and errors of ending workers hide it."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGINT
    return error is not None and _is_interrupt(error.__context__)


def _folder(recipe: Recipe) -> str | None:
    """Return the run's folder. Raise RecipeError if it holds another run, which this one would overwrite."""
    if recipe.save_folder is None:
        return None
    folder = format_name_with_dist(recipe.save_folder, str(recipe.run_name))
    if not (recipe.save_overwrite or recipe.autoresume) and _holds_run(recipe, folder):
        problem = f'{folder} holds a run: choose another run_name, or resume that run (autoresume=true), '
        problem += 'or replace it (save_overwrite=true)'
        raise recipe.sources.error('save_folder', problem)
    return folder


def _holds_run(recipe: Recipe, folder: str) -> bool:
    if '://' not in folder:
        return os.path.exists(f'{folder}/{RECIPE_FILE}')
    try:
        store = maybe_create_object_store_from_uri(folder)
        assert store is not None
        store.get_object_size(f'{parse_uri(folder)[2]}/{RECIPE_FILE}')
    except FileNotFoundError:
        return False
    except Exception as error:  # each object store has its own
        raise recipe.sources.error('save_folder', f'{folder} cannot be read: {one_line(error)}') from error
    return True


def _save_file(recipe: Recipe, folder: str, name: str, write: Callable[[Path], Any]) -> None:
    """Write a file of the run's folder, which may be in an object store."""
    try:
        store = maybe_create_object_store_from_uri(folder)
        if store is None:
            write(Path(folder) / name)
            return
        with TemporaryDirectory() as scratch:
            write(Path(scratch) / name)
            _, _, path = parse_uri(folder)
            store.upload_object(f'{path}/{name}', f'{scratch}/{name}')
    except UserError:
        raise
    except Exception as error:  # each object store has its own
        raise recipe.sources.error('save_folder', f'{name} cannot be written: {one_line(error)}') from error


def _written_files(recipe: Recipe, folder: str | None) -> Iterator[tuple[str, str]]:
    if folder is not None:
        yield 'checkpoint', f'{folder}/{_checkpoint_name(recipe)}'
        yield 'recipe', f'{folder}/{RECIPE_FILE}'
        yield 'model card', f'{folder}/{CARD_FILE}'


if __name__ == '__main__':
    sys.exit(main())
