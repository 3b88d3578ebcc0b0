"""``composer train.py -f FILE [key.sub=value ...]``: read a recipe, train what it says, sum up.

Exit codes: 0 trained, 2 a mistake in the recipe or its data (one line on stderr says which), 130 interrupted.
"""

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from composer import Trainer
from composer.loggers import ProgressBarLogger
from composer.utils import dist, format_name_with_dist, get_device, maybe_create_object_store_from_uri, parse_uri
from composer.utils.reproducibility import seed_all
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from composer_sba.data import DatasetConfig, build_dataloader, dataset_classes
from composer_sba.errors import CutLayerError, DatasetError, RecipeError, UserError
from composer_sba.models import classifier
from composer_sba.recipe import DECAY_ALL, Recipe, component_arguments, load, save
from composer_sba.registry import construct
from composer_sba.sba import sort_sba_last
from composer_sba.sources import NAMED
from composer_sba.summary import Summary

RECIPE_FILE = 'recipe.yaml'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.

    Returns:
        int: The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        recipe = load(arguments.file, arguments.overrides)
        if arguments.dry_run:
            with torch.device('meta'):
                build_components(recipe)
            print(OmegaConf.to_yaml(OmegaConf.create(recipe.to_dict())), end='')
        else:
            train(recipe)
    except UserError as error:
        if arguments.traceback:
            raise
        # Every rank says it: the launcher may end rank 0 before it speaks, and shows what the others said.
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 2
    except (SystemExit, RuntimeError) as error:
        if not _is_interrupt(error):
            raise
        print('interrupted', file=sys.stderr)
        return 130
    return 0


def train(recipe: Recipe) -> Trainer:
    """Train a recipe, save it beside its checkpoints and print the summary.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        Trainer: Composer's, closed, with the trained model in its state.

    Raises:
        UserError: If something in the recipe or its data cannot be used.
    """
    folder = _folder(recipe)
    summary = Summary()
    with warnings.catch_warnings():
        # Composer, of the last batch of every epoch, which is as short as the data makes it
        warnings.filterwarnings('ignore', message='Cannot split tensor of length', category=UserWarning)
        trainer = build_trainer(recipe, summary)
        if trainer.state.max_duration is not None and trainer.state.timestamp >= trainer.state.max_duration:
            problem = f'{folder} has {trainer.state.max_duration} behind it; raise it, or give another run_name'
            raise recipe.sources.error('max_duration', problem)
        if folder is not None and dist.get_global_rank() == 0:
            _save_recipe(recipe, folder)
        trainer.logger.log_hyperparameters(recipe.to_dict())
        for logger in trainer.logger.destinations:
            if isinstance(logger, ProgressBarLogger):
                # It would print every hyperparameter before its first bar, burying what a reader looks for
                logger.hparams_already_logged_to_console = True
        try:
            trainer.fit()
        except CutLayerError as error:
            raise recipe.sources.error('algorithms.sba.layers', one_line(error)) from error
        finally:
            trainer.close()
    if dist.get_global_rank() == 0:
        Console().print(summary.table(trainer.state, _places(recipe, folder)))
    return trainer


def build_trainer(recipe: Recipe, *destinations: Summary) -> Trainer:
    """Build Composer's Trainer as a recipe says.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        *destinations (Summary): Loggers beside the recipe's own.

    Returns:
        Trainer: Ready to ``fit()``.

    Raises:
        UserError: If a component refuses its arguments, data is missing, the batch size does not divide, or the model
            and the data differ in classes.
    """
    world = dist.get_world_size()
    if recipe.global_train_batch_size % world:
        problem = f'expected a multiple of the {world} devices, got {recipe.global_train_batch_size}'
        raise recipe.sources.error('global_train_batch_size', problem)
    rows = recipe.global_train_batch_size // world
    try:
        dist.initialize_dist(get_device(recipe.device), recipe.dist_timeout)
        # Model and data are drawn from the seed too, alike on all ranks; Trainer then seeds each rank apart.
        seed_all(recipe.seed)
        parts = build_components(recipe)
        parts['loggers'] += destinations
        return Trainer(
            **parts,
            train_dataloader=_dataloader(recipe, 'train_dataset', rows),
            eval_dataloader=_dataloader(recipe, 'eval_dataset', recipe.device_eval_batch_size or rows),
            **recipe.trainer_options(),
            parallelism_config=recipe.parallelism,
            algorithm_passes=[sort_sba_last],
        )
    except CutLayerError as error:
        raise recipe.sources.error('algorithms.sba.layers', one_line(error)) from error
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:  # how Composer words what it cannot run as asked
        raise RecipeError(f'{recipe.sources.file}: {one_line(error)}') from error


def build_components(recipe: Recipe) -> dict[str, Any]:
    """Build all that needs no data: model, optimizer, scheduler, algorithms, callbacks and loggers.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        dict[str, Any]: Keyword arguments of ``Trainer``.

    Raises:
        RecipeError: If one refuses its arguments or needs a library that is not installed.
    """
    model = classifier(_component(recipe, 'model'), recipe.model['num_classes'])
    groups = parameter_groups(model, recipe.optimizer.get(DECAY_ALL, True))
    parts: dict[str, Any] = {
        section: [_build(recipe, section, name, arguments) for name, arguments in getattr(recipe, section).items()]
        for section in NAMED
    }
    parts['optimizers'] = _component(recipe, 'optimizer', groups)
    parts['schedulers'] = _component(recipe, 'scheduler') if recipe.scheduler is not None else None
    return {'model': model, **parts}


def parameter_groups(model: nn.Module, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Split parameters by whether weight decay acts on them.

    Args:
        model (torch.nn.Module): The model.
        decay_norm_and_bias (bool): False puts the parameters of at most one dimension, which are the scales and shifts
            of normalization layers and all biases, into a group whose ``weight_decay`` is 0, as Hoffer et al. (2020) do
            for ResNets.

    Returns:
        list[dict[str, Any]]: Parameter groups for a ``torch.optim.Optimizer``.
    """
    parameters = list(model.parameters())
    if decay_norm_and_bias:
        return [{'params': parameters}]
    exempt = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{'params': [p for p in parameters if p.ndim > 1]}, {'params': exempt, 'weight_decay': 0.0}]


def one_line(error: Exception) -> str:
    """The one line of an error that tells what to do; a DataLoader worker's holds it last, below a traceback.

    Example:
        >>> one_line(ValueError('Caught ValueError in worker 0.\\nTraceback ...\\nValueError: no such shard'))
        'no such shard'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if 'Traceback' in str(error):
        return re.sub(r'^[\w.]+: ', '', lines[-1])
    return ' '.join(lines)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root: Composer makes it a SystemExit, and dying DataLoader workers bury that one."""
    if isinstance(error, SystemExit):
        return error.code == 128 + signal.SIGINT
    return error is not None and _is_interrupt(error.__context__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='composer train.py', description='Train what a recipe says.')
    parser.add_argument('-f', '--file', required=True, help='the recipe, a YAML file; yamls/ has some')
    parser.add_argument('--dry-run', action='store_true', help='check and print the resolved recipe, train nothing')
    parser.add_argument('--traceback', action='store_true', help='show where a refusal came from')
    parser.add_argument('overrides', nargs='*', metavar='key.sub=value', help='what to change in the recipe')
    return parser


def _component(recipe: Recipe, section: str, *supplied: Any) -> Any:
    entry = getattr(recipe, section)
    return _build(recipe, section, entry['name'], component_arguments(entry), *supplied)


def _build(recipe: Recipe, section: str, name: str, arguments: Mapping[str, Any], *supplied: Any) -> Any:
    try:
        return construct(section, name, arguments, *supplied)
    except (ValueError, TypeError, ImportError) as error:
        at = section if section not in NAMED else f'{section}.{name}'
        named = [key for key in _keys(arguments) if re.search(rf'\b{key.rpartition(".")[2]}\b', str(error))]
        raise recipe.sources.error('.'.join([at, *named[:1]]), one_line(error)) from error


def _keys(arguments: Mapping[str, Any], at: str = '') -> Iterator[str]:
    """Dotted keys, the deepest first."""
    for key, value in arguments.items():
        yield from _keys(value, f'{at}{key}.') if isinstance(value, Mapping) else ()
        yield f'{at}{key}'


def _dataloader(recipe: Recipe, section: str, rows: int) -> DataLoader[Any] | None:
    if getattr(recipe, section) is None:
        return None
    config = DatasetConfig(**getattr(recipe, section))
    try:
        classes = dataset_classes(config)
        if classes != recipe.model['num_classes']:
            problem = f'expected {classes}, as {section} {config.name} has, got {recipe.model["num_classes"]}'
            raise recipe.sources.error('model.num_classes', problem)
        return build_dataloader(config, rows, seed=recipe.seed)
    except DatasetError as error:
        raise recipe.sources.error(section, one_line(error)) from error


def _folder(recipe: Recipe) -> str | None:
    """The run's folder; refused where it holds the recipe of another run, which this one would replace."""
    if recipe.save_folder is None:
        return None
    folder = format_name_with_dist(recipe.save_folder, str(recipe.run_name))
    if (Path(folder) / RECIPE_FILE).exists() and not (recipe.save_overwrite or recipe.autoresume):
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
