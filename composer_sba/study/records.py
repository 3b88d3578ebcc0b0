"""Finished runs as lines of JSON, appended whole and read with every line checked."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from filelock import FileLock

from composer_sba.errors import UserError
from composer_sba.study.display_names import length


class Evaluation(TypedDict):
    """One evaluation of a run. Losses are in nats, accuracy and calibration error fractions of 1."""

    epoch: int
    seconds: float  # of training since the run began, evaluations left out
    accuracy: float
    loss: float | None
    calibration_error: float | None
    train_loss: float | None


class Record(TypedDict):
    """One finished run. Its metrics are medians over the evaluations of its last five epochs."""

    study: str
    network: str
    dataset: str
    method: str
    setting: dict[str, Any]
    seed: int
    hash: str
    recipe: dict[str, Any]
    commit: str
    date: str
    device: str
    hardware: str
    jobs: int
    versions: dict[str, str]
    train_samples: int
    epochs: list[Evaluation]
    accuracy: float
    loss: float | None
    calibration_error: float | None
    train_seconds: float
    wall_seconds: float
    images_per_second: float | None
    flops: float | None


def read(path: Path) -> list[Record]:
    """Read the finished runs of a study.

    Args:
        path (Path): ``results/<study>.jsonl``. A file that does not exist holds no runs.

    Returns:
        list[Record]: In the order of the file. A last line that was torn as it was written is warned of and left out.

    Raises:
        UserError: If any other line is not a record; the message names file, line and fault.

    Example:
        >>> read(Path('no/such.jsonl'))
        []
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b'\n')
    if _is_json(rest):  # an editor may leave out the last newline
        lines.append(rest)
    elif rest:
        warnings.warn(f'{path}, line {len(lines) + 1}: torn as it was written, left out', stacklevel=2)
    for number, line in enumerate(lines, start=1):
        fault = _fault(line)
        if fault:
            raise UserError(f'{path}, line {number}: {fault}: correct the line or delete it')
    return [cast(Record, json.loads(line)) for line in lines]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a run to the file of its study, whole or not at all, also while other processes append.

    Args:
        path (Path): ``results/<study>.jsonl``, made with its folder if need be. The rest of a line that was torn as it
            was written is cut off first.
        record (Mapping[str, Any]): The run, as :class:`Record` has it.

    Raises:
        UserError: If :func:`read` would refuse the record.
        OSError: If the line cannot be written in full; the file then is as before.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b'\n'
    fault = _fault(line)
    if fault:
        raise UserError(f'{path}: the record of a run {fault}')
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f'.{path.name}.lock')):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = path.read_bytes()
            rest = before[before.rfind(b'\n') + 1 :]
            if _is_json(rest):
                line = b'\n' + line
            elif rest:
                os.ftruncate(descriptor, len(before) - len(rest))
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError(f'{path}: only a part of the line could be written')
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _fault(line: bytes) -> str:
    """What keeps a line from being a record; empty if nothing does."""
    try:
        record = json.loads(line)
    except ValueError:
        return 'is not JSON'
    if not isinstance(record, dict):
        return 'is not a JSON object'
    missing = sorted(Record.__required_keys__ - record.keys())
    if missing:
        return f'lacks {", ".join(missing)}'
    for key, kind in {'recipe': dict, 'setting': dict, 'seed': int, 'accuracy': float, 'train_seconds': float}.items():
        if not isinstance(record[key], kind):
            return f'has {key} {record[key]!r}, expected {kind.__name__}'
    try:
        length(record['recipe'])
    except (TypeError, ValueError):
        return f"has recipe.max_duration {record['recipe'].get('max_duration')!r}, expected a duration such as '30ep'"
    try:
        seconds = [evaluation['seconds'] for evaluation in record['epochs']]
        if not seconds or sorted(seconds) != seconds:
            return 'has epochs whose seconds are not training time since the run began'
    except (KeyError, TypeError):
        return 'has epochs that are not evaluations'
    return ''
