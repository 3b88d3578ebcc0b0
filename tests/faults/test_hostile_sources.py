"""Archives and folders of attackers: refused before they write outside their folder, or more than images need.

pytest tests/faults/test_hostile_sources.py
"""

import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from composer_sba.convert import main as convert_main
from composer_sba.data import archives
from composer_sba.data.conversion import convert
from conversions import small_folder

pytestmark = pytest.mark.usefixtures('in_tmp_path')


def tar_with(root: Path, **member: Any) -> Path:
    small_folder(root / 'images')
    with tarfile.open(root / 'evil.tar', 'w') as tar:
        tar.add(root / 'images', '.')
        info = tarfile.TarInfo(member.pop('name'))
        for key, value in member.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b'x' * info.size))
    return root / 'evil.tar'


def zip_with(root: Path, name: str, content: bytes) -> Path:
    small_folder(root / 'images')
    with zipfile.ZipFile(root / 'evil.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for path in (root / 'images').rglob('*.png'):
            archive.write(path, path.relative_to(root / 'images'))
        archive.writestr(name, content)
    return root / 'evil.zip'


def zip_link(root: Path) -> Path:
    link = zipfile.ZipInfo('train/ant/1.png')
    link.create_system, link.external_attr = 3, 0o120777 << 16
    archive = zip_with(root, 'train/ant/2.png', b'x')
    with zipfile.ZipFile(archive, 'a') as packed:
        packed.writestr(link, '/etc/passwd')
    return archive


def tar_bomb(root: Path) -> Path:
    with tarfile.open(root / 'bomb.tar.gz', 'w:gz') as tar:
        info = tarfile.TarInfo('train/ant/0.png')
        info.size = 30 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    return root / 'bomb.tar.gz'


def image_bomb(root: Path) -> Path:
    Image.new('1', (20_000, 20_000)).save(small_folder(root / 'images') / 'train' / 'ant' / '1.png')
    return root / 'images'


def linked(root: Path, place: str, target: str) -> Path:
    (root / 'private').mkdir()
    Image.new('RGB', (8, 8)).save(root / 'private' / 'secret.png')
    (small_folder(root / 'images') / place).symlink_to(target)
    return root / 'images'


IN = {'name': 'train/ant/1.png'}


@pytest.mark.parametrize(
    ('make', 'what', 'message'),
    [
        (tar_with, {'name': '../../../evil', 'size': 4}, 'evil.tar: cannot be unpacked .*outside the destination'),
        (tar_with, {**IN, 'type': tarfile.SYMTYPE, 'linkname': '/etc/passwd'}, "contains a link, .* to '/etc/passwd'"),
        (tar_with, {**IN, 'type': tarfile.SYMTYPE, 'linkname': '../../../../x'}, 'evil.tar contains a link, .*1.png'),
        (tar_with, {**IN, 'type': tarfile.LNKTYPE, 'linkname': '../../../x'}, 'evil.tar contains a link, '),
        (tar_with, {**IN, 'type': tarfile.CHRTYPE}, 'special file'),
        (zip_with, {'name': '../../evil', 'content': b'x'}, r"evil.zip: the path '../../evil' leads out of the folder"),
        (zip_with, {'name': '/evil', 'content': b'x'}, r"evil.zip: the path '/evil' leads out of the folder"),
        (zip_with, {**IN, 'content': bytes(30 << 20)}, 'evil.zip unpacks to 31,45.,... bytes or more, over'),
        (zip_link, {}, 'evil.zip contains a link, train/ant/1.png: unpack it yourself if you trust it'),
        (tar_bomb, {}, 'bomb.tar.gz unpacks to 31,457,280 bytes or more, over 100 times its size, which images'),
        (image_bomb, {}, r'train/ant/1.png: not an image that can be read \(Image size .* exceeds limit'),
        (linked, {'place': 'train/ant/l.png', 'target': '../../../private/secret.png'}, 'l.png links to .*, outside'),
        (linked, {'place': 'train/ant/more', 'target': '../../../private'}, 'more links to .*, outside .*: copy'),
        (linked, {'place': 'train/ant/loop.png', 'target': 'loop.png'}, 'loop.png is a broken link: remove it'),
    ],
)  # fmt: skip
def test_a_hostile_source_is_refused_and_leaves_nothing(
    make: Callable[..., Path], what: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(archives, 'ALWAYS_ACCEPTED', 1 << 20)
    (tmp_path / 'source').mkdir()
    source = make(tmp_path / 'source', **what)
    assert convert_main(['imagefolder', '--source', str(source), '--out', 'out']) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]) and 'Traceback' not in ''.join(lines), lines
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != '.lock') == ['source']
    assert not list(tmp_path.parent.glob('evil')), 'something was written outside'


def test_an_archive_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zip_with(tmp_path, 'train/ant/1.png', os.urandom(1 << 20))
    monkeypatch.setattr(archives.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    assert convert_main(['imagefolder', '--source', str(archive), '--out', 'out']) == 2
    assert 'evil.zip: needs more than the 1,000 free bytes: free some space' in capsys.readouterr().err


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'images')
    (source / 'train' / 'ant' / '1.png').symlink_to('0.png')
    assert convert('imagefolder', source, tmp_path / 'out') == {'train': 3, 'val': 2}
