"""What is installed against what the files say: version, supported Pythons, entry point, marker of types.

``python -m pytest tests/test_packaging.py``
"""

import re
from importlib.metadata import entry_points, metadata
from importlib.resources import files
from pathlib import Path

import composer_sba

ROOT = Path(__file__).parent.parent


def test_the_changelog_has_the_version() -> None:
    assert f'## [{metadata("composer-sba")["Version"]}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_makefile_asks_for_the_pythons_of_the_metadata() -> None:
    asked = re.search(r'not \((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)', (ROOT / 'Makefile').read_text())
    assert asked
    low, high = '.'.join(asked.groups()[:2]), '.'.join(asked.groups()[2:])
    assert set(metadata('composer-sba')['Requires-Python'].split(',')) == {f'>={low}', f'<{high}'}


def test_llm_foundry_finds_sba() -> None:
    (found,) = entry_points(group='llmfoundry_algorithms', name='sba')
    assert found.load() is composer_sba.SBA


def test_the_package_says_that_it_is_typed() -> None:
    assert files(composer_sba).joinpath('py.typed').is_file()
