"""A recipe -> Composer's Trainer, and what refuses to be built -> one line that names its key."""

import inspect
import re
from collections.abc import Iterator, Mapping
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

from composer_sba.data import DatasetConfig, build_dataspec, dataset_classes
from composer_sba.errors import CutLayerError, DatasetError, RecipeError, UserError
from composer_sba.models import classifier
from composer_sba.recipe import DECAY_ALL, Recipe, component_arguments
from composer_sba.registry import components, construct
from composer_sba.sba import sort_sba_last
from composer_sba.seed_each_batch import SeedEachBatch, sort_seed_first
from composer_sba.sources import NAMED
from composer_sba.unfinished import RestOfEpoch, mend, take_over


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
        resumes = recipe.autoresume and recipe.save_folder is not None and '://' not in recipe.save_folder
        folder = Path(format_name_with_dist(recipe.save_folder or '', str(recipe.run_name)))
        if resumes:
            if dist.get_global_rank() == 0:
                mend(folder)
            dist.barrier()
        # Model and data are drawn from the seed too, alike on all ranks; Trainer then seeds each rank apart.
        seed_all(recipe.seed)
        parts = build_components(recipe)
        parts['loggers'] += destinations
        parts['algorithms'].append(SeedEachBatch())
        if recipe.train_subset_num_batches != -1:
            parts['callbacks'].append(RestOfEpoch())
        trainer = Trainer(
            **parts,
            train_dataloader=_data(recipe, 'train_dataset', rows),
            eval_dataloader=_data(recipe, 'eval_dataset', recipe.device_eval_batch_size or rows),
            **(recipe.trainer_options() | {'eval_interval': _eval_interval(recipe)}),
            parallelism_config=recipe.parallelism,
            algorithm_passes=[sort_sba_last, sort_seed_first],
        )
        for saver in trainer.state.callbacks if resumes and dist.get_global_rank() == 0 else ():
            if isinstance(saver, CheckpointSaver):
                take_over(saver, folder)
        return trainer
    except CutLayerError as error:
        raise recipe.sources.error(layers_key(recipe, error), one_line(error)) from error
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


def layers_key(recipe: Recipe, error: CutLayerError) -> str:
    """The key of the layers that an error is about: of the algorithms that cut, the one whose layer it names first."""

    def place(name: str) -> int:
        layers = recipe.algorithms[name].get('layers', 'head')
        found = [str(error).find(repr(layer)) for layer in ([layers] if isinstance(layers, str) else layers)]
        return min((each for each in found if each >= 0), default=len(str(error)))

    known = components('algorithms')
    cutting = [name for name in recipe.algorithms if 'layers' in inspect.signature(known[name]).parameters]
    return f'algorithms.{min(cutting, key=place)}.layers'


def one_line(error: Exception) -> str:
    r"""The one line of an error that tells what to do; a DataLoader worker's holds it last, below a traceback.

    Example:
        >>> one_line(ValueError('Caught ValueError in worker 0.\nTraceback ...\nValueError: no such shard'))
        'no such shard'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if 'Traceback' in str(error):
        return re.sub(r'^[\w.]+: ', '', lines[-1])
    return ' '.join(lines)


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
    except (ValueError, TypeError, ImportError) as error:
        at = section if section not in NAMED else f'{section}.{name}'
        named = [key for key in _keys(arguments) if re.search(rf'\b{key.rpartition(".")[2]}\b', str(error))]
        raise recipe.sources.error('.'.join([at, *named[:1]]), one_line(error)) from error


def _keys(arguments: Mapping[str, Any], at: str = '') -> Iterator[str]:
    """Dotted keys, the deepest first."""
    for key, value in arguments.items():
        yield from _keys(value, f'{at}{key}.') if isinstance(value, Mapping) else ()
        yield f'{at}{key}'


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
