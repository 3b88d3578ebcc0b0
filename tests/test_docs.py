"""The pages of docs/ against the code: Python runs, YAML is a recipe, commands parse, links and modules exist.

Run: pytest tests/test_docs.py
"""

import csv
import doctest
import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from composer.cli import launcher
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader, TensorDataset

import composer_sba
from composer_sba import __main__ as cli
from composer_sba import arguments as arguments_of_commands
from composer_sba import convert, evaluate, layers, train
from composer_sba.models import digits_net
from composer_sba.recipe import load
from composer_sba.recipe.build import build_components
from composer_sba.shipped import names
from composer_sba.study import __main__ as study
from composer_sba.study.arguments import study_parser
from programs import start

ROOT = Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = {
    str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob('*.md')) if '_build' not in path.parts
}
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.MULTILINE | re.DOTALL)

# Warnings of Composer, Streaming and Pillow that this package does not cause.
pytestmark = [
    pytest.mark.filterwarnings(f'ignore:{message}')
    for message in (
        'No optimizer was specified',
        'Some targets have less',
        "'mode' parameter is deprecated",
        'unclosed file .*shard:ResourceWarning',
    )
]


def blocks(*languages):
    """Return the page and the text of each block in one of the languages."""
    return [
        (page, text) for page, content in PAGES.items() for kind, text in BLOCK.findall(content) if kind in languages
    ]


@pytest.fixture(scope='module')
def downloaded(tmp_path_factory):
    """The cache of a reader who has downloaded the model of the tutorial: smaller here, and with random weights."""
    cache = tmp_path_factory.mktemp('huggingface')
    model = cache / 'models--facebook--deit-tiny-patch16-224'
    (model / 'refs').mkdir(parents=True)
    (model / 'refs' / 'main').write_text('first')
    sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=1000)
    transformers.ViTForImageClassification(config).save_pretrained(model / 'snapshots' / 'first')
    images = transformers.ViTImageProcessor(size={'height': 32, 'width': 32})
    images.save_pretrained(model / 'snapshots' / 'first')
    return cache


@pytest.fixture
def in_checkout(tmp_path_factory, monkeypatch, downloaded):
    """Work in a folder that holds the recipes, as a checkout does; all tests share the digits converted there.

    No network is used: models of huggingface.co come from the cache.
    """
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(transformers.utils.hub, 'TRANSFORMERS_CACHE', str(downloaded))
    folder = tmp_path_factory.getbasetemp() / 'docs'
    folder.mkdir(exist_ok=True)
    if not (folder / 'yamls').exists():
        (folder / 'yamls').symlink_to(ROOT / 'yamls')
    monkeypatch.chdir(folder)


def write_recipes(page):
    """Write each YAML block of a page that begins with ``# name.yaml`` to that file, as a reader does."""
    for kind, text in BLOCK.findall(PAGES[page]):
        if name := re.match(r'# (\w+\.yaml)\n', text):
            assert kind == 'yaml'
            Path(name.group(1)).write_text(text)


def predefined():
    """Return the names that a page may use without defining them: a network for random digits, and data."""
    network = digits_net()
    data = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(10, (64,)))
    return {
        'network': network,
        'model': ComposerClassifier(network, num_classes=10),
        'train_dataloader': DataLoader(data, batch_size=16),
        'eval_dataloader': DataLoader(data, batch_size=32),
    }


@pytest.mark.usefixtures('in_checkout')
@pytest.mark.parametrize(
    'pages',
    [
        *dict.fromkeys((page,) for page, _ in blocks('python', 'pycon')),
        # the commands of the second use what the first has trained
        pytest.param(('tutorials/image_folder.md', 'use_a_model.md'), marks=pytest.mark.nightly),
    ],
    ids=' then '.join,
)
def test_a_page_can_be_followed_from_top_to_bottom(pages, monkeypatch):
    """Run its Python and, in a tutorial, its commands, as in a fresh clone.

    Their trainings end after two batches of at most 16 images, and evaluate one batch. A block of commands that begins
    with ``# needs`` is left out: the reader sees what it needs.
    """

    def load_short(*arguments, **options):
        recipe = load(*arguments, **options)
        duration = recipe.max_duration if recipe.only_evaluates else '2ba'
        batch = min(recipe.global_train_batch_size, 16)
        sizes = {'global_train_batch_size': batch, 'device_eval_batch_size': 32, 'eval_subset_num_batches': 1}
        return replace(recipe, max_duration=duration, progress_bar=False, **sizes)

    monkeypatch.setattr(train, 'load', load_short)  # of the command only
    page = pages[0]
    write_recipes(page)
    space = predefined()
    for kind, text in BLOCK.findall(''.join(PAGES[each] for each in pages)):
        if kind == 'python':
            exec(compile(text, page, 'exec'), space)
        elif kind == 'pycon':
            example = doctest.DocTestParser().get_doctest(text, space, page, page, 0)
            output = []
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            runner.run(example, out=output.append, clear_globs=False)
            assert runner.failures == 0, ''.join(output)
            space |= example.globs
        elif kind == 'console' and page.startswith('tutorials/') and not text.startswith('# needs '):
            for command in re.findall(r'^\$ (.*)', text.replace('\\\n', ' '), re.MULTILINE):
                assert run(command) == 0, command
    if page == 'tutorials/image_folder.md':
        for file in ('predictions.csv', 'runs/flowers/predictions.csv')[: len(pages)]:
            assert len(Path(file).read_text().splitlines()) == 1 + 24  # images
    if len(pages) > 1:
        assert Path('runs/flowers/model.onnx').stat().st_size > Path('runs/flowers/model.pt2').stat().st_size / 2 > 0
    if page == 'tutorials/hugging_face.md':
        rows = list(csv.DictReader(Path('shapes.csv').read_text().splitlines()))
        assert len(rows) == 24 and {'circle', 'square', 'triangle'} == {rows[0][f'class_{rank}'] for rank in (1, 2, 3)}
        for row in rows:  # two ways from the file to probabilities: predict, and transformers alone
            by_transformers = {each['label']: each['score'] for each in space['classify'](f'shapes/val/{row["image"]}')}
            by_predict = {row[f'class_{rank}']: float(row[f'probability_{rank}']) for rank in (1, 2, 3)}
            assert by_transformers == pytest.approx(by_predict, abs=1e-4)


def run(command):
    """Run a command of a tutorial in this process, and return its exit code."""
    match shlex.split(command):
        case ['make', 'demo']:
            return train.main(['-f', 'yamls/digits_sba.yaml'])
        case ['composer', 'train.py', *arguments] | ['composer-sba', 'train', *arguments]:
            return train.main(arguments)
        case ['composer-sba', 'evaluate', *arguments]:
            return evaluate.main([*arguments, '--corruptions', 'fog', '--attacks', 'none'])
        case ['composer-sba', 'layers', '--model', 'resnet18'] | ['python', '-m', 'composer_sba.study', 'report', *_]:
            return 0  # the test of each command lists the layers; a report needs the runs of the study before it
        case ['composer-sba', name, *arguments]:
            return importlib.import_module(cli.COMMANDS[name][0]).main(arguments)
        case ['python', '-m', 'composer_sba.study', *arguments]:
            return study.main([*arguments, '--dry-run'])
        case ['pip', 'install', *_] | ['source', *_]:
            return 0
    pytest.fail(f'a tutorial has a command that this test does not run: {command}')


@pytest.mark.usefixtures('in_checkout')
@pytest.mark.parametrize(('page', 'text'), blocks('yaml'), ids=range(len(blocks('yaml'))))
def test_yaml_is_a_recipe_by_itself_or_over_one(page, text):
    Path('block.yaml').write_text(text)
    keys = re.findall(r'^(\w+):', text, re.MULTILINE)
    complete = 'extends' in keys or {'model', 'train_dataset', 'optimizer'} <= set(keys)
    with torch.device('meta'):
        build_components(load(['block.yaml'] if complete else ['yamls/digits_baseline.yaml', 'block.yaml']))


def commands():
    """Yield page and text of each command in a console block of docs/ or the README, continuation lines joined."""
    readme = re.findall(r'^```console\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
    for page, text in [*blocks('console'), *(('README.md', text) for text in readme)]:
        for line in text.replace('\\\n', ' ').splitlines():
            if line.startswith('$ '):
                yield page, ' '.join(line.removeprefix('$ ').split())


@pytest.mark.usefixtures('in_checkout')
@pytest.mark.parametrize(('page', 'command'), dict.fromkeys(commands()))
def test_a_command_exists_and_takes_its_arguments(page, command, monkeypatch, capsys, tmp_path):
    if page in PAGES:
        write_recipes(page)
    words = shlex.split(command, comments=True)
    while re.fullmatch(r'[A-Z_]+=\S*', words[0]):
        del words[0]
    match words:
        case ['composer-sba', 'convert', *arguments]:
            monkeypatch.setattr(convert, 'convert', lambda *args, **kwargs: {'train': 1})
            monkeypatch.setattr(convert, 'stored', lambda out: 'All files unchanged.')  # nothing was written
            assert convert.main(arguments) == 0
        case ['composer', *arguments]:
            launched = launcher._get_parser().parse_args(arguments)
            by_name = launched.training_script == 'composer_sba.train' and launched.module_mode
            assert by_name or (launched.training_script == 'train.py' and (ROOT / 'train.py').exists())
            parsed = arguments_of_commands.parse_train(launched.training_script_args, 'train.py')
            load(parsed.file, parsed.overrides)
        case ['composer-sba', 'layers', *arguments] if page in ('tutorials/own_model.md', 'recipes/libraries.md'):
            assert layers.main(arguments) == 0
            printed = capsys.readouterr().out.splitlines()
            rows = [line for line in PAGES[page].splitlines() if line.startswith('│')]
            assert set(rows) <= set(printed), set(rows) - set(printed)
        case ['composer-sba', name, *arguments]:
            module, _ = cli.COMMANDS[name]
            if name == 'train':
                parsed = arguments_of_commands.parse_train(arguments, name)
                if all(Path(file).exists() or file in names() for file in parsed.file):  # else of another page
                    load(parsed.file, parsed.overrides)
            else:
                importlib.import_module(module)._parser().parse_intermixed_args(arguments)
        case ['python', '-m', 'composer_sba.study', *arguments]:
            study_parser().parse_args(arguments)  # exits, and so fails the test, if it cannot
        case ['python', script, *arguments] if script.startswith('benchmarks/'):
            with start(ROOT / script, *arguments, '--help', output=tmp_path / 'help') as program:
                assert program.wait() == 0, program.said
        case ['pytest', path, '-k', choice, *_]:
            files = [ROOT / path] if (ROOT / path).is_file() else list((ROOT / path).glob('test_*.py'))
            tests = re.findall(r'^def (test_\w+)', ''.join(file.read_text() for file in files), re.MULTILINE)
            assert all(any(word in test for test in tests) for word in choice.split(' or ')), tests
        case ['pytest', path]:
            assert (ROOT / path).is_file()
        case ['make', target]:
            assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)
        case ['git', 'clone', address] | ['cd', address]:
            assert address.rpartition('/')[2] == 'composer-sba'
        case ['pip', 'install', '-e', package] | ['pip', 'install', package]:
            extra = re.fullmatch(r'(?:\.|composer-sba)(?:\[(\w+)\])?', package).group(1)
            assert extra is None or re.search(rf'^{extra} = \[$', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
        case ['source', '.venv/bin/activate']:
            pass
        case _:
            pytest.fail(f'{page} has a command that this test does not know: {command}')


@pytest.mark.parametrize('page', PAGES)
def test_relative_links_exist(page):
    for target in re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#[\w-]*)?\)', PAGES[page]):
        path = DOCS / target.lstrip('/') if target.startswith('/') else (DOCS / page).parent / target
        assert path.exists(), f'{page} links to {target}'


@pytest.mark.parametrize('page', PAGES)
def test_no_line_begins_with_a_percent_sign(page):
    """MyST drops such a line as a comment, without a warning."""
    assert not re.findall(r'^ *%.*', PAGES[page], re.MULTILINE)


def test_every_recipe_and_method_is_on_a_recipe_page():
    pages = ''.join(text for page, text in PAGES.items() if page.startswith('recipes/'))
    for path in sorted((ROOT / 'yamls').glob('*.yaml')) + sorted((ROOT / 'yamls' / 'methods').glob('*.yaml')):
        assert f'`{path.name}`' in pages, path


def test_every_public_name_is_in_the_reference():
    pages = ''.join(text for page, text in PAGES.items() if page.startswith('api/'))
    for name in composer_sba.__all__:
        assert f'composer_sba.{name}\n' in pages, name


def test_the_architecture_page_names_every_module_and_only_those():
    """Compare by file name: the page may group modules by folder or write their paths in full."""
    paths = re.findall(r'[\w/]+\.py\b', PAGES['architecture.md'])
    gone = [
        path for path in paths if '/' in path and not any((ROOT / at / path).exists() for at in ('', 'composer_sba'))
    ]
    assert not gone
    named = {path.rpartition('/')[2] for path in paths}
    modules = {path.name for path in (ROOT / 'composer_sba').rglob('*.py')} - {'__init__.py', '__main__.py'}
    assert modules <= named, f'not on the page: {sorted(modules - named)}'
    files = {path.name for folder in ('composer_sba', 'tests', 'benchmarks') for path in (ROOT / folder).rglob('*.py')}
    assert named <= files, f'on the page, but no such file: {sorted(named - files)}'


def test_the_letters_of_the_mechanism_are_large_enough_on_a_phone():
    style = (DOCS / '_static' / 'site.css').read_text()
    rule = r'@media \(max-width: (\d+)px\) \{\s*img\[src\$="/mechanism\.svg"\] \{ content: url\("(.*?)"\); \}'
    limit, name = re.search(rule, style).groups()
    figure = (DOCS / '_static' / name).read_text()
    width = int(re.search(r'viewBox="0 0 (\d+) \d+"', figure)[1])
    phone, margins = 390, 32
    letters = [int(size) * (phone - margins) / width for size in re.findall(r'font(?:-size)?: (\d+)px', figure)]
    assert phone <= int(limit) and min(letters) >= 12, f'{name} has letters of {min(letters):.1f} px at {phone} px'


def test_the_description_of_a_picture_is_on_one_line():
    """Sphinx joins the lines of a description without spaces."""
    pages = [page for page in DOCS.rglob('*.md') if '_build' not in page.parts]
    assert pages
    for page in pages:
        folded = re.findall(r'!\[[^\]]*\n[^\]]*\]\(.*?\)', page.read_text())
        assert not folded, f'{page.relative_to(DOCS)}: {folded}'
