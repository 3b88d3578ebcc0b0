"""Which recipes there are: networks and data sets that have a baseline, and the methods laid over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_sba.errors import UserError, nearest

BASELINE = 'baseline'


@dataclass(frozen=True)
class Regime:
    """The recipes of one network on one data set: ``<network>_<dataset>_<method>.yaml``.

    Args:
        folder (Path): Where they are.
        stem (str): ``<network>_<dataset>``.
    """

    folder: Path
    stem: str

    @property
    def names(self) -> tuple[str, str]:
        """Network and data set; the digits have one network and their name alone."""
        network, _, dataset = self.stem.rpartition('_')
        return network or dataset, dataset

    def own(self, method: str) -> Path:
        """The method's own recipe, which may not exist."""
        return self.folder / f'{self.stem}_{method}.yaml'

    def files(self, method: str) -> list[Path] | None:
        """The method's own recipe, else its file in ``methods/`` over the baseline, else None."""
        if self.own(method).exists():
            return [self.own(method)]
        general = self.folder / 'methods' / f'{method}.yaml'
        return [self.own(BASELINE), general] if general.exists() else None

    def methods(self) -> list[str]:
        """All that have a recipe of their own or a file in ``methods/``, the baseline first."""
        own = [path.stem.removeprefix(f'{self.stem}_') for path in self.folder.glob(f'{self.stem}_*.yaml')]
        general = [path.stem for path in (self.folder / 'methods').glob('*.yaml')]
        return sorted({*own, *general}, key=lambda method: (method != BASELINE, method))


def regimes(recipes: Path, networks: Sequence[str] = (), datasets: Sequence[str] = ()) -> list[Regime]:
    """Find the networks and data sets that have recipes.

    Args:
        recipes (Path): The folder of the recipes.
        networks (Sequence[str], optional): Which to keep. Default: ``()``, all.
        datasets (Sequence[str], optional): The same of data sets.

    Returns:
        list[Regime]: By name.

    Raises:
        UserError: If there is none of a name.
    """
    stems = sorted(path.name.removesuffix('_baseline.yaml') for path in recipes.glob('*_baseline.yaml'))
    found = [Regime(recipes, stem) for stem in stems]
    check_names('networks', networks, {regime.names[0] for regime in found})
    check_names('datasets', datasets, {regime.names[1] for regime in found})
    return [
        regime
        for regime in found
        if (not networks or regime.names[0] in networks) and (not datasets or regime.names[1] in datasets)
    ]


def check_names(option: str, given: Sequence[str], known: set[str]) -> None:
    """Raise UserError for a name that is not known."""
    for name in given:
        if name not in known:
            raise UserError(f"--{option}: unknown '{name}'{nearest(name, sorted(known))}")
