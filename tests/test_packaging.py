"""The installed package compared with its files: version, supported Pythons, commands, recipes, type marker.

Run: pytest tests/test_packaging.py. With ``-m ''`` it also builds wheel and source distribution, for which pip gets
setuptools from the network, and tries them in an environment of their own, outside the checkout.
"""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import metadata
from importlib.resources import files
from pathlib import Path

import pytest

import composer_sba
from composer_sba import __main__ as cli
from composer_sba.recipe import merge as sources

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where mypy brings it
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def test_the_changelog_has_the_version() -> None:
    assert f'## [{metadata("composer-sba")["Version"]}]' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_makefile_asks_for_the_pythons_of_the_metadata() -> None:
    asked = re.search(r'not \((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)', (ROOT / 'Makefile').read_text())
    assert asked
    low, high = '.'.join(asked.groups()[:2]), '.'.join(asked.groups()[2:])
    assert set(metadata('composer-sba')['Requires-Python'].split(',')) == {f'>={low}', f'<{high}'}


def test_the_package_says_that_it_is_typed() -> None:
    assert files(composer_sba).joinpath('py.typed').is_file()


def test_every_folder_of_modules_and_recipes_is_packaged() -> None:
    packaged = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    modules = {path.parent for path in (ROOT / 'composer_sba').rglob('*.py')}
    recipes = {Path('composer_sba') / path.parent.relative_to(ROOT) for path in (ROOT / 'yamls').rglob('*.yaml')}
    names = {'.'.join(path.parts) for path in {path.relative_to(ROOT) for path in modules} | recipes}
    assert set(packaged['packages']) == names
    assert packaged['package-data'] == {'composer_sba': ['py.typed']} | {
        '.'.join(path.parts): ['*.yaml'] for path in recipes
    }


def test_a_recipe_of_the_package_goes_by_its_name_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = tmp_path / 'own.yaml'
    own.write_text('extends: digits_sba.yaml\nseed: 3\n')
    names = [[Path(name).name for name, _ in sources.read([file]).layers] for file in ('digits_sba.yaml', 'own.yaml')]
    assert names[0] == ['digits_baseline.yaml', 'digits_sba.yaml', 'command line']
    assert names[1] == [*names[0][:2], 'own.yaml', 'command line']
    (tmp_path / 'digits_sba.yaml').write_text('extends: digits_baseline.yaml\n')  # one's own comes first
    assert sources.read(['digits_sba.yaml']).layers[1] == ('digits_sba.yaml', {})


@pytest.mark.parametrize(
    ('command', 'code', 'said'),
    [
        ('train -f nowhere.yaml', 2, 'error: nowhere.yaml: No such file or directory'),
        ('convert cifar10 --source nowhere.tar.gz', 2, 'nowhere.tar.gz'),
        ('layers --model nowhere', 2, "error: --model: unknown model 'nowhere'"),
        ('layers --model digits_net', 0, 'head'),
        ('study methods --networks nowhere --dry-run', 2, 'nowhere'),
        # Options and overrides in any order
        ('train -f digits_sba.yaml seed=3 --dry-run algorithms.sba.eta=0.7', 0, 'eta: 0.7'),
        ('train seed=3 --dry-run algorithms.sba.nowhere=1 -f digits_sba.yaml', 2, 'algorithms.sba.nowhere: unknown'),
        ('evaluate -f digits_sba.yaml seed=3 --checkpoint a.pt nowhere=1 --seed 1', 2, 'nowhere: unknown key'),
        ('layers --model digits_net dropout=0.1 --fold 2 num_classes=5', 0, 'M = 2'),
    ],
)
def test_the_console_command_hands_on_arguments_and_exit_code(command, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == code
    assert said in ''.join(capsys.readouterr())


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_the_help_of_a_command_calls_it_as_the_user_does(command, capsys) -> None:
    with pytest.raises(SystemExit, match='0'):
        cli.main([command, '--help'])
    assert capsys.readouterr().out.startswith(f'usage: composer-sba {command} ')


@pytest.mark.parametrize(('given', 'code'), [('--help', 0), ('--version', 0), ('nowhere', 2), ('', 2)])
def test_the_console_command_alone_names_its_commands(given, code, capsys) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        cli.main(given.split())
    said = ''.join(capsys.readouterr())
    assert said.strip() == f'composer-sba {metadata("composer-sba")["Version"]}' or 'COMMAND' in said
    assert given != '--help' or all(f'\n  {name} ' in said for name in cli.COMMANDS), said


@pytest.mark.nightly
@pytest.mark.parametrize('kind', ['wheel', 'sdist'])
def test_what_is_built_works_outside_the_checkout(kind, tmp_path) -> None:
    """In an environment that sees the dependencies of this one, and of composer-sba only what was built."""
    pip = [sys.executable, '-m', 'pip', '--quiet']
    # Of a copy: a build leaves folders behind, and would take along what an earlier one left.
    subprocess.run(['git', 'clone', '--quiet', ROOT, tmp_path / 'clone'], check=True)
    source = tmp_path / 'clone'
    if kind == 'sdist':
        build = 'import setuptools.build_meta as build; build.build_sdist("..")'
        environment = tmp_path / 'build'
        venv.create(environment, with_pip=True)
        subprocess.run([environment / 'bin' / 'pip', 'install', '--quiet', 'setuptools>=77'], check=True)
        subprocess.run([environment / 'bin' / 'python', '-c', build], cwd=source, check=True)
        [source] = tmp_path.glob('*.tar.gz')
    subprocess.run([*pip, 'wheel', '--no-deps', '--wheel-dir', tmp_path, source], check=True)
    [wheel] = tmp_path.glob('*.whl')
    environment = tmp_path / 'environment'
    venv.create(environment)
    [packages] = environment.glob('lib/python*/site-packages')
    subprocess.run([*pip, '--python', environment / 'bin' / 'python', 'install', '--no-deps', wheel], check=True)
    # A folder named in a .pth file is searched, but the .pth files in it, such as an editable install's, are not read.
    (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))

    def run(*command: str, code: int = 0) -> str:
        done = subprocess.run(
            [environment / 'bin' / command[0], *command[1:]], cwd=outside, env=variables, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    outside = tmp_path / 'outside'
    outside.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    assert str(environment) in run('python', '-c', 'import composer_sba; print(composer_sba.__file__)')
    said = run('python', '-m', 'composer_sba.train', '-f', 'digits_sba.yaml', 'max_duration=1ep', 'progress_bar=false')
    assert 'digits_sba: 23 steps' in said, said
    assert 'resnet44' in run('composer-sba', 'study', 'table1', '--dry-run')
    if kind == 'sdist':
        return  # has the same wheel in the end, and a type checker takes minutes
    (outside / 'user.py').write_text("from composer_sba import SBA\nSBA(fold=4)\nSBA(fold='many')\n")
    said = run('python', '-m', 'mypy', '--follow-imports=silent', 'user.py', code=1)
    assert 'user.py:3: error: Argument "fold" to "SBA" has incompatible type "str"; expected "int"' in said, said
    assert 'Found 1 error' in said, said
