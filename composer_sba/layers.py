"""``python -m composer_sba.layers --model NAME``: list the layers of a network that SBA can cut, and their cost.

Exit codes: 0 if the layers are listed, 2 if an argument is wrong (one line on stderr names it).
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from composer_sba.arguments import layers_parser as _parser

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    _parser().parse_intermixed_args()

import torchvision
from composer.models import ComposerClassifier
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from torch import nn
from yaml import YAMLError

from composer_sba import libraries
from composer_sba.errors import UserError, nearest, one_line
from composer_sba.latent.cut_survey import Cut, survey
from composer_sba.models import MODELS

PIXELS = {'digits_net': 8, 'resnet_cifar': 32, 'vgg16_cifar': 32, 'alexnet_cifar': 32, 'inception_v3': 299}  # else 224


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.layers') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    given = _parser(prog).parse_intermixed_args(argv)
    try:
        for name in ('fold', 'channels', 'image_size'):
            value = getattr(given, name)
            if value is not None and value < 1:
                raise UserError(f'--{name.replace("_", "-")}: expected at least 1, got {value}')
        arguments = _arguments(given)
        network = build(given.model, arguments)
        pixels = given.image_size or _pixels(given.model, arguments)
        cuts = survey(network, (given.channels, pixels, pixels))
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    Console().print(table(cuts, given.fold, f'{given.model}, {pixels} px, M = {given.fold}'))
    if cuts and cuts[0].why_unknown:
        Console(soft_wrap=True).print(f'The cost is unknown: {cuts[0].why_unknown}', markup=False)
    return 0


def build(model: str, arguments: dict[str, Any]) -> nn.Module:
    """Build a network by name, with random weights.

    Args:
        model (str): A model that recipes can name, a classifier of torchvision without the library's name, or
            ``module:factory``.
        arguments (dict): The keyword arguments of the model.

    Returns:
        torch.nn.Module: The network; for a ``ComposerClassifier``, the module in it.

    Raises:
        UserError: If the model is unknown, or cannot be built with these arguments.
    """
    factory = _factory(model)
    try:
        network = factory(**arguments)
    except Exception as error:  # a user's factory may raise anything
        raise UserError(f'{model} cannot be built with {arguments}: {one_line(error)}') from error
    if not isinstance(network, nn.Module):
        raise UserError(f'{model}: expected a function that returns a torch.nn.Module, got {type(network).__name__}')
    return network.module if isinstance(network, ComposerClassifier) else network


def _factory(model: str) -> Callable[..., Any]:
    if ':' in model:
        return _imported(*model.split(':', 1))
    if model in MODELS:
        return MODELS[model]
    known = torchvision.models.list_models(module=torchvision.models)
    if '/' not in model and model not in known:
        raise UserError(f"--model: unknown model '{model}'{nearest(model, [*MODELS, *known])}; or give module:factory")
    try:
        return libraries.find(_in_library(model)).build
    except UserError as error:
        raise UserError(f'--model: {error}') from error


def _pixels(model: str, arguments: dict[str, Any]) -> int:
    if (name := model.removeprefix('torchvision/')) in PIXELS or model in MODELS or ':' in model:
        return PIXELS.get(name, 224)
    return libraries.find(_in_library(model)).data_config(arguments).get('crop_size', 224)


def _in_library(model: str) -> str:
    return model if '/' in model else f'torchvision/{model}'


def _imported(module: str, factory: str) -> Any:
    sys.path.insert(0, '')  # the current directory, which a console command does not search
    try:
        return getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise UserError(f'{module}:{factory}: {error}') from error
    finally:
        sys.path.remove('')


def table(cuts: Sequence[Cut], fold: int, title: str) -> Table:
    """Lay out cuts from the input to the head, one per line.

    Args:
        cuts (Sequence[Cut]): The cuts, from :func:`composer_sba.latent.cut_survey.survey`.
        fold (int): M.
        title (str): The title of the table.

    Returns:
        Table: Widths, shares, ideal ratios of a step, and the memory of the virtual rows. The last three are left out
        if the cost is unknown.
    """
    rows = Table(title=title, title_justify='left', caption_justify='left')
    unknown = any(cut.share is None for cut in cuts)
    for column in ('cut', 'shape', 'features', *(() if unknown else ('share', 'step', 'MiB'))):
        rows.add_column(column, justify='left' if column in ('cut', 'shape') else 'right', overflow='fold')
    for cut in cuts:
        cost: tuple[str, ...] = ()
        if not unknown:
            memory = f'{fold * (cut.memory or 0) / 2**20:,.2f}'
            cost = f'{100 * (cut.share or 0):.3g} %', _ratio(cut.ratio(fold) or 1), memory
        rows.add_row(', '.join(cut.names), '×'.join(map(str, cut.shape)), f'{prod(cut.shape):,}', *cost)
    if not unknown:
        rows.caption = (
            'share: operations above the cut, as a fraction of a training step\n'
            'step: operations of an augmented step ÷ a plain one, 1 + M · share; the ratio of times is higher\n'
            f'MiB: memory of the {fold} virtual rows of one image, at the cut and above it, float32'
        )
    return rows


def _ratio(ratio: float) -> str:
    """Format a ratio with three digits, or with the first two that differ from 1."""
    if ratio == 1 or ratio >= 1.1:  # no operation is counted above some cuts
        return f'{ratio:.2f}'
    return f'{ratio:.{max(2, 1 - math.floor(math.log10(ratio - 1)))}f}'


def _arguments(given: argparse.Namespace) -> dict[str, Any]:
    wrong = [each for each in given.arguments if not each.partition('=')[0].isidentifier() or '=' not in each]
    if wrong:
        raise UserError(f"command line: expected key=value, got '{wrong[0]}'")
    try:
        arguments: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given.arguments))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f'command line: expected YAML after =: {one_line(error)}') from error
    return arguments | ({} if given.num_classes is None else {'num_classes': given.num_classes})


if __name__ == '__main__':
    sys.exit(main())
