"""What commands that use a checkpoint share: their options, the recipe, the images and the names of the classes."""

import argparse
from dataclasses import replace
from pathlib import Path

from composer.utils import dist

from composer_sba.data.config import DatasetConfig, resolve
from composer_sba.data.mds_index import RECORD
from composer_sba.errors import DatasetError, UserError, one_line
from composer_sba.recipe.recipe import RECIPE_FILE, Recipe, load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--checkpoint`` and ``-f`` to a command's parser."""
    parser.add_argument('--checkpoint', type=Path, required=True, metavar='FILE', help='a checkpoint of training')
    parser.add_argument(
        *('-f', '--file'),
        action='append',
        help=f"the recipe that was trained, as in train (default: {RECIPE_FILE} in the checkpoint's folder)",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the changes to the recipe, which follow all other arguments, to a command's parser."""
    parser.add_argument('overrides', nargs='*', metavar='key.sub=value', help='changes to the recipe')


def read_recipe(given: argparse.Namespace) -> Recipe:
    """Read the recipe of ``-f``, or the one that training saved beside the checkpoint; errors are those of load."""
    return load(given.file or [given.checkpoint.parent / RECIPE_FILE], given.overrides)


def require_one_process(command: str) -> None:
    """Raise UserError if a launcher has started several processes, each of which would do the same work."""
    if dist.get_world_size() > 1:
        raise UserError(f'{command} runs in one process: start it as composer-sba {command}, without the launcher')


def evaluation_images(recipe: Recipe) -> tuple[str, DatasetConfig]:
    """Return the images that a trained network expects: those of ``eval_dataset``, or else of ``train_dataset``.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        tuple[str, DatasetConfig]: The section of the recipe, and its dataset with the transforms of evaluation.
    """
    section = 'train_dataset' if recipe.eval_dataset is None else 'eval_dataset'
    return section, replace(DatasetConfig(**getattr(recipe, section)), augment=False, shuffle=False)


def class_names(recipe: Recipe) -> tuple[list[str], str | None]:
    """Return the names of a network's classes, in the order of its logits.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.

    Returns:
        tuple[list[str], str | None]: Names as the converter has recorded them. If there is no record, numbers and the
        reason.

    Raises:
        RecipeError: If the dataset has another number of classes than the network.
    """
    section, config = evaluation_images(recipe)
    count = recipe.model['num_classes']
    numbers = [str(number) for number in range(count)]
    try:
        record = resolve(config).read_index().get(RECORD, {})
    except DatasetError as error:
        return numbers, one_line(error)
    names = record.get('classes')
    if names is None:
        return numbers, f'{resolve(config).folder} does not record their names'
    if len(names) != count:
        raise recipe.sources.error(section, f'{config.name} has {len(names)} classes, the network {count}')
    return names, None
