"""The parsers of all commands except ``study``; they import nothing that imports PyTorch.

They answer ``--help`` and a mistake on the command line at once: PyTorch and Composer take seconds to import.
"""

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer_sba.conditions import ATTACKS, CORRUPTIONS, EPSILONS, SEVERITIES, SIGMAS, Smoothing
from composer_sba.errors import nearest
from composer_sba.shipped import nearest_name


def train_parser(prog: str = 'composer train.py') -> argparse.ArgumentParser:
    """Return the parser of ``train``."""
    parser = _parser(
        prog,
        'Train what a recipe describes.',
        ('-f digits_sba.yaml', 'a demo that takes about 30 seconds'),
        ('-f digits_sba.yaml algorithms.sba.eta=1 run_name=eta1', 'the same with another value'),
        ('-f digits_sba.yaml algorithms.sba.eta=1 --dry-run', 'print all values and train nothing'),
        ('-f digits_baseline.yaml -f methods/mixup.yaml', 'a method over a baseline'),
        ('-f digits_sba.yaml autoresume=true', 'resume an interrupted run'),
    )
    parser.add_argument(
        *('-f', '--file'),
        action='append',
        help='the recipe, required: a YAML file, or the name of one that comes with the package (composer-sba recipes '
        'lists them). Repeat the option to merge further files over it (methods/sba.yaml)',
    )
    parser.add_argument('--dry-run', action='store_true', help='check and print the resolved recipe, train nothing')
    parser.add_argument('--traceback', action='store_true', help='show the traceback of an error')
    add_overrides(parser)
    return parser


def parse_train(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse the arguments of ``train``; end the process at ``--help`` and at a mistake.

    Args:
        argv (Sequence[str], optional): The arguments; None for those of the process.
        prog (str): The program's name in the help.

    Returns:
        argparse.Namespace: ``file``, at least one; ``dry_run``, ``traceback`` and ``overrides``.
    """
    parser = train_parser(prog)
    given, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f'unrecognized arguments: {" ".join(unknown)}; a change to the recipe is key.sub=value')
    if not given.file:
        recipe = next((each for each in given.overrides if '=' not in each), None)
        known = recipe and (recipe if Path(recipe).exists() else nearest_name(recipe) or recipe)
        parser.error(f'expected the recipe after -f: {prog} -f {known or "digits_sba.yaml"}')
    return given


def predict_parser(prog: str = 'python -m composer_sba.predict') -> argparse.ArgumentParser:
    """Return the parser of ``predict``."""
    parser = _parser(
        prog,
        'Write the most probable classes of every image of a folder to a CSV file. A file that cannot be classified '
        'has a line with the reason.',
        ('--checkpoint FILE photos --top 3', 'three classes for each image'),
    )
    add_checkpoint(parser)
    parser.add_argument('--top', type=int, default=5, metavar='K', help='classes for each image (default: 5)')
    add_output(parser, 'CSV', 'predictions.csv')
    parser.add_argument('folder', type=path, help='folder of images, read with its sub-folders, or one image')
    add_overrides(parser)
    return parser


def evaluate_parser(prog: str = 'python -m composer_sba.evaluate') -> argparse.ArgumentParser:
    """Return the parser of ``evaluate``."""
    parser = _parser(
        prog,
        'Measure the error of a trained classifier on clean, noisy, corrupted and attacked images.',
        ('--checkpoint FILE --attacks none', 'noise and corruptions'),
        ('--checkpoint FILE --certify 100 --corruptions none', 'certificates'),
    )
    add_checkpoint(parser)
    text = "folder for the results (default: the checkpoint's)"
    parser.add_argument('--out', type=path, metavar='FOLDER', help=text)
    parser.add_argument(
        '--sigmas',
        type=_list_of(float),
        default=SIGMAS,
        metavar='X,X',
        help=f'standard deviations of the noise, in units of the pixel range (default: {",".join(map(str, SIGMAS))})',
    )
    parser.add_argument(
        '--corruptions',
        type=_list_of(str, CORRUPTIONS),
        default=CORRUPTIONS,
        metavar='NAME,NAME',
        help=f'corruptions to compute: all (default), none, or some of {", ".join(CORRUPTIONS)}',
    )
    parser.add_argument(
        '--severities',
        type=_list_of(int, SEVERITIES),
        default=SEVERITIES,
        metavar='N,N',
        help='severities of the corruptions, 1 to 5 (default: all)',
    )
    parser.add_argument(
        '--published',
        type=path,
        metavar='FOLDER',
        help='read the corrupted images from here instead: CIFAR-10-C after convert cifar10c, or ImageNet-C, with '
        '<corruption>/<severity>/<class>/ folders',
    )
    parser.add_argument(
        '--attacks',
        type=_list_of(str, ATTACKS),
        default=ATTACKS,
        metavar='NAME,NAME',
        help=f'attacks, which need the extra [robustness]: all (default), none, or some of {", ".join(ATTACKS)}',
    )
    for norm in ('l2', 'linf'):
        text = f'largest {norm} distance of attacks, in units of the pixel range (default: {EPSILONS[norm]:.3g})'
        parser.add_argument(f'--{norm}', type=float, default=EPSILONS[norm], metavar='X', help=text)
    for option, default, text in (
        ('--attack-steps', 10, 'steps of an attack'),
        ('--attack-images', 500, 'images to attack'),
        ('--certify', 0, 'images to certify by randomized smoothing, 0 for none'),
        ('--n0', Smoothing.n0, 'samples that choose the class of a certified image'),
        ('--n', Smoothing.n, 'samples that bound the probability of that class'),
    ):
        parser.add_argument(option, type=int, default=default, metavar='N', help=f'{text} (default: {default:,})')
    for option, value, text in (
        ('--certify-sigma', Smoothing.sigma, 'standard deviation of the noise of certificates'),
        ('--alpha', Smoothing.alpha, 'probability that a certificate is wrong'),
    ):
        parser.add_argument(option, type=float, default=value, metavar='X', help=f'{text} (default: {value:g})')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed of noise and corruptions (default: 0)')
    add_overrides(parser)
    return parser


def export_parser(prog: str = 'python -m composer_sba.export') -> argparse.ArgumentParser:
    """Return the parser of ``export``."""
    parser = _parser(
        prog,
        'Write a trained network as ONNX or as a program of torch.export. The file takes images of RGB in [0, 1], in '
        'batches of any size, and normalizes them itself. It is compared with the network.',
        ('--checkpoint runs/digits_sba/latest-rank0.pt', 'ONNX, as model.onnx beside the checkpoint'),
        ('--checkpoint runs/digits_sba/latest-rank0.pt --format pt2', 'a program of torch.export'),
    )
    add_checkpoint(parser)
    parser.add_argument(
        '--format',
        choices=('onnx', 'pt2'),
        default='onnx',
        help='onnx (default), which needs the extra [export], or pt2, a program of torch.export',
    )
    add_output(parser, 'FILE', 'model.onnx or model.pt2')
    add_overrides(parser)
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the options ``--checkpoint`` and ``-f`` to a parser."""
    parser.add_argument('--checkpoint', type=path, required=True, metavar='FILE', help='a checkpoint of training')
    parser.add_argument(
        *('-f', '--file'),
        action='append',
        help='the recipe that was trained, as in train (default: recipe.yaml beside the checkpoint)',
    )


def add_output(parser: argparse.ArgumentParser, metavar: str, default: str) -> None:
    """Add the options ``--out`` and ``--overwrite`` to a parser."""
    text = f'file to write (default: {default} beside the checkpoint)'
    parser.add_argument('--out', type=path, metavar=metavar, help=text)
    parser.add_argument('--overwrite', action='store_true', help='replace an existing file')


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the changes to the recipe, which follow all other arguments, to a parser."""
    parser.add_argument('overrides', nargs='*', default=[], metavar='key.sub=value', help='changes to the recipe')


def convert_parser(prog: str = 'python -m composer_sba.convert') -> argparse.ArgumentParser:
    """Return the parser of ``convert``."""
    parser = _parser(
        prog,
        'Convert images to MDS shards, which recipes read.',
        ('imagefolder --source flowers --out data/flowers', 'a folder of images'),
        ('imagefolder --source flowers --max-side 512', 'the same, with smaller files that are read faster'),
        ('cifar10 --source cifar-10-python.tar.gz', 'CIFAR-10, to data/cifar10'),
    )
    kinds = 'digits, cifar10, cifar100, imagefolder (also for ImageNet) or cifar10c'
    parser.add_argument('dataset', metavar='DATASET', help=f'kind of the source: {kinds}')
    parser.add_argument(
        '--source',
        help='folder with train/<class>/ and val/<class>/ or test/<class>/ (also for ImageNet), or an archive of one '
        '(.tar, .tar.gz, .tar.bz2, .tar.xz, .zip); for CIFAR also the original cifar-10-python.tar.gz, '
        'cifar-100-python.tar.gz or their unpacked folders; for cifar10c CIFAR-10-C.tar or its folder; digits need '
        'none',
    )
    parser.add_argument('--out', help='folder to make (default: data/<dataset>)')
    parser.add_argument(
        '--max-side',
        type=int,
        metavar='PIXELS',
        help='for imagefolder: resize images whose longer side is longer, and store them as JPEG; 512 suits crops of '
        '224 (default: all files stay as they are, which changes no pixel)',
    )
    parser.add_argument(
        '--quality',
        type=int,
        metavar='Q',
        help='JPEG quality of the resized images, 1 to 100; requires --max-side (default: 90, as in FFCV for ImageNet)',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an existing dataset')
    return parser


def layers_parser(prog: str = 'python -m composer_sba.layers') -> argparse.ArgumentParser:
    """Return the parser of ``layers``."""
    parser = _parser(
        prog,
        'List the layers of a network that SBA can cut, and the cost of each cut.',
        ('--model resnet_cifar depth=20 --fold 40', 'a network of this package'),
        ('--model torchvision/convnext_tiny --image-size 160', 'one of a library'),
        ('--model my_module:make_network', 'your own'),
    )
    parser.add_argument(
        '--model',
        required=True,
        metavar='NAME',
        help='a model of the recipes (resnet_cifar, timm/resnet18, huggingface/FOLDER), a classifier of torchvision '
        '(convnext_tiny), or module:factory, a function that returns an nn.Module, in a module that can be imported '
        'from the current directory',
    )
    parser.add_argument('--fold', type=int, default=4, metavar='M', help='virtual samples per image (default: 4)')
    parser.add_argument(
        '--image-size',
        type=int,
        metavar='N',
        help='side of the images in pixels (default: 224, or the size for which the model is made)',
    )
    parser.add_argument('--channels', type=int, default=3, metavar='C', help='channels of the images (default: 3)')
    parser.add_argument('--num-classes', type=int, metavar='K', help="classes (default: the model's)")
    parser.add_argument(
        'arguments', nargs='*', default=[], metavar='key=value', help='more arguments of the model: depth=20'
    )
    return parser


def recipes_parser(prog: str = 'composer-sba recipes') -> argparse.ArgumentParser:
    """Return the parser of ``recipes``."""
    parser = _parser(
        prog,
        'List the recipes of the package, with their status and cost; or its methods or models.',
        ('| grep cifar10', 'the recipes of one dataset'),
        ('methods', 'what can be merged over a baseline'),
        ('models', 'the values of model.name'),
    )
    kinds = ('recipes', 'methods', 'models')
    parser.add_argument('kind', nargs='?', default='recipes', choices=kinds, help='what to list (default: recipes)')
    return parser


def with_examples(parser: argparse.ArgumentParser, *examples: tuple[str, str]) -> argparse.ArgumentParser:
    """Add examples to the help of a parser, and wrap its description.

    Args:
        parser (argparse.ArgumentParser): The parser.
        *examples (tuple[str, str]): The arguments of a call, and what it does.

    Returns:
        argparse.ArgumentParser: The same parser.
    """
    lines = [f'  # {what}\n  {parser.prog} {arguments}' for arguments, what in examples]
    parser.description = textwrap.fill(parser.description or '', 80)
    parser.epilog = '\n'.join(['examples:', *lines])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def path(text: str) -> Path:
    """Return a path with the home folder in place of ``~``, which no shell expands after ``--option=``."""
    return Path(os.path.expanduser(text))


def _parser(prog: str, description: str, *examples: tuple[str, str]) -> argparse.ArgumentParser:
    return with_examples(argparse.ArgumentParser(prog=prog, description=description), *examples)


def _list_of(kind: Callable[[str], Any], known: Sequence[Any] = ()) -> Callable[[str], list[Any]]:
    """Return a parser of comma-separated values; 'all' are the known values, if any, and 'none' is no value."""

    def parse(text: str) -> list[Any]:
        if text == 'none' or (text == 'all' and known):
            return [] if text == 'none' else list(known)
        try:
            values = [kind(each) for each in text.split(',')]
        except ValueError:
            raise argparse.ArgumentTypeError(f'expected values separated by commas, got {text!r}') from None
        for value in values:
            if known and isinstance(value, str) and value not in known:
                raise argparse.ArgumentTypeError(f"unknown '{value}'{nearest(value, known)}")
        return values

    return parse
