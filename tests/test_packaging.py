"""The installed package compared with its files: version, supported Pythons, commands, recipes, type marker.

Run: pytest tests/test_packaging.py. With ``-m ''`` it also builds wheel and source distribution, for which pip gets
setuptools from the network, and tries them in an environment of their own, outside the checkout.
"""

import ast
import functools
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
from PIL import Image

import composer_sba
from composer_sba import __main__ as cli
from composer_sba.data.readers import READERS
from composer_sba.models import MODELS
from composer_sba.recipe import merge as sources
from composer_sba.shipped import names

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


def test_imports_are_at_most_nine_levels_deep() -> None:
    """Contracts of import-linter say which way imports point. Imports within functions do not count."""
    package = ROOT / 'composer_sba'
    modules = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__'): path
        for path in package.rglob('*.py')
    }
    imported = {
        name: [
            module if module in modules else f'{node.module}'
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom)
            for module in [f'{node.module}.{each.name}' for each in node.names]
        ]
        for name, path in modules.items()
    }

    @functools.cache
    def longest(module: str) -> list[str]:
        deeper = [longest(each) for each in imported[module] if each in modules]
        return [module, *max(deeper, key=len, default=[])]

    deepest = max(map(longest, modules), key=len)
    assert 7 <= len(deepest) <= 9, ' -> '.join(deepest)


def test_links_to_the_repository_name_it_alike_and_exist() -> None:
    """Every file has the address of the metadata, and pages of the repository that are linked exist."""
    urls = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['urls']
    pages = [ROOT / name for name in ('README.md', 'SECURITY.md', 'CITATION.cff', 'pyproject.toml')]
    pages += (ROOT / 'docs').rglob('*.md')
    address = r'https://(?:raw\.githubusercontent|github)\.com/[\w-]+/composer-sba\b[^\s)\]"]*'
    links = [link for page in pages for link in re.findall(address, page.read_text())]
    places = [link.replace('raw.githubusercontent', 'github').replace('/blob', '').split('#')[0] for link in links]
    assert all(place.startswith(urls['Repository']) for place in places), places
    files = [place.partition('/main/')[2] for place in places if '/main/' in place]
    assert files and not [file for file in files if not (ROOT / file).exists()], files


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
        (
            'train -f nowhere.yaml',
            2,
            'error: nowhere.yaml: No such file or directory; composer-sba recipes lists those',
        ),
        ('train -f yamls/digit_sba.yml', 2, 'digit_sba.yml: No such file or directory; did you mean digits_sba.yaml?'),
        ('train -f flowrs.yml', 2, 'flowrs.yml: No such file or directory; did you mean flowers.yaml?'),
        ('train -f runs/a/recip.yaml', 2, 'recip.yaml: No such file or directory; did you mean runs/a/recipe.yaml?'),
        ('train -f digits_sba.yaml methods/mixup.yaml', 2, 'a recipe needs -f: -f methods/mixup.yaml'),
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
    for own in ('flowers.yaml', 'runs/a/recipe.yaml'):
        (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / own).touch()
    assert cli.main(command.split()) == code
    assert said in ''.join(capsys.readouterr())


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_the_help_of_a_command_calls_it_as_the_user_does(command, capsys, monkeypatch) -> None:
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit, match='0'):
        cli.main([command, '--help'])
    said = capsys.readouterr().out
    assert said.startswith(f'usage: composer-sba {command} ')
    examples = said.partition('\nexamples:\n')[2].splitlines()
    assert any(line.startswith(f'  composer-sba {command} ') for line in examples), said
    assert max(map(len, said.splitlines())) <= 80, max(said.splitlines(), key=len)
    assert command != 'convert' or all(kind in said for kind in READERS)


NO_RECIPE = 'expected the recipe after -f: composer-sba train'


@pytest.mark.parametrize(
    ('given', 'problem'),
    [
        ('predict --checkpoint a.pt', 'the following arguments are required: folder'),
        ('predict photos', 'the following arguments are required: --checkpoint'),
        ('train digits_sba.yaml', f'{NO_RECIPE} -f digits_sba.yaml'),
        ('train digit_sba.yaml seed=3', f'{NO_RECIPE} -f digits_sba.yaml'),
        ('train seed=3 mixup.yaml', f'{NO_RECIPE} -f methods/mixup.yaml'),
        ('train own.yaml', f'{NO_RECIPE} -f own.yaml'),
        ('train', f'{NO_RECIPE} -f digits_sba.yaml'),
        ('train -f a.yaml --eta 1', 'unrecognized arguments: --eta; a change to the recipe is key.sub=value'),
    ],
)
def test_a_mistake_in_the_arguments_names_only_what_is_wrong(given, problem, capsys) -> None:
    with pytest.raises(SystemExit, match='2'):
        cli.main(given.split())
    assert capsys.readouterr().err.splitlines()[-1] == f'composer-sba {given.split()[0]}: error: {problem}'


def run_until_torch(*arguments: str, module: str = 'composer_sba.__main__') -> subprocess.CompletedProcess[str]:
    """Run a command in a process that ends with 99 when it begins to import PyTorch."""
    program = (
        'import os, sys\n'
        'class NoTorch:\n'
        '    def find_spec(self, name, *_):\n'
        '        if name == "torch":\n'
        '            os._exit(99)\n'
        'sys.meta_path.insert(0, NoTorch())\n'
        f'import runpy; runpy.run_module("{module}", run_name="__main__", alter_sys=True)\n'
    )
    command = [sys.executable, '-c', program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {'RANK': '0'}, check=False)


@pytest.mark.parametrize(
    'given',
    [
        *(
            '--help',
            '--version',
            'recipes',
            '--list',
            'train digits_sba.yaml',
            'evaluate --corruptions frog',
            'study method',
        ),
        *(f'{command} --help' for command in cli.COMMANDS),
        'study methods --help',
    ],
)
def test_what_needs_no_pytorch_does_not_wait_for_it(given) -> None:
    done = run_until_torch(*given.split())
    mistake = given in ('train digits_sba.yaml', 'evaluate --corruptions frog', 'study method')
    assert done.returncode == (2 if mistake else 0), done.stderr
    assert done.stderr if mistake else done.stdout


@pytest.mark.parametrize('module', [module for module, _ in cli.COMMANDS.values() if module != 'composer_sba.recipes'])
def test_a_command_as_a_module_answers_before_pytorch(module) -> None:
    done = run_until_torch('--help', module=module)
    assert (done.returncode, done.stdout.partition(' ')[0]) == (0, 'usage:'), done.stderr
    assert 'table1' in done.stdout or not module.startswith('composer_sba.study')
    mistaken = run_until_torch('--frog', module=module)
    assert mistaken.returncode == 2 and 'error: ' in mistaken.stderr, mistaken.stderr


def test_the_first_line_comes_before_pytorch() -> None:
    done = run_until_torch('train', '-f', 'digits_baseline.yaml', '-f', 'methods/sba.yaml')
    assert (done.returncode, done.stdout) == (99, '')
    assert done.stderr == 'digits_baseline+sba: loading PyTorch and Composer ...\n'


def test_the_list_of_recipes_has_status_and_cost_in_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv('COLUMNS', '80')
    assert cli.main(['recipes']) == 0
    lines = {line.split()[0]: ' '.join(line.split()[1:]) for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == {'recipe', *(name for name in names() if '/' not in name)}
    assert lines['digits_sba.yaml'] == 'measured about 30 s on 2 cores'
    assert lines['alexnet_cifar10_baseline.yaml'] == '5 epochs 7.1e14 FLOP'
    assert lines['vgg16_cifar10_cutout_ba.yaml'] == "not measured 32 times the baseline's"
    without = [name for name, facts in lines.items() if not re.search(r'(measured|epochs) \S', facts)]
    assert without == ['recipe'], without


def test_the_lists_of_methods_and_models_are_complete(capsys, monkeypatch) -> None:
    monkeypatch.setenv('COLUMNS', '80')
    assert cli.main(['recipes', 'methods']) == 0
    methods = re.findall(r'^methods/\S+ +\S', capsys.readouterr().out, re.MULTILINE)
    assert [line.split()[0] for line in methods] == [name for name in names() if name.startswith('methods/')]
    assert cli.main(['recipes', 'models']) == 0
    said = capsys.readouterr().out
    table = said.partition('\n\n')[0].splitlines()
    assert [line.split()[0] for line in table if line[0] != ' '] == ['name', *MODELS]
    assert max(map(len, said.splitlines())) <= 80, said
    begins = table[0].index('pixels')
    assert all(line[begins - 1] == ' ' and line[begins].isdigit() for line in table[1:] if line[0] != ' '), said


@pytest.mark.parametrize(('given', 'code'), [('--help', 0), ('--version', 0), ('trian', 2), ('', 2)])
def test_the_console_command_alone_names_its_commands(given, code, capsys) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        cli.main(given.split())
    said = ''.join(capsys.readouterr())
    assert said.strip() == f'composer-sba {metadata("composer-sba")["Version"]}' or 'COMMAND' in said
    assert given != '--help' or all(f'\n  {name} ' in said for name in cli.COMMANDS), said
    assert given != 'trian' or "no command is called 'trian'; did you mean 'train'?" in said, said


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
    Image.new('RGB', (8, 8)).save(outside / 'digit.png')
    used = ['--checkpoint', 'runs/digits_sba/latest-rank0.pt']
    said = run('composer-sba', 'predict', *used, 'digit.png', '--out', 'digit.csv')
    assert 'predictions of 1 images: digit.csv' in said, said
    assert 'network: runs/digits_sba/model.pt2' in run('composer-sba', 'export', *used, '--format', 'pt2')
    assert 'clean' in run('composer-sba', 'evaluate', *used, '--corruptions', 'none', '--attacks', 'none')
    assert 'digits_sba.yaml' in run('composer-sba', 'recipes')
    assert 'resnet44' in run('composer-sba', 'study', 'table1', '--dry-run')
    if kind == 'sdist':
        return  # has the same wheel in the end, and a type checker takes minutes
    (outside / 'user.py').write_text("from composer_sba import SBA\nSBA(fold=4)\nSBA(fold='many')\n")
    said = run('python', '-m', 'mypy', '--follow-imports=silent', 'user.py', code=1)
    assert 'user.py:3: error: Argument "fold" to "SBA" has incompatible type "str"; expected "int"' in said, said
    assert 'Found 1 error' in said, said
