"""The command ``composer-sba export --checkpoint FILE``: write a trained network as ONNX or as a PyTorch program.

The exported network takes ``images``, float32 of shape ``(N, 3, H, W)`` with any N, RGB in [0, 1]: it normalizes them
itself. It returns ``logits``, float32 of shape ``(N, K)``. The file says so in its metadata, with the names of the
classes. The command runs the file and compares its logits with those of the network.

Exit codes: 0 exported, 2 a mistake in the arguments or the recipe, or a network that cannot be exported (described in
one line on stderr).
"""

import importlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from composer_sba.arguments import export_parser as _parser

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    _parser().parse_intermixed_args()

import torch
from torch import nn

from composer_sba.data.config import resolve
from composer_sba.data.transforms import mean_and_std
from composer_sba.errors import UserError, one_line
from composer_sba.provenance import versions
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import Recipe
from composer_sba.recipe.redact import redact
from composer_sba.robustness.pixels import PixelClassifier
from composer_sba.trained import (
    expected_images,
    new_file,
    read_recipe,
    require_one_process,
    sha256_of,
)

TOLERANCE = 1e-4  # of a logit's difference, as a fraction of the largest absolute logit
CHECKED_BATCHES = (1, 5)  # sizes of the batches of the check; the network is traced with another one
_TRACED_BATCH = 2


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.export') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    given = _parser(prog).parse_intermixed_args(argv)
    out = given.out or given.checkpoint.parent / f'model.{given.format}'
    try:
        recipe = read_recipe(given)
        with new_file(out, given.overwrite) as path:
            difference = export(recipe, given.checkpoint, path, given.format)
    except UserError as error:
        print(f'error: {redact(one_line(error))}', file=sys.stderr)
        return 2
    sizes = ' and '.join(map(str, CHECKED_BATCHES))
    print(f'checked with batches of {sizes} images: logits differ by at most {difference:.1g} of the largest')
    print(f'network: {out}')
    return 0


def export(recipe: Recipe, checkpoint: Path, out: Path, kind: str = 'onnx') -> float:
    """Write a trained network in pixel units as a file, and compare the file with the network.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`: the one that was trained.
        checkpoint (Path): A checkpoint of Composer's Trainer, not sharded.
        out (Path): The file to write.
        kind (str, optional): ``'onnx'``, or ``'pt2'`` for ``torch.export``. Default: ``'onnx'``.

    Returns:
        float: The largest difference of a logit from the network's, as a fraction of the largest absolute logit, on
        uniformly random images. It is at most ``TOLERANCE``.

    Raises:
        UserError: If the checkpoint cannot be loaded, a package is missing, the network cannot be exported, or the file
            predicts something else.
    """
    require_one_process('export')
    if kind == 'onnx':
        _require_onnx()
    expected = expected_images(recipe, checkpoint.parent)
    try:
        config = resolve(expected.config)
        mean, std = mean_and_std(config)
    except (UserError, OSError) as error:
        raise recipe.sources.error(expected.section, one_line(error)) from error
    network, _ = load_network(recipe, checkpoint)
    classifier = PixelClassifier(network, mean, std).cpu().eval()
    size = config.crop_size
    metadata: dict[str, Any] = {
        'run_name': recipe.run_name,
        'images': f'float32, (N, 3, {size}, {size}), RGB in [0, 1]: normalized inside the network',
        'logits': f'float32, (N, {len(expected.classes)}): a softmax gives probabilities',
        'classes': expected.classes,
        'resize_size': config.resize_size,
        'crop_size': size,
        'checkpoint_sha256': sha256_of(checkpoint),
        'versions': versions(),
    }
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(rows, 3, size, size, generator=generator) for rows in (_TRACED_BATCH, *CHECKED_BATCHES)]
    write = _write_onnx if kind == 'onnx' else _write_pt2
    try:
        with _quietly(), torch.inference_mode():
            # A named dimension is refused for attention; the check below uses other sizes
            free = {0: torch.export.Dim.AUTO}  # type: ignore[attr-defined]  # PyTorch adds it to a function
            program = torch.export.export(classifier, (batches[0],), dynamic_shapes=(free,), strict=False)
            exported = write(program, out, metadata)
            pairs = [(exported(batch), classifier(batch)) for batch in batches[1:]]
    except Exception as error:  # PyTorch and ONNX Runtime raise many types
        if isinstance(error, OSError | UserError):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:  # PyTorch wraps it in pages of advice
            cause = cause.__cause__
        first = str(cause).strip().partition('\n')[0] or type(cause).__name__
        raise UserError(f'{recipe.model["name"]} cannot be exported to {kind}: {first}') from error
    largest = max(wanted.abs().max().item() for _, wanted in pairs) or 1.0
    difference = torch.cat([(found - wanted).flatten() for found, wanted in pairs]).abs().max().item() / largest
    if not difference <= TOLERANCE:  # also for NaN
        problem = f'logits differ by {difference:.2g} of the largest, at most {TOLERANCE:g} is accepted'
        raise UserError(f'{kind} changes what {recipe.model["name"]} predicts: {problem}')
    return difference


def _require_onnx() -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        try:
            importlib.import_module(package)
        except ImportError as error:
            problem = f'ONNX needs {package}, which is not installed'
            raise UserError(f"{problem}: pip install 'composer-sba[export]', or choose --format pt2") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Drop what PyTorch logs and prints: graphs before an exception, and warnings of operators that are not used."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _write_onnx(
    program: torch.export.ExportedProgram, out: Path, metadata: dict[str, Any]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write an ONNX file; return a function that runs it."""
    import onnxruntime

    converted = torch.onnx.export(program, dynamo=True, input_names=['images'], output_names=['logits'], verbose=False)
    assert converted is not None
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    converted.model.metadata_props.update(texts)
    converted.save(out)
    weights = out.with_name(f'{out.name}.data')  # of a network that one file cannot hold
    if weights.exists():
        weights.unlink()
        raise UserError('the network is too large for one file of ONNX: use --format pt2')
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['logits'], {'images': images.numpy()})[0])


def _write_pt2(program: torch.export.ExportedProgram, out: Path, metadata: dict[str, Any]) -> nn.Module:
    """Write a file of ``torch.export``; return the module that it holds."""
    torch.export.save(program, out, extra_files={'metadata.json': json.dumps(metadata)})
    return torch.export.load(out).module()


if __name__ == '__main__':
    sys.exit(main())
