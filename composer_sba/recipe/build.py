"""Composer's Trainer, built from a recipe."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, DataSpec, Event, State, TimeUnit
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, get_device
from composer.utils.reproducibility import seed_all
from torch import nn

from composer_sba.algorithms._composer import network_of
from composer_sba.algorithms.seed_each_batch import SeedEachBatch
from composer_sba.data.loader import DatasetConfig, build_dataspec, dataset_classes, image_size
from composer_sba.data.shared_memory import fail_together
from composer_sba.errors import RecipeError, UserError
from composer_sba.models import classifier
from composer_sba.recipe.checkpoints import (
    RestOfEpoch,
    adopt_checkpoints,
    find_damage,
    loading_problem,
    only_data,
    repair_latest,
)
from composer_sba.recipe.explain import argument_key, explain, explained, mark, marked, problem_of
from composer_sba.recipe.merge import COMMAND_LINE, NAMED
from composer_sba.recipe.recipe import DECAY_ALL, Recipe, component_arguments
from composer_sba.recipe.registry import algorithm_passes, construct


def build_trainer(recipe: Recipe, *destinations: LoggerDestination) -> Trainer:
    """Build Composer's Trainer from a recipe.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        *destinations (LoggerDestination): Loggers in addition to the recipe's own.

    Returns:
        Trainer: Ready to ``fit()``. When a component of the recipe raises an exception, this carries the component's
        key for :func:`composer_sba.recipe.explain.explained`.

    Raises:
        UserError: If a component refuses its arguments, data is missing, the batch size is not a multiple of the number
            of devices, or the model and the data differ in classes.
    """
    world = dist.get_world_size()
    if recipe.global_train_batch_size % world:
        problem = f'expected a multiple of the {world} devices, got {recipe.global_train_batch_size}'
        raise recipe.sources.error('global_train_batch_size', problem)
    rows = recipe.global_train_batch_size // world
    with explained(recipe.sources):
        dist.initialize_dist(_device(recipe), recipe.dist_timeout)
        with fail_together():
            if dist.get_global_rank() == 0:
                _prepare_folder(recipe)
        # The seed also determines the model and the data, equally on all ranks. Trainer then seeds each rank apart.
        seed_all(recipe.seed)
        parts = build_components(recipe)
        parts['loggers'] += destinations
        parts['algorithms'].append(SeedEachBatch())
        if recipe.train_subset_num_batches != -1:
            parts['callbacks'].append(RestOfEpoch())
        parts['train_dataloader'] = _data(recipe, 'train_dataset', rows)
        parts['eval_dataloader'] = _data(recipe, 'eval_dataset', recipe.device_eval_batch_size or rows)
        _check_image_sizes(recipe, parts['model'])
        trainer = _trainer(recipe, parts)
        folder = _local_folder(recipe)
        for saver in [each for each in trainer.state.callbacks if isinstance(each, CheckpointSaver)]:
            mark(saver, 'save_folder', {})
            if recipe.autoresume and folder is not None and dist.get_global_rank() == 0:
                adopt_checkpoints(saver, folder)
        return trainer


def for_evaluation(recipe: Recipe) -> Recipe:
    """Prepare a recipe whose ``max_duration`` is 0 for :func:`build_trainer`.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        Recipe: It loads what the run would start from, which is the latest checkpoint of its folder under
        ``autoresume``, unless the command line gives a ``load_path``. It reads no training data and saves nothing.
    """
    if any(name == COMMAND_LINE and values.get('load_path') for name, values in recipe.sources.layers):
        recipe = replace(recipe, autoresume=False)
    # Evaluation needs neither a scheduler nor a duration; a scheduler that divides by a duration of 0 would fail
    changes: dict[str, Any] = {'max_duration': '1ep', 'scheduler': None, 'scale_schedule_ratio': 1.0}
    changes |= {'train_dataset': None, 'train_subset_num_batches': -1}
    if not (recipe.autoresume and '://' in str(recipe.save_folder)):  # else Composer finds the latest checkpoint
        changes |= {'save_folder': None, 'autoresume': False}
    latest = _latest(recipe)
    if latest is not None and os.path.exists(latest):
        changes |= {'load_path': latest, 'load_weights_only': False}
    return replace(recipe, **changes)


def load_network(recipe: Recipe, checkpoint: Path) -> tuple[nn.Module, torch.device]:
    """Build the network of a recipe, after model surgery by its algorithms, with the weights of a checkpoint.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`; it needs no data.
        checkpoint (Path): A checkpoint that Composer's Trainer has saved, not sharded.

    Returns:
        tuple[torch.nn.Module, torch.device]: The network without Composer's model around it, on the recipe's device.

    Raises:
        UserError: If a component refuses its arguments, or the checkpoint is missing, corrupt or another model's.
    """
    with explained(recipe.sources):
        device = _device(recipe)
        damage = find_damage(checkpoint) if checkpoint.is_file() else 'no such file'
        if damage is not None:
            raise UserError(f'cannot load the checkpoint {checkpoint}: {damage}')
        model = {key: value for key, value in recipe.model.items() if key != 'pretrained'}  # the checkpoint has weights
        parts = build_components(replace(recipe, model=model, callbacks={}, loggers={}))
        try:
            with only_data():
                trainer = Trainer(
                    model=parts['model'],
                    algorithms=parts['algorithms'],
                    optimizers=parts['optimizers'],
                    load_path=str(checkpoint),
                    load_weights_only=True,
                    device=device,
                    progress_bar=False,
                )
        except Exception as error:  # torch, Composer and a surgery raise many types
            if explain(recipe.sources, error) is not None:
                raise
            raise UserError(loading_problem(str(checkpoint), error)) from error
        trainer.close()
        return network_of(trainer.state.model), torch.device(
            trainer.state.device.tensor_to_device(torch.empty(0)).device
        )


def build_components(recipe: Recipe) -> dict[str, Any]:
    """Build what needs no data: model, optimizer, scheduler, algorithms, callbacks and loggers.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        dict[str, Any]: Keyword arguments of ``Trainer``.

    Raises:
        RecipeError: If a component refuses its arguments or needs a library that is not installed.
    """
    model = classifier(_single(recipe, 'model'), recipe.model['num_classes'])
    groups = parameter_groups(model, recipe.optimizer.get(DECAY_ALL, True))
    parts: dict[str, Any] = {
        section: [_build(recipe, section, name, arguments) for name, arguments in getattr(recipe, section).items()]
        for section in NAMED
    }
    parts['optimizers'] = _single(recipe, 'optimizer', groups)
    if recipe.scheduler is not None:
        parts['schedulers'] = marked(_single(recipe, 'scheduler').__call__, 'scheduler', recipe.scheduler)
    return {'model': model, **parts}


def parameter_groups(model: nn.Module, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Split parameters by whether weight decay acts on them.

    Args:
        model (torch.nn.Module): The model.
        decay_norm_and_bias (bool): False puts the parameters of at most one dimension into a group whose
            ``weight_decay`` is 0: the scales and shifts of normalization layers, and all biases. Hoffer et al. (2020)
            do so for ResNets.

    Returns:
        list[dict[str, Any]]: Parameter groups for a ``torch.optim.Optimizer``.
    """
    parameters = list(model.parameters())
    if decay_norm_and_bias:
        return [{'params': parameters}]
    exempt = [parameter for parameter in parameters if parameter.ndim <= 1]
    return [{'params': [p for p in parameters if p.ndim > 1]}, {'params': exempt, 'weight_decay': 0.0}]


def _trainer(recipe: Recipe, parts: Mapping[str, Any]) -> Trainer:
    last_event = None

    def note_event(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
        nonlocal last_event
        last_event = event
        return algorithms

    try:
        with only_data():
            return Trainer(
                **parts,
                **(recipe.trainer_options() | {'eval_interval': _eval_interval(recipe), 'progress_bar': False}),
                parallelism_config=recipe.parallelism,
                algorithm_passes=[*algorithm_passes(), note_event],
            )
    except Exception as error:
        if explain(recipe.sources, error) is not None:
            raise
        latest = _latest(recipe)
        resumed = latest is not None and (recipe.load_path is None or os.path.exists(latest))
        key, path = ('save_folder', latest) if resumed else ('load_path', recipe.load_path)
        if last_event == Event.BEFORE_LOAD and path is not None:
            raise recipe.sources.error(key, loading_problem(path, error)) from error
        if isinstance(error, ValueError | OSError | OverflowError):  # Composer refuses a combination of options
            raise RecipeError(f"{recipe.sources.file}: Composer's Trainer: {problem_of(error)}") from error
        raise


def _device(recipe: Recipe) -> Device:
    try:
        device = get_device(recipe.device)
    except Exception as error:  # of a type that depends on what is missing
        problem = f'expected a device of this machine, got {recipe.device} ({problem_of(error)})'
        raise recipe.sources.error('device', f'{problem}: remove the key, or set device=cpu') from error
    if device.name == 'cpu' and recipe.precision not in (None, 'fp32'):
        raise recipe.sources.error('precision', f'expected fp32, which is all that a CPU has, got {recipe.precision}')
    return device


def _local_folder(recipe: Recipe) -> Path | None:
    """Return the run's folder; None if it has none, or one in an object store."""
    if recipe.save_folder is None or '://' in recipe.save_folder:
        return None
    return Path(format_name_with_dist(recipe.save_folder, str(recipe.run_name)))


def _latest(recipe: Recipe) -> str | None:
    """Return the checkpoint from which ``autoresume`` resumes, whether or not it exists."""
    if not recipe.autoresume or recipe.save_latest_filename is None:
        return None
    return format_name_with_dist(f'{recipe.save_folder}/{recipe.save_latest_filename}', str(recipe.run_name))


def _prepare_folder(recipe: Recipe) -> None:
    """Create the run's folder, repair what a killed run has left there, and refuse damaged checkpoints."""
    checkpoints = {'load_path': recipe.load_path}
    folder = _local_folder(recipe)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints['save_folder'] = latest = _latest(recipe)
            if latest is not None:
                repair_latest(Path(latest))
        except OSError as error:
            raise recipe.sources.error('save_folder', f'cannot be written: {problem_of(error)}') from error
    for key, path in checkpoints.items():
        damage = find_damage(Path(path)) if path is not None and os.path.isfile(path) else None
        if damage is not None:
            raise recipe.sources.error(key, f'cannot load the checkpoint {path}: {damage}; it is corrupt')


def _eval_interval(recipe: Recipe) -> Any:
    """Return the recipe's interval, or a function of state and event that adds the last epochs."""
    if recipe.eval_dataset is None:
        return 1  # any other interval makes the Trainer warn that it has no effect
    if not recipe.eval_last_epochs:
        return recipe.eval_interval
    periodically = create_interval_scheduler(
        recipe.eval_interval, include_end_of_training=False, checkpoint_events=False
    )

    evaluated = None  # the batch after which the latest evaluation ran

    def due(state: State, event: Event) -> bool:
        nonlocal evaluated
        if state.max_duration is None or state.max_duration.unit != TimeUnit.EPOCH:
            if periodically(state, event) or (event == Event.FIT_END and state.timestamp.batch != evaluated):
                evaluated = state.timestamp.batch
                return True
            return False
        left = int(state.max_duration) - int(state.timestamp.epoch)
        return periodically(state, event) or (event == Event.EPOCH_END and left < recipe.eval_last_epochs)

    return due


def _single(recipe: Recipe, section: str, *supplied: Any) -> Any:
    entry = getattr(recipe, section)
    return _build(recipe, section, entry['name'], component_arguments(entry), *supplied)


def _build(recipe: Recipe, section: str, name: str, arguments: Mapping[str, Any], *supplied: Any) -> Any:
    entry = f'{section}.{name}' if section in NAMED else section
    try:
        component = construct(section, name, arguments, *supplied)
    except Exception as error:  # a constructor may raise anything over an argument that it does not expect
        raise recipe.sources.error(argument_key(entry, arguments, error), problem_of(error)) from error
    if section in NAMED:
        mark(component, entry, arguments)
    return component


def _check_image_sizes(recipe: Recipe, model: nn.Module) -> None:
    """Raise RecipeError if a library's model takes no images of a dataset's size."""
    sections = {key: getattr(recipe, key) for key in ('train_dataset', 'eval_dataset')}
    configs = {key: DatasetConfig(**values) for key, values in sections.items() if values is not None}
    for section, config in configs.items() if '/' in recipe.model['name'] else ():
        size = image_size(config)
        try:
            with torch.no_grad():
                model.eval()((torch.zeros(1, 3, size, size), None))
        except Exception as error:  # of a type that depends on the network
            problem = f'takes no images of {size}x{size} pixels, as {section} {config.name} has: {problem_of(error)}'
            raise recipe.sources.error('model', problem) from error
    model.train()


def _data(recipe: Recipe, section: str, rows: int) -> DataSpec | None:
    if getattr(recipe, section) is None:
        return None
    config = DatasetConfig(**getattr(recipe, section))
    try:
        with fail_together():
            classes = dataset_classes(config)
        if classes == recipe.model['num_classes']:
            device = get_device(recipe.device).tensor_to_device(torch.empty(0)).device  # of this rank
            return build_dataspec(config, rows, seed=recipe.seed, device=device)
    except (ValueError, OSError, OverflowError) as error:
        key = argument_key(section, getattr(recipe, section), error)
        raise recipe.sources.error(key, problem_of(error)) from error
    problem = f'expected {classes}, as {section} {config.name} has, got {recipe.model["num_classes"]}'
    raise recipe.sources.error('model.num_classes', problem)
