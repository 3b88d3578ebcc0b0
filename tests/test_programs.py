"""Programs of the tests behave as if Python had started them."""

from pathlib import Path

import pytest

from programs import start

SCRIPT = """
import logging, sys, threading, warnings
class Broken:
    def __del__(self):
        raise ValueError('in __del__')
def fail():
    raise ValueError('in a thread')
Broken()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
warnings.warn('a warning')
logging.getLogger('torch').warning('logged by a library')
logging.getLogger('ours').warning('logged by us')
print('to stdout')
sys.exit(7)
"""


@pytest.mark.parametrize('name', ['in __del__', 'in a thread', 'a warning', 'logged by a', 'logged by us', 'to stdout'])
def test_what_a_program_says_is_kept(tmp_path: Path, name: str) -> None:
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)
    with start(script, output=tmp_path / 'log') as program:
        assert program.wait() == 7, program.said
    assert name in program.said


def test_a_program_that_fails_ends_with_1(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    script.write_text('raise ValueError("its reason")')
    with start(script, output=tmp_path / 'log') as program:
        assert program.wait() == 1
    assert 'ValueError: its reason' in program.said
