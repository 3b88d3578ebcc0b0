"""The program ``composer-sba COMMAND ...``, which runs the ``main`` of each command's module."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from composer_sba.arguments import (
    convert_parser,
    evaluate_parser,
    export_parser,
    layers_parser,
    parse_train,
    predict_parser,
)
from composer_sba.errors import nearest
from composer_sba.study.arguments import study_parser

COMMANDS = {
    'train': ('composer_sba.train', 'train what a recipe describes'),
    'evaluate': ('composer_sba.evaluate', 'measure the robustness of a trained classifier'),
    'predict': ('composer_sba.predict', 'write the classes of images in a folder to a CSV file'),
    'export': ('composer_sba.export', 'write a trained network as ONNX or as a program of torch.export'),
    'recipes': ('composer_sba.recipes', 'list the recipes, methods and models that come with the package'),
    'convert': ('composer_sba.convert', 'convert a dataset of images to shards that recipes read'),
    'layers': ('composer_sba.layers', 'list the layers of a network that SBA can cut, and their cost'),
    'study': ('composer_sba.study.__main__', "run the paper's experiments and others, and report their results"),
}

_PARSERS = {
    'evaluate': evaluate_parser,
    'predict': predict_parser,
    'export': export_parser,
    'convert': convert_parser,
    'layers': layers_parser,
}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command with the remaining arguments.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the command's help. Default: ``None``, ``composer-sba COMMAND``.

    Returns:
        int: The command's exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ['--list']:
        given[0] = 'recipes'
    _parser().parse_args(given[:1])  # ends the process at --help, --version and unknown commands
    command, *rest = given
    title = prog = prog or f'composer-sba {command}'
    if command == 'train':
        title = '+'.join(Path(each).stem for each in parse_train(rest, prog).file)
    elif command == 'study':
        study_parser(prog).parse_args(rest)
    elif command in _PARSERS:
        _PARSERS[command](prog).parse_intermixed_args(rest)  # ends the process at --help and at mistakes
    if command != 'recipes' and os.environ.get('RANK', '0') == '0':
        print(f'{title}: loading PyTorch and Composer ...', file=sys.stderr, flush=True)
    module, _ = COMMANDS[command]
    return int(importlib.import_module(module).main(rest, prog=prog))


def _parser() -> argparse.ArgumentParser:
    commands = '\n'.join(f'  {name:10}{summary}' for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='composer-sba',
        description='Stochastic Batch Augmentation for MosaicML Composer.',
        usage='%(prog)s COMMAND ...',
        epilog=f'commands:\n{commands}\n\nexamples:\n'
        '  # a demo that takes about 30 seconds\n  composer-sba train -f digits_sba.yaml\n'
        '  # the same in one process for each GPU, which Composer starts\n'
        '  composer -m composer_sba.train -f digits_sba.yaml\n'
        "  # a command's options and examples\n  composer-sba train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', type=_command, metavar='COMMAND', help='one of the commands below')
    parser.add_argument('--list', action='store_true', help='list recipes; --list methods and --list models list those')
    parser.add_argument('--version', action='version', version=f'%(prog)s {version("composer-sba")}')
    return parser


def _command(name: str) -> str:
    if name not in COMMANDS:
        raise argparse.ArgumentTypeError(f"no command is called '{name}'{nearest(name, COMMANDS)}")
    return name


if __name__ == '__main__':
    sys.exit(main())
