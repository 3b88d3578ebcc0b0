"""Records read back compared with those appended, and against what killed runs, full disks and people leave in a file.

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
from composer_sba.study.records import append, read
from invented_runs import RUNS, record, write


def test_records_come_back_as_they_went(tmp_path):
    write(tmp_path / 'new', *RUNS)
    assert read(tmp_path / 'new' / 'rivals.jsonl') == RUNS
    assert read(tmp_path / 'none.jsonl') == []


@pytest.mark.parametrize(
    ('line', 'fault'),
    [
        ('{"study": ', 'is not JSON'),
        ('', 'is not JSON'),
        ('[1]', 'is not a JSON object'),
        (
            json.dumps({key: value for key, value in record().items() if key not in ('seed', 'loss')}),
            'lacks loss, seed',
        ),
        (json.dumps(record() | {'accuracy': '0.6'}), "has accuracy '0.6', expected float"),
        (json.dumps(record(recipe={'max_duration': '30'})), "has recipe.max_duration '30', expected a duration"),
        (json.dumps(record() | {'epochs': []}), 'has epochs whose seconds are not training time since the run began'),
        (json.dumps(record() | {'epochs': [{'epoch': 1}]}), 'has epochs that are not evaluations'),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, fault):
    path = tmp_path / 'rivals.jsonl'
    path.write_text(f'{json.dumps(record())}\n{line}\n')
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f'{path}, line 2: {fault}') and '\n' not in str(caught.value)
    with pytest.raises(UserError, match='report|record'):
        append(path, json.loads(line) if line.startswith('{"study": "') else {})


def test_a_torn_last_line_is_told_of_and_cut_off(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    whole = json.dumps(record())
    path.write_text(f'{whole}\n{whole[:100]}')
    with pytest.warns(UserWarning, match=f'{path}, line 2: torn as it was written, left out'):
        assert read(path) == [record()]
    append(path, record(seed=2))
    assert read(path) == [record(), record(seed=2)]


def test_a_last_line_without_newline_counts(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    path.write_text(json.dumps(record()))
    assert read(path) == [record()]
    append(path, record(seed=2))
    assert read(path) == [record(), record(seed=2)]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / 'rivals.jsonl'
    append(path, record())
    genuine = os.write
    monkeypatch.setattr('os.write', lambda descriptor, data: genuine(descriptor, data[:10]))
    with pytest.raises(OSError, match='only a part of the line could be written'):
        append(path, record(seed=2))
    monkeypatch.undo()
    assert read(path) == [record()]


def _append_ten(path, first):
    for seed in range(first, first + 10):
        append(path, record(seed=seed))


def test_processes_append_at_the_same_time(tmp_path):
    path = tmp_path / 'rivals.jsonl'
    spawn = get_context('spawn')
    workers = [spawn.Process(target=_append_ten, args=(path, first), daemon=True) for first in (0, 10, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert sorted(run['seed'] for run in read(path)) == list(range(30))


def test_a_study_runs_without_scipy_and_matplotlib():
    needed = {'records', 'groups', 'names', 'paper'}
    folder = Path(records.__file__).parent
    nodes = [node for each in sorted(needed) for node in ast.walk(ast.parse((folder / f'{each}.py').read_text()))]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not {module for module in modules if module.startswith(('scipy', 'matplotlib'))}
    assert {module.rpartition('.')[2] for module in modules if module.startswith('composer_sba.study')} <= needed
