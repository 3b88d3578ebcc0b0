"""The recipes that come with the package: their folder and their names."""

import difflib
from pathlib import Path


def shipped() -> Path:
    """Return the folder of the recipes that come with the package, installed or in a checkout."""
    package = Path(__file__).parent
    return package / 'yamls' if (package / 'yamls').is_dir() else package.parent / 'yamls'


def names() -> list[str]:
    """Return the names by which recipes of the package can be given, ``methods/mixup.yaml`` among them.

    Example:
        >>> [name for name in names() if 'digits' in name][:2]
        ['digits_baseline.yaml', 'digits_cutout.yaml']
    """
    found = [path.relative_to(shipped()) for path in shipped().rglob('*.yaml')]
    return sorted(path.as_posix() for path in found if not path.name.startswith('.'))


def nearest_name(name: str | Path) -> str | None:
    """Return the recipe whose name is nearest to one that a user wrote, or None if none is near.

    It is a recipe of the package, or a file in the folder of ``name``.

    Example:
        >>> nearest_name('digit_sba.yml'), nearest_name('mixup.yaml'), nearest_name('flowers.yaml')
        ('digits_sba.yaml', 'methods/mixup.yaml', None)
    """
    stems = {Path(each).stem: each for each in reversed(names())}
    stems |= {path.stem: str(path) for kind in ('yml', 'yaml') for path in sorted(Path(name).parent.glob(f'*.{kind}'))}
    close = difflib.get_close_matches(Path(name).stem, stems, n=1, cutoff=0.75)
    return stems[close[0]] if close else None
