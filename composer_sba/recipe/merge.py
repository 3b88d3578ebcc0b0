"""Where a recipe's keys come from: files, the files they extend and the command line, and how they merge.

Each layer lies over the one before. Three rules merge them:

- mappings merge key by key, everything else is replaced;
- a mapping that names another component (``scheduler: {name: ...}``) replaces the mapping below it whole, so that no
  argument of one component reaches another;
- ``null`` in ``algorithms``, ``callbacks`` or ``loggers`` takes the entry below it away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from composer_sba.errors import RecipeError, nearest, one_line
from composer_sba.recipe import registry
from composer_sba.recipe.signature import show

NAMED = ('algorithms', 'callbacks', 'loggers')  # sections that map names to arguments
SINGLE = ('model', 'optimizer', 'scheduler')  # sections of one component, with its name under `name`
COMMAND_LINE = 'command line'


@dataclass(frozen=True)
class Sources:
    """The layers of a recipe, lowest first, kept to tell in which of them a mistake was written.

    Args:
        layers (tuple): Name of the file, or ``'command line'``, and the keys it gives.
    """

    layers: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    def error(self, key: str, problem: str) -> RecipeError:
        """Word a mistake in one line: the layer that last gave the key (else the recipe), the key, the problem."""
        givers = [name for name, values in self.layers if _has(values, key.split('.'))]
        return RecipeError(f'{[self.file, *givers][-1]}: {key}: {problem}')

    @property
    def file(self) -> str:
        """The recipe's own file, the last of its files."""
        return next((name for name, _ in reversed(self.layers) if name != COMMAND_LINE), 'recipe')

    def merged(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Merge the layers over ``defaults`` by the rules above.

        Raises:
            RecipeError: If ``null`` takes away what no layer below has.
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
                    raise self.error(f'{at}{key}', 'null takes an entry away, and there is none; {} gives defaults')
                del merged[key]
            elif isinstance(below, dict) and isinstance(value, dict) and _same_component(below, value):
                merged[key] = self._merge(below, value, f'{at}{key}.')
            else:
                merged[key] = value
        return merged


def read(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Sources:
    """Read files, the files they extend, and overrides; spell every component as the registry lists it.

    Args:
        paths (Sequence[str | Path]): YAML files, each over the one before; ``extends: FILE`` is relative to the file.
            A file that is not there is looked for among the ``shipped()`` ones.
        overrides (Sequence[str]): ``key.sub=value``, the value in YAML.

    Returns:
        Sources: Root of the first ``extends`` chain first, overrides last.

    Raises:
        RecipeError: On a file that is missing or not YAML, a cycle, an override without a key and ``=``, or a component
            nobody knows.
    """
    files = [layer for path in paths for layer in _read_file(_found(Path(path), path))]
    layers = [*files, (COMMAND_LINE, _read_overrides(overrides))]
    return Sources(tuple((name, _spelled(Sources(((name, values),)), values)) for name, values in layers))


def shipped() -> Path:
    """The folder of the recipes that come with the package: within it in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / 'yamls' if (package / 'yamls').is_dir() else package.parent / 'yamls'


def _read_file(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    if path.resolve() in [each.resolve() for each in above]:
        raise RecipeError(f'{above[-1]}: extends: a cycle, {" -> ".join(each.name for each in (*above, path))}')
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        cause = f'{above[-1]}: extends: ' if above else ''
        # Of YAML that is but a number OmegaConf says it by an OSError of its own
        problem = error.strerror or 'expected a mapping of keys, got another kind of YAML'
        raise RecipeError(f'{cause}{path}: {problem}') from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''
        raise RecipeError(f'{path}: {where}not YAML: {error.problem}') from error
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        # The last four are what PyYAML raises over dates, keys, tags and depths that it did not think of
        raise RecipeError(f'{path}: not YAML: {one_line(error)}') from error
    if not isinstance(values, dict):
        raise RecipeError(f'{path}: expected a mapping of keys, got a {type(values).__name__}')
    base = values.pop('extends', None)
    if not isinstance(base, str | None) or '\0' in (base or ''):
        raise RecipeError(f'{path}: extends: expected the name of a file, got {show(base)}')
    lower = [] if base is None else _read_file(_found(path.parent / base, base), (*above, path))
    return [*lower, (str(path), {str(key): value for key, value in values.items()})]


def _found(path: Path, name: str | Path) -> Path:
    return path if path.exists() or not (shipped() / name).is_file() else shipped() / name


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """All overrides as one layer: ``optimizer.name=adam`` keeps the ``optimizer.betas`` beside it, in either order."""
    together: Any = OmegaConf.create()
    for text in overrides:
        key, equals, _ = text.partition('=')
        if not equals or not all(key.split('.')):
            raise RecipeError(f"{COMMAND_LINE}: expected key=value or key.sub=value, got '{text}'")
        try:
            together = OmegaConf.merge(together, OmegaConf.from_dotlist([text]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise RecipeError(f"{COMMAND_LINE}: {key}: expected YAML after =, got '{text}'") from error
    return cast(dict[str, Any], OmegaConf.to_container(together))


def _spelled(source: Sources, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of one layer, its components under their listed names, so that layers that mean the same meet."""
    spelled = dict(values)
    for section in NAMED:
        entries = values.get(section) or {}
        if not isinstance(entries, dict):
            raise source.error(section, f'expected a mapping of names to arguments, got {show(entries)}')
        names = [_listed(source, section, str(name), f'{section}.{name}') for name in entries]
        if len(set(names)) < len(names):
            raise source.error(section, f"'{max(names, key=names.count)}' is named twice")
        if section in values:
            spelled[section] = dict(zip(names, entries.values(), strict=True))
    for section in SINGLE:
        entry = values.get(section)
        if isinstance(entry, dict) and 'name' in entry:
            spelled[section] = entry | {'name': _listed(source, section, str(entry['name']), f'{section}.name')}
    return spelled


def _listed(source: Sources, section: str, name: str, key: str) -> str:
    listed = registry.canonical(section, name)
    if listed is None:
        kind = section.removesuffix('s')
        raise source.error(key, f"unknown {kind} '{name}'{nearest(name, registry.components(section))}")
    return listed


def _same_component(below: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return 'name' not in over or over['name'] == below.get('name')


def _has(values: Any, key: list[str]) -> bool:
    return not key or (isinstance(values, Mapping) and key[0] in values and _has(values[key[0]], key[1:]))
