"""Data, disks and remotes that fail: one line each, and nothing that was good is lost.

pytest tests/faults/test_data_faults.py; tests that fill a disk mount a small one, which requires root
"""

import io
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from composer_sba.convert import main as convert_main
from composer_sba.data import DatasetConfig, build_dataloader, loader
from composer_sba.data.conversion import convert
from composer_sba.errors import DatasetError
from composer_sba.recipe.recipe import load
from composer_sba.train import main, train
from disks import disk

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
SHORT = ['max_duration=1ba', 'progress_bar=false', 'eval_subset_num_batches=1']

pytestmark = [
    # PyTorch and Composer warn about a failed save and a Trainer that was never closed
    pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning'),
    pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning'),
]


@pytest.fixture
def digits(few_digits: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(few_digits, tmp_path / 'digits'))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / 'small') as folder:
        yield folder


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / 'locked', 'ro,size=1m') as folder:
        yield folder


def run(digits: Path, *more: str) -> int:
    where = [f'train_dataset.local={digits}', f'eval_dataset.local={digits}']
    return main(['-f', RECIPE, *SHORT, *where, *more])


# --- a dataset that is damaged ----------------------------------------------------------------------------------------


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(image: bytes | None, label: int) -> Callable[[Path], None]:
    """Replace the first sample, with correct hashes."""

    def change(shard: Path) -> None:
        folder = shard.parent
        record = json.loads((folder / 'index.json').read_text())['composer_sba']
        shutil.rmtree(folder)
        whole = io.BytesIO()
        Image.new('RGB', (8, 8)).save(whole, 'PNG')
        with MDSWriter(columns={'x': 'bytes', 'y': 'int'}, out=str(folder), hashes=['xxh64']) as writer:
            writer.write({'x': image or whole.getvalue(), 'y': label})
            for _ in range(30):
                writer.write({'x': whole.getvalue(), 'y': 0})
        index = json.loads((folder / 'index.json').read_text()) | {'composer_sba': record}
        (folder / 'index.json').write_text(json.dumps(index))

    return change


def truncated_jpeg() -> bytes:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(whole, 'JPEG')
    return whole.getvalue()[:-20]


SHARD = 'shard.00000.mds'


@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize(
    ('file', 'damage', 'message'),
    [
        (
            SHARD,
            flip,
            r'shard.00000.mds has changed since it was written, its xxh64 differs: make it again with composer-sba',
        ),
        (SHARD, cut, r'shard.00000.mds has [\d,]+ bytes, index.json says [\d,]+: make it again with composer-sba'),
        (SHARD, Path.unlink, r'shard.00000.mds is missing, index.json lists it: make it again with composer-sba'),
        ('index.json', Path.unlink, r'digits/val has no index.json, it is incomplete: make it again with composer-sba'),
        ('index.json', cut, r'index.json is not the index of an MDS dataset \(.+\): make it again with composer-sba'),
        (SHARD, rewrite(truncated_jpeg(), 0), r'sample 0 cannot be read \(image file is truncated .*\): make it again'),
        (SHARD, rewrite(None, 10), r'sample 0 has the label 10, expected 0 to 9: correct num_classes or the data'),
    ],
)
def test_a_damaged_dataset_ends_in_one_line(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: Callable[[Path], None],
    message: str,
    in_memory: bool,
) -> None:
    damage(digits / 'val' / file)
    assert run(digits, f'save_folder={tmp_path}/run', f'eval_dataset.in_memory={str(in_memory).lower()}') == 2
    line = capsys.readouterr().err.strip()
    assert re.search(message, line) and '\n' not in line, line
    assert 'eval_dataset' in line or 'digits/val' in line, line


def test_a_flipped_byte_is_found_unless_verify_is_off(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(digits / 'train' / SHARD, at=0)  # in the number of samples, which Streaming takes from the index
    skip = ['save_folder=null', 'train_dataset.verify=false']
    train(load(RECIPE, [*SHORT, *skip, f'train_dataset.local={digits}', f'eval_dataset.local={digits}']))
    monkeypatch.setattr(loader, 'VERIFIED_BYTES', 1000)  # now the shards are too large to be compared by default
    assert run(digits, 'save_folder=null') == 0
    assert run(digits, 'save_folder=null', 'train_dataset.verify=true') == 2


# --- disks ------------------------------------------------------------------------------------------------------------


def images(folder: Path, side: int) -> Path:
    for split, count in (('train', 6), ('val', 2)):
        for name in ('ant', 'bee'):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f'{i}.png')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_a_disk_that_fills_in_a_conversion(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / 'mds'
    convert('imagefolder', images(tmp_path / 'small_images', 8), out)
    before = content(out)
    source = str(images(tmp_path / 'images', 400))  # random pixels: half a megabyte each
    assert convert_main(['imagefolder', '--source', source, '--out', str(out), '--overwrite']) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r'mds: the conversion failed: .*No space left on device', line), line
    assert content(out) == before
    assert sorted(path.name for path in small_disk.iterdir()) == ['.mds.lock', 'mds']
    convert('imagefolder', tmp_path / 'small_images', out, overwrite=True)
    assert content(out) == before


def test_a_disk_that_fills_as_a_checkpoint_is_written(
    small_disk: Path, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends in one line; once there is space, the same command ends with the bits of the unbroken run."""
    torch.set_num_threads(1)
    keys = ['max_duration=12ba', 'eval_interval=100ep', 'save_interval=1ba', 'save_num_checkpoints_to_keep=-1']
    keys += ['autoresume=true', 'save_overwrite=false', 'train_dataset.in_memory=true']

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['model']

    assert run(few_digits, *keys, f'save_folder={tmp_path}/whole') == 0
    capsys.readouterr()
    folder = small_disk / 'run'
    assert run(few_digits, *keys, f'save_folder={folder}') == 2
    line = capsys.readouterr().err.strip()
    assert re.search(
        'command line: save_folder: a checkpoint cannot be written .*No space left .* autoresume=true$', line
    ), line
    reached = torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']['timestamp']['Timestamp']['batch']
    assert 0 < reached < 12, reached
    subprocess.run(['mount', '-o', 'remount,size=64m', str(small_disk)], check=True)
    assert run(few_digits, *keys, f'save_folder={folder}') == 0
    expected, found = weights(tmp_path / 'whole'), weights(folder)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize('autoresume', ['true', 'false'])
def test_a_folder_that_cannot_be_written(
    read_only_disk: Path, few_digits: Path, capsys: pytest.CaptureFixture[str], autoresume: str
) -> None:
    assert run(few_digits, f'save_folder={read_only_disk}/run', f'autoresume={autoresume}') == 2
    line = capsys.readouterr().err.strip()
    assert re.search(r'digits_sba.yaml|command line: save_folder.*Read-only file system', line), line
    assert 'Read-only file system' in line and '\n' not in line, line
    assert convert_main(['digits', '--out', f'{read_only_disk}/mds']) == 2
    line = capsys.readouterr().err.strip()
    assert re.search('the conversion failed: .*Read-only file system', line) and '\n' not in line, line


def test_compressed_shards_on_a_disk_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    """In memory they are read; Streaming decompresses them into their folder, or into another as its cache."""
    with MDSWriter(columns={'x': 'png', 'y': 'int'}, out=str(small_disk / 'train'), compression='gz') as writer:
        for label in range(10):
            writer.write({'x': Image.new('RGB', (32, 32)), 'y': label})
    subprocess.run(['mount', '-o', 'remount,ro', str(small_disk)], check=True)
    keys = {'name': 'cifar10', 'local': str(small_disk)}
    remedy = f'set remote to {small_disk} and local to a new folder'
    with pytest.raises(DatasetError, match=f'^{small_disk}/train is read-only, but .* decompressed: {remedy}$'):
        build_dataloader(DatasetConfig(**keys), 5)
    for readable in {'in_memory': True}, {'remote': str(small_disk), 'local': str(tmp_path / 'new'), 'num_workers': 0}:
        labels = torch.cat([labels for _, labels in build_dataloader(DatasetConfig(**keys | readable), 5)])
        assert sorted(labels.tolist()) == list(range(10))


def test_a_folder_whose_parent_is_a_file(few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'file').write_text('in the way')
    assert run(few_digits, f'save_folder={tmp_path}/file/run') == 2
    line = capsys.readouterr().err.strip()
    assert 'Not a directory' in line and '\n' not in line, line


# --- remotes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accept connections and never answer."""
    server = socket.create_server(('127.0.0.1', 0))
    taken = []

    def take() -> None:
        try:
            while True:
                taken.append(server.accept()[0])
        except OSError:  # closed
            pass

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{server.getsockname()[1]}'
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for connection in taken:
        connection.close()
    thread.join()


def test_a_remote_that_does_not_answer(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('S3_ENDPOINT_URL', silent_server)
    monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'nobody')
    monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'knows-this-one')
    monkeypatch.setenv('AWS_MAX_ATTEMPTS', '1')
    remote = ['train_dataset.remote=s3://bucket/digits', 'train_dataset.download_timeout=0.2', 'save_folder=null']
    assert main(['-f', RECIPE, *SHORT, *remote, f'train_dataset.local={tmp_path}/cache']) == 2
    line = capsys.readouterr().err.strip()
    assert re.search(r's3://bucket/digits/train/index.json cannot be fetched \(Read timeout .*: check remote', line), (
        line
    )
    assert 'knows-this-one' not in line and '\n' not in line, line
    assert not list((tmp_path / 'cache').rglob('*.json*')), 'half of an index is left'
