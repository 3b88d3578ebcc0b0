"""Runs sorted into groups, inside which they may be compared, and into the rows of a group's table."""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from composer.core import Time

from composer_sba.errors import UserError
from composer_sba.study.display_names import LONGER, duration, label, length, name
from composer_sba.study.records import Record

# What the recipes of one row of a table must share; seeds excepted
_SAME = (
    *('model', 'train_dataset', 'optimizer', 'scheduler', 'algorithms', 'global_train_batch_size', 'max_duration'),
    *('scale_schedule_ratio', 'precision'),
)


class Group(NamedTuple):
    """What runs must have in common to be compared."""

    study: str
    network: str
    dataset: str
    train_samples: int
    max_duration: str  # as scale_schedule_ratio scales it
    hardware: str

    @property
    def title(self) -> str:
        """The heading of the group.

        Example:
            >>> Group('rivals', 'resnet8', 'cifar10', 5000, '30ep', 'Xeon').title
            'ResNet8 on CIFAR-10, 5,000 training images, 30 epochs'
        """
        what = dict.fromkeys([name(self.network), name(self.dataset)])  # the digits' network is called digits too
        return f'{" on ".join(what)}, {self.train_samples:,} training images, {duration(self.max_duration)}'


def group(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Sort runs into groups whose runs may be compared.

    Args:
        records (Iterable[Record]): From :func:`read`.

    Returns:
        dict[Group, list[Record]]: Groups and runs in the order in which they first appear. A run of
        ``longer`` or ``twice`` stands with the longest baseline that is shorter than itself.

    Raises:
        UserError: If a method has two runs of one seed, or runs of different recipes: their mean would mean nothing.
    """
    groups: dict[Group, list[Record]] = {}
    for record in sorted(records, key=lambda record: record['method'] in LONGER):  # after their baselines
        home = _group(record)
        if record['method'] in LONGER:
            shorter = [each for each, runs in groups.items() if _is_shorter_baseline(each, runs, home)]
            home = max(shorter, key=lambda each: Time.from_timestring(each.max_duration).value, default=home)
        groups.setdefault(home, []).append(record)
    for runs in groups.values():
        for title, row in rows(runs).items():
            _refuse_mixture(title, row)
    return groups


def rows(runs: Iterable[Record]) -> dict[str, list[Record]]:
    """Sort the runs of a group by method and setting.

    Args:
        runs (Iterable[Record]): The runs of a group.

    Returns:
        dict[str, list[Record]]: The label of each method and setting, and its runs, in order of appearance.
    """
    sorted_runs: dict[tuple[str, str], list[Record]] = {}
    for run in runs:
        sorted_runs.setdefault((run['method'], json.dumps(run['setting'], sort_keys=True)), []).append(run)
    labelled: dict[str, list[Record]] = {}
    for (method, _), row in sorted_runs.items():
        title = label(row[0])
        labelled[f'{title} [{method}]' if title in labelled else title] = row
    return labelled


def _group(record: Record) -> Group:
    return Group(
        study=record['study'],
        network=record['network'],
        dataset=record['dataset'],
        train_samples=record['train_samples'],
        max_duration=length(record['recipe']).to_timestring(),
        hardware=record['hardware'],
    )


def _is_shorter_baseline(group: Group, runs: list[Record], longer: Group) -> bool:
    time, limit = Time.from_timestring(group.max_duration), Time.from_timestring(longer.max_duration)
    alike = group._replace(max_duration=longer.max_duration) == longer and time.unit == limit.unit
    return alike and time.value < limit.value and any(run['method'] == 'baseline' for run in runs)


def _refuse_mixture(title: str, row: list[Record]) -> None:
    first = row[0]
    where = f'results of {first["study"]}, {first["network"]} on {first["dataset"]}, {title}'
    of_seed: dict[int, Record] = {}
    for run in row:
        twin = of_seed.setdefault(run['seed'], run)
        if twin is not run:
            hashes = f'{twin["hash"]} and {run["hash"]}'
            raise UserError(f'{where}: seed {run["seed"]} has two runs, {hashes}: delete the line of one')
        for key in _SAME:
            if _seedless(run['recipe'].get(key)) != _seedless(first['recipe'].get(key)):
                seeds = f'seeds {first["seed"]} and {run["seed"]}'
                raise UserError(f'{where}: the recipes of {seeds} differ in {key}: delete the lines of one recipe')


def _seedless(part: Any) -> Any:
    """A part of a recipe without what the seeds of one method may differ in."""
    if isinstance(part, dict):
        return {key: _seedless(value) for key, value in part.items() if 'seed' not in key}
    return part
