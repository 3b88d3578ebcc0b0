"""A recipe -> Composer's Trainer, and what refuses to be built -> one line that names its key."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import DataSpec, Event, State, TimeUnit
from composer.loggers import LoggerDestination
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, get_device
from composer.utils.reproducibility import seed_all
from torch import nn

from composer_sba.algorithms.seed_each_batch import SeedEachBatch, sort_seed_first
from composer_sba.data.loader import DatasetConfig, build_dataspec, dataset_classes
from composer_sba.errors import DatasetError, one_line
from composer_sba.models import classifier
from composer_sba.recipe.checkpoints import RestOfEpoch, damage, mend, only_data, take_over
from composer_sba.recipe.explain import argument_key, option_refusal, refusal
from composer_sba.recipe.merge import NAMED
from composer_sba.recipe.recipe import DECAY_ALL, Recipe, component_arguments
from composer_sba.recipe.registry import construct
from composer_sba.sba import sort_sba_last


def build_trainer(recipe: Recipe, *destinations: LoggerDestination) -> Trainer:
    """Build Composer's Trainer as a recipe says.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        *destinations (LoggerDestination): Loggers beside the recipe's own.

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
        if dist.get_global_rank() == 0:
            _look_at_checkpoints(recipe)
        dist.barrier()
        # Model and data are drawn from the seed too, alike on all ranks; Trainer then seeds each rank apart.
        seed_all(recipe.seed)
        parts = build_components(recipe)
        parts['loggers'] += destinations
        parts['algorithms'].append(SeedEachBatch())
        if recipe.train_subset_num_batches != -1:
            parts['callbacks'].append(RestOfEpoch())
        parts['train_dataloader'] = _data(recipe, 'train_dataset', rows)
        parts['eval_dataloader'] = _data(recipe, 'eval_dataset', recipe.device_eval_batch_size or rows)
        with only_data():  # it loads a checkpoint
            trainer = Trainer(
                **parts,
                **(recipe.trainer_options() | {'eval_interval': _eval_interval(recipe)} | _progress(recipe)),
                parallelism_config=recipe.parallelism,
                algorithm_passes=[sort_sba_last, sort_seed_first],
            )
        folder = _resumed_folder(recipe)
        for saver in trainer.state.callbacks if dist.get_global_rank() == 0 else ():
            if folder is not None and isinstance(saver, CheckpointSaver):
                take_over(saver, folder)
        return trainer
    except Exception as error:
        refused = refusal(recipe, error)
        if refused is None and isinstance(error, ValueError | OSError | OverflowError):
            refused = option_refusal(recipe, error)  # how Composer words what it cannot run as asked
        if refused is None or refused is error:
            raise
        raise refused from error


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


def _resumed_folder(recipe: Recipe) -> Path | None:
    """Where a run that resumes by itself keeps its checkpoints, unless in an object store."""
    if not recipe.autoresume or recipe.save_folder is None or '://' in recipe.save_folder:
        return None
    return Path(format_name_with_dist(recipe.save_folder, str(recipe.run_name)))


def _look_at_checkpoints(recipe: Recipe) -> None:
    """Put in order what a killed run has left, and refuse a checkpoint that is damaged, unless in an object store."""
    found = {}
    folder = _resumed_folder(recipe)
    if folder is not None and recipe.save_latest_filename is not None:
        latest = folder / format_name_with_dist(recipe.save_latest_filename, str(recipe.run_name))
        mend(latest)
        found['save_folder'] = latest
    if recipe.load_path is not None:
        found['load_path'] = Path(recipe.load_path)
    for key, path in found.items():
        problem = damage(path) if os.path.isfile(path) else None
        if problem is not None:
            raise recipe.sources.error(key, f'expected a whole checkpoint of such a run, got {problem} in {path}')


def _progress(recipe: Recipe) -> dict[str, Any]:
    if recipe.progress_bar is not None:
        return {}
    if sys.stderr.isatty():
        return {'progress_bar': True}
    # A file would get a line of the bar with every batch.
    each_epoch = {} if recipe.log_to_console else {'log_to_console': True, 'console_log_interval': '1ep'}
    return {'progress_bar': False, **each_epoch}


def _eval_interval(recipe: Recipe) -> Any:
    """What Trainer takes: the recipe's interval, or a function of state and event that adds the last epochs."""
    if not recipe.eval_last_epochs:
        return recipe.eval_interval
    periodically = create_interval_scheduler(
        recipe.eval_interval, include_end_of_training=False, checkpoint_events=False
    )

    def due(state: State, event: Event) -> bool:
        if state.max_duration is None or state.max_duration.unit != TimeUnit.EPOCH:
            return periodically(state, event) or event == Event.FIT_END
        left = int(state.max_duration) - int(state.timestamp.epoch)
        return periodically(state, event) or (event == Event.EPOCH_END and left < recipe.eval_last_epochs)

    return due


def _component(recipe: Recipe, section: str, *supplied: Any) -> Any:
    entry = getattr(recipe, section)
    return _build(recipe, section, entry['name'], component_arguments(entry), *supplied)


def _build(recipe: Recipe, section: str, name: str, arguments: Mapping[str, Any], *supplied: Any) -> Any:
    try:
        return construct(section, name, arguments, *supplied)
    except Exception as error:  # a constructor may raise anything over an argument that it did not expect
        at = section if section not in NAMED else f'{section}.{name}'
        raise recipe.sources.error(argument_key(at, arguments, error), one_line(error)) from error


def _data(recipe: Recipe, section: str, rows: int) -> DataSpec | None:
    if getattr(recipe, section) is None:
        return None
    config = DatasetConfig(**getattr(recipe, section))
    try:
        classes = dataset_classes(config)
        if classes != recipe.model['num_classes']:
            problem = f'expected {classes}, as {section} {config.name} has, got {recipe.model["num_classes"]}'
            raise recipe.sources.error('model.num_classes', problem)
        device = get_device(recipe.device).tensor_to_device(torch.empty(0)).device  # of this rank
        return build_dataspec(config, rows, seed=recipe.seed, device=device)
    except DatasetError as error:
        raise recipe.sources.error(section, one_line(error)) from error
