"""Which runs a study consists of: recipes in ``yamls/`` times settings times seeds."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from composer_sba.errors import UserError
from composer_sba.recipe.recipe import Recipe, component_arguments, load
from composer_sba.recipe.registry import construct
from composer_sba.study.flops import flops_per_image
from composer_sba.study.paper import TABLE_1
from composer_sba.study.recipe_index import BASELINE, Regime, check_names, regimes

ETAS = (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0)
TABLE_1_METHODS = (BASELINE, 'cutout', 'cutout_ba', 'ba', 'sba')
STUDIES = ('table1', 'eta', 'layers', 'rivals', 'search')

# What the search for SBA's best setting draws from, beside the layers, and how much a step of it may cost.
SEARCH: dict[str, Sequence[float]] = {
    'fold': (1, 4, 16),
    'augment_prob': (0.25, 0.5, 1.0),
    'eta': (0.1, 0.3, 1.0, 3.0),
    'vicinity.gaussian_fraction': (0.0, 0.5, 1.0),
    'vicinity.sigma': (0.1, 0.3, 1.0),
    'vicinity.dropout': (0.1, 0.3, 0.5),
}
MAX_COST = 1.3  # times the baseline's

# Where and how a run is watched or kept has no part in what it is.
_INCIDENTAL = (
    *('run_name', 'device', 'dist_timeout', 'loggers', 'autoresume', 'load_path', 'progress_bar', 'log_to_console'),
    *('console_log_interval', 'python_log_level', 'save_folder', 'save_filename', 'save_latest_filename'),
    *('save_interval', 'save_num_checkpoints_to_keep', 'save_overwrite', 'save_weights_only'),
)
_INCIDENTAL_DATA = ('local', 'remote', 'num_workers', 'cache_limit', 'download_timeout', 'verify')


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
        study (str): One of ``STUDIES``.
        network, dataset, method (str): As the names of the recipes have them.
        setting (dict): What the study varies, such as ``{'eta': 0.1}``.
        recipe (Recipe): All of it.
    """

    study: str
    network: str
    dataset: str
    method: str
    setting: dict[str, Any]
    recipe: Recipe = field(repr=False)

    @property
    def name(self) -> str:
        """What a line of output calls it."""
        setting = ''.join(f' {key}={value}' for key, value in self.setting.items())
        return f'{self.network} {self.dataset} {self.method}{setting} seed {self.recipe.seed}'

    def with_seed(self, seed: int) -> 'Run':
        """The same run from another seed."""
        return replace(self, recipe=replace(self.recipe, seed=seed))

    @property
    def facts(self) -> dict[str, Any]:
        """The recipe without what is incidental: all that decides which model comes out."""
        facts = {key: value for key, value in self.recipe.to_dict().items() if key not in _INCIDENTAL}
        for section in ('train_dataset', 'eval_dataset'):
            facts[section] = {k: v for k, v in (facts[section] or {}).items() if k not in _INCIDENTAL_DATA}
        return facts

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits that are equal for equal facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]


def plan(
    study: str,
    recipes: Path,
    *,
    networks: Sequence[str] = (),
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int = 3,
    trials: int = 20,
    epochs_scale: float = 1.0,
    overrides: Sequence[str] = (),
    scratch: Path = Path('runs/study'),
) -> list[Run]:
    """List the runs of a study, all of the first seed first, so that a study that is cut short compares like with like.

    Args:
        study (str): ``'table1'``: the cells of the paper's Table 1. ``'eta'``: SBA for each η of Fig. 2 and the
            baseline. ``'layers'``: SBA and latent BA at each layer, as in Fig. 3, and the baseline. ``'rivals'``: every
            method that the network has a recipe for, those of ``methods/`` among them. ``'search'``: the baseline, and
            SBA with settings drawn from ``SEARCH`` and all layers that cost no more than ``MAX_COST`` times as much.
        recipes (Path): The folder of the recipes.
        networks (Sequence[str], optional): Which to keep, as their recipes are named. Default: ``()``, all.
        datasets (Sequence[str], optional): The same of data sets.
        methods (Sequence[str], optional): The same of methods.
        seeds (int, optional): Number of seeds, from that of the recipe upwards. Default: ``3``.
        trials (int, optional): Number of settings of a search. Default: ``20``.
        epochs_scale (float, optional): Factor of every duration, by Composer's ``scale_schedule_ratio``. Default:
            ``1.0``.
        overrides (Sequence[str], optional): ``key.sub=value`` for every run; one for an algorithm
            (``algorithms.sba.fold=4``) reaches the runs that have it. Default: ``()``.
        scratch (Path, optional): Where a run keeps checkpoints, in a folder named by its hash, to be resumed from.
            Default: ``runs/study``.

    Returns:
        list[Run]: In the order to run them.

    Raises:
        UserError: If a name is unknown, or nothing is left.
    """
    known = {method for regime in regimes(recipes) for method in regime.methods()}
    check_names('methods', methods, known | {'latent_ba'})
    if any(each.partition('=')[0] == 'load_path' for each in overrides):
        raise UserError('load_path: a study trains from the beginning, and its records do not tell what was loaded')
    if seeds < 1:
        raise UserError(f'--seeds: expected at least 1, got {seeds}')
    chosen = regimes(recipes, networks, datasets)
    if study == 'table1':
        chosen = [regime for regime in chosen if regime.names[::-1] in TABLE_1]
    first = [
        Run(study, *regime.names, method, setting, _load(files, [*overrides, *extra], epochs_scale))
        for regime in chosen
        for method, setting, files, extra in _variants(study, regime, methods, trials, overrides)
        if not methods or method in methods
    ]
    runs = [_resumable(run.with_seed(run.recipe.seed + seed), scratch) for seed in range(seeds) for run in first]
    if not runs:
        raise UserError(f'{study}: no recipe in {recipes} fits --networks, --datasets and --methods')
    return runs


_Variant = tuple[str, dict[str, Any], list[Path], list[str]]


def _variants(
    study: str, regime: Regime, methods: Sequence[str], trials: int, overrides: Sequence[str]
) -> Iterator[_Variant]:
    """Method, setting, files and further overrides."""
    if study in ('table1', 'rivals'):
        names = TABLE_1_METHODS if study == 'table1' else methods or regime.methods()
        for method in names:
            files = regime.files(method)
            if files is not None and (study == 'rivals' or files == [regime.own(method)]):
                yield method, {}, files, []
        return
    yield BASELINE, {}, [regime.own(BASELINE)], []
    sba = regime.files('sba')
    if sba is None:
        return
    if study == 'eta':
        for eta in ETAS:
            yield 'sba', {'eta': eta}, sba, [f'algorithms.sba.eta={eta}']
        return
    if study == 'search':
        yield from _trials(sba, overrides, trials)
        return
    for layer in cut_layers(load(sba)):
        # Dense bases end at 8,192 features, and identity has their law up to the clip
        at = [f'algorithms.sba.layers={layer}', 'algorithms.sba.vicinity.basis=identity']
        latent_ba = ['algorithms.sba.target=hard', 'algorithms.sba.augment_prob=1.0', 'algorithms.sba.eta=1.0']
        yield 'sba', {'layer': layer}, sba, at
        yield 'latent_ba', {'layer': layer}, sba, [*at, *latent_ba]


def _trials(sba: list[Path], overrides: Sequence[str], trials: int) -> Iterator[_Variant]:
    """Settings drawn at random, each once: chance finds a good one sooner than a grid where few arguments matter."""
    limit = MAX_COST * flops_per_image(replace(_load(sba, overrides), algorithms={}))
    grid = {'layers': cut_layers(load(sba)), **SEARCH}
    chance = random.Random(0)
    drawn: list[dict[str, Any]] = []
    for _ in range(1000 * trials):
        setting = {key: chance.choice(values) for key, values in grid.items()}
        extra = [f'algorithms.sba.{key}={value}' for key, value in setting.items()]
        if len(drawn) < trials and setting not in drawn and flops_per_image(_load(sba, [*overrides, *extra])) <= limit:
            drawn.append(setting)
            yield 'sba', {key.removeprefix('vicinity.'): value for key, value in setting.items()}, sba, extra


def cut_layers(recipe: Recipe) -> list[str]:
    """Name the stages of a recipe's network that have parameters, and the head.

    Example:
        >>> cut_layers(load('yamls/resnet44_cifar10_baseline.yaml'))
        ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    network: nn.Module = construct('model', recipe.model['name'], component_arguments(recipe.model))
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    stages = [name for name, stage in network.named_children() if stage is not last and [*stage.parameters()]]
    return [*stages, 'head']


def _load(files: Sequence[Path], overrides: Sequence[str], epochs_scale: float = 1.0) -> Recipe:
    algorithms = load(files).algorithms
    recipe = load(files, [text for text in overrides if _applies(text.partition('=')[0].split('.'), algorithms)])
    return replace(recipe, scale_schedule_ratio=recipe.scale_schedule_ratio * epochs_scale)


def _resumable(run: Run, scratch: Path) -> Run:
    """The run with a folder of its own to go on from, should it be broken off."""
    folder = str(scratch / run.hash)
    recipe = replace(run.recipe, run_name=run.hash, save_folder=folder, autoresume=True, save_overwrite=False)
    return replace(run, recipe=recipe)


def _applies(key: Sequence[str], algorithms: dict[str, Any]) -> bool:
    return key[0] != 'algorithms' or len(key) < 3 or key[1] in algorithms
