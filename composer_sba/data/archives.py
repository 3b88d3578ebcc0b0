"""Archives of images, .tar and .zip: unpacked within limits, or refused in one line."""

import contextlib
import errno
import os
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path

from composer_sba.errors import DatasetError, one_line

MAX_RATIO = 100  # largest factor by which an archive may grow; images are compressed already and hardly grow
ALWAYS_ACCEPTED = 1 << 30  # bytes; smaller contents are accepted at any ratio

_OTHER_ARCHIVES = {  # by their first bytes
    b'7z\xbc\xaf\x27\x1c': 'a 7-Zip archive',
    b'Rar!\x1a\x07': 'a RAR archive',
    b'\x28\xb5\x2f\xfd': 'compressed with Zstandard',
    b'\x04\x22\x4d\x18': 'compressed with LZ4',
    b'\x1f\x9d': 'compressed with compress',
    b'LZIP': 'compressed with lzip',
}
_ZIP_ENCRYPTED, _ZIP_UTF8 = 0x1, 0x800  # flags of a member
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_ZIP_OTHER_METHODS = {9: 'Deflate64', 93: 'Zstandard', 95: 'XZ', 98: 'PPMd'}
_ZIP_UNICODE_PATH = 0x7075  # extra field with the name in UTF-8
_DOS_SYSTEMS = (0, 6, 10, 11)  # FAT, HPFS and, by two numbers, NTFS


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder.

    Args:
        archive (Path): A .tar, .tar.gz, .tar.bz2, .tar.xz or .zip.
        folder (Path): Target folder, which is made.

    Raises:
        DatasetError: If the archive is broken or Python cannot read it, if it holds links or paths out of the folder,
            or if its content exceeds the free space or :data:`MAX_RATIO`.
    """
    try:
        if tarfile.is_tarfile(archive):
            limits = _Limits(archive, folder)
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter=limits.filter_tar)
                while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                    pass  # at its end the checksum of a compressed file is compared
        elif zipfile.is_zipfile(archive):
            _unpack_zip(archive, folder)
        else:
            _refuse_other_formats(archive)
    except DatasetError:
        raise
    except (
        tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error, struct.error, RuntimeError, ValueError,
        OSError,
    ) as error:  # fmt: skip
        if getattr(error, 'errno', None) not in (None, errno.EINVAL):  # a full disk, no permission
            raise
        remedy = 'download it again, or unpack it yourself and give the folder'
        raise DatasetError(f'{archive}: cannot be unpacked ({one_line(error)}): {remedy}') from error


def _unpack_zip(archive: Path, folder: Path) -> None:
    limits = _Limits(archive, folder)
    with open(archive, 'rb') as file:
        file.seek(-min(archive.stat().st_size, 22 + (1 << 16)), os.SEEK_END)  # the last record and its comment
        disk = file.read().rpartition(b'PK\x05\x06')[2][:2]
    if disk not in (b'\0\0', b'\xff\xff'):  # the latter: see the record of ZIP64
        raise DatasetError(f'{archive} is the last part of a split archive: join its parts with zip -s 0 --out')
    with zipfile.ZipFile(archive) as unzipped:
        members = unzipped.infolist()
        for member in members:
            encrypted, method = member.flag_bits & _ZIP_ENCRYPTED, member.compress_type
            if encrypted or method not in _ZIP_METHODS:
                what = (
                    'encrypted'
                    if encrypted
                    else f'compressed with {_ZIP_OTHER_METHODS.get(method, f"method {method}")}'
                )
                raise DatasetError(f'{archive} is {what}, which Python cannot unpack: unpack it, and give the folder')
            member.filename = _member_path(member)
            limits.refuse_path(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                limits.refuse_link(member.filename)
            limits.add(member.file_size)
        for member in members:
            unzipped.extract(member, folder)


def _member_path(member: zipfile.ZipInfo) -> str:
    r"""Return the path of a ZIP archive's member.

    Without the flag, Python reads a name as cp437, but macOS and other systems write UTF-8 without the flag. Some
    programs of Windows write ``\``, which separates folders only there.
    """
    name = member.orig_filename
    if not member.flag_bits & _ZIP_UTF8:
        raw = name.encode('cp437')
        with contextlib.suppress(UnicodeDecodeError):
            name = (_unicode_path(member.extra, raw) or raw).decode()
    if member.create_system in _DOS_SYSTEMS and '/' not in name:
        name = name.replace('\\', '/')
    return name.partition('\0')[0]


def _unicode_path(extra: bytes, raw: bytes) -> bytes:
    """Return a member's name in UTF-8 from its extra fields; empty if none belongs to the name ``raw``."""
    while len(extra) >= 4:
        kind, size = struct.unpack('<HH', extra[:4])
        content, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _ZIP_UNICODE_PATH and content[1:5] == struct.pack('<L', zlib.crc32(raw)):
            return content[5:]
    return b''


def _refuse_other_formats(archive: Path) -> None:
    with open(archive, 'rb') as file:
        start = file.read(8)
    for magic, kind in _OTHER_ARCHIVES.items():
        if start.startswith(magic):
            raise DatasetError(f'{archive} is {kind}, which Python cannot read: unpack it, and give the folder')
    if start.startswith((b'PK\x03\x04', b'PK\x07\x08')):
        raise DatasetError(f'{archive} is a part of a ZIP archive: join all parts, or download it again')
    if start.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ')):
        raise DatasetError(f'{archive} is a damaged archive, or not a .tar that was compressed: download it again')
    raise DatasetError(f'{archive} is neither a folder nor a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip archive')


class _Limits:
    """Limits of what an archive may contain: no links, no paths that lead out of it, not too many bytes."""

    def __init__(self, archive: Path, folder: Path) -> None:
        self.archive, self.bytes = archive, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.free = shutil.disk_usage(folder).free
        self.plausible = max(ALWAYS_ACCEPTED, MAX_RATIO * archive.stat().st_size)

    def add(self, size: int) -> None:
        self.bytes += size
        if self.bytes > self.plausible:
            problem = f'unpacks to {self.bytes:,} bytes or more, over {MAX_RATIO} times its size, which images do not'
            raise DatasetError(f'{self.archive} {problem}: do not trust it')
        if self.bytes > self.free:
            raise DatasetError(f'{self.archive}: needs more than the {self.free:,} free bytes: free some space')

    def refuse_path(self, name: str) -> None:
        if name.startswith(('/', '\\')) or '..' in name.replace('\\', '/').split('/'):
            raise DatasetError(f'{self.archive}: the path {name!r} leads out of the folder: do not trust it')

    def refuse_link(self, name: str) -> None:
        raise DatasetError(
            f'{self.archive} contains a link, {name}: unpack it yourself if you trust it, and give the folder'
        )

    def filter_tar(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """Apply Python's filter of data, which refuses paths and devices, and refuse links, which images do not need.

        Links deceive the filters of Python before 3.10.18, 3.11.13 and 3.12.11 (CVE-2025-4517).
        """
        if member.issym() or member.islnk():
            self.refuse_link(f'{member.name!r} to {member.linkname!r}')
        self.add(member.size)
        return tarfile.data_filter(member, folder)
