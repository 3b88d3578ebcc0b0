"""Recipes with mistakes: misspelled, missing, misplaced and malicious keys and values."""

import copy
import datetime
import inspect
import math
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from composer_sba.data.loader import DatasetConfig
from composer_sba.recipe.recipe import Recipe
from composer_sba.recipe.registry import components
from composer_sba.recipe.signature import annotations, fits

# These call a service and need an account there
_ONLINE = {'mosaicml', 'remote_uploader_downloader', 'slack', 'wandb', 'mlflow', 'neptune', 'cometml'}

_ODD: list[Any] = [
    *(None, True, False, '', ' ', 'x', 'head', '5', '5ep', '-1ep', '0ba', '1e400', 'nan', 'null', 'a' * 300),
    *(
        'ünï·𝔘',
        '\u202egpj',
        'tab\there',
        'two\nlines',
        'nul\0',
        '/dev/null/x',
        '~',
        '~/x',
        '~nobody-of-this-name/x',
        '${seed}',
        '${nowhere}',
        '${',
        '???',
    ),
    *(0, 1, -1, 2, 3, 0.5, -0.5, 1e-320, 1e308, 65_537, 2**31, 2**63, 2**64, -(2**63), 10**30),
    *(math.nan, math.inf, -math.inf, datetime.date(2020, 2, 2), b'\x00\xff'),
    *([], [1], ['head'], [None], [[1]], {}, {'name': 'x'}, {'name': 'linear'}, {'a': {'b': 1}}, {1: 2}),
]


@dataclass(frozen=True)
class Mutant:
    """A recipe's bytes, overrides for it, and descriptions of what was changed."""

    content: bytes
    overrides: tuple[str, ...]
    changes: tuple[str, ...]


def base(digits: Path) -> dict[str, Any]:
    """Return a recipe without mistakes that trains one batch quickly."""
    data = {'name': 'digits', 'local': str(digits), 'in_memory': True, 'subset': 40}
    return {
        'model': {'name': 'digits_net', 'num_classes': 10, 'dropout': 0.1},
        'train_dataset': data | {'split': 'train'},
        'eval_dataset': data | {'split': 'val'},
        'optimizer': {'name': 'sgd', 'lr': 0.1, 'momentum': 0.9},
        'scheduler': {'name': 'multi_step', 'milestones': ['3ep', '4ep'], 'gamma': 0.1},
        'algorithms': {
            'sba': {
                'layers': ['conv2', 'head'],
                'fold': 2,
                'augment_prob': {'name': 'linear', 'alpha_i': 1, 'alpha_f': 1},
                'vicinity': {'sigma': 0.1, 'basis': 'hadamard'},
            },
            'mixup': {'alpha': 0.2, 'interpolate_loss': False},
            'label_smoothing': {'smoothing': 0.1},
        },
        'callbacks': {'lr_monitor': {}, 'last_epochs_median': {}},
        'loggers': {'file': {'filename': 'log.txt'}},
        'max_duration': '1ba',
        'eval_interval': '1ba',
        'global_train_batch_size': 8,
        'device': 'cpu',
        'save_folder': 'runs/${run_name}',
        'progress_bar': False,
    }


def paths(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values below ``node``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, key)
        yield from paths(value, (*above, key))


def at(recipe: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        recipe = recipe[key]
    return recipe


def _options(section: str | None, name: str | None) -> dict[str, Any]:
    """Return the keys of a section or a component, with their types."""
    build: Any = Recipe
    if section in ('train_dataset', 'eval_dataset'):
        build = DatasetConfig
    elif section is not None and name is not None:
        build = components(section)[name]
    known = [key for key in inspect.signature(build).parameters if key not in ('params', 'kwargs', 'sources')]
    return {key: annotations(build).get(key, Any) for key in known}


@st.composite
def odd(draw: Any, hint: Any = Any) -> Any:
    """Draw a value that nobody means; three times in four it has the type of the annotation."""
    fitting = [value for value in _ODD if fits(hint, value)]
    return copy.deepcopy(draw(st.sampled_from(fitting if fitting and draw(st.integers(0, 3)) else _ODD)))


_KINDS = ['value', 'value', 'option', 'option', 'component', 'misspelled', 'unknown', 'missing', 'moved']
_SECTIONS = [None, None, 'train_dataset', 'eval_dataset', 'model', 'optimizer', 'scheduler']
_NAMES = ['__class__', '_target_', 'a.b', 'extends', 'name']
_BREAKS = ['tag', 'tag', 'cut', 'character', 'twice', 'tab', 'bytes', 'empty', 'extends', 'alias', 'document']
_TAGS = [
    '!!python/object/apply:os.system ["touch pwned"]',
    '!!python/name:os.system',
    '!!python/module:os',
    '!!python/object/new:subprocess.Popen [[touch, pwned]]',
    '!include other.yaml',
    '!!set {a, b}',
    '!!timestamp x',
]
_VALUES = ['', '1', '-1', 'null', '.nan', '[', '{a: 1}', '[1]', '!!python/name:os.system', '"', '${x}', '1e99', 'ü']
_FORMS = ['{key}={value}', '{key}={value}', '{key}.x={value}', '{key}[0]={value}', '.{key}={value}', '{key}']
_FORMS += ['={value}', '{key}=={value}', '{key}..x={value}']


@st.composite
def misspelled(draw: Any, key: str) -> str:
    """Draw a key with one letter added, removed or changed."""
    at = draw(st.integers(0, max(len(key) - 1, 0)))
    letter = draw(st.sampled_from(string.ascii_letters + '_-. é\u200b'))
    return draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key.upper()]))


@st.composite
def edited(draw: Any, recipe: dict[str, Any]) -> str:
    """Change one value or key of ``recipe``; return a description."""
    kind = draw(st.sampled_from(_KINDS))
    path = draw(st.sampled_from(list(paths(recipe))))
    *above, key = path
    parent = at(recipe, tuple(above))
    if kind == 'value':
        parent[key] = draw(odd(float if isinstance(parent[key], float) else type(parent[key])))
        return f'{path} = {parent[key]!r}'
    if kind == 'option':
        section = draw(st.sampled_from(_SECTIONS))
        target = recipe if section is None else recipe.get(section)
        if not isinstance(target, dict):
            return 'nothing'
        name = target.get('name') if section in ('model', 'optimizer', 'scheduler') else None
        known = isinstance(name, str) and name in components(section)
        options = _options(section, name if known else None)
        option = draw(st.sampled_from(list(options)))
        target[option] = draw(odd(options[option]))
        return f'{section}.{option} = {target[option]!r}'
    if kind == 'component':
        section = draw(st.sampled_from(['algorithms', 'callbacks', 'loggers', 'scheduler', 'optimizer', 'model']))
        name = draw(st.sampled_from([each for each in components(section) if each not in _ONLINE]))
        options = _options(section, name) or {'x': int}
        keys = draw(st.lists(st.sampled_from(list(options)), max_size=2, unique=True))
        arguments = {each: draw(odd(options[each])) for each in keys}
        if section in ('algorithms', 'callbacks', 'loggers'):
            if not isinstance(recipe.get(section), dict):
                recipe[section] = {}
            recipe[section][name] = arguments
        else:
            recipe[section] = {'name': name, **({'num_classes': 10} if section == 'model' else {}), **arguments}
        return f'{section}.{name} = {arguments!r}'
    if kind == 'misspelled' and isinstance(key, str):
        new = draw(misspelled(key))
        parent[new] = parent.pop(key)
        return f'{path} is spelled {new!r}'
    if kind == 'unknown' and isinstance(parent, dict):
        new = draw(st.text(min_size=1, max_size=8) | st.sampled_from(_NAMES))
        parent[new] = draw(odd())
        return f'{(*above, new)} = {parent[new]!r}'
    if kind == 'moved':
        value = parent[key]
        parent[key] = draw(st.sampled_from([[value], {'value': value}, str(value)]))
        return f'{path} = {parent[key]!r}'
    if isinstance(parent, dict):
        del parent[key]
        return f'{path} is missing'
    return 'nothing'


@st.composite
def broken(draw: Any, text: str) -> tuple[bytes, str]:
    """Break the text of a recipe; return it with a description."""
    lines = text.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(_BREAKS))
    if kind == 'tag':
        tag = draw(st.sampled_from(_TAGS))
        key = draw(st.sampled_from(['seed', 'callbacks', 'optimizer', 'x']))
        return f'{text}\n{key}: {tag}\n'.replace(f'\n{key}:', f'\n{key}_:', 1).encode(), f'{key}: {tag}'
    if kind == 'cut':
        cut = draw(st.integers(0, len(text)))
        return text[:cut].encode(), f'cut at {cut}'
    if kind == 'character':
        cut = draw(st.integers(0, len(text)))
        character = draw(st.sampled_from('{}[]:,&*!|>%@`"\'#\0\x07\ufeff\u2028'))
        return (text[:cut] + character + text[cut:]).encode(), f'{character!r} at {cut}'
    if kind == 'twice':
        return ''.join([*lines, lines[place].lstrip() or 'seed: 1\n', lines[place]]).encode(), f'line {place} again'
    if kind == 'tab':
        lines[place] = '\t' + lines[place]
        return ''.join(lines).encode(), f'a tab in line {place}'
    if kind == 'bytes':
        return draw(
            st.sampled_from([b'\xff\xfe\x00', b'seed: \xe9\n', text.encode('utf-16'), b'\x80' * 9])
        ), 'not UTF-8'
    if kind == 'extends':
        name = draw(st.sampled_from(['recipe.yaml', 'gone.yaml', '.', '/dev/null', '', 'nul\\0', '../' * 40 + 'x']))
        return f'extends: "{name}"\n{text}'.encode(), f'extends: {name}'
    if kind == 'alias':
        bomb = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
            f'{two}: &{two} [{", ".join([f"*{one}"] * 9)}]\n' for one, two in zip('abcdefg', 'bcdefgh', strict=True)
        )
        return draw(st.sampled_from([bomb.encode(), f'x: &x [*x]\n{text}'.encode(), b'a: *nowhere\n'])), 'aliases'
    if kind == 'document':
        return f'{text}---\n{text}'.encode(), 'two documents'
    return draw(st.sampled_from([b'', b'\n', b'# nothing\n', b'null\n', b'3\n', b'text\n', b'--- []\n'])), 'empty'


@st.composite
def overriding(draw: Any, recipe: dict[str, Any]) -> str:
    """Draw an override, right or wrong."""
    path = [each for each in draw(st.sampled_from(list(paths(recipe)))) if isinstance(each, str)]
    key = '.'.join(path) or 'seed'
    value, form = draw(st.sampled_from(_VALUES)), draw(st.sampled_from(_FORMS))
    return form.format(key=key, value=value)


@st.composite
def mutants(draw: Any, digits: Path) -> Mutant:
    """Draw a recipe with one to three mistakes."""
    recipe = base(digits)
    changes = [draw(edited(recipe)) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2])))]
    text = yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)
    content, overrides = text.encode('utf-8', 'surrogatepass'), ()
    also = draw(st.sampled_from(['text', 'override', *['nothing'] * 4 * bool(changes)]))
    if also == 'text':
        content, change = draw(broken(text))
        changes.append(change)
    elif also == 'override':
        overrides = tuple(draw(st.lists(overriding(base(digits)), min_size=1, max_size=2)))
        changes += overrides
    return Mutant(content, overrides, tuple(changes))
