"""Code shared by the commands that use a checkpoint: its recipe, its network's images and classes, the output file."""

import argparse
import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_sba.data.config import DatasetConfig, resolve
from composer_sba.data.loader import build_dataloader, dataset_classes
from composer_sba.data.mds_index import RECORD
from composer_sba.data.transforms import mean_and_std
from composer_sba.errors import DatasetError, UserError, one_line
from composer_sba.recipe.recipe import RECIPE_FILE, Recipe, load

DATASET_FILE = 'dataset.json'  # which training saves beside its checkpoints


def read_recipe(given: argparse.Namespace) -> Recipe:
    """Read the recipe of ``-f``, or the one that training saved beside the checkpoint; errors are those of load."""
    beside = given.checkpoint.parent / RECIPE_FILE
    if given.checkpoint.is_dir():
        raise UserError(f'{given.checkpoint} is a folder: name a checkpoint in it, such as latest-rank0.pt')
    if not given.file and not beside.is_file():
        if not given.checkpoint.is_file():
            raise UserError(f'cannot load the checkpoint {given.checkpoint}: no such file')
        raise UserError(f'{beside} does not exist: name the recipe that was trained, -f FILE')
    return load(given.file or [beside], given.overrides)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, which may be larger than the memory."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def require_one_process(command: str) -> None:
    """Raise UserError if a launcher has started several processes, each of which would do the same work."""
    if dist.get_world_size() > 1:
        raise UserError(f'{command} runs in one process: start it as composer-sba {command}, without the launcher')


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Make a file as a whole or not at all.

    Args:
        path (Path): The file; missing folders are made.
        overwrite (bool): Whether to replace an existing file.

    Yields:
        Path: Where to write. The file is moved to ``path`` at the end of the block, and removed if the block fails.

    Raises:
        UserError: If the file exists or cannot be written.
    """
    if path.exists() and not overwrite:
        raise UserError(f'{path} exists: pass --overwrite to replace it, or choose another --out')
    partial = path.with_stem(f'{path.stem}.partial')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise UserError(one_line(error)) from error  # of other work in the block
        raise UserError(
            f'{path} cannot be written ({error.strerror or one_line(error)}): choose another --out'
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class ExpectedImages:
    """The images that a trained network expects, and its classes.

    Attributes:
        section (str): The recipe's section that describes them, for messages.
        config (DatasetConfig): Their dataset, with the transforms of evaluation and the statistics for normalization.
        classes (list[str]): Names in the order of the logits; numbers if no names are known.
        why_numbers (str, optional): Why no names are known.
    """

    section: str
    config: DatasetConfig
    classes: list[str]
    why_numbers: str | None


def expected_images(recipe: Recipe, folder: Path) -> ExpectedImages:
    """Return the images of ``eval_dataset``, or of ``train_dataset`` if the recipe has no other.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        folder (Path): The run's folder, with the record of the dataset that training saved. A run of an earlier version
            has none; then the dataset itself is read.

    Returns:
        ExpectedImages: The images and the classes.

    Raises:
        UserError: If the record is damaged, or has another number of classes than the network.
    """
    section, config = _evaluation_dataset(recipe)
    path, why_numbers = folder / DATASET_FILE, None
    source = str(path)
    try:
        if path.is_file():
            record = json.loads(path.read_text())
        else:
            source = str(resolve(config).folder)
            record = resolve(config).read_index().get(RECORD, {})
        classes, mean, std = (record.get(key) for key in ('classes', 'mean', 'std'))
    except DatasetError as error:
        classes = mean = std = None
        why_numbers = one_line(error)
    except (OSError, ValueError, AttributeError) as error:
        remedy = ': delete it to read the dataset instead' * path.is_file()
        raise UserError(f'{source} cannot be read ({one_line(error)}){remedy}') from error
    config = replace(config, mean=config.mean or mean, std=config.std or std)
    count = recipe.model['num_classes']
    if classes is not None and len(classes) != count:
        raise UserError(f'{source} names {len(classes)} classes, the network has {count}')
    if classes is None:
        classes = [str(number) for number in range(count)]
        why_numbers = why_numbers or f'{source} does not record their names'
    return ExpectedImages(section, config, classes, why_numbers)


def dataset_record(recipe: Recipe) -> dict[str, Any]:
    """Return what a trained network needs to know about its dataset: names of classes, means, standard deviations."""
    _, config = _evaluation_dataset(recipe)
    mean, std = mean_and_std(config)
    record = resolve(config).read_index().get(RECORD, {})
    return {'dataset': config.name, 'classes': record.get('classes'), 'mean': [*mean], 'std': [*std]}


def _evaluation_dataset(recipe: Recipe) -> tuple[str, DatasetConfig]:
    section = 'train_dataset' if recipe.eval_dataset is None else 'eval_dataset'
    return section, replace(DatasetConfig(**getattr(recipe, section)), augment=False, shuffle=False)


def pixel_loader(
    recipe: Recipe, device: torch.device
) -> tuple[DataLoader, DatasetConfig, Sequence[float], Sequence[float]]:
    """Load the ``eval_dataset`` of a recipe in pixel units, as :mod:`composer_sba.robustness` needs it.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`.
        device (torch.device): The device that evaluates.

    Returns:
        tuple[DataLoader, DatasetConfig, Sequence[float], Sequence[float]]: Batches of images in [0, 1] and labels;
        the configuration of their dataset; mean and standard deviation that the network expects.

    Raises:
        RecipeError: If there is no ``eval_dataset``, it cannot be read, or its classes are not the model's.
    """
    config = DatasetConfig(**require_images(recipe))
    try:
        if dataset_classes(config) != recipe.model['num_classes']:
            classes = recipe.model['num_classes']
            raise DatasetError(f'{config.name} has {dataset_classes(config)} classes, the model has {classes}')
        mean, std = mean_and_std(config)
        pixels = replace(config, mean=[0.0] * 3, std=[1.0] * 3, augment=False, shuffle=False)
        rows = recipe.device_eval_batch_size or recipe.global_train_batch_size
        return build_dataloader(pixels, rows, device=device), pixels, mean, std
    except (UserError, OSError) as error:
        raise recipe.sources.error('eval_dataset', one_line(error)) from error


def require_images(recipe: Recipe) -> dict[str, Any]:
    """Return the ``eval_dataset`` of a recipe; raise RecipeError if it has none."""
    if recipe.eval_dataset is None:
        raise recipe.sources.error('eval_dataset', 'is required: its images are evaluated')
    return recipe.eval_dataset
