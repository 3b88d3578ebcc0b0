"""Files of results: one line of JSON for each."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file, completely or not at all; other processes may append at the same time.

    Args:
        path (Path): The file. It and its folder are created if necessary. An incomplete last line is removed first.
        record (Mapping[str, Any]): What to write.

    Raises:
        OSError: If the line cannot be written completely. The file is then unchanged.
    """
    line = json.dumps(record, ensure_ascii=False).encode() + b'\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f'.{path.name}.lock')):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = path.read_bytes()
            rest = before[before.rfind(b'\n') + 1 :]
            if is_json(rest):
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


def is_json(line: bytes) -> bool:
    """Return whether a line is complete. An editor may leave out the last newline of a file."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
