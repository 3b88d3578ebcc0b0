"""The command ``composer-sba predict --checkpoint FILE FOLDER``: classify images with a trained network.

It writes a CSV file with one line for each file of the folder and its sub-folders: the path, the most probable classes
with their probabilities, and, for a file that cannot be classified, the reason.

Exit codes: 0 predicted, 2 a mistake in the arguments, the recipe or the images (described in one line on stderr).
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from composer_sba.arguments import predict_parser as _parser

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    _parser().parse_intermixed_args()

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from composer_sba.data.config import DatasetConfig, resolve
from composer_sba.data.readers import is_hidden
from composer_sba.data.samples import decoding_error, to_rgb
from composer_sba.data.transforms import transform
from composer_sba.errors import UserError, one_line
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import Recipe
from composer_sba.recipe.redact import redact
from composer_sba.trained import (
    ExpectedImages,
    expected_images,
    new_file,
    read_recipe,
    require_one_process,
)

PREDICTIONS_FILE = 'predictions.csv'
NAMED_FILES = 3  # of those that cannot be classified, in the message


class Prediction(NamedTuple):
    """The most probable classes of an image with their probabilities; or none, and why it cannot be classified."""

    path: Path
    classes: list[tuple[str, float]]
    problem: str


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.predict') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    given = _parser(prog).parse_intermixed_args(argv)
    try:
        if given.top < 1:
            raise UserError(f'--top: expected a number of classes >= 1, got {given.top}')
        recipe = read_recipe(given)
        files = image_files(given.folder)
        out = given.out or given.checkpoint.parent / PREDICTIONS_FILE
        images = expected_images(recipe, given.checkpoint.parent)
        with new_file(out, given.overwrite) as path:
            failed = _write(recipe, given, files, images, path)
    except UserError as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    if failed:
        few = ', '.join(f'{each.path.name} ({each.problem})' for each in failed[:NAMED_FILES])
        more = ', ...' * (len(failed) > NAMED_FILES)
        print(f'{len(failed):,} of {len(files):,} files cannot be classified: {few}{more}', file=sys.stderr)
    if images.why_numbers is not None:
        print(f'The classes are numbers: {images.why_numbers}', file=sys.stderr)
    print(f'predictions of {len(files) - len(failed):,} images: {out}')
    return 0


def predict(
    recipe: Recipe, checkpoint: Path, files: Sequence[Path], images: ExpectedImages, top: int = 5
) -> Iterator[Prediction]:
    """Classify image files with a trained network, after the evaluation transforms of its recipe.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`: the one that was trained.
        checkpoint (Path): A checkpoint of Composer's Trainer, not sharded.
        files (Sequence[Path]): The image files, in any format that Pillow reads.
        images (ExpectedImages): From :func:`composer_sba.trained.expected_images`.
        top (int, optional): How many of the most probable classes to return, at most all. Default: ``5``.

    Yields:
        Prediction: One for each file, in order. A file that cannot be read, or whose size the network does not take,
        has a ``problem`` and no classes.

    Raises:
        UserError: If the checkpoint cannot be loaded, or the recipe's transforms cannot be built.
    """
    require_one_process('predict')
    config = images.config
    try:
        dataset = _ImageFiles(files, config)
    except (UserError, OSError) as error:
        raise recipe.sources.error(images.section, one_line(error)) from error
    network, device = load_network(recipe, checkpoint)
    network.eval()
    rows = recipe.device_eval_batch_size or recipe.global_train_batch_size
    cores = min(len(os.sched_getaffinity(0)), 8) if config.num_workers is None else config.num_workers
    loader = DataLoader(dataset, rows, num_workers=min(cores, len(files) // rows))
    for indices, batch, problems in loader:
        with torch.inference_mode():
            chances = network(batch.to(device)).float().softmax(1)
        values, labels = (each.tolist() for each in chances.topk(min(top, chances.shape[1])))
        for index, problem, row, ranked in zip(indices, problems, values, labels, strict=True):
            named = [(images.classes[label], value) for label, value in zip(ranked, row, strict=True)]
            yield Prediction(files[index], [] if problem else named, problem)


def image_files(folder: Path) -> list[Path]:
    """Return the files of a folder and its sub-folders, sorted, without those that are hidden.

    Links to files are followed, links to folders are not.

    Args:
        folder (Path): A folder, or a file, which is returned itself.

    Raises:
        UserError: If there are no files.
    """
    if not folder.is_dir():
        if not folder.exists():
            raise UserError(f'{folder} does not exist: give a folder of images')
        return [folder]
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        files += [Path(parent, name) for name in names if not is_hidden(name)]
    if not files:
        raise UserError(f'{folder} has no files: give a folder of images')
    return sorted(files)


class _ImageFiles(Dataset):
    """Images after the transforms, with their index and why they cannot be read; black if they cannot."""

    def __init__(self, files: Sequence[Path], config: DatasetConfig) -> None:
        config = resolve(config)
        self.files, self.transform = files, transform(config)
        self.size, self.fixed_size = config.crop_size, config.known.size is not None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, str]:
        try:
            image = to_rgb(Image.open(io.BytesIO(self.files[index].read_bytes())))
            if not self.fixed_size or image.size == (self.size, self.size):
                return index, self.transform(image), ''
            problem = f'{image.width}x{image.height} pixels, the network takes {self.size}x{self.size}'
        except Exception as error:  # decoders raise many types, which depend on the format and the damage
            problem = decoding_error(error)
        return index, torch.zeros(3, self.size, self.size), problem


def _write(
    recipe: Recipe, given: argparse.Namespace, files: Sequence[Path], images: ExpectedImages, path: Path
) -> list[Prediction]:
    """Write the CSV file; return what cannot be classified."""
    root = given.folder if given.folder.is_dir() else given.folder.parent
    top = min(given.top, len(images.classes))
    ranks = [f'{column}_{rank}' for rank in range(1, top + 1) for column in ('class', 'probability')]
    failed = []
    # A file's name may contain bytes that are not UTF-8
    with path.open('w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file)
        writer.writerow(['image', *ranks, 'problem'])
        predictions = predict(recipe, given.checkpoint, files, images, top)
        for each in tqdm(predictions, total=len(files), unit=' images', disable=None):
            cells = [cell for name, chance in each.classes for cell in (name, f'{chance:.6f}')]
            cells += [''] * (len(ranks) - len(cells))
            writer.writerow([each.path.relative_to(root).as_posix(), *cells, each.problem])
            failed += [each] if each.problem else []
    if len(failed) == len(files):
        problem = f'{given.folder} has no image that can be classified'
        raise UserError(f'{problem}: {failed[0].path.name} ({failed[0].problem})')
    return failed


if __name__ == '__main__':
    sys.exit(main())
