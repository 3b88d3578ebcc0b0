"""Composer's launcher, which forks its ranks instead of starting them: a start of Python takes each 10 s of imports.

Run by programs.py: ``start('tests/forked_launcher.py', '-n', '2', 'train.py', ...)``, as ``composer -n 2 train.py ...``
"""

import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import IO

from composer.cli import launcher

from programs import run_here


class Rank:
    """What the launcher uses of ``subprocess.Popen``, for a process that is forked from this one."""

    def __init__(
        self, command: list[str], stdout: IO[str] | None = None, stderr: IO[str] | None = None, text: bool = True
    ) -> None:
        self.args, self.stdout, self.stderr = command, stdout, stderr
        self._process = multiprocessing.Process(target=self._run)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def _run(self) -> None:
        for number, file in enumerate((self.stdout, self.stderr), start=1):
            if file is not None:
                os.dup2(file.fileno(), number)
        run_here(self.args[1:])  # the first is Python


if __name__ == '__main__':
    launcher.subprocess = SimpleNamespace(**vars(subprocess) | {'Popen': Rank})
    sys.exit(launcher.main())
