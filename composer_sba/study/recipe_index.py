"""The recipes of a folder, sorted by network, dataset and method."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_sba.errors import UserError, nearest

BASELINE = 'baseline'
_SUFFIX = f'_{BASELINE}.yaml'


@dataclass(frozen=True)
class RecipeFamily:
    """The recipes of one network on one dataset: files named ``<network>_<dataset>_<method>.yaml``.

    Args:
        folder (Path): The folder of the recipes.
        stem (str): ``<network>_<dataset>``. The dataset's name has no underscore.
    """

    folder: Path
    stem: str

    @property
    def names(self) -> tuple[str, str]:
        """Network and dataset. The recipes of the digits name only the dataset, which is also the network's name."""
        network, _, dataset = self.stem.rpartition('_')
        return network or dataset, dataset

    def own(self, method: str) -> Path:
        """Return the path of the method's own recipe, which may not exist."""
        return self.folder / f'{self.stem}_{method}.yaml'

    def files(self, method: str) -> list[Path] | None:
        """Return the method's own recipe, or the baseline and the method's file in ``methods/``, or None."""
        if self.own(method).exists():
            return [self.own(method)]
        general = self.folder / 'methods' / f'{method}.yaml'
        return [self.own(BASELINE), general] if general.exists() else None

    def methods(self) -> list[str]:
        """Return the methods that have a recipe of their own or a file in ``methods/``, the baseline first."""
        prefixes = [f'{stem}_' for stem in _stems(self.folder)]
        own = [
            name.removeprefix(f'{self.stem}_').removesuffix('.yaml')
            for name in _visible(self.folder, '.yaml')
            # 'vgg16_cifar10_wide_sba' belongs to 'vgg16_cifar10_wide' if that has a baseline, not to 'vgg16_cifar10'
            if max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default='') == f'{self.stem}_'
        ]
        general = [name.removesuffix('.yaml') for name in _visible(self.folder / 'methods', '.yaml')]
        return sorted({*own, *general}, key=lambda method: (method != BASELINE, method))


def families(recipes: Path, networks: Sequence[str] = (), datasets: Sequence[str] = ()) -> list[RecipeFamily]:
    """Find the networks and datasets that have a baseline recipe.

    Args:
        recipes (Path): The folder of the recipes.
        networks (Sequence[str], optional): The networks to keep. Default: ``()``, all.
        datasets (Sequence[str], optional): The datasets to keep. Default: ``()``, all.

    Returns:
        list[RecipeFamily]: Sorted by name.

    Raises:
        UserError: If the folder has no baseline recipe, or none for one of the names.
    """
    found = [RecipeFamily(recipes, stem) for stem in _stems(recipes)]
    if not found:
        raise UserError(f'--recipes: {recipes} has no <network>_<dataset>{_SUFFIX}')
    check_names('networks', networks, {family.names[0] for family in found})
    check_names('datasets', datasets, {family.names[1] for family in found})
    return [
        family
        for family in found
        if (not networks or family.names[0] in networks) and (not datasets or family.names[1] in datasets)
    ]


def check_names(option: str, given: Sequence[str], known: set[str]) -> None:
    """Raise UserError for the first name that is not known."""
    for name in given:
        if name not in known:
            raise UserError(f"--{option}: unknown '{name}'{nearest(name, sorted(known))}")


def _stems(folder: Path) -> list[str]:
    return [name.removesuffix(_SUFFIX) for name in _visible(folder, _SUFFIX)]


def _visible(folder: Path, suffix: str) -> list[str]:
    """Return the names in a folder that end in ``suffix``; hidden files are copies that editors and systems leave."""
    return sorted(path.name for path in folder.glob(f'*{suffix}') if not path.name.startswith('.'))
