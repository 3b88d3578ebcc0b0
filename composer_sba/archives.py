"""Archives and folders of strangers: unpacked inside a folder, within the room there is, and followed nowhere else."""

import os
import shutil
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path

from composer_sba.errors import DatasetError

MAX_RATIO = 100  # bytes that one byte of an archive may become; images are compressed already, and become about one
SMALL = 1 << 30  # bytes that no archive is refused for


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder.

    Args:
        archive (Path): A .tar, .tar.gz, .tar.xz or .zip.
        folder (Path): Where to; it is made.

    Raises:
        DatasetError: If the archive is none, is broken, reaches outside ``folder``, or becomes more than there is room
            for or than images can.
    """
    try:
        if tarfile.is_tarfile(archive):
            room = _Room(archive, folder)
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter=room.take)
        elif zipfile.is_zipfile(archive):
            room = _Room(archive, folder)
            with zipfile.ZipFile(archive) as unzipped:
                for member in unzipped.infolist():
                    room.refuse_path(member.filename)
                    room.add(member.file_size)
                unzipped.extractall(folder)
        else:
            raise DatasetError(f'{archive} is neither a folder nor a .tar, .tar.gz, .tar.xz or .zip archive')
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error) as error:
        raise DatasetError(f'{archive}: cannot be unpacked ({error}): download it again') from error


def refuse_links(folder: Path) -> None:
    """Raise DatasetError if a link in ``folder`` leads out of it: what it leads to is not part of the data set."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                continue
            if not os.path.exists(path):
                raise DatasetError(f'{path} is a link that leads nowhere: remove it')
            if os.path.commonpath([root, os.path.realpath(path)]) != root:
                raise DatasetError(
                    f'{path} is a link out of {folder}, to {os.path.realpath(path)}: put the files themselves there'
                )


class _Room:
    """Counts what an archive becomes, and says when that is too much."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive, self.bytes = archive, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.free = shutil.disk_usage(folder).free
        self.plausible = max(SMALL, MAX_RATIO * archive.stat().st_size)

    def add(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.plausible:
            problem = f'expected at most {MAX_RATIO} times its {self.archive.stat().st_size:,} bytes'
            raise DatasetError(f'{self.archive}: {problem}, got {self.bytes:,} and more: no archive of images')
        if self.bytes > self.free:
            raise DatasetError(f'{self.archive}: needs more than the {self.free:,} bytes that are free: make room')

    def refuse_path(self, name: str) -> None:
        if name.startswith(('/', '\\')) or '..' in name.replace('\\', '/').split('/'):
            raise DatasetError(
                f'{self.archive}: expected files inside the archive, got the path {name!r}: do not trust it'
            )

    def take(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """Python's own filter of data, which refuses paths and devices, and no links: images need none.

        By way of links the filters of Python before 3.10.18, 3.11.13 and 3.12.11 can be deceived (CVE-2025-4517).
        """
        if member.issym() or member.islnk():
            problem = f'expected files, got the link {member.name!r} to {member.linkname!r}'
            raise DatasetError(f'{self.archive}: {problem}: unpack it yourself if you trust it, and give the folder')
        self.add(member.size)
        return tarfile.data_filter(member, folder)
