"""Finished runs as lines of JSON: each is appended as a whole, and every line is checked when it is read."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints

from composer_sba.errors import UserError
from composer_sba.json_lines import append_line, is_json
from composer_sba.study.display_names import scaled_duration


class Evaluation(TypedDict):
    """One evaluation of a run. Losses are in nats; accuracy and calibration error are fractions of 1."""

    epoch: int
    seconds: float  # of training since the run began, without evaluation
    accuracy: float
    loss: float | None
    calibration_error: float | None
    train_loss: float | None


class _Run(TypedDict):
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


class Record(_Run, total=False):
    """One finished run. Its metrics are medians over the evaluations of its last five epochs."""

    robustness: dict[str, Any]  # of composer_sba.study.robustness.measure, in runs of that study


def read_records(path: Path) -> list[Record]:
    """Read the finished runs of a study.

    Args:
        path (Path): ``results/<study>.jsonl``. A file that does not exist holds no runs.

    Returns:
        list[Record]: The runs in the order of the file. If a kill has cut off the last line, it is left out with a
        warning.

    Raises:
        UserError: If any other line is not a record; the message names the file, the line and the problem.

    Example:
        >>> read_records(Path('no/such.jsonl'))
        []
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b'\n')
    if is_json(rest):  # an editor may leave out the last newline
        lines.append(rest)
    elif rest:
        warnings.warn(f'{path}, line {len(lines) + 1}: incomplete, left out', stacklevel=2)
    for number, line in enumerate(lines, start=1):
        problem = _problem(line)
        if problem:
            raise UserError(f'{path}, line {number}: {problem}: correct the line or delete it')
    return [cast(Record, json.loads(line)) for line in lines]


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append a run to the file of its study, as :func:`.append_line` does.

    Args:
        path (Path): ``results/<study>.jsonl``.
        record (Mapping[str, Any]): The run, with the keys of :class:`Record`.

    Raises:
        UserError: If :func:`read_records` would refuse the record.
        OSError: If the line cannot be written completely. The file is then unchanged.
    """
    problem = _problem(json.dumps(record).encode())
    if problem:
        raise UserError(f'{path}: the record of a run {problem}')
    append_line(path, record)


def _problem(line: bytes) -> str:
    """Return why a line is not a record, or ``''`` if it is one."""
    try:
        record = json.loads(line)
    except ValueError:
        return 'is not JSON'
    if not isinstance(record, dict):
        return 'is not a JSON object'
    missing = sorted(Record.__required_keys__ - record.keys())
    if missing:
        return f'lacks {", ".join(missing)}'
    for key, hint in get_type_hints(Record).items():
        if key in record and not _matches(record[key], hint):
            return f'has {key} {record[key]!r}, expected {getattr(hint, "__name__", hint)}'
    try:
        scaled_duration(record['recipe'])
    except (TypeError, ValueError):
        return f"has recipe.max_duration {record['recipe'].get('max_duration')!r}, expected a duration such as '30ep'"
    hints = get_type_hints(Evaluation)
    for evaluation in record['epochs']:
        if not isinstance(evaluation, dict) or not all(
            key in evaluation and _matches(evaluation[key], hint) for key, hint in hints.items()
        ):
            return 'has epochs that are not evaluations'
    seconds = [evaluation['seconds'] for evaluation in record['epochs']]
    if not seconds or sorted(seconds) != seconds:
        return 'has epochs whose seconds are not training time since the run began'
    return ''


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field; the items of lists and mappings are not compared."""
    alternatives = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(get_origin(each) or each for each in alternatives)
    # JSON does not distinguish 1 from 1.0
    return isinstance(value, (*kinds, int) if float in kinds else kinds) and not isinstance(value, bool)
