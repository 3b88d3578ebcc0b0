"""The layers of a recipe: files, the files that they extend and the command line.

Each layer is merged over the one before:

- Mappings merge key by key. Any other value replaces the one below it.
- A mapping that names another component (``scheduler: {name: ...}``) replaces the whole mapping below it, because the
  arguments of one component mean nothing to another.
- ``null`` in ``algorithms``, ``callbacks`` or ``loggers`` removes an inherited entry.
"""

import copy
import functools
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from composer_sba.errors import RecipeError, UserError, nearest, one_line
from composer_sba.recipe import registry
from composer_sba.recipe.signature import as_yaml
from composer_sba.shipped import nearest_name, shipped

NAMED = ('algorithms', 'callbacks', 'loggers')  # sections that map names to arguments
SINGLE = ('model', 'optimizer', 'scheduler')  # sections of one component, with its name under `name`
COMMAND_LINE = 'command line'


@dataclass(frozen=True)
class Sources:
    """The layers of a recipe, lowest first. Error messages name the layer that holds the mistake.

    Args:
        layers (tuple): The name of each file, or ``'command line'``, with the keys that it gives.
    """

    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def error(self, key: str, problem: str) -> RecipeError:
        """Return an error of one line: the last layer that gives the key (else the recipe's file), key and problem."""
        names = [name for name, values in self.layers if _contains(values, key.split('.'))]
        return RecipeError(f'{[self.file, *names][-1]}: {key}: {problem}')

    @property
    def file(self) -> str:
        """The recipe's own file, which is the last one."""
        return next((name for name, _ in reversed(self.layers) if name != COMMAND_LINE), 'recipe')

    def merged(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the layers over ``defaults`` by the rules above.

        Raises:
            RecipeError: If ``null`` removes an entry that no layer below has.
        """
        values = dict(defaults)
        for _, over in self.layers:
            values = self._merge(values, over)
        return values

    def _merge(self, base: Mapping[str, Any], over: Mapping[str, Any], at: str = '') -> dict[str, Any]:
        merged = dict(base)
        for key, value in over.items():
            below = merged.get(key)
            if value is None and at.removesuffix('.') in NAMED:
                if key not in merged:
                    problem = 'null removes an inherited entry, but none is inherited; write {} for the defaults'
                    raise self.error(f'{at}{key}', problem)
                del merged[key]
            elif isinstance(below, dict) and isinstance(value, dict) and _is_same_component(below, value):
                merged[key] = self._merge(below, value, f'{at}{key}.')
            else:
                merged[key] = value
        return merged


def read(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Sources:
    """Read files, the files that they extend, and overrides.

    Components get the names that the registry lists.

    Args:
        paths (Sequence[str | Path]): YAML files, each merged over the one before. ``extends: FILE`` is relative to the
            file that has it. A file that does not exist is looked up among the recipes of the package.
        overrides (Sequence[str]): ``key.sub=value``, where the value is YAML.

    Returns:
        Sources: The layers, from the root of the first ``extends`` chain to the overrides.

    Raises:
        RecipeError: If a file is missing or is not YAML, if ``extends`` forms a cycle, if an override is not
            ``key=value``, or if a component is unknown.
    """
    files = [layer for path in paths for layer in _read_file(_find(path))]
    layers = [*files, (COMMAND_LINE, _read_overrides(overrides))]
    return Sources(tuple((name, _with_listed_names(Sources(((name, each),)), each)) for name, each in layers))


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    if path.resolve() in [each.resolve() for each in above]:
        raise RecipeError(f'{above[-1]}: extends: a cycle, {" -> ".join(each.name for each in (*above, path))}')
    try:
        values = copy.deepcopy(_parsed(path.read_text('utf-8')))
    except OSError as error:
        extends = f'{above[-1]}: extends: ' if above else ''
        # OmegaConf raises an OSError of its own, without strerror, for YAML that is a bare number
        problem = error.strerror or 'expected a mapping of keys, got another kind of YAML'
        if isinstance(error, FileNotFoundError):
            near = nearest_name(path)
            problem += f'; did you mean {near}?' if near else '; composer-sba recipes lists those of the package'
        raise RecipeError(f'{extends}{path}: {problem}') from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
        raise RecipeError(f'{path}: {where}not YAML: {error.problem}') from error
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML raises the last four for some dates, keys, tags and depths
        raise RecipeError(f'{path}: not YAML: {one_line(error)}') from error
    if not isinstance(values, dict):
        raise RecipeError(f'{path}: expected a mapping of keys, got a {type(values).__name__}')
    base = values.pop('extends', None)
    if not isinstance(base, str | None) or '\0' in (base or ''):
        raise RecipeError(f'{path}: extends: expected the name of a file, got {as_yaml(base)}')
    lower = [] if base is None else _read_file(_find(base, path.parent), (*above, path))
    return [*lower, (str(path), {str(key): value for key, value in values.items()})]


@functools.lru_cache
def _parsed(text: str) -> Any:
    """Parse once what many recipes of a study extend. Callers share the result, so they copy it."""
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def _find(name: str | Path, folder: Path = Path()) -> Path:
    path = folder / os.path.expanduser(name)
    return path if path.exists() or not (shipped() / name).is_file() else shipped() / name


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Read all overrides as one layer: ``optimizer.name=adam`` keeps ``optimizer.betas=...``, in either order."""
    together: Any = OmegaConf.create()
    for text in overrides:
        key, equals, _ = text.partition('=')
        if not equals or not all(key.split('.')):
            file = f'; a recipe needs -f: -f {text}' if text.endswith(('.yaml', '.yml')) else ''
            raise RecipeError(f"{COMMAND_LINE}: expected key=value or key.sub=value, got '{text}'{file}")
        try:
            together = OmegaConf.merge(together, OmegaConf.from_dotlist([text]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise RecipeError(f"{COMMAND_LINE}: {key}: expected YAML after =, got '{text}'") from error
    return cast(dict[str, Any], OmegaConf.to_container(together))


def _with_listed_names(source: Sources, values: Mapping[str, Any]) -> dict[str, Any]:
    """Give the components of a layer the names that the registry lists, which makes layers agree on their keys."""
    renamed = dict(values)
    for section in NAMED:
        entries = values.get(section) or {}
        if not isinstance(entries, dict):
            such = f', such as {{{entries}: {{}}}}' if isinstance(entries, str) else ''
            raise source.error(section, f'expected a mapping of names to arguments{such}, got {as_yaml(entries)}')
        names = [_listed_name(source, section, str(name), f'{section}.{name}') for name in entries]
        if len(set(names)) < len(names):
            raise source.error(section, f"'{max(names, key=names.count)}' is named twice")
        if section in values:
            renamed[section] = dict(zip(names, entries.values(), strict=True))
    for section in SINGLE:
        entry = values.get(section)
        if isinstance(entry, str) and '${' not in entry:
            raise source.error(section, f'expected a mapping such as {{name: {entry}}}, got {as_yaml(entry)}')
        if isinstance(entry, dict) and 'name' in entry:
            renamed[section] = entry | {'name': _listed_name(source, section, str(entry['name']), f'{section}.name')}
    return renamed


def _listed_name(source: Sources, section: str, name: str, key: str) -> str:
    try:
        listed = registry.canonical(section, name)
    except UserError as error:
        raise source.error(key, one_line(error)) from error
    if listed is None:
        kind, known = section.removesuffix('s'), registry.in_library(name) if section == 'model' else None
        near = f"; write '{known}'" if known else nearest(name, registry.components(section))
        raise source.error(key, f"unknown {kind} '{name}'{near}")
    return listed


def _is_same_component(below: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return 'name' not in over or over['name'] == below.get('name')


def _contains(values: Any, key: list[str]) -> bool:
    return not key or (isinstance(values, Mapping) and key[0] in values and _contains(values[key[0]], key[1:]))
