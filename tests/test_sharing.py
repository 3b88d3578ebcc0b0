"""What processes share: an epoch's samples, dealt out alike to any nodes, and memory that a killed run has left.

Run: python -m pytest tests/test_sharing.py
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from composer_sba.data import shared_memory as sharing
from composer_sba.data.loader import DatasetConfig, build_dataloader
from shards import dataset, labels


def test_two_runs_on_the_same_nodes_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A folder stands for a node's shared memory; the runs arrive at the two nodes in opposite orders."""
    script = Path(__file__).with_name('registration_on_nodes.py')
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONWARNINGS': 'ignore'}
    for node in ('0', '1'):
        (tmp_path / node).mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), run, node, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for run in ('a', 'b')
        for node in ('0', '1')
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(text.endswith('registered\n') for text in said), said


@pytest.mark.parametrize(
    ('samples', 'nodes', 'ranks', 'workers', 'batch_size'), [(97, 1, 3, 2, 4), (64, 2, 2, 1, 4), (61, 2, 4, 3, 2)]
)
def test_partition_resumes_on_other_nodes_in_the_same_order(
    samples: int, nodes: int, ranks: int, workers: int, batch_size: int
) -> None:
    def batches(dealt: np.ndarray) -> list[set[int]]:
        by_step = dealt.transpose(3, 2, 0, 1, 4).reshape(dealt.shape[3] * dealt.shape[2], -1)
        return [{int(i) for i in step if i >= 0} for step in by_step if (step >= 0).any()]

    steps = batches(sharing.partition(samples, nodes, nodes, ranks, workers, batch_size))
    whole = set().union(*steps)
    assert sum(map(len, steps)) == len(whole) > samples - nodes * ranks
    rest = sharing.partition(samples, nodes, 1, nodes * ranks, workers, batch_size, 2 * nodes * ranks * batch_size)
    assert batches(rest) == steps[2:]


def test_a_run_that_was_killed_does_not_stop_the_next(tmp_path: Path) -> None:
    """Blocks in shared memory: the killed run's are removed, those of a run that lives stay."""
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
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'PYTHONWARNINGS': 'ignore'}
    readers: list[subprocess.Popen[str]] = []
    prefixes = []
    try:
        for local in ('killed', 'alive'):  # the second maps the blocks of the first while it looks for free names
            command = [sys.executable, str(script), str(tmp_path / 'remote'), str(tmp_path / local)]
            readers.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
            )
            assert readers[-1].stdout is not None
            prefixes.append(int(readers[-1].stdout.readline().split()[1]))
        os.killpg(readers[0].pid, signal.SIGKILL)  # with the process that would tidy up after it
        readers[0].wait()
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
            reader.communicate()


def test_a_batch_that_a_killed_worker_was_handing_over_is_removed() -> None:
    """By name, age and whether its maker lives; torch names its files torch_<pid>_<random>_<count>."""
    dead = subprocess.Popen([sys.executable, '-c', ''])
    dead.wait()
    shared = Path('/dev/shm')
    old, new, living = (
        shared / f'torch_{name}' for name in (f'{dead.pid}_1_2', f'{dead.pid}_1_3', f'{os.getpid()}_1_2')
    )
    try:
        for path in (old, new, living):
            path.touch()
        for path in (old, living):
            os.utime(path, (0, 0))
        with sharing.registration():
            assert [path.exists() for path in (old, new, living)] == [False, True, True]
    finally:
        for path in (old, new, living):
            path.unlink(missing_ok=True)
