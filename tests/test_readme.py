"""The README against the repository: its scripts run as printed, and the files that it names exist.

Run: pytest tests/test_readme.py
"""

import re
import shlex
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

from composer_sba import convert, train
from conversions import cifar_batches, image_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def python_block(heading):
    return re.search(rf'^## {heading}\n.*?^```python\n(.*?)^```', README, re.M | re.S).group(1)


def test_the_composer_script_trains(monkeypatch):  # on random images: nothing is downloaded
    images = TensorDataset(torch.rand(256, 3, 32, 32), torch.randint(10, (256,)))
    monkeypatch.setattr(torchvision.datasets, 'CIFAR10', lambda *args, **kwargs: images)
    names = {}
    exec(compile(python_block('In a Composer script'), 'README.md', 'exec'), names)
    trainer = names['trainer']
    assert trainer.state.timestamp.batch == 2
    assert [type(algorithm).__name__ for algorithm in trainer.state.algorithms] == ['SBA']
    assert torch.isfinite(trainer.state.loss).all()


def test_the_plain_pytorch_loop_trains(digits):
    images, labels = digits
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10))
    names = {
        'F': F,
        'model': model,
        'loader': list(zip(images[:1024].split(64), labels[:1024].split(64), strict=True)),
        'optimizer': torch.optim.SGD(model.parameters(), lr=0.5),
    }
    with torch.no_grad():
        before = F.cross_entropy(model(images), labels).item()
    exec(compile(python_block('In plain PyTorch'), 'README.md', 'exec'), names)
    with torch.no_grad():
        after = F.cross_entropy(model(images), labels).item()
    assert after < 0.8 * before, f'loss {before:.3f} -> {after:.3f}'


def test_the_commands_of_the_recipes_run(tmp_path, monkeypatch):
    """Run the commands in order in one folder, on a few images of the named formats, for two batches each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'yamls').symlink_to(ROOT / 'yamls')
    cifar_batches(tmp_path / 'cifar-10-batches-py')
    with tarfile.open('cifar-10-python.tar.gz', 'w:gz') as archive:
        archive.add('cifar-10-batches-py')
    folder = image_folder(tmp_path / 'imagenet')
    small = ['max_duration=2ba', 'global_train_batch_size=4', 'progress_bar=false']
    small += ['device_eval_batch_size=4', 'eval_subset_num_batches=1']
    block = re.search(r'^## From a recipe\n\n```console\n(.*?)^```', README, re.M | re.S).group(1)
    trained = 0
    for command in block.splitlines():
        match shlex.split(command.removeprefix('$ ').replace('/datasets/imagenet', str(folder))):
            case ['composer', 'train.py', *arguments]:
                classes = ['model.num_classes=3'] if 'imagenet' in command else []
                assert train.main([*arguments, *small, *classes]) == 0, command
                trained += 1
            case ['python', '-m', 'composer_sba.convert', *arguments]:
                assert convert.main(arguments) == 0, command
            case words:
                assert words[:3] == ['pip', 'install', '-e'], command  # the tests run in such an environment
    assert trained == 3


def test_every_recipe_and_link_that_it_names_exists():
    shipped = [f'yamls/{name}' for name in re.findall(r'-f (?:yamls/)?([\w/]+\.yaml)', README)]
    for path in shipped + re.findall(r'yamls/[\w/]+\.yaml', README) + re.findall(r'\]\(([\w./]+)\)', README):
        assert (ROOT / path).exists(), path


def test_it_stays_short():
    assert len(README.splitlines()) <= 145
