"""Conversions compared with their sources, byte by byte with a second one, and with what stood there before.

Run: python -m pytest tests/test_convert.py
"""

import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from composer_sba.convert import main
from composer_sba.data import conversion as module
from composer_sba.data.conversion import convert
from composer_sba.errors import DatasetError
from conversions import content, image_folder, record, samples, text_file, visible


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


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    convert('imagefolder', image_folder(tmp_path / 'a'), out)
    other = image_folder(tmp_path / 'b', ('xerus', 'yak'))
    with pytest.raises(DatasetError, match=r'out holds a dataset already: pass --overwrite'):
        convert('imagefolder', other, out)
    assert convert('imagefolder', other, out, exist_ok=True) == {}
    assert record(out / 'val')['num_classes'] == 3
    convert('imagefolder', other, out, overwrite=True)
    assert record(out / 'val')['num_classes'] == 2
    precious = tmp_path / 'precious'
    precious.mkdir()
    (precious / 'thesis.tex').write_text('years of work')
    with pytest.raises(DatasetError, match=r'precious exists and is no MDS dataset'):
        convert('imagefolder', other, precious, overwrite=True)
    assert visible(precious) == ['thesis.tex']
    assert visible(tmp_path) == ['a', 'b', 'out', 'precious']


def test_failed_overwrite_keeps_the_old_dataset(tmp_path: Path) -> None:
    convert('imagefolder', image_folder(tmp_path / 'a'), tmp_path / 'out')
    before = content(tmp_path / 'out')
    with pytest.raises(DatasetError, match='not an image'):
        convert('imagefolder', text_file(tmp_path / 'b'), tmp_path / 'out', overwrite=True)
    assert content(tmp_path / 'out') == before


def _convert_slowly(source: Path, out: Path) -> None:
    encode = module._encode

    def slow(image: Any) -> bytes:
        time.sleep(0.05)
        return encode(image)

    module._encode = slow
    convert('imagefolder', source, out)


def test_killed_conversion_never_looks_finished(tmp_path: Path) -> None:
    source = image_folder(tmp_path / 'source')
    out = tmp_path / 'mds' / 'out'
    # A fork of a process with threads can stand still, and a child that does keeps pytest from its end
    process = multiprocessing.get_context('spawn').Process(target=_convert_slowly, args=(source, out), daemon=True)
    process.start()
    deadline = time.monotonic() + 120
    while not (tmp_path / 'mds' / '.out.partial' / 'train').exists():
        assert time.monotonic() < deadline, 'the conversion did not start'
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert visible(tmp_path / 'mds') == ['.out.partial']
    convert('imagefolder', source, out)
    assert visible(tmp_path / 'mds') == ['out']
    assert len(samples(out / 'train')) == 63


def test_a_dataset_that_is_there_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is mounted for reading: nothing is made, not even a lock."""
    convert('digits', None, tmp_path / 'digits')
    monkeypatch.setattr(Path, 'mkdir', lambda *args, **kwargs: pytest.fail('a folder is made'))
    monkeypatch.setattr(module, 'FileLock', lambda *args: pytest.fail('a lock is taken'))
    assert convert('digits', None, tmp_path / 'digits', exist_ok=True) == {}


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(DatasetError, match=r'file/out: the conversion failed: .*(Not a directory|File exists)'):
        convert('imagefolder', image_folder(tmp_path / 'source'), tmp_path / 'file' / 'out')


def test_command_line_prints_counts_and_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = image_folder(tmp_path / 'source'), tmp_path / 'out'
    assert main(['imagefolder', '--source', str(source), '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf'63 train and 21 val images in [\d.]+ s \([\d,]+ images/s\): {out}', printed), printed
    assert f'train_dataset: {{name: imagefolder, local: {out}, split: train}}' in printed
    assert f'eval_dataset: {{name: imagefolder, local: {out}, split: val}}' in printed
