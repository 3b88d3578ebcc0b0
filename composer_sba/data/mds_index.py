"""The index of an MDS dataset: fetched if need be, and checked against the shards before they are used."""

import json
import os
from pathlib import Path
from typing import Any

from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader

from composer_sba.errors import DatasetError, one_line

INDEX = 'index.json'
RECORD = 'composer_sba'  # the key of index.json under which convert.py tells about the data set


def read_index(local: Path, remote: str | None, split: str, *, make: str, timeout: float = 60) -> dict[str, Any]:
    """Read the index of a split, fetched from the remote if need be, and check it against the shards on disk.

    Args:
        local (Path): Folder of the dataset, or the local cache of ``remote``.
        remote (str, optional): Where the dataset comes from; ``None`` if ``local`` has it all.
        split (str): Sub-folder, ``'train'`` or ``'val'``.
        make (str): The command that makes the dataset, for messages.
        timeout (float, optional): Longest wait for the remote, in seconds. Default: ``60``.

    Returns:
        dict[str, Any]: The content of ``index.json``.

    Raises:
        DatasetError: If a folder, the index or a shard is missing, half-written or not an MDS dataset of images.
    """
    folder = local / split
    path = folder / INDEX
    if not path.is_file():
        if remote is not None:
            _fetch(f'{remote.rstrip("/")}/{split}/{INDEX}', path, timeout)
        elif not local.is_dir():
            raise DatasetError(f'{local} does not exist: make it with {make}')
        elif not folder.is_dir():
            found = sorted(index.parent.name for index in local.glob(f'*/{INDEX}')) or 'none'
            raise DatasetError(
                f'{local} has no split {split!r} (found: {found}): correct split, or make it with {make}'
            )
        else:
            raise DatasetError(f'{folder} has no {INDEX}, it is incomplete: {remake(folder, remote, make)}')
    remedy = remake(folder, remote, make)
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        shards = index['shards']
        samples = sum(shard['samples'] for shard in shards)
        columns = sorted({column for shard in shards for column in shard['column_names']})
        files = [[shard[kind] for kind in ('raw_data', 'zip_data') if shard[kind]] for shard in shards]
        sizes = [[(file['basename'], file['bytes']) for file in kinds] for kinds in files]
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f'{path} is not the index of an MDS dataset ({error!r}): {remedy}') from error
    if not samples:
        raise DatasetError(f'{folder} holds no samples: {remedy}')
    if not {'x', 'y'} <= set(columns):
        raise DatasetError(f'{folder} has the columns {columns}, images need x and y: {remedy}')
    for kinds in sizes:
        present = [(folder / name, size) for name, size in kinds if (folder / name).is_file()]
        if not present and remote is None:
            raise DatasetError(f'{folder / kinds[0][0]} is missing, {INDEX} lists it: {remedy}')
        for file, size in present:
            if file.stat().st_size != size:
                raise DatasetError(f'{file} has {file.stat().st_size:,} bytes, {INDEX} says {size:,}: {remedy}')
    return index


def check_hashes(folder: Path, shards: list[dict[str, Any]], remedy: str) -> None:
    """Compare the shards that lie in a folder with the hashes that were taken as they were written.

    Args:
        folder (Path): Folder of the split.
        shards (list[dict]): As ``index.json`` lists them.
        remedy (str): What to do about a broken dataset, for messages.

    Raises:
        DatasetError: If a byte of a shard is not what it was.
    """
    for file in (shard[kind] for shard in shards for kind in ('raw_data', 'zip_data')):
        path = folder / file['basename'] if file else folder
        hashes = file['hashes'] if path.is_file() else {}
        for algorithm in sorted(hashes, key='xxh64'.__ne__)[:1]:  # the fastest, at gigabytes a second
            if get_hash(algorithm, path.read_bytes()) != hashes[algorithm]:
                raise DatasetError(f'{path} has changed since it was written, its {algorithm} differs: {remedy}')


def _fetch(remote: str, path: Path, timeout: float) -> None:
    partial = path.with_name(f'{INDEX}.{os.getpid()}')  # ranks may fetch at the same time
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        CloudDownloader.direct_download(remote, str(partial), timeout)
        partial.replace(path)
    except Exception as error:  # each cloud has exceptions of its own
        problem = f'{remote} cannot be fetched ({one_line(error)}): check remote and your access to it'
        raise DatasetError(problem) from error


def remake(folder: Path, remote: str | None, make: str) -> str:
    """Say how a broken dataset is had anew: by making it again, or fetching it again."""
    return f'make it again with {make} --overwrite' if remote is None else f'delete {folder} to fetch it again'
