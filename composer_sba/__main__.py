"""The program ``composer-sba COMMAND ...``, which runs the ``main`` of each command's module."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    'train': ('composer_sba.train', 'train what a recipe describes'),
    'evaluate': ('composer_sba.evaluate', 'measure the robustness of a trained classifier'),
    'predict': ('composer_sba.predict', 'write the classes of images in a folder to a CSV file'),
    'convert': ('composer_sba.convert', 'convert a dataset of images to shards that recipes read'),
    'layers': ('composer_sba.layers', 'list the layers of a network that SBA can cut, and their cost'),
    'study': ('composer_sba.study.__main__', "run the paper's experiments and others, and report their results"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the remaining arguments.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.

    Returns:
        int: The command's exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    _parser().parse_args(given[:1])  # ends the process at --help, --version and unknown commands
    module, _ = COMMANDS[given[0]]
    return int(importlib.import_module(module).main(given[1:], prog=f'composer-sba {given[0]}'))


def _parser() -> argparse.ArgumentParser:
    commands = '\n'.join(f'  {name:10}{summary}' for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='composer-sba',
        description='Stochastic Batch Augmentation for MosaicML Composer.',
        usage='%(prog)s COMMAND ...',
        epilog=f'commands:\n{commands}\n\n"composer-sba COMMAND --help" describes a command. To train on several '
        'GPUs, let Composer start the processes:\n  composer -m composer_sba.train -f digits_sba.yaml',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help='one of the commands below')
    parser.add_argument('--version', action='version', version=f'%(prog)s {version("composer-sba")}')
    return parser


if __name__ == '__main__':
    sys.exit(main())
