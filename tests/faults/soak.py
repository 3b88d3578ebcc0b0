"""Trains the digits for a long time, killed and started again about every minute, and looks for what grows.

python tests/faults/soak.py --minutes 30

Every other kill takes the whole process group, the others the training process alone, as the kernel does when memory
runs out. One line is printed for each life, and at the end what has grown; the exit code is then 1.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / 'yamls' / 'digits_sba.yaml'
KEYS = ['max_duration=1000000ep', 'progress_bar=false', 'eval_interval=20ep', 'save_interval=50ba', 'autoresume=true']
KEYS += ['save_overwrite=false', 'save_num_checkpoints_to_keep=2', 'train_dataset.num_workers=1', 'model.dropout=0.3']
KEYS += ['algorithms.sba.layers=[conv2,head]']


@dataclass
class Life:
    """What one life of the run held, and what it left when it was killed."""

    batches: int  # of all lives
    first_mib: float  # resident memory of all its processes at its first checkpoint
    last_mib: float  # the same when it was killed
    handles: int  # its open files and sockets then, without shared memory, where Streaming opens other runs' too
    shared: int  # blocks and files in /dev/shm that this run has left, until its next life removes them
    disk_kib: float  # data and checkpoints
    files: int  # their number
    temporary: int  # files and folders that libraries made for themselves, and that a kill leaves


# What may differ between the first and the last third of the lives, as a share and in the field's own unit. A kill
# leaves up to 14 names in shared memory, and what it hits tells which files are open.
SLACK = {'last_mib': (0.03, 0.0), 'handles': (0.0, 4.0), 'shared': (0.0, 14.0), 'disk_kib': (0.1, 0.0)}
SLACK |= {'files': (0.0, 2.0)}


class Soak:
    """One run in a folder of its own.

    Args:
        folder (Path): For data, checkpoints and temporary files.
        chance (random.Random): Draws the moments of death.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.temporary = folder / 'tmp'
        self.temporary.mkdir()
        self.dead: set[int] = set()

    def start(self) -> subprocess.Popen:
        """Begin a life."""
        keys = [*KEYS, f'save_folder={self.folder}/run', f'train_dataset.local={self.folder}/digits']
        keys.append(f'eval_dataset.local={self.folder}/digits')
        environment = os.environ | {'OMP_NUM_THREADS': '1', 'TMPDIR': str(self.temporary)}
        with (self.folder / 'log').open('ab') as said:
            command = [sys.executable, str(ROOT / 'train.py'), '-f', str(RECIPE), *keys]
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)

    def live(self, seconds: float, whole_group: bool) -> Life:
        """Let the run go on for a while and kill it."""
        before = self.batches()
        process = self.start()
        end = time.monotonic() + seconds
        first: float | None = None
        while time.monotonic() < end or first is None:
            time.sleep(1)
            if process.poll() is not None or time.monotonic() > end + 300:
                sys.exit(
                    f'The run ended by itself, or made no checkpoint:\n{(self.folder / "log").read_text()[-3000:]}'
                )
            if first is None and self.batches() > before:
                first = sum(each.memory_info().rss for each in family(process.pid)) / 2**20
        members = family(process.pid)
        memory = sum(each.memory_info().rss for each in members)
        handles = sum(not name.startswith('/dev/shm/') for each in members for name in opened(each.pid))
        self.dead |= {each.pid for each in members}
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        self.all_gone(process.pid)
        disk = [path for folder in ('run', 'digits') for path in (self.folder / folder).rglob('*') if path.is_file()]
        size = sum(path.lstat().st_blocks for path in disk) / 2
        temporary = len(list(self.temporary.rglob('*')))
        return Life(self.batches(), first, memory / 2**20, handles, len(self.blocks()), size, len(disk), temporary)

    def finish(self) -> int:
        """Live once more, end by Ctrl-C and count what is left in shared memory."""
        before = self.batches()
        process = self.start()
        while self.batches() == before and process.poll() is None:
            time.sleep(1)
        self.dead |= {each.pid for each in family(process.pid)}
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        self.all_gone(process.pid)
        return len(self.blocks())

    def batches(self) -> int:
        """How far the checkpoints have come."""
        found = (re.search(r'ba(\d+)-rank0\.pt', path.name) for path in self.folder.glob('run/ep*.pt'))
        return max((int(each[1]) for each in found if each), default=0)

    def blocks(self) -> list[str]:
        """This run's names in /dev/shm: Streaming's, by the folder that they are about, and torch's, by pid."""
        names = [path.name for path in Path('/dev/shm').iterdir()]
        streams = {name[:6] for name in names if re.fullmatch(r'\d{6}_locals', name) and self.about(name)}
        torchs = {f'torch_{pid}_' for pid in self.dead}
        return [name for name in names if name[:6] in streams or any(map(name.startswith, torchs))]

    def about(self, name: str) -> bool:
        try:
            return str(self.folder).encode() in (Path('/dev/shm') / name).read_bytes()
        except FileNotFoundError:  # another run's, gone meanwhile
            return False

    def all_gone(self, group: int) -> None:
        """Wait for the workers, which look every five seconds whether the training process is there."""
        end = time.monotonic() + 60
        while left := [each.pid for each in psutil.process_iter() if in_group(each, group)]:
            if time.monotonic() > end:
                sys.exit(f'Processes of the killed run are still there after 60 s: {left}')
            time.sleep(0.2)


def in_group(process: psutil.Process, group: int) -> bool:
    """Whether a process is one of a group and has not ended."""
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def opened(pid: int) -> Iterator[str]:
    """What a process has open."""
    for handle in Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(handle)


def family(pid: int) -> list[psutil.Process]:
    """A process and those that it started."""
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def grown(lives: list[Life]) -> list[str]:
    """Compare the first third of the lives with the last, and the end of each life with its beginning."""
    third = -(-len(lives) // 3)
    found = []
    for name, (share, amount) in SLACK.items():
        first, last = (
            statistics.median(getattr(life, name) for life in part) for part in (lives[:third], lives[-third:])
        )
        if last > first * (1 + share) + amount:
            found.append(f'{name} grew from {first:.1f} to {last:.1f} (medians of {third} lives)')
    gain = statistics.median(life.last_mib / life.first_mib for life in lives)
    if gain > 1.05:
        found.append(f'memory grew by {100 * gain - 100:.1f} % within a life (median)')
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=30, help='how long (default: 30)')
    parser.add_argument('--life', type=float, default=60, help='seconds between two kills, +- a third (default: 60)')
    arguments = parser.parse_args()
    chance = random.Random(17)
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix='soak') as folder:
        soak, lives = Soak(Path(folder), chance), []
        print('  '.join(f'{field.name:>9}' for field in fields(Life)))
        while time.monotonic() < end:
            seconds = arguments.life * chance.uniform(2 / 3, 4 / 3)
            lives.append(soak.live(seconds, whole_group=len(lives) % 2 == 0))
            print('  '.join(f'{value:9.0f}' for value in astuple(lives[-1])), flush=True)
        left = soak.finish()
        said = (soak.folder / 'log').read_text()
    failures = [*grown(lives), *([f'{left} blocks in /dev/shm after an orderly end'] if left else [])]
    failures += [line for line in said.splitlines() if 'Traceback' in line or line.startswith('error')]
    made = (lives[-1].temporary - lives[0].temporary) / max(len(lives) - 1, 1)
    print(f'{len(lives)} kills, {lives[-1].batches} batches; each life left {made:.0f} temporary files of libraries.')
    print(*(failures or ['Nothing else grew, nothing else was left.']), sep='\n')
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
