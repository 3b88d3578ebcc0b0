"""The command ``composer-sba evaluate --checkpoint FILE``: measure the robustness of a trained classifier.

It prints a table, appends one line of JSON to ``evaluation.jsonl`` and draws the error against the noise.

Exit codes: 0 evaluated, 2 a mistake in the arguments, the recipe or its data (described in one line on stderr).
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from composer_sba.arguments import evaluate_parser as _parser

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    _parser().parse_intermixed_args()

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from composer_sba.conditions import Smoothing
from composer_sba.data.config import DatasetConfig, ResolvedConfig, resolve
from composer_sba.data.loader import build_dataloader, dataset_classes
from composer_sba.data.mds_index import INDEX, RECORD
from composer_sba.data.transforms import transform
from composer_sba.errors import UserError, one_line
from composer_sba.json_lines import append_line
from composer_sba.provenance import commit, hardware, versions
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import Recipe
from composer_sba.recipe.redact import redact
from composer_sba.robustness import evaluate
from composer_sba.trained import pixel_loader, read_recipe, require_images, require_one_process, sha256_of

RESULTS_FILE, FIGURE_FILE = 'evaluation.jsonl', 'error_under_noise.png'


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.evaluate') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    given = _parser(prog).parse_intermixed_args(argv)
    try:
        recipe = read_recipe(given)
        out = _writable(given.out or given.checkpoint.parent, make=given.out is not None)
        smoothing = Smoothing(given.certify_sigma, given.n0, given.n, given.alpha) if given.certify else None
        record = evaluate_checkpoint(
            recipe,
            given.checkpoint,
            published=given.published,
            sigmas=given.sigmas,
            corruptions=given.corruptions,
            severities=given.severities,
            attacks=given.attacks,
            epsilons={'l2': given.l2, 'linf': given.linf},
            attack_steps=given.attack_steps,
            attack_images=given.attack_images,
            smoothing=smoothing,
            certified_images=given.certify,
            folder=out,
            seed=given.seed,
        )
        append_line(out / RESULTS_FILE, record)
        written = [('results', str(out / RESULTS_FILE))]
        if len(record['noise']) > 1:
            written.append(('figure', draw(record, out / FIGURE_FILE)))
        if smoothing is not None:
            written.append(('certificates', record['certificates']['file']))
    except UserError as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    Console().print(table(record))
    for title, text in written:
        print(f'{title}: {text}')  # a table would fold a path
    return 0


def evaluate_checkpoint(
    recipe: Recipe,
    checkpoint: Path,
    *,
    published: Path | None = None,
    smoothing: Smoothing | None = None,
    folder: Path = Path(),
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint on the ``eval_dataset`` of its recipe.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`: the one that was trained, or one with the same model.
        checkpoint (Path): A checkpoint of Composer's Trainer, not sharded.
        published (Path, optional): Folder of a published set of corrupted images, with ``<corruption>/<severity>/``:
            CIFAR-10-C after its conversion, or ImageNet-C, as unpacked. Default: ``None``, corruptions are computed.
        smoothing (Smoothing, optional): Noise and numbers of samples of certificates. Default: ``None``, none.
        folder (Path, optional): Folder of the file of certificates, ``certificates-<key>.tsv``. The key identifies all
            that they depend on, so the same call continues the file. Default: the current one.
        seed (int, optional): Seed of all draws. Default: ``0``.
        **options (Any): Further arguments of :func:`composer_sba.robustness.evaluation.evaluate`.

    Returns:
        dict[str, Any]: The result of :func:`composer_sba.robustness.evaluation.evaluate`, and what it was measured
        with: recipe, checkpoint and its SHA-256, seed, batch size, versions, commit, hardware, date and seconds.

    Raises:
        UserError: If the recipe has no ``eval_dataset``, or the checkpoint or the data cannot be used.
    """
    start = time.perf_counter()
    require_one_process('evaluate')
    require_images(recipe)
    network, device = load_network(recipe, checkpoint)
    rows = recipe.device_eval_batch_size or recipe.global_train_batch_size
    loader, pixels, mean, std = pixel_loader(recipe, device)
    try:
        corrupted = None if published is None else _published(published, pixels, rows, device)
    except (UserError, OSError) as error:
        raise recipe.sources.error('eval_dataset', one_line(error)) from error
    digest = sha256_of(checkpoint)
    settings = (
        digest,
        recipe.eval_dataset,
        mean,
        std,
        rows,
        smoothing,
        options.get('certified_images'),
        seed,
        device.type,
    )
    certificates = folder / f'certificates-{hashlib.sha256(repr(settings).encode()).hexdigest()[:8]}.tsv'
    result = evaluate(
        network,
        loader,
        mean=mean,
        std=std,
        published=corrupted,
        smoothing=smoothing,
        certificates=certificates,
        seed=seed,
        device=device,
        **options,
    )
    if smoothing is not None:
        result['certificates']['file'] = str(certificates)
    return {
        'run_name': recipe.run_name,
        **result,
        'published': None if published is None else str(published),
        'seed': seed,
        'batch_size': rows,
        'checkpoint': str(checkpoint),
        'checkpoint_sha256': digest,
        'recipe': redact(recipe.to_dict()),
        'commit': commit(),
        'versions': versions(),
        'hardware': hardware('gpu' if device.type == 'cuda' else 'cpu'),
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'seconds': round(time.perf_counter() - start, 1),
    }


def table(result: Mapping[str, Any]) -> Table:
    """Lay out a result of :func:`composer_sba.robustness.evaluation.evaluate`, one condition a line.

    Args:
        result (Mapping[str, Any]): The result.

    Returns:
        Table: For a ``rich.console.Console`` to print. A corruption is the mean of its severities.
    """
    name = f'{result["run_name"]}: ' if 'run_name' in result else ''
    shown = Table(title=f'{name}{result["images"]:,} images', title_justify='left')
    shown.add_column('condition', no_wrap=True)
    for column in ('error', 'NLL', 'calibration error'):
        shown.add_column(column, justify='right')

    def add(title: str, *entries: Mapping[str, float]) -> None:
        error, nll, calibration = (
            sum(entry[key] for entry in entries) / len(entries) for key in ('error', 'nll', 'calibration_error')
        )
        shown.add_row(title, f'{100 * error:.2f} %', f'{nll:.3f}', f'{100 * calibration:.2f} %')

    add('clean', result['clean'])
    for entry in result['noise']:
        if entry['sigma']:
            add(f'noise, σ = {entry["sigma"]:g}', entry)
    for corruption, entries in result['corruptions'].items():
        add(corruption, *entries)
    for key, title in (('mean_corruption_error', 'mean'), ('relative_corruption_error', "relative to AlexNet's")):
        if result[key] is not None:
            shown.add_row(f'corruptions, {title}', f'{100 * result[key]:.2f} %', '', '')
    for entry in result['attacks']:
        title = f'{entry["attack"]}, ε = {entry["epsilon"]:.3g}, {entry["images"]:,} images'
        shown.add_row(title, f'{100 * entry["error"]:.2f} %', '', '')
    certified = result['certificates'] or {'certified_error': []}
    for entry in (each for each in certified['certified_error'] if each['error'] < 1 or not each['radius']):
        title = f'certified, ℓ2 ≤ {entry["radius"]:g}, σ = {certified["sigma"]:g}, {certified["images"]:,} images'
        shown.add_row(title, f'≤ {100 * entry["error"]:.2f} %', '', '')
    return shown


def draw(result: Mapping[str, Any], path: Path) -> str:
    """Draw the error against the standard deviation of the noise.

    Args:
        result (Mapping[str, Any]): A result of :func:`composer_sba.robustness.evaluation.evaluate`.
        path (Path): The file to write, in a format of Matplotlib.

    Returns:
        str: The path, or why there is no figure: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "none: Matplotlib is not installed (pip install 'composer-sba[robustness]')"
    figure = Figure(figsize=(4.5, 3.2), layout='constrained')
    axes = figure.subplots()
    points = sorted((entry['sigma'], 100 * entry['error']) for entry in result['noise'])
    axes.plot(*zip(*points, strict=True), marker='o')
    axes.set(xlabel='standard deviation of the noise (pixel range = 1)', ylabel='error (%)', ylim=(0, None))
    axes.set_title(result.get('run_name', ''), loc='left')
    figure.savefig(path, dpi=150)
    return str(path)


def _writable(folder: Path, make: bool) -> Path:
    """Return a folder for results; raise UserError before the evaluation if it cannot be written."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out {folder} cannot be made: {error.strerror}') from error
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise UserError(f'{folder} cannot be written: choose another --out')
    return folder


def _published(
    folder: Path, config: DatasetConfig, rows: int, device: torch.device
) -> Iterator[tuple[str, int, DataLoader]]:
    """Return corruption, severity and batches of each ``<corruption>/<severity>/``, shards or class folders."""
    config = resolve(config)
    paths = sorted(folder.glob('*/[1-5]'))
    if not paths:
        problem = f'--published {folder} has no <corruption>/<severity>/ folders'
        raise UserError(f'{problem}: unpack ImageNet-C there, or convert CIFAR-10-C')
    return ((path.parent.name, int(path.name), _published_images(path, config, rows, device)) for path in paths)


def _published_images(path: Path, config: ResolvedConfig, rows: int, device: torch.device) -> DataLoader:
    if (path / INDEX).is_file():
        corruptions, corruption, severity = path.parents[1], path.parent.name, path.name
        split = DatasetConfig('cifar10c', str(corruptions), split=f'{corruption}/{severity}', in_memory=True)
        return build_dataloader(replace(split, mean=config.mean, std=config.std), rows, device=device)
    unscaled = replace(config, resize_size=config.crop_size)  # the images have been cropped
    try:
        images = ImageFolder(str(path), transform(unscaled))
    except OSError as error:  # such as a class without images
        raise UserError(f'{path} cannot be read: {one_line(error)}') from error
    classes = config.read_index().get(RECORD, {}).get('classes', images.classes)
    if images.classes != classes or len(classes) != dataset_classes(config):
        problem = f'has {len(images.classes)} classes, {images.classes[:3]} and others'
        raise UserError(f'{path} {problem}: expected those of {config.folder}')
    cores = min(len(os.sched_getaffinity(0)), 8)
    return DataLoader(images, rows, num_workers=cores if config.num_workers is None else config.num_workers)


if __name__ == '__main__':
    sys.exit(main())
