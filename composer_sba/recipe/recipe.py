"""Recipes: YAML files and the command line, read into one checked :class:`Recipe` that says everything that ran."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from composer.core import Time, TimeUnit
from composer.utils import FSDP2Config, FSDPConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_sba.data.config import DatasetConfig
from composer_sba.errors import nearest, one_line
from composer_sba.recipe.merge import NAMED, SINGLE, Sources, read
from composer_sba.recipe.redact import HIDDEN, redact
from composer_sba.recipe.registry import component_faults, components
from composer_sba.recipe.signature import faults, show

MAX_CLASSES = 1_000_000  # a head of so many rows still fits into memory
DECAY_ALL = 'decay_norm_and_bias'  # an option of every optimizer, ours and not the optimizer's own

Duration = int | str | Time[int]


@dataclass(kw_only=True)
class TrainerOptions:
    """What goes to Composer's ``Trainer`` as it is, under Trainer's names; a comment marks a default of ours."""

    run_name: str | None = None  # the name of the recipe's file
    max_duration: Duration
    seed: int = 17  # Trainer draws one
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
    progress_bar: bool | None = None  # on a terminal; elsewhere the metrics of each epoch as lines
    log_to_console: bool = False
    console_log_interval: Duration = '1ba'
    python_log_level: str | None = None


@dataclass(kw_only=True)
class Recipe(TrainerOptions):
    """One training run, complete: what :func:`load` reads and :mod:`composer_sba.recipe.build` turns into a Trainer.

    Args:
        model (dict): ``name`` in ``composer_sba.models.MODELS`` and its arguments, ``num_classes`` among them.
        train_dataset (dict): The fields of :class:`composer_sba.data.DatasetConfig`.
        eval_dataset (dict, optional): The same, to evaluate on. Default: ``None``, no evaluation.
        optimizer (dict): ``name`` and arguments. ``decay_norm_and_bias: false`` exempts normalization layers and biases
            (parameters of one dimension) from weight decay.
        scheduler (dict, optional): ``name`` and arguments. Default: ``None``, a constant learning rate.
        algorithms, callbacks, loggers (dict): Name -> arguments, ``{}`` for a component's defaults.
        parallelism (dict, optional): ``fsdp``: the fields of Composer's ``FSDPConfig``, or of its ``FSDP2Config`` where
            the environment has ``FSDP_VERSION=2``. Default: ``None``, plain data parallelism.
        global_train_batch_size (int): Unit: rows over all devices.
        device_eval_batch_size (int, optional): Unit: rows on one device. Default: ``None``, as in training.
        eval_last_epochs (int): Evaluate at the end of each of this many last epochs too, whatever ``eval_interval`` is;
            ``max_duration`` in batches or samples has no last epochs. Default: ``0``.
        sources (Sources): Where each key was written, for messages; no part of the recipe itself.
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
        """The part that is Trainer's own, as keyword arguments."""
        return {option.name: getattr(self, option.name) for option in fields(TrainerOptions)}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, defaults included."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != 'sources'}


def load(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check all that can be checked without its data.

    :mod:`composer_sba.recipe.merge` has the rules by which files and overrides merge.

    Args:
        path (str | Path | Sequence): A YAML file; ``extends: FILE`` in it, relative to itself, is merged under it. Or
            several files, each merged over the one before, as a method over a baseline.
        overrides (Sequence[str]): ``key.sub=value``, as on the command line; the value is YAML.

    Returns:
        Recipe: Defaults filled in, interpolations such as ``runs/${run_name}`` resolved.

    Raises:
        RecipeError: On any mistake, in one line: the file, the key, what was expected and what came.

    Example:
        >>> load('yamls/digits_sba.yaml', ['algorithms.sba.eta=0.5']).algorithms['sba']['eta']
        0.5
    """
    paths = [path] if isinstance(path, str | Path) else path
    sources = read(paths, overrides)
    defaults = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}
    values = sources.merged(defaults | {section: {} for section in NAMED})
    del values['sources']
    values['run_name'] = values['run_name'] or '+'.join(Path(each).stem for each in paths)
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except OmegaConfBaseException as error:
        raise sources.error(str(error.full_key), one_line(error)) from error
    for key, problem in _faults(resolved):
        raise sources.error(key, problem)
    return Recipe(**resolved, sources=sources)


def save(recipe: Recipe, path: str | Path) -> None:
    """Write :func:`to_yaml` of a recipe to a file; a comment on top names the versions."""
    packages = ', '.join(f'{package} {version(package)}' for package in ('composer-sba', 'mosaicml', 'torch'))
    Path(path).write_text(f'# As it ran, with {packages}\n{to_yaml(recipe)}')


def to_yaml(recipe: Recipe) -> str:
    """Spell a recipe as one flat YAML text that :func:`load` reads back equal, but for secrets, which are hidden."""
    return OmegaConf.to_yaml(OmegaConf.create(redact(recipe.to_dict())))


def component_arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a section of one component: all of it but its name and what is ours."""
    return {key: value for key, value in entry.items() if key not in ('name', DECAY_ALL)}


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What is wrong with a merged recipe: dotted key and problem. What follows a fault may rest on what it refused."""
    yield from _value_faults(values)
    yield from faults(Recipe, values, supplied=['sources'])
    for section in SINGLE:
        entry = values[section]
        if entry is not None and 'name' not in entry:
            yield f'{section}.name', f'is required: one of {", ".join(components(section))}'
        elif entry is not None:
            yield from _below(section, _single_faults(section, entry))
    for section in NAMED:
        for name, arguments in values[section].items():
            if not isinstance(arguments, dict):
                yield f'{section}.{name}', f'expected a mapping, {{}} for its defaults, got {show(arguments)}'
            yield from _below(f'{section}.{name}', component_faults(section, name, arguments))
    for section in ('train_dataset', 'eval_dataset'):
        if values[section] is not None:
            yield from _below(section, faults(DatasetConfig, values[section]))
    yield from _below('compile_config', faults(torch.compile, values['compile_config'] or {}, supplied=['model']))
    yield from _parallelism_faults(values['parallelism'] or {})
    for key in ('global_train_batch_size', 'device_eval_batch_size', 'device_train_microbatch_size'):
        if isinstance(values[key], int) and values[key] < 1:
            yield key, f'expected at least 1, got {values[key]}'
    for key in ('train_subset_num_batches', 'eval_subset_num_batches', 'save_num_checkpoints_to_keep'):
        if values[key] < -1 or values[key] == 0:  # of no batches Composer trains epoch after epoch, for ever
            yield key, f'expected -1 for all, or at least 1, got {values[key]}'
    if Time.from_input(values['max_duration'], TimeUnit.EPOCH).value < 1:
        yield 'max_duration', f'expected more than nothing, got {show(values["max_duration"])}'
    if values['eval_last_epochs'] < 0:
        yield 'eval_last_epochs', f'expected at least 0, got {values["eval_last_epochs"]}'
    if values['autoresume'] and values['save_folder'] is None:
        yield 'autoresume', 'expected a save_folder, where it looks for the checkpoint to resume from; got none'


def _single_faults(section: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if DECAY_ALL in entry and section != 'optimizer':
        yield DECAY_ALL, f'belongs to optimizer, not to {section}'
    if not isinstance(entry.get(DECAY_ALL, True), bool):
        yield DECAY_ALL, f'expected bool, got {show(entry[DECAY_ALL])}'
    classes = entry.get('num_classes')
    if section == 'model' and classes is None:
        yield 'num_classes', 'is required (int)'
    if section == 'model' and isinstance(classes, int) and not 2 <= classes <= MAX_CLASSES:
        yield 'num_classes', f'expected 2 to {MAX_CLASSES}, got {classes}'
    yield from component_faults(section, entry['name'], component_arguments(entry))


def _parallelism_faults(parallelism: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, settings in parallelism.items():
        # Composer's FSDPConfig takes any key without a word, so its fields are compared here
        known = [each.name for config in (FSDPConfig, FSDP2Config) for each in fields(config) if each.init]
        if key != 'fsdp':
            yield f'parallelism.{key}', f'unknown key{nearest(key, ["fsdp"])}'
        for name in settings or {}:
            if name not in known:
                yield f'parallelism.fsdp.{name}', f'unknown key{nearest(name, known)}'


def _value_faults(values: Any, at: str = '') -> Iterator[tuple[str, str]]:
    """Values that no option can mean: numbers that are none or too long for the machine, secrets that are hidden."""
    if isinstance(values, Mapping | list):
        for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
            yield from _value_faults(value, f'{at}.{key}' if at else f'{key}')
    elif isinstance(values, float) and math.isnan(values):
        yield at, 'expected a number, got nan'
    elif isinstance(values, str) and HIDDEN in values:
        yield at, f'expected the secret in the place of {HIDDEN}, which it was saved without: give it as {at}=...'
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        yield at, f'expected an integer of at most 64 bits, got {values}'


def _below(key: str, found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    return ((f'{key}.{inner}', problem) for inner, problem in found)
