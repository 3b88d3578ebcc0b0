"""The index of an MDS dataset: downloaded if necessary, and compared with the shards before they are used."""

import json
import os
import tempfile
from pathlib import Path, PurePath
from typing import Any

from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader

from composer_sba.errors import DatasetError, one_line

INDEX = 'index.json'
RECORD = 'composer_sba'  # the key of index.json that holds what the converter recorded about the dataset


def read_index(local: Path, remote: str | None, split: str, *, command: str, timeout: float = 60) -> dict[str, Any]:
    """Read the index of a split, from the remote if necessary, and compare it with the shards on disk.

    Args:
        local (Path): Folder of the dataset, or the local cache of ``remote``.
        remote (str, optional): Source of the dataset; ``None`` if ``local`` is complete.
        split (str): Sub-folder, ``'train'`` or ``'val'``.
        command (str): The command that makes the dataset, for messages.
        timeout (float, optional): Longest wait for the remote, in seconds. Default: ``60``.

    Returns:
        dict[str, Any]: The content of ``index.json``.

    Raises:
        DatasetError: If a folder, the index or a shard is missing, incomplete or not an MDS dataset of images.
    """
    folder = local / split
    path = folder / INDEX
    remedy = rebuild_remedy(folder, remote, command)
    if not path.is_file():
        if remote is not None:
            _download(f'{remote.rstrip("/")}/{split}/{INDEX}', path, timeout)
        elif not local.is_dir():
            raise DatasetError(f'{local} does not exist: make it with {command}')
        elif not folder.is_dir():
            found = sorted(index.parent.name for index in local.glob(f'*/{INDEX}')) or 'none'
            raise DatasetError(
                f'{local} has no split {split!r} (found: {found}): correct split, or make it with {command}'
            )
        else:
            raise DatasetError(f'{folder} has no {INDEX}, it is incomplete: {remedy}')
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        shards = index['shards']
        samples = sum(shard['samples'] for shard in shards)
        columns = sorted({column for shard in shards for column in shard['column_names']})
        files = [[shard[kind] for kind in ('raw_data', 'zip_data') if shard[kind]] for shard in shards]
        sizes = [[(PurePath(file['basename']), file['bytes']) for file in kinds] for kinds in files]
        if any(name.is_absolute() or '..' in name.parts for kinds in sizes for name, _ in kinds):
            raise ValueError('a shard outside its folder')
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f'{path} is not the index of an MDS dataset ({error!r}): {remedy}') from error
    if not samples:
        raise DatasetError(f'{folder} holds no samples: {remedy}')
    if not {'x', 'y'} <= set(columns):
        raise DatasetError(f'{folder} has the columns {columns}, images need x and y: {remedy}')
    for kinds in sizes:
        present = [(folder / name, size) for name, size in kinds if (folder / name).is_file()]
        if not present and remote is None:
            raise DatasetError(f'{folder / kinds[-1][0]} is missing, {INDEX} lists it: {remedy}')
        for file, size in present:
            if file.stat().st_size != size:
                raise DatasetError(f'{file} has {file.stat().st_size:,} bytes, {INDEX} says {size:,}: {remedy}')
    return index


def check_hashes(folder: Path, shards: list[dict[str, Any]], remedy: str) -> None:
    """Compare the shards in a folder with the hashes in its index.

    Args:
        folder (Path): Folder of the split.
        shards (list[dict]): As ``index.json`` lists them.
        remedy (str): How to repair a broken dataset, for messages.

    Raises:
        DatasetError: If the content of a shard has changed.
    """
    for file in (shard[kind] for shard in shards for kind in ('raw_data', 'zip_data')):
        path = folder / file['basename'] if file else folder
        hashes = file['hashes'] if path.is_file() else {}
        for algorithm in sorted(hashes, key='xxh64'.__ne__)[:1]:  # xxh64 is the fastest, at gigabytes a second
            if get_hash(algorithm, path.read_bytes()) != hashes[algorithm]:
                raise DatasetError(f'{path} has changed since it was written, its {algorithm} differs: {remedy}')


def check_decompression(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Check that Streaming can keep compressed shards decompressed in their folder, without a remote.

    Args:
        folder (Path): Folder of the split.
        shards (list[dict]): As ``index.json`` lists them.

    Raises:
        DatasetError: If a shard has no compressed file, for Streaming would delete the decompressed one; or if the
            folder cannot be written.
    """
    for shard in shards:
        if shard['zip_data']:
            path = folder / shard['zip_data']['basename']
            if not path.is_file():
                raise DatasetError(f'{path} is missing, only decompressed shards are left: set remote to their source')
            if not (folder / shard['raw_data']['basename']).is_file() and not os.access(folder, os.W_OK):
                raise DatasetError(
                    f'{folder} is read-only, but its shards must be decompressed: '
                    f'set remote to {folder.parent} and local to a new folder'
                )


def _download(remote: str, path: Path, timeout: float) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{INDEX}.', dir=path.parent) as folder:  # ranks may download at once
            partial = Path(folder) / INDEX
            CloudDownloader.direct_download(remote, str(partial), timeout)
            partial.replace(path)
    except Exception as error:  # each cloud has its own exceptions
        problem = f'{remote} cannot be fetched ({one_line(error)}): check remote and your access to it'
        raise DatasetError(problem) from error


def rebuild_remedy(folder: Path, remote: str | None, command: str) -> str:
    """Return how to replace a broken dataset, for messages."""
    return f'make it again with {command} --overwrite' if remote is None else f'delete {folder} to fetch it again'
