"""Records read back compared with those appended; files damaged by kills, full disks and edits.

Run: pytest tests/test_records.py
"""

import ast
import json
import os
from multiprocessing import get_context
from pathlib import Path

import pytest

from composer_sba.errors import UserError
from composer_sba.study import records
from composer_sba.study.records import append_record, read_records
from invented_runs import RUNS, record, write


def test_records_are_read_back_unchanged(tmp_path):
    write(tmp_path / 'new', *RUNS)
    assert read_records(tmp_path / 'new' / 'methods.jsonl') == RUNS
    assert read_records(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize(
    ('line', 'problem'),
    [
        ('{"study": ', 'is not JSON'),
        ('', 'is not JSON'),
        ('[1]', 'is not a JSON object'),
        (
            json.dumps({key: value for key, value in record().items() if key not in ('seed', 'loss')}),
            'lacks loss, seed',
        ),
        (json.dumps(record() | {'accuracy': '0.6'}), "has accuracy '0.6', expected float"),
        (json.dumps(record() | {'seed': True}), 'has seed True, expected int'),
        (json.dumps(record() | {'network': 8}), 'has network 8, expected str'),
        (json.dumps(record() | {'versions': None}), 'has versions None, expected dict'),
        (json.dumps(record() | {'flops': '1e14'}), "has flops '1e14', expected float | None"),
        (json.dumps(record(recipe={'max_duration': '30'})), "has recipe.max_duration '30', expected a duration"),
        (json.dumps(record() | {'epochs': []}), 'has epochs whose seconds are not training time since the run began'),
        (json.dumps(record() | {'epochs': [{'epoch': 1}]}), 'has epochs that are not evaluations'),
        (json.dumps(record() | {'epochs': [{'seconds': 1.0}]}), 'has epochs that are not evaluations'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, problem):
    path = tmp_path / 'methods.jsonl'
    path.write_text(f'{json.dumps(record())}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f'{path}, line 2: {problem}') and '\n' not in str(caught.value)
    with pytest.raises(UserError, match='report|record'):
        append_record(path, json.loads(line) if line.startswith('{"study": "') else {})


def test_an_incomplete_last_line_gives_a_warning_and_is_removed(tmp_path):
    path = tmp_path / 'methods.jsonl'
    whole = json.dumps(record())
    path.write_text(f'{whole}\n{whole[:100]}')
    with pytest.warns(UserWarning, match=f'{path}, line 2: incomplete, left out'):
        assert read_records(path) == [record()]
    append_record(path, record(seed=2))
    assert read_records(path) == [record(), record(seed=2)]


def test_a_last_line_without_newline_counts(tmp_path):
    path = tmp_path / 'methods.jsonl'
    path.write_text(json.dumps(record()))
    assert read_records(path) == [record()]
    append_record(path, record(seed=2))
    assert read_records(path) == [record(), record(seed=2)]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'methods.jsonl'
    append_record(path, record())
    genuine = os.write
    monkeypatch.setattr('os.write', lambda descriptor, data: genuine(descriptor, data[:10]))
    with pytest.raises(OSError, match='only a part of the line could be written'):
        append_record(path, record(seed=2))
    monkeypatch.undo()
    assert read_records(path) == [record()]


def _append_ten(path, first):
    for seed in range(first, first + 10):
        append_record(path, record(seed=seed))


def test_processes_append_at_the_same_time(tmp_path):
    path = tmp_path / 'methods.jsonl'
    forkserver = get_context('forkserver')
    workers = [forkserver.Process(target=_append_ten, args=(path, first), daemon=True) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert sorted(run['seed'] for run in read_records(path)) == list(range(30))


def test_a_study_runs_without_scipy_and_matplotlib():
    """The modules of the command and those that they import at their top level."""
    folder, waiting, seen = Path(records.__file__).parent, ['__main__', 'command'], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        nodes = ast.parse((folder / f'{name}.py').read_text()).body
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        assert not [module for module in modules if module.startswith(('scipy', 'matplotlib'))], name
        own = [module.rpartition('.')[2] for module in modules if module.startswith('composer_sba.study.')]
        waiting += [module for module in own if module not in seen]
    assert {'records', 'runner', 'plan', 'step_timing'} < seen
