"""Conversions compared with their sources: every image's bytes, every label, every byte of a second conversion.

Run: python -m pytest tests/test_convert.py
"""

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from streaming.base.format.mds import MDSReader

from composer_sba import convert as module
from composer_sba.convert import convert, main
from composer_sba.errors import DatasetError

MODES = {'a.jpg': 'RGB', 'b.jpg': 'L', 'c.jpg': 'CMYK', 'd.png': 'P', 'e.png': 'RGBA', 'f.png': 'LA', 'g.webp': 'RGB'}


def picture(mode: str = 'RGB', size: tuple[int, int] = (12, 10), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(pixels[..., :3]).convert(mode) if mode != 'RGBA' else Image.fromarray(pixels)


def image_folder(root: Path, classes: tuple[str, ...] = ('ant', 'bee', 'cat'), held_out: str = 'val') -> Path:
    for split, copies in (('train', 3), (held_out, 1)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for copy in range(copies):
                for file, mode in MODES.items():
                    picture(mode, seed=copy).save(root / split / name / f'{copy}{file}')
    return root


def samples(folder: Path) -> list[dict[str, Any]]:
    """What an MDS split holds, read by Streaming's own reader."""
    shards = json.loads((folder / 'index.json').read_text())['shards']
    readers = [MDSReader.from_json(str(folder.parent), folder.name, shard) for shard in shards]
    return [reader[i] for reader in readers for i in range(len(reader))]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'index.json').read_text())['composer_sba']


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith('.lock'))


@pytest.mark.parametrize('held_out', ['val', 'test'])
def test_image_folder_keeps_bytes_and_labels(tmp_path: Path, held_out: str) -> None:
    source = image_folder(tmp_path / 'source', held_out=held_out)
    assert convert('imagefolder', source, tmp_path / 'out') == {'train': 63, 'val': 21}
    for split, folder in (('train', 'train'), ('val', held_out)):
        expected = [
            (path.read_bytes(), label)
            for label, name in enumerate(('ant', 'bee', 'cat'))
            for path in sorted((source / folder / name).iterdir())
        ]
        found = [(sample['x'], sample['y']) for sample in samples(tmp_path / 'out' / split)]
        assert sorted(found) == sorted(expected)
        assert (found == expected) == (split == 'val'), 'train is shuffled, val keeps its order'


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


def test_digits_are_lossless_and_stratified(tmp_path: Path) -> None:
    convert('digits', None, tmp_path / 'digits')
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((tuple(row), int(label)) for row, label in zip(pixels, labels, strict=True))
    found = [sample for split in ('train', 'val') for sample in samples(tmp_path / 'digits' / split)]
    images = [np.asarray(Image.open(io.BytesIO(sample['x'])), float).ravel() / 15 for sample in found]
    assert sorted((tuple(image), sample['y']) for image, sample in zip(images, found, strict=True)) == expected
    counts = np.bincount([sample['y'] for sample in samples(tmp_path / 'digits' / 'val')])
    assert counts.sum() == 360 and counts.min() >= 35 and counts.max() <= 37, counts


def cifar_batches(folder: Path, per_batch: int = 20) -> np.ndarray:
    """CIFAR-10's python batches with random pixels; returns those of the test batch, ``(N, 3072)``."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (per_batch, 3072), np.uint8)
    batch = {b'data': pixels, b'labels': [i % 10 for i in range(per_batch)]}
    for name in ('test_batch', *(f'data_batch_{i}' for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f'class{i}'.encode() for i in range(10)]
    (folder / 'batches.meta').write_bytes(pickle.dumps({b'label_names': names}, protocol=2))
    return pixels


def test_cifar10_batches_are_lossless_from_folder_and_archive(tmp_path: Path) -> None:
    pixels = cifar_batches(tmp_path / 'cifar-10-batches-py')
    with tarfile.open(tmp_path / 'cifar.tar.gz', 'w:gz') as archive:
        archive.add(tmp_path / 'cifar-10-batches-py', 'cifar-10-batches-py')
    assert convert('cifar10', tmp_path / 'cifar-10-batches-py', tmp_path / 'a') == {'train': 100, 'val': 20}
    convert('cifar10', tmp_path / 'cifar.tar.gz', tmp_path / 'b')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
    found = np.stack([np.asarray(Image.open(io.BytesIO(sample['x']))) for sample in samples(tmp_path / 'a' / 'val')])
    np.testing.assert_array_equal(found, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    assert record(tmp_path / 'a' / 'val')['classes'][3] == 'class3'


def test_cifar100_batches_have_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    batch = {b'data': np.zeros((200, 3072), np.uint8), b'fine_labels': [*range(100)] * 2, b'coarse_labels': [0] * 200}
    for name in ('train', 'test'):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / 'meta').write_bytes(pickle.dumps({b'fine_label_names': [b'%d' % i for i in range(100)]}, protocol=2))
    convert('cifar100', folder, tmp_path / 'out')
    assert sorted(sample['y'] for sample in samples(tmp_path / 'out' / 'val')) == sorted([*range(100)] * 2)


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


def no_train(root: Path) -> Path:
    return root


def other_classes(root: Path) -> Path:
    (image_folder(root) / 'val' / 'dog').mkdir()
    return root


def broken_image(root: Path) -> Path:
    path = image_folder(root) / 'train' / 'bee' / '0a.jpg'
    path.write_bytes(path.read_bytes()[:200])
    return root


def text_file(root: Path) -> Path:
    (image_folder(root) / 'val' / 'ant' / 'notes.txt').write_text('no image')
    return root


def no_val(root: Path) -> Path:
    (root / 'train' / 'ant').mkdir(parents=True)
    return root


def empty_split(root: Path) -> Path:
    for split in ('train', 'val'):
        (root / split / 'ant').mkdir(parents=True)
    return root


def escaping_archive(root: Path) -> Path:
    with tarfile.open(root / 'evil.tar', 'w') as archive:
        info = tarfile.TarInfo('../../evil')
        info.size = 4
        archive.addfile(info, io.BytesIO(b'evil'))
    return root / 'evil.tar'


def broken_archive(root: Path) -> Path:
    cifar_batches(root / 'batches', per_batch=200)
    with tarfile.open(root / 'cut.tar.gz', 'w:gz') as archive:
        archive.add(root / 'batches')
    whole = (root / 'cut.tar.gz').read_bytes()
    (root / 'cut.tar.gz').write_bytes(whole[: len(whole) // 2])
    return root / 'cut.tar.gz'


def no_archive(root: Path) -> Path:
    (root / 'notes.txt').write_text('no archive')
    return root / 'notes.txt'


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ('true',)


def evil_pickle(root: Path) -> Path:
    cifar_batches(root / 'batches')
    (root / 'batches' / 'data_batch_3').write_bytes(pickle.dumps(Evil()))
    return root / 'batches'


def batch_missing(root: Path) -> Path:
    cifar_batches(root / 'batches')
    (root / 'batches' / 'data_batch_4').unlink()
    return root / 'batches'


@pytest.mark.parametrize(
    ('name', 'make', 'message'),
    [
        ('imagefolder', lambda root: root / 'nowhere', r'--source .*nowhere does not exist: give a folder'),
        ('imagefolder', no_train, r'has no train/<class>/ folders and no CIFAR batches'),
        ('imagefolder', no_val, r'has no val/<class>/ or test/<class>/ beside train'),
        ('imagefolder', other_classes, r"train and val differ in their classes: only one of them has \['dog'\]"),
        ('imagefolder', empty_split, r'the train split has no images'),
        ('imagefolder', broken_image, r'train/bee/0a.jpg: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', text_file, r'val/ant/notes.txt: not an image that can be read \(.+\): repair or remove it'),
        ('imagefolder', escaping_archive, r'evil.tar: cannot be unpacked \(.*outside the destination'),
        ('imagefolder', no_archive, r'notes.txt is neither a folder nor a .tar'),
        ('cifar10', image_folder, r"has 3 classes, CIFAR-10 has 10: choose 'imagefolder'"),
        ('cifar10', broken_archive, r'cut.tar.gz: cannot be unpacked \(.+\): download it again'),
        ('cifar10', evil_pickle, r'data_batch_3: not a readable CIFAR batch \(.*posix.system is not plain data'),
        ('cifar10', batch_missing, r'data_batch_4: not a readable CIFAR batch \(.*No such file'),
        ('digits', image_folder, r'digits come with scikit-learn and take no --source'),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'source').mkdir()
    (tmp_path / 'out').mkdir()
    source = make(tmp_path / 'source')
    assert main([name, '--source', str(source), '--out', str(tmp_path / 'out' / 'mds')]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert re.search(message, line), line
    assert visible(tmp_path / 'out') == [], 'something half-made was left'
    assert not (tmp_path / 'evil').exists()


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
