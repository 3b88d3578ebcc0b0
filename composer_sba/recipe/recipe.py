"""Recipes: YAML files and overrides, read into one checked :class:`Recipe` that describes the whole run."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from composer.core import Time, TimeUnit
from composer.utils import FSDP2Config, FSDPConfig
from composer.utils.reproducibility import MAX_SEED
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sba.data.config import KNOWN_DATASETS, DatasetConfig, filled_in
from composer_sba.errors import UserError, nearest, one_line
from composer_sba.recipe.merge import NAMED, SINGLE, Sources, read
from composer_sba.recipe.redact import HIDDEN, redact
from composer_sba.recipe.registry import complete, component_errors, components, data_config, parameters
from composer_sba.recipe.signature import argument_errors, as_yaml

RECIPE_FILE = 'recipe.yaml'  # which training saves beside its checkpoints
MAX_TIMEOUT = 10**9  # seconds, which is 30 years
MAX_CLASSES = 1_000_000  # a head with so many rows still fits into memory
DECAY_ALL = 'decay_norm_and_bias'  # an option that a recipe adds to every optimizer

_OTHER_NAMES = {  # of other trainers -> keys of a recipe
    'epochs': 'max_duration',
    'batch_size': 'global_train_batch_size',
    'learning_rate': 'optimizer.lr',
}
_HOME = re.compile(r'~[\w.-]*/')  # where a path in a home folder begins

Duration = int | str | Time[int]


@dataclass(kw_only=True)
class TrainerOptions:
    """Options that go to Composer's ``Trainer`` under Trainer's names. A comment marks a default that differs."""

    run_name: str | None = None  # the name of the recipe's file
    max_duration: Duration  # with 0ba the run only evaluates, and saves nothing
    seed: int = 17  # Trainer draws one at random
    eval_interval: Duration = '1ep'
    train_subset_num_batches: int = -1
    eval_subset_num_batches: int = -1
    scale_schedule_ratio: float = 1.0
    step_schedulers_every_batch: bool | None = None
    device: Literal['cpu', 'gpu', 'mps', 'tpu'] | None = None
    precision: Literal['fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8'] | None = None
    device_train_microbatch_size: int | Literal['auto'] | None = None
    deterministic_mode: bool = False
    dist_timeout: float = 300.0
    compile_config: dict[str, Any] | None = None
    save_folder: str | None = None
    save_filename: str = 'ep{epoch}-ba{batch}-rank{rank}.pt'
    save_latest_filename: str | None = 'latest-rank{rank}.pt'
    save_interval: Duration = '1ep'
    save_num_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    save_weights_only: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    load_strict_model_weights: bool = True
    load_ignore_keys: list[str] | None = None
    autoresume: bool = False
    progress_bar: bool | None = None  # a line for each epoch, and a bar on a terminal; false for neither
    log_to_console: bool = False
    console_log_interval: Duration = '1ba'
    python_log_level: str | None = None


@dataclass(kw_only=True)
class Recipe(TrainerOptions):
    """A complete training run, read by :func:`load` and built by :mod:`composer_sba.recipe.build`.

    Args:
        model (dict): ``name`` in ``composer_sba.models.MODELS``, or a model of a library
            (:mod:`composer_sba.libraries`), and its arguments, including ``num_classes``.
        train_dataset (dict): The fields of :class:`composer_sba.data.DatasetConfig`. :func:`load` adds what a library's
            model expects of its images: ``mean``, ``std``, ``crop_size`` and ``resize_size``.
        eval_dataset (dict, optional): The same for evaluation. Default: ``None``, no evaluation.
        optimizer (dict): ``name`` and arguments. ``decay_norm_and_bias: false`` exempts normalization layers and biases
            (parameters of one dimension) from weight decay.
        scheduler (dict, optional): ``name`` and arguments. Default: ``None``, a constant learning rate.
        algorithms, callbacks, loggers (dict): Arguments by name; ``{}`` for a component's defaults.
        parallelism (dict, optional): ``fsdp``: the fields of Composer's ``FSDPConfig``, or of its ``FSDP2Config`` if
            the environment has ``FSDP_VERSION=2``. Default: ``None``, data parallelism.
        global_train_batch_size (int): Unit: rows over all devices.
        device_eval_batch_size (int, optional): Unit: rows on one device. Default: ``None``, as in training.
        eval_last_epochs (int): Number of last epochs that are also evaluated at their end, whatever ``eval_interval``
            is. It has no effect if ``max_duration`` is in batches or samples. Default: ``0``.
        sources (Sources): The file of each key, for error messages. Not a part of the recipe itself.
    """

    model: dict[str, Any]
    train_dataset: dict[str, Any]
    eval_dataset: dict[str, Any] | None = None
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None = None
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] | None = None
    global_train_batch_size: int
    device_eval_batch_size: int | None = None
    eval_last_epochs: int = 0
    sources: Sources = field(default=Sources(), compare=False, repr=False)

    def trainer_options(self) -> dict[str, Any]:
        """Return the options of Trainer as keyword arguments."""
        return {option.name: getattr(self, option.name) for option in fields(TrainerOptions)}

    @property
    def only_evaluates(self) -> bool:
        """Whether ``max_duration`` is 0."""
        return Time.from_input(self.max_duration, TimeUnit.EPOCH).value == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, with defaults."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != 'sources'}


def load(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check everything that needs no data.

    :mod:`composer_sba.recipe.merge` describes how files and overrides merge.

    Args:
        path (str | Path | Sequence): A YAML file. ``extends: FILE``, relative to the file that has it, names a file to
            merge under it. Or several files, each merged over the one before, such as a baseline and a method.
        overrides (Sequence[str]): ``key.sub=value``, where the value is YAML.

    Returns:
        Recipe: With defaults. Interpolations such as ``runs/${run_name}`` are resolved, and a leading ``~/`` of a value
        is the user's home folder.

    Raises:
        RecipeError: If there is a mistake. Its one line has the file, the key, what was expected and what was found.

    Example:
        >>> load('yamls/digits_sba.yaml', ['algorithms.sba.eta=0.5']).algorithms['sba']['eta']
        0.5
    """
    paths = [path] if isinstance(path, str | Path) else path
    sources = read(paths, overrides)
    values = _merged(sources)
    values['run_name'] = values['run_name'] or '+'.join(Path(each).stem for each in paths)
    try:
        resolved = _resolved(values)
    except OmegaConfBaseException as error:
        raise sources.error(str(error.full_key), one_line(error)) from error
    for key, problem in _errors(resolved):
        raise sources.error(key, problem)
    try:
        images = data_config(resolved['model'])
    except (UserError, OSError) as error:
        raise sources.error('model.name', one_line(error)) from error
    for section in ('train_dataset', 'eval_dataset'):
        if resolved[section] is not None:
            resolved[section] = _with_defaults(resolved[section], images)
    return Recipe(**resolved, sources=sources)


def save(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe to a file as :func:`to_yaml` does, under a comment that names the versions."""
    packages = ', '.join(f'{package} {version(package)}' for package in ('composer-sba', 'mosaicml', 'torch'))
    Path(path).write_text(f'# As it ran, with {packages}\n{to_yaml(recipe)}', encoding='utf-8')


def to_yaml(recipe: Recipe) -> str:
    """Return a recipe as one YAML text with the default of every option, which :func:`load` reads back as the same run.

    Interpolations are resolved except for ``${run_name}``: under another ``run_name`` the text names another folder.
    Secrets are hidden.

    Raises:
        RecipeError: If a dataset has a key that is wrong for it.
    """
    values = recipe.to_dict()
    for section in SINGLE:
        if values[section] is not None:
            name, arguments = values[section]['name'], component_arguments(values[section])
            values[section] = {'name': name, **complete(section, name, arguments)}
    values['optimizer'][DECAY_ALL] = recipe.optimizer.get(DECAY_ALL, True)
    for section in NAMED:
        values[section] = {name: complete(section, name, given) for name, given in values[section].items()}
    for section in ('train_dataset', 'eval_dataset'):
        try:
            values[section] = values[section] and filled_in(DatasetConfig(**values[section]))
        except UserError as error:
            raise recipe.sources.error(section, one_line(error)) from error
    named = _resolved(_merged(recipe.sources) | {'run_name': r'\${run_name}'}) | {'run_name': None}
    values = _with_run_name(values, named, str(recipe.run_name))
    return OmegaConf.to_yaml(OmegaConf.create(redact(values)))


def component_arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a section of one component, without its name and ``decay_norm_and_bias``."""
    return {key: value for key, value in entry.items() if key not in ('name', DECAY_ALL)}


def _with_defaults(dataset: dict[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    """Give a dataset the statistics and sizes that its model expects, unless it has its own or images of one size."""
    known = KNOWN_DATASETS.get(dataset['name'])
    sizes = ('crop_size', 'resize_size')
    fixed = known is None or known.size is not None or any(dataset.get(key) is not None for key in sizes)
    return dataset | {
        key: value for key, value in images.items() if dataset.get(key) is None and not (fixed and key in sizes)
    }


def _merged(sources: Sources) -> dict[str, Any]:
    defaults = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}
    values = sources.merged(defaults | {section: {} for section in NAMED})
    del values['sources']
    return values


def _resolved(values: Mapping[str, Any]) -> Any:
    return _with_home(OmegaConf.to_container(OmegaConf.create(dict(values)), resolve=True))


def _with_run_name(values: Any, named: Any, run_name: str) -> Any:
    """Write ``${run_name}`` where the recipe does, unless a value has been replaced since the recipe was read."""
    if isinstance(values, dict) and isinstance(named, dict):
        return {key: _with_run_name(value, named.get(key), run_name) for key, value in values.items()}
    if isinstance(values, list) and isinstance(named, list) and len(values) == len(named):
        return [_with_run_name(*pair, run_name) for pair in zip(values, named, strict=True)]
    is_same = isinstance(named, str) and named.replace('${run_name}', run_name) == values
    return named if is_same else values


def _places(values: Mapping[str, Any], key: str) -> Iterator[str]:
    """Find the key of a recipe that other trainers call so, and arguments of components and datasets of that name."""
    if key in _OTHER_NAMES:
        yield _OTHER_NAMES[key]
    given = {each: values.get(each) for each in SINGLE}
    single = {each: entry for each, entry in given.items() if isinstance(entry, Mapping) and 'name' in entry}
    taken = {section: parameters(section, entry['name']) for section, entry in single.items()}
    for section in NAMED:
        taken |= {f'{section}.{name}': parameters(section, name) for name in values[section]}
    taken |= {each: [field.name for field in fields(DatasetConfig)] for each in ('train_dataset', 'eval_dataset')}
    for entry, names in taken.items():
        yield from (f'{entry}.{name}' for name in names if key == name.rpartition('.')[2])


def _with_home(values: Any) -> Any:
    """Replace a leading ``~/`` or ``~user/`` of every text, which no shell does after ``key=``."""
    if isinstance(values, dict):
        return {key: _with_home(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_home(value) for value in values]
    return os.path.expanduser(values) if isinstance(values, str) and _HOME.match(values) else values


def _errors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find what is wrong with a merged recipe: dotted keys and problems, of which the first is reported.

    A check may rely on those before it.
    """
    yield from _value_errors(values)
    known = [each.name for each in fields(Recipe)]
    for key, problem in argument_errors(Recipe, values, supplied=['sources']):
        places = [] if key in known else list(_places(values, key))
        yield key, f'unknown key; did you mean {" or ".join(places)}?' if places else problem
    for section in SINGLE:
        entry = values[section]
        if entry is not None and 'name' not in entry:
            yield f'{section}.name', f'is required: one of {", ".join(components(section))}'
        elif entry is not None:
            yield from _below(section, _single_errors(section, entry))
    for section in NAMED:
        for name, arguments in values[section].items():
            if not isinstance(arguments, dict):
                yield f'{section}.{name}', f'expected a mapping, {{}} for its defaults, got {as_yaml(arguments)}'
            yield from _below(f'{section}.{name}', component_errors(section, name, arguments))
    for section in ('train_dataset', 'eval_dataset'):
        if values[section] is not None:
            yield from _below(section, argument_errors(DatasetConfig, values[section]))
    yield from _below('compile_config', argument_errors(torch.compile, values['compile_config'] or {}, ['model']))
    yield from _parallelism_errors(values['parallelism'] or {})
    yield from _range_errors(values)


def _range_errors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ('global_train_batch_size', 'device_eval_batch_size', 'device_train_microbatch_size'):
        if isinstance(values[key], int) and values[key] < 1:
            yield key, f'expected at least 1, got {values[key]}'
    for key in ('train_subset_num_batches', 'eval_subset_num_batches', 'save_num_checkpoints_to_keep'):
        if values[key] < -1 or values[key] == 0:  # with no batches, Composer trains epoch after epoch without an end
            yield key, f'expected -1 for all, or at least 1, got {values[key]}'
    duration, ratio = Time.from_input(values['max_duration'], TimeUnit.EPOCH).value, values['scale_schedule_ratio']
    if duration < 0:
        yield 'max_duration', f'must not be negative, got {as_yaml(values["max_duration"])}'
    if not duration and values['eval_dataset'] is None:
        yield 'max_duration', f'{as_yaml(values["max_duration"])} only evaluates, which needs an eval_dataset'
    if not 0 < ratio < math.inf:
        yield 'scale_schedule_ratio', f'expected a positive number, got {ratio}'
    if duration and int(duration * ratio) < 1:
        yield 'scale_schedule_ratio', f'{ratio} shortens max_duration {as_yaml(values["max_duration"])} to 0'
    if ratio != 1 and values['scheduler'] is None:
        yield 'scale_schedule_ratio', 'has no effect without a scheduler'
    if not 0 <= values['seed'] <= MAX_SEED:
        yield 'seed', f'expected 0 to {MAX_SEED}, got {values["seed"]}'
    if not 0 < values['dist_timeout'] <= MAX_TIMEOUT:
        yield 'dist_timeout', f'expected a number of seconds, at most {MAX_TIMEOUT}, got {values["dist_timeout"]}'
    if values['eval_last_epochs'] < 0:
        yield 'eval_last_epochs', f'expected at least 0, got {values["eval_last_epochs"]}'
    if values['autoresume'] and values['save_folder'] is None:
        yield 'autoresume', 'expected a save_folder with the checkpoint to resume from, got none'


def _single_errors(section: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if DECAY_ALL in entry and section != 'optimizer':
        yield DECAY_ALL, f'belongs to optimizer, not to {section}'
    if section == 'optimizer' and entry.get('differentiable'):
        yield 'differentiable', 'cannot be used: Composer takes no gradients through an update; remove the key'
    if not isinstance(entry.get(DECAY_ALL, True), bool):
        yield DECAY_ALL, f'expected bool, got {as_yaml(entry[DECAY_ALL])}'
    classes = entry.get('num_classes')
    if section == 'model' and classes is None:
        yield 'num_classes', 'is required (int)'
    if section == 'model' and isinstance(classes, int) and not 2 <= classes <= MAX_CLASSES:
        yield 'num_classes', f'expected 2 to {MAX_CLASSES}, got {classes}'
    yield from component_errors(section, entry['name'], component_arguments(entry))


def _parallelism_errors(parallelism: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, settings in parallelism.items():
        # Composer's FSDPConfig ignores unknown keys
        known = [each.name for config in (FSDPConfig, FSDP2Config) for each in fields(config) if each.init]
        if key != 'fsdp':
            yield f'parallelism.{key}', f'unknown key{nearest(key, ["fsdp"])}'
        for name in settings or {}:
            if name not in known:
                yield f'parallelism.fsdp.{name}', f'unknown key{nearest(name, known)}'


def _value_errors(values: Any, at: str = '') -> Iterator[tuple[str, str]]:
    """Find values that no option can have: NaN, integers of more than 64 bits, hidden secrets, unknown home folders."""
    if isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _value_errors(value, f'{at}.{key}' if at else f'{key}')
    elif isinstance(values, float) and math.isnan(values):
        yield at, 'expected a number, got nan'
    elif isinstance(values, str) and HIDDEN in values:
        yield at, f'holds {HIDDEN} instead of the secret, which is never saved: give it as {at}=...'
    elif isinstance(values, str) and _HOME.match(values):
        yield at, f'{values!r} names the home folder of an unknown user'
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        yield at, f'expected an integer of at most 64 bits, got {values}'


def _below(key: str, errors: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((f'{key}.{inner}', problem) for inner, problem in errors)
