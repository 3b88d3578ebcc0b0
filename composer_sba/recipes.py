"""The command ``composer-sba recipes``: list the recipes, methods and models that come with the package.

It reads the comment at the top of each file, and imports neither PyTorch nor Composer.
"""

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from composer_sba.arguments import recipes_parser as _parser
from composer_sba.shipped import names, shipped


def main(argv: Sequence[str] | None = None, prog: str = 'composer-sba recipes') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, those of the process.
        prog (str, optional): The program's name in the help.

    Returns:
        int: The exit code.
    """
    kind = _parser(prog).parse_args(argv).kind
    if kind == 'models':
        _print_models()
        return 0
    columns = ('method', 'what it is') if kind == 'methods' else ('recipe', 'status', 'cost')
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for name in names():
        text = _comment(shipped() / name)
        if name.startswith('methods/') and kind == 'methods':
            table.add_row(name, text.partition(' composer train.py ')[0])
        elif '/' not in name and kind == 'recipes':
            table.add_row(name, _status(text), _cost(text))
    Console(highlight=False).print(table)
    return 0


def _comment(path: Path) -> str:
    """Return the comment at the top of a recipe, as one line."""
    lines = path.read_text().splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith('#')), len(lines))
    return ' '.join(line.lstrip('# ').strip() for line in lines[:end])


def _status(comment: str) -> str:
    if not re.search(r'\b(Measured on|Results:|Accuracy:)', comment):
        return 'not measured'
    epochs = re.search(r'Measured on .*? after (\d+ epochs)', comment)
    return epochs[1] if epochs else 'measured'


def _cost(comment: str) -> str:
    found = re.search(r"Cost: (.*?(?:baseline's|(?=[;,.](?:\s|$))))", comment)
    return found[1] if found else ''


def _print_models() -> None:
    """Print the table in the docstring of ``models.py``, which would import PyTorch."""
    source = (Path(__file__).parent / 'models.py').read_text()
    table = re.search(r'^=+ .*^=+.*?$(?=\n\n)', ast.get_docstring(ast.parse(source)) or '', re.MULTILINE | re.DOTALL)
    lines = table[0].replace('``', '').splitlines() if table else []
    print('\n'.join(line for line in lines if not line.startswith('=')))
    print('\nand by the name of a library: torchvision/resnet18, timm/vit_small_patch16_224, huggingface/FOLDER')
