"""The README against the repository: its scripts and commands run as printed, and its links work on PyPI.

Run: pytest tests/test_readme.py
"""

import re
import shlex
import tarfile
from pathlib import Path

import torch

from composer_sba import SBA, convert, train
from composer_sba.recipe import load
from composer_sba.recipe.build import build_components
from conversions import cifar_batches, image_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def python_block(heading):
    return re.search(rf'^## {heading}\n.*?^```python\n(.*?)^```', README, re.M | re.S).group(1)


def test_the_composer_script_trains_as_printed(capfd):
    names = {}
    exec(compile(python_block('In a Composer script'), 'README.md', 'exec'), names)
    assert [type(algorithm).__name__ for algorithm in names['trainer'].state.algorithms] == ['SBA']
    accuracy = float(re.search(r'^MulticlassAccuracy: (.*)', capfd.readouterr().out, re.M).group(1))
    promised = float(re.search(r'MulticlassAccuracy: about (.*)', README).group(1))
    assert abs(accuracy - promised) < 0.04


def test_the_plain_pytorch_loop_trains_as_printed(capfd):
    exec(compile(python_block('In plain PyTorch'), 'README.md', 'exec'), {})
    error = float(re.search(r'error: (.*)%', capfd.readouterr().out).group(1))
    promised = float(re.search(r'# about (\d+) %', README).group(1))
    assert abs(error - promised) < 4  # points; a digit is 0.28


def test_the_commands_of_the_recipes_run(tmp_path, monkeypatch):
    """Run the commands in order in one folder, on a few images of the named formats, for two batches each."""
    monkeypatch.chdir(tmp_path)
    cifar_batches(tmp_path / 'cifar-10-batches-py')
    with tarfile.open('cifar-10-python.tar.gz', 'w:gz') as archive:
        archive.add('cifar-10-batches-py')
    folder = image_folder(tmp_path / 'imagenet')
    small = ['max_duration=2ba', 'global_train_batch_size=4', 'progress_bar=false']
    small += ['device_eval_batch_size=4', 'eval_subset_num_batches=1']
    block = re.search(r'^## From a recipe\n.*?^```console\n(.*?)^```', README, re.M | re.S).group(1)
    trained = converted = 0
    for command in block.splitlines():
        match shlex.split(command.removeprefix('$ ').replace('/datasets/imagenet', str(folder))):
            case ['composer-sba', 'train', *arguments] | ['composer', '-m', 'composer_sba.train', *arguments]:
                sizes = [
                    f'{split}_dataset.{key}=64' for split in ('train', 'eval') for key in ('crop_size', 'resize_size')
                ]
                imagenet = ['model.num_classes=3', *sizes] if 'imagenet' in command else []
                assert train.main([*arguments, *small, *imagenet]) == 0, command
                trained += 1
            case ['composer-sba', 'convert', *arguments]:
                assert convert.main(arguments) == 0, command
                converted += 1
    assert (trained, converted) == (3, 2) and len(block.splitlines()) == 5


def test_the_recipe_that_it_prints_is_complete(tmp_path):
    (tmp_path / 'own.yaml').write_text(re.search(r'^```yaml\n(.*?)^```', README, re.M | re.S).group(1))
    with torch.device('meta'):
        parts = build_components(load([tmp_path / 'own.yaml']))
    [sba] = [each for each in parts['algorithms'] if isinstance(each, SBA)]
    assert (sba.fold, sba.eta, sba.vicinity.basis) == (40, 0.01, 'normalized')


def test_every_recipe_that_it_names_exists():
    for name in re.findall(r'(?:-f |extends: )([\w/]+\.yaml)', README):
        assert (ROOT / 'yamls' / name).exists(), name


def test_links_do_not_depend_on_where_the_page_is_shown():
    """PyPI shows the README without the repository."""
    links = re.findall(r'\]\(([^)#]*)', README)
    assert links and all(link.startswith('https://') or not link for link in links), links


def test_its_prose_stays_short():
    """Count lines without code, tables and empty lines."""
    prose = re.sub(r'^```\w*\n.*?^```$', '', README, flags=re.M | re.S)
    lines = [line for line in prose.splitlines() if line and not line.startswith(('|', '    '))]
    assert len(lines) <= 60, len(lines)
