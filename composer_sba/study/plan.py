"""The runs of a study: every combination of recipe, setting and seed."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from composer_sba.errors import UserError
from composer_sba.recipe.merge import read
from composer_sba.recipe.recipe import Recipe, load
from composer_sba.recipe.registry import canonical
from composer_sba.study.arguments import MAX_COST
from composer_sba.study.display_names import scaled_duration
from composer_sba.study.flops import flops_per_image
from composer_sba.study.paper import TABLE_1
from composer_sba.study.recipe_index import BASELINE, RecipeFamily, check_names, families
from composer_sba.study.robustness import settings
from composer_sba.study.runs import Run, cut_layers

ETAS = (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0)
TABLE_1_METHODS = (BASELINE, 'cutout', 'cutout_ba', 'ba', 'sba')

# The values that `search` draws SBA's settings from, besides the layers
SEARCH: dict[str, Sequence[float]] = {
    'fold': (1, 4, 16),
    'augment_prob': (0.25, 0.5, 1.0),
    'eta': (0.1, 0.3, 1.0, 3.0),
    'vicinity.gaussian_fraction': (0.0, 0.5, 1.0),
    'vicinity.sigma': (0.1, 0.3, 1.0),
    'vicinity.dropout': (0.1, 0.3, 0.5),
}


def plan(
    study: str,
    recipes: Path,
    *,
    networks: Sequence[str] = (),
    datasets: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: int = 3,
    trials: int = 20,
    forms: bool = False,
    epochs_scale: float = 1.0,
    overrides: Sequence[str] = (),
    scratch: Path = Path('runs/study'),
) -> list[Run]:
    """List the runs of a study, sorted by seed, which leaves complete comparisons if the study is interrupted.

    Args:
        study (str): ``'table1'``: the cells of the paper's Table 1. ``'eta'``: SBA for each η of Fig. 2 and the
            baseline. ``'layers'``: SBA and latent BA at each layer, as in Fig. 3, and the baseline. ``'methods'``:
            every method that has a recipe for the network or a file in ``methods/``. ``'search'``: the baseline, and
            SBA at random settings from ``SEARCH`` and all layers that cost at most ``MAX_COST`` times as much.
            ``'robustness'``: SBA at the input and what it is compared with,
            ``composer_sba.study.robustness.settings``.
        recipes (Path): The folder of the recipes.
        networks (Sequence[str], optional): The networks to keep, by the names of their recipes. Default: ``()``, all.
        datasets (Sequence[str], optional): The datasets to keep. Default: ``()``, all.
        methods (Sequence[str], optional): The methods to keep. Default: ``()``, all.
        seeds (int, optional): The number of seeds, counted upwards from the recipe's seed. Default: ``3``.
        trials (int, optional): The number of settings of ``'search'``. Default: ``20``.
        forms (bool, optional): Whether ``'robustness'`` adds other forms of SBA at the input. Default: ``False``.
        epochs_scale (float, optional): A factor for every duration, applied through Composer's
            ``scale_schedule_ratio``. Default: ``1.0``.
        overrides (Sequence[str], optional): ``key.sub=value`` for every run. An override of an algorithm's argument
            (``algorithms.sba.fold=4``) applies only to the runs that have the algorithm. Default: ``()``.
        scratch (Path, optional): The folder of the checkpoints from which an interrupted run resumes. Each run has a
            subfolder named by its hash. Default: ``runs/study``.

    Returns:
        list[Run]: In the order to run them.

    Raises:
        UserError: If a name is unknown, no run is left, an override has no effect, two runs are the same, a recipe
            loads a checkpoint or has no ``eval_dataset``, a duration is scaled to nothing, or a search has too few
            settings.
    """
    known = {method for family in families(recipes) for method in family.methods()}
    check_names('methods', methods, known | {'latent_ba'})
    if seeds < 1:
        raise UserError(f'--seeds: expected at least 1, got {seeds}')
    if not 0 < epochs_scale < math.inf:
        raise UserError(f'--epochs-scale: must be positive and finite, got {epochs_scale}')
    chosen = families(recipes, networks, datasets)
    if study == 'table1':
        chosen = [family for family in chosen if family.names[::-1] in TABLE_1]
    first = [
        Run(study, *family.names, each.method, each.setting, _load(each, overrides, epochs_scale))
        for family in chosen
        for each in _variants(study, family, methods, trials, forms, overrides)
        if not methods or each.method in methods
    ]
    if not first:
        raise UserError(f'{study}: no recipe in {recipes} fits --networks, --datasets and --methods')
    runs = [_resumable(run.with_seed(run.recipe.seed + seed), scratch) for seed in range(seeds) for run in first]
    _check_runs(runs, overrides)
    return runs


class _Variant(NamedTuple):
    """A recipe of a study before the overrides of the command line are applied."""

    method: str
    setting: dict[str, Any]
    files: list[Path]
    varied: Sequence[str] = ()  # overrides with the values that the study varies
    defaults: Sequence[str] = ()  # overrides that those of the command line may replace


def _variants(
    study: str, family: RecipeFamily, methods: Sequence[str], trials: int, forms: bool, overrides: Sequence[str]
) -> Iterator[_Variant]:
    if study in ('table1', 'methods'):
        names = TABLE_1_METHODS if study == 'table1' else dict.fromkeys(methods) or family.methods()
        for method in names:
            files = family.files(method)
            if files is not None and (study == 'methods' or files == [family.own(method)]):
                yield _Variant(method, {}, files)
        return
    if study == 'robustness':
        baseline = load(family.own(BASELINE), [text for text in overrides if _applies(text, {})])
        for each in settings(baseline.global_train_batch_size, cut_layers(baseline)[:-1], forms):
            files = family.files(each.method)
            if files is not None:
                yield _Variant(each.method, each.values, files, each.overrides)
        return
    yield _Variant(BASELINE, {}, [family.own(BASELINE)])
    sba = family.files('sba')
    if sba is None:
        return
    if study == 'eta':
        for eta in ETAS:
            yield _Variant('sba', {'eta': eta}, sba, [f'algorithms.sba.eta={eta}'])
        return
    if study == 'search':
        yield from _trials(sba, overrides, trials)
        return
    for layer in cut_layers(load(sba)):
        at = f'algorithms.sba.layers={layer}'
        latent_ba = ['algorithms.sba.target=hard', 'algorithms.sba.augment_prob=1.0', 'algorithms.sba.eta=1.0']
        yield _Variant('sba', {'layer': layer}, sba, [at], _NOT_DENSE)
        yield _Variant('latent_ba', {'layer': layer}, sba, [at, *latent_ba], _NOT_DENSE)


# Dense bases are limited to 8,192 features; identity has the same distribution up to the clip
_NOT_DENSE = ('algorithms.sba.vicinity.basis=identity',)


def _trials(sba: list[Path], overrides: Sequence[str], trials: int) -> Iterator[_Variant]:
    """Draw each setting at random and once: a random search beats a grid if few arguments matter."""
    recipe = load(sba)
    dense = (recipe.algorithms.get('sba', {}).get('vicinity') or {}).get('basis') in ('normalized', 'orthogonal')
    plain = _load(_Variant(BASELINE, {}, sba), overrides)
    limit = MAX_COST * flops_per_image(replace(plain, algorithms={}))
    grid = {'layers': cut_layers(recipe), **SEARCH}
    stream = random.Random(0)
    seen: set[tuple[Any, ...]] = set()
    found = 0
    while found < trials:
        if len(seen) == math.prod(map(len, grid.values())):
            raise UserError(f'--trials: only {found} settings cost at most {MAX_COST} times the baseline, got {trials}')
        values = {key: stream.choice(choices) for key, choices in grid.items()}
        if tuple(values.values()) in seen:
            continue
        seen.add(tuple(values.values()))
        setting = {key.removeprefix('vicinity.'): value for key, value in values.items()}
        varied = [f'algorithms.sba.{key}={value}' for key, value in values.items()]
        variant = _Variant('sba', setting, sba, varied, _NOT_DENSE if dense else ())
        if flops_per_image(_load(variant, overrides)) <= limit:
            found += 1
            yield variant


def _load(variant: _Variant, overrides: Sequence[str], epochs_scale: float = 1.0) -> Recipe:
    varied = {_key(text) for text in variant.varied}
    for text in overrides:
        if _key(text) in varied:
            raise UserError(f'--set {text}: the study varies this key itself')
    algorithms = read(variant.files).merged({}).get('algorithms') or {}
    own = [text for text in overrides if _applies(text, algorithms)]
    recipe = load(variant.files, [*variant.defaults, *own, *variant.varied])
    return replace(recipe, scale_schedule_ratio=recipe.scale_schedule_ratio * epochs_scale)


def _applies(override: str, algorithms: Mapping[str, Any]) -> bool:
    """Return whether an override applies to a run with these algorithms: an argument needs its algorithm."""
    section, *names = _key(override)
    return section != 'algorithms' or len(names) < 2 or names[0] in algorithms


def _key(override: str) -> tuple[str, ...]:
    """Return the parts of an override's key, with an algorithm's name in its canonical spelling."""
    section, *names = override.partition('=')[0].split('.')
    if section == 'algorithms' and names:
        names[0] = canonical('algorithms', names[0]) or names[0]
    return section, *names


def _check_runs(runs: Sequence[Run], overrides: Sequence[str]) -> None:
    """Raise UserError for an override that applies to no run and for a run that its record would not identify."""
    for text in overrides:
        if not any(_applies(text, run.recipe.algorithms) for run in runs):
            raise UserError(f"--set {text}: no run of this study has the algorithm '{_key(text)[1]}'")
    by_hash: dict[str, Run] = {}
    for run in runs:
        if run.recipe.load_path is not None:
            raise UserError(f'{run.name}: load_path: a study trains from scratch; its records do not name a checkpoint')
        if run.recipe.eval_dataset is None:
            raise UserError(f'{run.name}: eval_dataset: a study needs one, since its records hold evaluations')
        if scaled_duration(run.recipe.to_dict()).value < 1:
            ratio = run.recipe.scale_schedule_ratio
            raise UserError(f'{run.name}: --epochs-scale: {run.recipe.max_duration} times {ratio:g} is less than 1')
        twin = by_hash.setdefault(run.hash, run)
        if twin is not run:
            raise UserError(f'{twin.name} and {run.name} have the same recipe: leave one of them out')


def _resumable(run: Run, scratch: Path) -> Run:
    """Return the run with a folder of its own, from which it resumes after an interruption."""
    folder = str(scratch / run.hash)
    recipe = replace(run.recipe, run_name=run.hash, save_folder=folder, autoresume=True, save_overwrite=False)
    return replace(run, recipe=recipe)
