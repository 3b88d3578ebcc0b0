"""An archive of a folder compared with the folder: both become the same bytes.

Run: python -m pytest tests/test_archives.py
"""

import tarfile
import zipfile
from pathlib import Path

import pytest

from composer_sba.data.conversion import convert
from conversions import content, image_folder


@pytest.mark.parametrize('suffix', ['tar.xz', 'tar.gz', 'zip'])
def test_archive_of_a_folder(tmp_path: Path, suffix: str) -> None:
    source = image_folder(tmp_path / 'source', tuple('abcdefghij'), 'test')
    archive = tmp_path / f'source.{suffix}'
    if suffix == 'zip':
        with zipfile.ZipFile(archive, 'w') as packed:
            for path in source.rglob('*'):
                packed.write(path, path.relative_to(source))
    else:
        opened = tarfile.open(archive, 'w:xz') if suffix == 'tar.xz' else tarfile.open(archive, 'w:gz')
        with opened as packed_tar:
            packed_tar.add(source / 'train', 'train')
            packed_tar.add(source / 'test', 'test')
    convert('cifar10', source, tmp_path / 'a')
    convert('cifar10', archive, tmp_path / 'b')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
