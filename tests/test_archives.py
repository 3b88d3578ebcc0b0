"""Archives of every kind compared with the folder that they hold; and damaged, hostile and foreign ones.

Run: python -m pytest tests/test_archives.py
"""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from composer_sba.data.archives import unpack
from composer_sba.data.conversion import convert
from composer_sba.errors import DatasetError
from conversions import (
    content,
    image_folder,
    visible,
)


@pytest.mark.parametrize('suffix', ['tar', 'tar.gz', 'tar.bz2', 'tar.xz', 'zip'])
def test_an_archive_of_a_folder_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    source = image_folder(tmp_path / 'source', tuple('abcdefghij'), 'test')
    archive = tmp_path / f'source.{suffix}'
    if suffix == 'zip':
        with zipfile.ZipFile(archive, 'w') as packed:
            for path in source.rglob('*'):
                packed.write(path, path.relative_to(source))
    else:
        opened: Any = tarfile.open(archive, f'w:{suffix[4:]}')
        with opened as packed_tar:
            packed_tar.add(source / 'train', 'train')
            packed_tar.add(source / 'test', 'test')
    convert('cifar10', source, tmp_path / 'a')
    convert('cifar10', archive, tmp_path / 'b')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')


def zip_of(
    name: bytes, system: int = 3, *, flags: int = 0, method: int = 0, extra: bytes = b'', disk: int = 0
) -> bytes:
    """A ZIP archive, written byte by byte, of one file whose content is its name."""
    fields = struct.pack('<4H3L2H', flags, method, 0, 33, zlib.crc32(name), len(name), len(name), len(name), len(extra))
    local = b'PK\3\4' + struct.pack('<H', 20) + fields + name + extra + name
    attributes = struct.pack('<3H2L', 0, 0, 0, 0, 0)
    central = b'PK\1\2' + struct.pack('<2H', 20 | system << 8, 20) + fields + attributes + name + extra
    return local + central + b'PK\5\6' + struct.pack('<4H2LH', disk, disk, 1, 1, len(central), len(local), 0)


def unicode_path(raw: bytes, name: str) -> bytes:
    field = b'\1' + struct.pack('<L', zlib.crc32(raw)) + name.encode()
    return struct.pack('<2H', 0x7075, len(field)) + field


FAT, UNIX, NTFS, MACOS = 0, 3, 10, 19


@pytest.mark.parametrize(
    ('archive', 'path'),
    [
        (zip_of(b'train/a/0.png'), 'train/a/0.png'),
        (zip_of(b'train\\a\\0.png', FAT), 'train/a/0.png'),  # .NET before 4.6.1
        (zip_of(b'train\\a\\0.png', NTFS), 'train/a/0.png'),
        (zip_of(b'train/a\\0.png', FAT), 'train/a\\0.png'),  # as unzip: a backslash separates if nothing else does
        (zip_of(b'a\\0.png', UNIX), 'a\\0.png'),  # where a name may hold one
        (zip_of('café/0.png'.encode(), UNIX, flags=0x800), 'café/0.png'),
        (zip_of('café/0.png'.encode(), UNIX), 'café/0.png'),
        (zip_of('cafe\u0301/0.png'.encode(), MACOS), 'cafe\u0301/0.png'),
        (zip_of('日本/0.png'.encode(), FAT), '日本/0.png'),
        (zip_of('café\\0.png'.encode(), FAT, flags=0x800), 'café/0.png'),
        (zip_of(b'caf\x82/0.png', FAT), 'café/0.png'),  # cp437
        (zip_of(b'\x8e/0.png', FAT, extra=unicode_path(b'\x8e/0.png', 'Ž/0.png')), 'Ž/0.png'),
        (zip_of(b'\x8e/0.png', FAT, extra=unicode_path(b'of another name', 'Ž/0.png')), 'Ä/0.png'),
    ],
    ids=lambda value: value if isinstance(value, str) else 'archive',
)
def test_names_in_archives_of_other_systems(tmp_path: Path, archive: bytes, path: str) -> None:
    (tmp_path / 'a.zip').write_bytes(archive)
    unpack(tmp_path / 'a.zip', tmp_path / 'out')
    assert [str(file.relative_to(tmp_path / 'out')) for file in (tmp_path / 'out').rglob('*.png')] == [path]


def tar_of(suffix: str, damage: Callable[[bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    opened: Any = tarfile.open(fileobj=buffer, mode=f'w:{suffix}')
    with opened as tar:
        for i in range(20):
            info = tarfile.TarInfo(f'{i}.png')
            info.size = 5000
            tar.addfile(info, io.BytesIO(np.random.default_rng(i).bytes(info.size)))
    return damage(buffer.getvalue())


def first_half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def hole(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


WHOLE = zip_of(b'train/a/0.png')


@pytest.mark.parametrize(
    ('archive', 'message'),
    [
        (zip_of(b'0.png', flags=1), 'is encrypted, which Python cannot unpack: unpack it, and give the folder'),
        (zip_of(b'0.png', method=9), 'is compressed with Deflate64, which Python cannot unpack: unpack it, and give'),
        (zip_of(b'0.png', method=93), 'is compressed with Zstandard, which Python cannot unpack'),
        (zip_of(b'0.png', method=6), 'is compressed with method 6, which Python cannot unpack'),
        (
            zip_of(b'0.png', flags=0x20),
            r'cannot be unpacked \(compressed patched data .*download it again, or unpack it',
        ),
        (zip_of(b'0.png', disk=2), 'is the last part of a split archive: join its parts with zip -s 0 --out'),
        (WHOLE[:-30], 'is a part of a ZIP archive: join all parts, or download it again'),
        (b'PK\x07\x08' + WHOLE[:30], 'is a part of a ZIP archive: join all parts, or download it again'),
        (WHOLE.replace(b'0.png', b'1.png', 1), r'cannot be unpacked \(File name in directory .*download it again'),
        (WHOLE.replace(b'PK\1\2', b'PK\1\3'), r'cannot be unpacked \(Bad magic number for central directory\)'),
        (WHOLE[:-6] + b'\xff\0\0\0\0\0', r'cannot be unpacked \(.+\): download it again'),
        (zip_of('é/0.png'.encode('latin-1'), flags=0x800), r'cannot be unpacked \(.*utf-8.*\): download it again'),
        (
            b"7z\xbc\xaf'\x1c" + bytes(100),
            'is a 7-Zip archive, which Python cannot read: unpack it, and give the folder',
        ),
        (b'Rar!\x1a\x07\x01\0' + bytes(100), 'is a RAR archive, which Python cannot read: unpack it, and give the'),
        (b'\x28\xb5\x2f\xfd' + bytes(100), 'is compressed with Zstandard, which Python cannot read: unpack it, and'),
        (b'\x04\x22\x4d\x18' + bytes(100), 'is compressed with LZ4, which Python cannot read: unpack it, and give'),
        (b'no archive', 'is neither a folder nor a .tar, .tar.gz, .tar.bz2, .tar.xz or .zip archive'),
        (b'', 'is neither a folder nor a .tar'),
        (tar_of('', first_half), r'cannot be unpacked \(.+\): download it again'),
        (tar_of('gz', first_half), r'cannot be unpacked \(.+\): download it again'),
        (tar_of('bz2', first_half), 'is a damaged archive, or not a .tar that was compressed: download it again'),
        (tar_of('xz', first_half), r'cannot be unpacked \(.+\): download it again'),
        (tar_of('gz', hole), r'cannot be unpacked \(.+\): download it again'),
        (tar_of('bz2', hole), 'is a damaged archive, or not a .tar that was compressed: download it again'),
        (
            gzip.compress(b'no tar', mtime=0),
            'is a damaged archive, or not a .tar that was compressed: download it again',
        ),
        (tar_of('xz', hole), r'cannot be unpacked \(.+\): download it again'),
    ],
    ids=lambda value: value if isinstance(value, str) else 'archive',
)
def test_archives_that_cannot_be_read_end_in_one_line(tmp_path: Path, archive: bytes, message: str) -> None:
    (tmp_path / 'file').write_bytes(archive)
    with pytest.raises(DatasetError, match=f'{tmp_path}/file:? {message}') as caught:
        convert('imagefolder', tmp_path / 'file', tmp_path / 'out')
    assert '\n' not in str(caught.value)
    assert visible(tmp_path) == ['file']
