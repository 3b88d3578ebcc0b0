"""Registration in shared memory: runs do not wait for each other, ranks agree, and only dead runs' blocks are removed.

Run: python -m pytest tests/test_shared_memory.py
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from streaming.base.constant import BARRIER, EPOCH_SHAPE, LOCALS, SHM_TO_CLEAN
from streaming.base.shared.prefix import _check_and_find_retrying, _pack_locals

from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.data.shared_memory import registration
from composer_sba.errors import DatasetError
from programs import start
from shards import dataset, labels

SHARED = Path('/dev/shm')

# Its made-up blocks must not meet the runs that test_resume.py kills, so one worker runs both
pytestmark = pytest.mark.usefixtures('only_worker')


@pytest.mark.parametrize(
    ('runs', 'memories'),
    [
        ('ab', ('0', '1')),  # the locks of two machines, which two runs could take in opposite orders
        ('a', ('0', '0')),  # one machine's lock, which a run on two containers would take twice
    ],
)
def test_registration_on_two_nodes_ends(tmp_path: Path, runs: str, memories: tuple[str, str]) -> None:
    """A folder stands for a machine's shared memory."""
    script = Path(__file__).with_name('registration_on_nodes.py')
    programs = []
    try:
        for run in runs:
            for node in ('0', '1'):
                memory = tmp_path / f'memory{memories[int(node)]}'
                memory.mkdir(exist_ok=True)
                arguments = [run, node, str(memory), str(tmp_path), str(2 * len(runs))]
                programs.append(start(script, *arguments, output=tmp_path / f'{run}{node}.log'))
        codes = [program.wait(60) for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert codes == [0] * len(codes), [program.said for program in programs]


@pytest.fixture
def own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets of this test take numbers that a search from zero, as in the runs of other workers, does not reach."""
    first = 100_000 + os.getpid() % 10_000
    monkeypatch.setattr('composer_sba.data.shared_memory._numbers_with_lock_files', lambda: set(range(first)))
    monkeypatch.setattr('streaming.base.shared.prefix._each_prefix_int', lambda: itertools.count(first))


@pytest.fixture
def block() -> Iterator[Callable[..., Path]]:
    """``block(name, content, age=0)`` makes a file in shared memory, ``age`` seconds ago, which no process maps.

    ``{number:06}`` in the name becomes the next free number, of which ``content`` may be a function.
    """
    made = []

    def make(name: str, content: bytes | Callable[[int], bytes] = b'', age: float = 0) -> Path:
        while True:
            number = free_number()
            path = SHARED / name.format(number=number)
            with contextlib.suppress(FileExistsError):  # a run of another worker has taken the number since
                with path.open('xb') as file:
                    made.append((path, os.fstat(file.fileno()).st_ino))
                    file.write(content(number) if callable(content) else content)
                os.utime(path, (time.time() - age,) * 2)
                return path

    yield make
    for path, file in made:
        if path.exists() and path.stat().st_ino == file:  # else it is a block of a run
            path.unlink()


def free_number() -> int:
    return max(_check_and_find_retrying([], [None], name, retry=100) for name in SHM_TO_CLEAN)


def test_ranks_agree_though_a_run_ends_or_one_of_them_fails(
    tmp_path: Path, run_ranks: Callable[..., str], block: Callable[..., Path], few_digits: Path
) -> None:
    (tmp_path / 'digits').symlink_to(few_digits)
    for name in ('good', 'changed'):
        dataset(tmp_path / name, 16)
    shard = tmp_path / 'changed' / 'train' / 'shard.00000.mds'
    shard.write_bytes(shard.read_bytes()[:-1] + b'!')
    number = int(block(f'{{number:06}}_{LOCALS}', partial(_pack_locals, ['/another/run'])).name[:6])
    script = Path(__file__).with_name('registration_on_ranks.py')
    printed = run_ranks(script, 2, str(tmp_path), str(number), timeout=120)
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith('{"')]
    assert len(ranks) == 2
    for outcome in ranks:
        assert outcome.pop('a run ends') == outcome.pop('afterwards') == 8, ranks
        assert 'has changed since it was written' in outcome.pop('hash')
        for kind in ('missing on rank 1', 'missing in a recipe'):
            assert 'missing does not exist: make it with' in outcome.pop(kind), ranks
        for failed in ('FileLock on rank 0', 'MemoryDataset on rank 0', 'MemoryDataset on rank 1'):
            assert failed.replace(' on', ' failed on') in outcome.pop(failed), ranks
        assert 'cannot be written' in outcome.pop('a file in place of a folder on rank 0'), ranks
        assert len(outcome) == 4
        for failure, message in outcome.items():
            assert message.endswith(f'good/train: {failure}'), ranks


def test_a_run_that_was_killed_does_not_stop_the_next(tmp_path: Path) -> None:
    """The blocks of the killed run are removed, and those of the living run stay."""
    dataset(tmp_path / 'remote', 16)
    script = tmp_path / 'reader.py'
    script.write_text(
        'import sys, time\n'
        'from composer_sba.data.loader import DatasetConfig, build_dataloader\n'
        'keys = dict(name="imagefolder", num_classes=16, crop_size=8, resize_size=8)\n'
        'loader = build_dataloader(DatasetConfig(**keys, remote=sys.argv[1], local=sys.argv[2]), 4)\n'
        'print("blocks", loader.dataset._shm_prefix_int, flush=True)\n'
        'time.sleep(100)\n'
    )
    readers = []
    prefixes = []
    try:
        for local in ('killed', 'alive'):  # the second maps the blocks of the first while it looks for free names
            output = tmp_path / f'{local}.log'
            readers.append(start(script, str(tmp_path / 'remote'), str(tmp_path / local), output=output))
            end = time.monotonic() + 60
            while not readers[-1].said and readers[-1].poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            prefixes.append(int(readers[-1].said.split()[1]))
        readers[0].kill()  # with the process that would remove its blocks
        killed, alive = (Path(f'/dev/shm/{prefix:06}_locals') for prefix in prefixes)
        assert killed.exists() and alive.exists(), prefixes
        keys = {'local': str(tmp_path / 'killed'), 'remote': str(tmp_path / 'remote')}
        config = DatasetConfig('imagefolder', num_classes=16, crop_size=8, resize_size=8, **keys)
        loader = build_dataloader(config, 4)
        assert sorted(labels(loader)) == list(range(16))
        assert alive.exists(), 'a block of a living run was removed'
    finally:
        for reader in readers:
            reader.kill()


@pytest.mark.usefixtures('own_numbers')
@pytest.mark.parametrize(
    ('name', 'content', 'age'),
    [
        ('{number:06}_locals', _pack_locals(['a folder of a run without this package'], 0), 3600),
        ('{number:06}_barrier', b'its barrier', 3600),
        ('torch_{dead}_1_2', b'a batch of a worker in another container', 3600),
    ],
)
def test_blocks_of_others_stay(
    digits_folder: Path, block: Callable[..., Path], name: str, content: bytes, age: float
) -> None:
    """No visible process maps them, and their maker's number is unknown here: so it is with ``docker --ipc=host``."""
    dead = subprocess.Popen(['true'])
    dead.wait()
    theirs = block(name.replace('{dead}', str(dead.pid)), content, age)
    build_dataloader(DatasetConfig('digits', local=str(digits_folder)), 4)
    assert theirs.read_bytes() == content


def test_an_empty_block_is_removed_only_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the shared memory, where runs of other tests would wait for the blocks and remove them."""
    monkeypatch.setattr('composer_sba.data.shared_memory._SHARED_MEMORY', tmp_path)
    new, old, other = (tmp_path / name for name in ('000000_locals', '000001_locals', 'folder_barrier'))
    for path in (new, old, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 60,) * 2)
    with registration():
        pass
    assert (new.exists(), old.exists(), other.exists()) == (True, False, True)


@pytest.mark.usefixtures('own_numbers')
@pytest.mark.parametrize(
    ('name', 'age'),
    [
        (LOCALS, 120),
        (LOCALS, 8),  # too young to be removed at once: the run waits
        (BARRIER, 8),
    ],
)
def test_an_empty_block_does_not_stop_the_next_run(
    digits_folder: Path, block: Callable[..., Path], name: str, age: float
) -> None:
    """A process that is killed as it creates a block leaves one that Streaming cannot open."""
    left = block(f'{{number:06}}_{name}', age=age)
    build_dataloader(DatasetConfig('digits', local=str(digits_folder)), 4)
    assert not left.exists() or left.stat().st_size


@pytest.mark.usefixtures('own_numbers')
def test_an_empty_block_of_the_number_that_a_run_takes_does_not_stop_its_epoch(
    digits_folder: Path, tmp_path: Path, block: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming looks for each kind of block up to the first free number."""
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))  # without lock files of ended runs: the next number is free
    first = block(f'{{number:06}}_{LOCALS}', partial(_pack_locals, ['a folder of a run without this package']))
    block(f'{int(first.name[:6]) + 1:06}_{EPOCH_SHAPE}')
    loader = build_dataloader(DatasetConfig('digits', local=str(digits_folder), num_workers=0), 40)
    assert sum(len(images) for images, _ in loader) == 1437


@pytest.mark.usefixtures('own_numbers')
@pytest.mark.parametrize('same_cache', [False, True])
def test_a_run_above_a_block_that_a_killed_run_left_is_seen(
    tmp_path: Path, block: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, same_cache: bool
) -> None:
    """Streaming's search for runs ends at the number of the block, and that for such blocks at the run above it."""
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))  # without lock files of ended runs: the next number is free
    cache = tmp_path / 'cache'
    keys = dataset(tmp_path / 'remote', 16) | {'local': str(cache), 'remote': str(tmp_path / 'remote')}
    left = int(block(f'{{number:06}}_{BARRIER}', b'left').name[:6])
    locals_ = [f'{cache}/train' if same_cache else '/another/run']
    above = block(f'{left + 1:06}_{LOCALS}', _pack_locals(locals_, left + 1))
    if same_cache:
        with pytest.raises(DatasetError, match='another run caches a remote in this folder'):
            build_dataloader(DatasetConfig(**keys), 4)
    else:
        assert build_dataloader(DatasetConfig(**keys), 4).dataset._shm_prefix_int == left + 2
    assert above.exists()


def test_lock_files_of_ended_runs_are_listed_and_not_looked_for_one_by_one(
    tmp_path: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming leaves two for each dataset and uses none of their numbers again."""
    for number in range(500):
        (tmp_path / f'{number:06}_{("barrier", "cache")[number % 2]}_filelock').touch()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    exists, looked_for = os.path.exists, []
    monkeypatch.setattr(
        'os.path.exists', lambda path: (str(path).endswith('_filelock') and looked_for.append(path)) or exists(path)
    )
    loader = build_dataloader(DatasetConfig('digits', local=str(digits_folder)), 4)
    assert loader.dataset._shm_prefix_int >= 500
    assert len(looked_for) < 500, len(looked_for)


@pytest.mark.usefixtures('own_numbers')
def test_a_cache_that_another_run_uses_is_refused_in_one_line(tmp_path: Path, block: Callable[..., Path]) -> None:
    keys = dataset(tmp_path / 'remote', 16) | {'local': str(tmp_path / 'cache'), 'remote': str(tmp_path / 'remote')}
    block(f'{{number:06}}_{LOCALS}', partial(_pack_locals, [f'{tmp_path}/cache/train']))
    with pytest.raises(DatasetError, match='cache/train: another run caches a remote in this folder: choose another'):
        build_dataloader(DatasetConfig(**keys), 4)


@pytest.mark.nightly
def test_a_living_run_in_another_container_keeps_its_blocks(tmp_path: Path, digits_folder: Path) -> None:
    """A process namespace of its own, with the machine's shared memory, as ``docker --ipc=host`` makes it."""
    unshare = ['unshare', '--pid', '--fork', '--mount-proc']
    if subprocess.run([*unshare, 'true'], capture_output=True).returncode:
        pytest.skip('only root may make a process namespace')
    theirs, ours = tmp_path / 'theirs.py', tmp_path / 'ours.py'
    theirs.write_text(
        'import sys, time\n'
        'from streaming import StreamingDataset\n'
        'print("block", StreamingDataset(local=sys.argv[1], batch_size=4)._shm_prefix_int, flush=True)\n'
        'time.sleep(300)\n'
    )
    ours.write_text(
        'import sys\n'
        'from composer_sba.data import DatasetConfig, build_dataloader\n'
        'print(len(build_dataloader(DatasetConfig("digits", local=sys.argv[1]), 4)))\n'
    )
    with start(theirs, digits_folder / 'train', output=tmp_path / 'theirs.log') as living:
        end = time.monotonic() + 60
        while 'block' not in living.said and living.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        number = int(living.said.split()[1])
        blocks = sorted(SHARED.glob(f'{number:06}_*'))
        assert blocks
        environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONWARNINGS': 'ignore'}
        command = [*unshare, sys.executable, str(ours), str(digits_folder)]
        read = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert read.stdout == '360\n', read
        assert sorted(SHARED.glob(f'{number:06}_*')) == blocks
