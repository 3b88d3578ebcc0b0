"""The command ``composer-sba recipes``: list the recipes, methods and models that come with the package.

It reads the comment at the top of each file, and imports neither PyTorch nor Composer.
"""

import ast
import re
from collections.abc import Iterable, Sequence
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
    rows = []
    for name in names():
        text = _comment(shipped() / name)
        if name.startswith('methods/') and kind == 'methods':
            rows.append([name, text.partition(' composer train.py ')[0]])
        elif '/' not in name and kind == 'recipes':
            rows.append([name, _status(text), _cost(text)])
    _print(['method', 'what it is'] if kind == 'methods' else ['recipe', 'status', 'cost'], rows)
    return 0


def _print(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


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
    lines = (ast.get_docstring(ast.parse(source)) or '').splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith('=')]
    begins = [found.start() for found in re.finditer('=+', lines[rules[0]])]
    header, *rows = [
        [line[begin:end].replace('``', '').strip() for begin, end in zip(begins, [*begins[1:], None], strict=True)]
        for line in lines[rules[0] + 1 : rules[-1]]
        if not line.startswith('=')
    ]
    whole: list[list[str]] = []
    for row in rows:
        if row[0]:
            whole.append(row)
        else:  # the last cell goes on
            whole[-1][-1] += f' {row[-1]}'
    _print(header, whole)
    print('\nand by the name of a library: torchvision/resnet18, timm/vit_small_patch16_224,\nhuggingface/FOLDER')
