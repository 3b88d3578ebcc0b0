"""Conversions compared with their sources, byte by byte with a second one, and with what existed before.

Run: python -m pytest tests/test_conversion.py
"""

import errno
import json
import os
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_sba.convert import main
from composer_sba.data import conversion as module
from composer_sba.data.conversion import convert
from composer_sba.errors import DatasetError
from conversions import content, image_folder, record, samples, small_folder, text_file, visible
from disks import disk
from programs import start


def test_record_has_classes_and_statistics(tmp_path: Path) -> None:
    source = image_folder(tmp_path / 'source')
    convert('imagefolder', source, tmp_path / 'out')
    pixels = [
        np.asarray(Image.open(path).convert('RGBA').convert('RGB'), np.float64).reshape(-1, 3) / 255
        for path in (source / 'train').rglob('*.*')
    ]
    for split in ('train', 'val'):
        found = record(tmp_path / 'out' / split)
        assert found['classes'] == ['ant', 'bee', 'cat'] and found['num_classes'] == 3
        np.testing.assert_allclose(found['mean'], np.concatenate(pixels).mean(0), atol=1e-3)
        np.testing.assert_allclose(found['std'], np.concatenate(pixels).std(0), atol=1e-3)


def test_twice_gives_the_same_bytes_and_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'SHARD_BYTES', 8000)
    source = image_folder(tmp_path / 'source')
    for out in ('first', 'second'):
        convert('imagefolder', source, tmp_path / out)
    first = content(tmp_path / 'first')
    assert first == content(tmp_path / 'second')
    shards = json.loads(first['train/index.json'])['shards']
    assert len(shards) > 2, f'{len(shards)} shards'
    assert all(set(shard['raw_data']['hashes']) == {'sha1', 'xxh64'} for shard in shards)


# --- the output folder ------------------------------------------------------------------------------------------------


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    convert('imagefolder', image_folder(tmp_path / 'a'), out)
    other = small_folder(tmp_path / 'b')
    with pytest.raises(DatasetError, match=r'out already holds a dataset: pass --overwrite'):
        convert('imagefolder', other, out)
    assert convert('imagefolder', other, out, exist_ok=True) == {}
    assert record(out / 'val')['num_classes'] == 3
    convert('imagefolder', other, out, overwrite=True)
    assert record(out / 'val')['num_classes'] == 2
    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'thesis.tex').write_text('years of work')
    with pytest.raises(DatasetError, match=r'precious exists and is not an MDS dataset'):
        convert('imagefolder', other, precious, overwrite=True)
    assert visible(precious) == ['thesis.tex']
    assert visible(tmp_path) == ['a', 'b', 'out', 'precious']


def test_failed_overwrite_keeps_the_old_dataset(tmp_path: Path) -> None:
    convert('imagefolder', small_folder(tmp_path / 'a'), tmp_path / 'out')
    before = content(tmp_path / 'out')
    with pytest.raises(DatasetError, match='not an image'):
        convert('imagefolder', text_file(tmp_path / 'b'), tmp_path / 'out', overwrite=True)
    assert content(tmp_path / 'out') == before
    with pytest.raises(DatasetError, match=r'out would be replaced, and --source .*out/images with it: choose'):
        convert('imagefolder', small_folder(tmp_path / 'out' / 'images'), tmp_path / 'out', overwrite=True)
    assert len(content(tmp_path / 'out' / 'images')) == 4


SLOW = """
import sys, time
from composer_sba.data import conversion

encode = conversion._encode
conversion._encode = lambda *arguments, **options: time.sleep(0.05) or encode(*arguments, **options)
conversion.convert('imagefolder', *sys.argv[1:])
"""


def test_killed_conversion_never_looks_finished(tmp_path: Path) -> None:
    source = image_folder(tmp_path / 'source')
    out = tmp_path / 'mds' / 'out'
    (tmp_path / 'slow.py').write_text(SLOW)
    with start(tmp_path / 'slow.py', source, out, output=tmp_path / 'log') as program:
        deadline = time.monotonic() + 120
        while not (tmp_path / 'mds' / '.out.partial' / 'train').exists():
            assert time.monotonic() < deadline and program.poll() is None, program.said
            time.sleep(0.01)
        program.kill()
    assert visible(tmp_path / 'mds') == ['.out.partial']
    convert('imagefolder', source, out)
    assert visible(tmp_path / 'mds') == ['out']
    assert len(samples(out / 'train')) == 63


def test_a_kill_between_two_renames_loses_no_dataset(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'source')
    convert('imagefolder', source, tmp_path / 'out')
    before = content(tmp_path / 'out')
    (tmp_path / 'out').rename(tmp_path / '.out.replaced')
    assert convert('imagefolder', source, tmp_path / 'out', exist_ok=True) == {}
    assert content(tmp_path / 'out') == before
    assert visible(tmp_path) == ['out', 'source']


@pytest.mark.parametrize('fails', ['.out.partial', 'out'])
def test_a_rename_that_fails_loses_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """A folder of a container's image, or another user's in a sticky folder, cannot be renamed by anyone but them."""
    convert('imagefolder', small_folder(tmp_path / 'a'), tmp_path / 'out')
    before = content(tmp_path / 'out')
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == fails:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', refuse)
    message = 'out cannot be replaced .Invalid cross-device link.: choose' if fails == 'out' else 'conversion failed'
    # Its image is broken, which the conversion must not find out first.
    source = text_file(tmp_path / 'b') if fails == 'out' else small_folder(tmp_path / 'b')
    with pytest.raises(DatasetError, match=message):
        convert('imagefolder', source, tmp_path / 'out', overwrite=True)
    assert content(tmp_path / 'out') == before
    assert visible(tmp_path) == ['a', 'b', 'out']


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / 'volume') as folder:
        yield folder


def test_a_mount_point_is_refused_before_anything_is_converted(tmp_path: Path, mount_point: Path) -> None:
    source = text_file(tmp_path / 'source')
    with pytest.raises(
        DatasetError, match=r'volume is a mount point.*: choose a folder in it, such as .*/imagefolder$'
    ):
        convert('imagefolder', source, mount_point)
    assert visible(mount_point) == []
    assert convert('imagefolder', small_folder(tmp_path / 'good'), mount_point / 'imagefolder') == {
        'train': 2,
        'val': 2,
    }
    with pytest.raises(DatasetError, match='/ is a mount point'):
        convert('imagefolder', source, '/')


@pytest.mark.parametrize('exists', [True, False])
def test_a_link_leads_to_the_output(tmp_path: Path, exists: bool) -> None:
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'out').symlink_to('disk/mds')
    if exists:
        (tmp_path / 'disk' / 'mds').mkdir()
    convert('imagefolder', small_folder(tmp_path / 'source'), tmp_path / 'out')
    assert (tmp_path / 'out').is_symlink() and visible(tmp_path / 'disk') == ['mds']
    assert len(samples(tmp_path / 'disk' / 'mds' / 'train')) == 2


def test_a_dataset_that_is_there_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is mounted read-only: no folder is made, not even a lock."""
    convert('digits', None, tmp_path / 'digits')
    monkeypatch.setattr(Path, 'mkdir', lambda *args, **kwargs: pytest.fail('a folder is made'))
    monkeypatch.setattr(module, 'FileLock', lambda *args: pytest.fail('a lock is taken'))
    assert convert('digits', None, tmp_path / 'digits', exist_ok=True) == {}


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(DatasetError, match=r'file/out: the conversion failed: .*(Not a directory|File exists)'):
        convert('imagefolder', small_folder(tmp_path / 'source'), tmp_path / 'file' / 'out')


# --- broken images ----------------------------------------------------------------------------------------------------


def test_all_broken_images_are_named_at_once(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'source')
    for path in ('train/ant/666.jpg', 'train/bee/Thumbs.db', 'val/bee/11702.jpg'):
        (source / path).write_bytes(b'')
    with pytest.raises(DatasetError) as caught:
        convert('imagefolder', source, tmp_path / 'out')
    assert str(caught.value) == (
        f'{source}/train/ant/666.jpg: not an image that can be read (cannot identify image file), and 2 more: '
        f'{source}/train/bee/Thumbs.db (cannot identify image file), {source}/val/bee/11702.jpg (cannot identify image '
        'file): repair or remove them'
    )
    assert visible(tmp_path) == ['source']


def test_twenty_broken_images_are_named(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'source')
    for i in range(25):
        (source / 'train' / 'ant' / f'{i:02}.png').write_bytes(b'no image')
    with pytest.raises(DatasetError, match=r'and 24 more: .*, \.\.\.: repair or remove them') as caught:
        convert('imagefolder', source, tmp_path / 'out')
    assert re.findall(r'ant/(\d+).png', str(caught.value)) == [f'{i:02}' for i in range(20)]


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(run: Callable[[], Any]) -> float:
    """The most memory that Python objects and NumPy arrays took at once, in MiB; not that of PIL's images."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / (1 << 20)
    finally:
        tracemalloc.stop()


def test_files_are_read_ahead_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """160 MiB of files, of which 16 MiB are read ahead and the writer holds three shards of 8 MiB."""
    monkeypatch.setattr(module, 'AHEAD_BYTES', 16 << 20, raising=False)
    monkeypatch.setattr(module, 'SHARD_BYTES', 8 << 20)
    source = small_folder(tmp_path / 'source')
    Image.new('RGB', (1440, 960)).save(source / 'train' / 'ant' / '0.png', 'BMP')
    for i in range(1, 40):
        os.link(source / 'train' / 'ant' / '0.png', source / 'train' / 'ant' / f'{i}.png')
    found = peak(lambda: convert('imagefolder', source, tmp_path / 'out'))
    assert found < 80, f'{found:.0f} MiB'


def test_statistics_need_no_copies_of_the_pixels(tmp_path: Path) -> None:
    source = small_folder(tmp_path / 'source')
    for name in ('ant', 'bee'):
        Image.new('RGB', (4000, 3000)).save(source / 'train' / name / '0.png', 'JPEG')
    found = peak(lambda: convert('imagefolder', source, tmp_path / 'out'))
    assert found < 30, f'{found:.0f} MiB for 12 megapixels'


@pytest.mark.parametrize(('budget', 'at_once'), [(1, 1), (8 * 8 * 8, 1), (1 << 30, 2)])
def test_images_are_decoded_within_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, at_once: int
) -> None:
    monkeypatch.setattr(module, '_decoding', module._Budget(budget))
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    running, most, lock, to_rgb = 0, 0, threading.Lock(), module.to_rgb

    def counted(image: Image.Image) -> Image.Image:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return to_rgb(image)

    monkeypatch.setattr(module, 'to_rgb', counted)
    source = small_folder(tmp_path / 'source', *(f'train/ant/{i}.png' for i in range(8)))
    assert convert('imagefolder', source, tmp_path / 'out') == {'train': 9, 'val': 2}
    assert most == at_once


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_line_prints_counts_and_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = image_folder(tmp_path / 'source'), tmp_path / 'out'
    assert main(['imagefolder', '--source', str(source), '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf'63 train and 21 val images in [\d.]+ s \([\d,]+ images/s\): {out}', printed), printed
    assert f'train_dataset: {{name: imagefolder, local: {out}, split: train}}' in printed
    assert f'eval_dataset: {{name: imagefolder, local: {out}, split: val}}' in printed


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setenv('HOME', str(tmp_path))
    small_folder(tmp_path / 'set')
    assert main(['imagefolder', '--source=~/set', '--out=~/a']) == 0
    assert f'local: {tmp_path}/a, split' in capsys.readouterr().out
    assert convert('imagefolder', Path('~/set'), Path('~/b')) == convert('imagefolder', '~/set', '~/c')
    assert content(tmp_path / 'a') == content(tmp_path / 'b') == content(tmp_path / 'c')
    assert visible(tmp_path / 'here') == []
    assert main(['imagefolder', '--source=~/nowhere', '--out=~/d']) == 2
    assert f'{tmp_path}/nowhere does not exist' in capsys.readouterr().err
