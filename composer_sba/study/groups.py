"""Groups of comparable runs, and the rows of a group's table."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from composer.core import Time

from composer_sba.errors import UserError
from composer_sba.study.display_names import LONGER, display_name, duration_in_words, row_label, scaled_duration
from composer_sba.study.recipe_index import BASELINE
from composer_sba.study.records import Record

# The parts in which the recipes of one row of a table must agree, seeds excepted
_COMPARED = (
    *('model', 'train_dataset', 'eval_dataset', 'optimizer', 'scheduler', 'algorithms', 'global_train_batch_size'),
    *('max_duration', 'scale_schedule_ratio', 'precision'),
)


class Group(NamedTuple):
    """The facts that runs must share to be compared."""

    study: str
    network: str
    dataset: str
    train_samples: int
    max_duration: str  # scaled by scale_schedule_ratio
    hardware: str  # or its kind, in the study of robustness, which compares no times

    @property
    def title(self) -> str:
        """The heading of the group.

        Example:
            >>> Group('methods', 'resnet8', 'cifar10', 5000, '30ep', 'Xeon').title
            'ResNet8 on CIFAR-10, 5,000 training images, 30 epochs'
        """
        names = dict.fromkeys(map(display_name, (self.network, self.dataset)))  # once if both are called digits
        return f'{" on ".join(names)}, {self.train_samples:,} training images, {duration_in_words(self.max_duration)}'


def group(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Sort runs into groups of comparable runs.

    Args:
        records (Iterable[Record]): From :func:`composer_sba.study.records.read_records`.

    Returns:
        dict[Group, list[Record]]: Groups and runs in the order in which they first appear. A run of ``longer`` or
        ``twice`` belongs to the group of the longest baseline that is shorter than itself.

    Raises:
        UserError: If a method has two runs of one seed or runs of different recipes, whose mean would have no meaning.
    """
    groups: dict[Group, list[Record]] = {}
    for record in sorted(records, key=lambda record: record['method'] in LONGER):  # after their baselines
        home = _group(record)
        if record['method'] in LONGER:
            shorter = [each for each, runs in groups.items() if _has_shorter_baseline(each, runs, home)]
            home = max(shorter, key=lambda each: Time.from_timestring(each.max_duration).value, default=home)
        groups.setdefault(home, []).append(record)
    for runs in groups.values():
        for label, row in rows(runs).items():
            _check_row(label, row)
    return groups


def rows(runs: Iterable[Record]) -> dict[str, list[Record]]:
    """Sort the runs of a group by method and setting.

    Args:
        runs (Iterable[Record]): The runs of a group.

    Returns:
        dict[str, list[Record]]: Label of the method and setting -> runs, in order of appearance.
    """
    by_setting: dict[tuple[str, str], list[Record]] = {}
    for run in runs:
        by_setting.setdefault((run['method'], json.dumps(run['setting'], sort_keys=True)), []).append(run)
    labelled: dict[str, list[Record]] = {}
    for (method, _), row in by_setting.items():
        label = row_label(row[0])
        labelled[f'{label} [{method}]' if label in labelled else label] = row
    return labelled


def _group(record: Record) -> Group:
    factor = 2 if 'raw rows' in record['setting'] else 1  # half of the raw rows a step, for as many steps
    return Group(
        study=record['study'],
        network=record['network'],
        dataset=record['dataset'],
        train_samples=record['train_samples'],
        max_duration=(scaled_duration(record['recipe']) * factor).to_timestring(),
        hardware=record['device'] if record['study'] == 'robustness' else record['hardware'],
    )


def _has_shorter_baseline(group: Group, runs: list[Record], longer: Group) -> bool:
    time, limit = Time.from_timestring(group.max_duration), Time.from_timestring(longer.max_duration)
    alike = group._replace(max_duration=longer.max_duration) == longer and time.unit == limit.unit
    return alike and time.value < limit.value and any(run['method'] == BASELINE for run in runs)


def _check_row(label: str, row: list[Record]) -> None:
    """Raise UserError if the runs of a row are not one recipe with different seeds."""
    first = row[0]
    where = f'results of {first["study"]}, {first["network"]} on {first["dataset"]}, {label}'
    run_of_seed: dict[int, Record] = {}
    for run in row:
        twin = run_of_seed.setdefault(run['seed'], run)
        if twin is not run:
            hashes = f'{twin["hash"]} and {run["hash"]}'
            raise UserError(f'{where}: seed {run["seed"]} has two runs, {hashes}: delete the line of one')
        for key in _COMPARED:
            if _seedless(run['recipe'].get(key)) != _seedless(first['recipe'].get(key)):
                seeds = f'seeds {first["seed"]} and {run["seed"]}'
                raise UserError(f'{where}: the recipes of {seeds} differ in {key}: delete the lines of one recipe')


def _seedless(part: Any) -> Any:
    """Return a part of a recipe without its seeds: ``seed``, ``shuffle_seed`` and the like."""
    if isinstance(part, dict):
        return {key: _seedless(value) for key, value in part.items() if key.split('_')[-1] != 'seed'}
    return part
