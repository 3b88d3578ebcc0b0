"""The evaluation of a classifier: against closed forms, loops, Composer's own metrics, and as a command.

Run: pytest tests/test_evaluate.py
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.models import ComposerClassifier
from PIL import Image
from scipy.stats import norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba.conditions import Smoothing
from composer_sba.convert import main as convert_main
from composer_sba.data import DatasetConfig, build_dataloader, convert, transform
from composer_sba.errors import UserError
from composer_sba.evaluate import main
from composer_sba.models import digits_net
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import load
from composer_sba.robustness import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    corrupt,
    evaluate,
    mean_corruption_error,
    relative_corruption_error,
)
from composer_sba.train import main as train_main
from composer_sba.train import train
from conversions import CIFAR10C, cifar10c_arrays, cifar_batches, image_folder

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SHORT = ['max_duration=2ba', 'progress_bar=false', 'train_dataset.in_memory=true', 'eval_dataset.in_memory=true']


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe_options(digits_folder):
    return [*SHORT, f'train_dataset.local={digits_folder}', f'eval_dataset.local={digits_folder}']


def random_data(rows=24, side=8, classes=3):
    return TensorDataset(torch.rand(rows, 3, side, side), torch.randint(classes, (rows,)))


def random_network(side=8, classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, classes), nn.BatchNorm1d(classes))


def slow_scores(network, images, labels):
    """Error, NLL and expected calibration error of 15 bins, image by image."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    logits = network.eval()((images - mean) / std).detach().double().numpy()
    wrong, nll, bins = 0, 0.0, [[] for _ in range(15)]
    for row, label in zip(logits, labels.tolist(), strict=True):
        chances = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        wrong += int(row.argmax() != label)
        nll -= np.log(chances[label])
        bins[int(np.ceil(chances.max() * 15)) - 1].append((chances.max(), row.argmax() == label))
    gaps = [abs(np.sum([confidence - hit for confidence, hit in each])) for each in bins]
    return {'error': wrong / len(labels), 'nll': nll / len(labels), 'calibration_error': sum(gaps) / len(labels)}


def test_scores_are_those_of_a_loop_over_images():
    data, network = random_data(), random_network()
    network(torch.randn(64, 3, 8, 8))  # gives the normalization its statistics
    images, labels = data.tensors
    result = evaluate(network, DataLoader(data, 10), mean=MEAN, std=STD, corruptions=['contrast', 'pixelate'])
    assert result['images'] == 24
    assert result['clean'] == pytest.approx(slow_scores(network, images, labels), abs=1e-5)
    assert result['noise'][0] == {'sigma': 0.0, **result['clean']}
    for name in ('contrast', 'pixelate'):
        for entry in result['corruptions'][name]:
            expected = slow_scores(network, corrupt(images, name, entry['severity']), labels)
            assert entry == pytest.approx({'severity': entry['severity'], **expected}, abs=1e-5), name


def test_bytes_are_pixels_as_well():
    pixels, labels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8), torch.randint(3, (12,))
    network, options = random_network().eval(), {'mean': MEAN, 'std': STD, 'corruptions': []}
    results = [
        evaluate(network, DataLoader(TensorDataset(images, labels), 12), **options)
        for images in (pixels, pixels.float() / 255)
    ]
    assert results[0] == results[1]


def test_noise_moves_a_linear_classifier_as_the_normal_distribution_says():
    """Two classes, a hyperplane at distance d, images at 0.5: the error is Φ(-d / σ) while nothing is clipped."""
    weight = torch.randn(3 * 64)
    distance, sigmas, rows = 0.1, (0.05, 0.1), 4000
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2, dtype=torch.float32))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([weight / weight.norm(), 0 * weight]))
        network[1].bias.copy_(torch.tensor([distance - 0.5 * (weight / weight.norm()).sum().item(), 0.0]))
    data = TensorDataset(torch.full((rows, 3, 8, 8), 0.5), torch.zeros(rows, dtype=torch.long))
    result = evaluate(network, DataLoader(data, 1000), mean=[0.0] * 3, std=[1.0] * 3, sigmas=sigmas, corruptions=[])
    for entry in result['noise']:
        expected = norm.cdf(-distance / entry['sigma'])
        tolerance = 4 * np.sqrt(expected * (1 - expected) / rows)
        assert abs(entry['error'] - expected) < tolerance, (entry, expected)


def test_draws_depend_on_seed_condition_and_batch_alone():
    data, network = random_data(), random_network()
    options = {'mean': MEAN, 'std': STD, 'sigmas': [0.2]}

    def run(**more):
        before = torch.get_rng_state()
        loader = DataLoader(data, 10, generator=torch.Generator())  # else PyTorch draws a seed for its workers
        result = evaluate(network, loader, **options, **more)
        assert torch.equal(before, torch.get_rng_state()), 'the global random stream has moved'
        return result

    every, again, one, other = run(), run(), run(corruptions=['fog'], severities=[3]), run(seed=1)
    assert every == again
    assert one['corruptions']['fog'] == [every['corruptions']['fog'][2]]
    assert one['noise'] == every['noise']
    assert other['noise'] != every['noise'] and other['corruptions']['fog'] != every['corruptions']['fog']
    assert other['clean'] == every['clean']
    assert set(every['corruptions']) == set(CORRUPTIONS)


def test_modes_of_the_network_are_restored():
    network = random_network().train()
    network[0].eval()
    before = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    evaluate(network, DataLoader(random_data(), 10), mean=MEAN, std=STD, corruptions=[])
    assert [module.training for module in network.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class Merging(nn.Linear):
    """Adds a second weight to the first in ``eval()`` and subtracts it in ``train()``, as LoRA does."""

    def __init__(self, features, classes):
        super().__init__(features, classes)
        self.second, self.merged = nn.Parameter(torch.randn(classes, features)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.second if mode else self.second
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.second, self.bias)


def test_a_network_whose_modes_do_more_than_set_a_flag_is_restored():
    network = nn.Sequential(nn.Flatten(), Merging(192, 3)).train()
    weight = network[1].weight.clone()
    evaluate(network, DataLoader(random_data(), 10), mean=MEAN, std=STD, corruptions=[])
    assert network[1].training and not network[1].merged
    assert torch.equal(network[1].weight, weight)


def test_both_mean_corruption_errors_are_those_of_their_definitions():
    errors = {'fog': [0.2, 0.4], 'gaussian_blur': [0.6, 0.8], 'snow': [0.5]}
    assert mean_corruption_error(errors) == pytest.approx((0.3 + 0.7 + 0.5) / 3)
    relative = (0.3 / ALEXNET_ERRORS['fog'] + 0.5 / ALEXNET_ERRORS['snow']) / 2
    assert relative_corruption_error(errors) == pytest.approx(relative)
    assert mean_corruption_error({}) is None and relative_corruption_error({'saturate': [0.1]}) is None
    for side in (8, 72):  # the second has ImageNet's constants
        options = {'mean': MEAN, 'std': STD, 'sigmas': [], 'corruptions': ['contrast', 'saturate']}
        result = evaluate(random_network(side), DataLoader(random_data(8, side), 8), **options)
        found = {name: [entry['error'] for entry in each] for name, each in result['corruptions'].items()}
        assert result['mean_corruption_error'] == mean_corruption_error(found)
        assert result['relative_corruption_error'] == (None if side == 8 else relative_corruption_error(found))


@pytest.mark.parametrize(
    ('network', 'images', 'options', 'line'),
    [
        (random_network(), 3 * torch.randn(4, 3, 8, 8), {}, r'expected images in \[0, 1\] or uint8, got values from'),
        (random_network(), torch.full((4, 3, 8, 8), torch.nan), {}, r'expected images in \[0, 1\] or uint8'),
        (nn.Identity(), torch.rand(4, 3, 8, 8), {}, r'logits of shape \(N, K\), got \(4, 3, 8, 8\)'),
        (random_network(), torch.rand(4, 3, 8, 8), {'sigmas': [-0.1]}, 'Expected sigmas to be finite numbers >= 0'),
        (random_network(), torch.rand(4, 3, 8, 8), {'corruptions': ['frog']}, "corruption 'frog'; did you mean 'fog'"),
        (random_network(), torch.rand(4, 3, 8, 8), {'severities': [9]}, 'an integer from 1 to 5, got 9'),
        (random_network(), torch.rand(0, 3, 8, 8), {}, 'the loader has no images'),
        (random_network(), torch.rand(4, 3, 8, 8), {'attack_images': 0}, 'attack_images to be an integer >= 1, got 0'),
        (random_network(), torch.rand(4, 3, 8, 8), {'attack_steps': 0}, 'attack_steps to be an integer >= 1, got 0'),
        (random_network(), torch.rand(4, 3, 8, 8), {'epsilons': {'l2': 0.0}}, 'epsilons to be finite numbers > 0'),
        (
            *(random_network(), torch.rand(4, 3, 8, 8), {'smoothing': Smoothing(), 'certified_images': -1}),
            'certified_images to be an integer >= 1, got -1',
        ),
    ],
)
def test_mistakes_are_one_line(network, images, options, line):
    data = TensorDataset(images, torch.zeros(len(images), dtype=torch.long))
    with pytest.raises(UserError, match=line):
        evaluate(network, DataLoader(data, 4), mean=MEAN, std=STD, **options)


def test_severities_and_counts_may_be_numbers_of_numpy():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(corrupt(images, 'contrast', np.int64(3)), corrupt(images, 'contrast', 3))
    assert json.dumps(vars(Smoothing(n=np.int64(5), sigma=np.float32(0.5)))) == json.dumps(vars(Smoothing(0.5, n=5)))


def test_a_network_trained_by_plain_composer(digits_folder):
    """No recipe of ours: the user's own Trainer, then the Python function."""
    network = digits_net()
    options = {'name': 'digits', 'local': str(digits_folder), 'in_memory': True}
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=build_dataloader(DatasetConfig(**options), 64, drop_last=True),
        eval_dataloader=build_dataloader(DatasetConfig(**options, split='val'), 360),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        max_duration='1ep',
        device='cpu',
        progress_bar=False,
    )
    trainer.fit()
    accuracy = trainer.state.eval_metric_values['MulticlassAccuracy'].item()
    pixels = DatasetConfig(**options, split='val', mean=[0.0] * 3, std=[1.0] * 3)
    result = evaluate(
        network, build_dataloader(pixels, 100), mean=[0.2874] * 3, std=[0.3540] * 3, sigmas=[0, 1], corruptions=[]
    )
    assert result['clean']['error'] == pytest.approx(1 - accuracy, abs=1e-6)
    assert result['noise'][1]['error'] > result['clean']['error'] + 0.2


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_writes_line_and_figure(recipe_options, tmp_path, capsys):
    assert train_main(['-f', 'digits_sba.yaml', *recipe_options, f'save_folder={tmp_path}/run']) == 0
    trained = capsys.readouterr().out
    checkpoint, out = tmp_path / 'run' / 'latest-rank0.pt', tmp_path / 'out'
    options = ['--sigmas', '0,0.1', '--corruptions', 'contrast,fog', '--severities', '1,5', '--out', str(out)]
    options += ['--attacks', 'pgd_l2', '--attack-images', '8', '--certify', '3', '--n0', '10']
    for _ in range(2):
        assert main(['--checkpoint', str(checkpoint), *options, '--n', '50']) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (out / 'evaluation.jsonl').read_text().splitlines()]
    assert len(lines) == 2
    one, other = ({**line, 'date': None, 'seconds': None} for line in lines)
    assert one == other
    assert f'eval accuracy          │ {100 - 100 * one["clean"]["error"]:.4g} %' in trained
    assert [entry['sigma'] for entry in one['noise']] == [0, 0.1]
    assert {name: [entry['severity'] for entry in each] for name, each in one['corruptions'].items()} == {
        'contrast': [1, 5],
        'fog': [1, 5],
    }
    assert {key: one['attacks'][0][key] for key in ('attack', 'epsilon', 'steps', 'images')} == {
        'attack': 'pgd_l2',
        'epsilon': 0.25,
        'steps': 10,
        'images': 8,
    }
    certificates = Path(one['certificates']['file'])
    assert len(certificates.read_text().splitlines()) == 1 + 3, 'the second call certifies no image again'
    assert one['certificates']['images'] == 3
    sba = one['recipe']['algorithms']['sba']
    assert {key: sba[key] for key in ('fold', 'augment_prob', 'eta')} == {'fold': 8, 'augment_prob': 0.5, 'eta': 0.1}
    assert {'commit', 'versions', 'hardware', 'seed', 'batch_size', 'checkpoint_sha256'} <= set(one)
    for row in (
        'digits_sba: 360 images',
        'noise, σ = 0.1',
        'contrast',
        'corruptions, mean',
        'pgd_l2, ε = 0.25',
        certificates.name,
    ):
        assert row in printed, printed
    assert (out / 'error_under_noise.png').read_bytes().startswith(b'\x89PNG')


def slow_error(network, config, images, labels):
    """The share of images, uint8 of shape (N, H, W, 3), that a network predicts wrongly."""
    batch = torch.stack([transform(config)(Image.fromarray(image)) for image in images])
    return (network.eval()(batch).argmax(1) != torch.tensor(labels)).double().mean().item()


def test_cifar10c_is_read_by_corruption_and_severity(tmp_path, capsys):
    arrays, labels = cifar10c_arrays(tmp_path / 'CIFAR-10-C', size=10)
    cifar_batches(tmp_path / 'batches')
    for name, source in (('cifar10', 'batches'), ('cifar10c', 'CIFAR-10-C')):
        assert convert_main([name, '--source', source]) == 0
    assert 'evaluate --checkpoint FILE --published data/cifar10c' in capsys.readouterr().out
    options = ['max_duration=1ba', 'progress_bar=false', 'train_dataset.in_memory=true', 'eval_dataset.in_memory=true']
    arguments = ['-f', 'resnet8_cifar10_baseline.yaml', *options, 'save_folder=run', 'global_train_batch_size=50']
    assert train_main([*arguments, 'eval_interval=1ba']) == 0
    network, _ = load_network(load('run/recipe.yaml'), Path('run/latest-rank0.pt'))
    kept = ('fog', 'snow', 'zoom_blur')
    for name in set(CIFAR10C) - set(kept):
        shutil.rmtree(Path('data', 'cifar10c', name))  # saves time
    command = ['--checkpoint', 'run/latest-rank0.pt', '--published', 'data/cifar10c', '--sigmas', '0']
    assert main([*command, '--attacks', 'none']) == 0
    line = json.loads(Path('run/evaluation.jsonl').read_text())
    assert tuple(line['corruptions']) == kept
    config, errors = DatasetConfig('cifar10', augment=False), []
    for name, entries in line['corruptions'].items():
        for severity, entry in enumerate(entries, start=1):
            block = slice(10 * (severity - 1), 10 * severity)
            errors.append(slow_error(network, config, arrays[name][block], labels[block].tolist()))
            assert (entry['severity'], entry['error']) == (severity, pytest.approx(errors[-1])), name
    assert len(errors) == 15 and line['mean_corruption_error'] == pytest.approx(np.mean(errors))
    assert main([*command[:2], '--published', 'run']) == 2
    refused = 'error: run/recipe.yaml: eval_dataset: --published run has no <corruption>/<severity>/ folders'
    assert capsys.readouterr().err.startswith(refused)


def test_imagenet_c_is_read_as_folders_of_images(tmp_path, capsys):
    convert('imagefolder', image_folder(tmp_path / 'source'), tmp_path / 'images')
    source = '{name: imagefolder, local: images, crop_size: 8, resize_size: 9, num_workers: 0}'
    datasets = [f'train_dataset={source}', f'eval_dataset={source}', 'eval_dataset.split=val', 'model.num_classes=3']
    assert train_main(['-f', 'digits_baseline.yaml', *datasets, 'max_duration=1ba', 'save_folder=run']) == 0
    images, labels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8), [i // 4 for i in range(12)]
    for severity in (2, 5):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / 'published' / 'fog' / str(severity) / ('ant', 'bee', 'cat')[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image // severity).save(folder / f'{i:02}.png')
    command = ['--checkpoint', 'run/latest-rank0.pt', '--published', 'published', '--attacks', 'none']
    assert main(command) == 0
    network, _ = load_network(load('run/recipe.yaml'), Path('run/latest-rank0.pt'))
    config = DatasetConfig('imagefolder', 'images', split='val', crop_size=8, resize_size=8)
    line = json.loads(Path('run/evaluation.jsonl').read_text())
    expected = [(s, pytest.approx(slow_error(network, config, images // s, labels))) for s in (2, 5)]
    assert [(entry['severity'], entry['error']) for entry in line['corruptions']['fog']] == expected
    (tmp_path / 'published' / 'fog' / '5' / 'ant').rename(tmp_path / 'published' / 'fog' / '5' / 'wasp')
    capsys.readouterr()
    assert main(command) == 2
    assert "fog/5 has 3 classes, ['bee', 'cat', 'wasp'] and others: expected those of" in capsys.readouterr().err
    for image in (tmp_path / 'published' / 'fog' / '5' / 'wasp').iterdir():
        image.unlink()
    assert main(command) == 2
    assert 'error: published/fog/5 cannot be read: ' in capsys.readouterr().err


def test_surgery_of_the_recipe_is_part_of_the_network(recipe_options, tmp_path):
    """BlurPool replaces layers, so the checkpoint has other layers than the model of the recipe."""
    algorithms = ['algorithms.blurpool={replace_convs: false}', 'algorithms.sba={}']
    recipe = load('digits_baseline.yaml', [*recipe_options, f'save_folder={tmp_path}/run', *algorithms])
    trained = train(recipe).state.model.module.eval()
    loaded, device = load_network(recipe, tmp_path / 'run' / 'latest-rank0.pt')
    assert device == torch.device('cpu')
    images = torch.randn(5, 3, 8, 8)
    assert any('BlurMaxPool' in type(module).__name__ for module in loaded.modules())
    assert torch.equal(trained(images), loaded.eval()(images))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_several_processes_are_refused(recipe_options, monkeypatch, capsys):
    """Each would count only its own images."""
    monkeypatch.setattr('composer.utils.dist.get_world_size', lambda: 2)
    assert main(['--checkpoint', 'any.pt', '-f', 'digits_baseline.yaml', *recipe_options]) == 2
    assert capsys.readouterr().err.startswith('error: evaluate runs in one process')


def test_mistakes_of_the_command_are_one_line(recipe_options, tmp_path, capsys):
    torch.save({'state': {'model': {}}}, tmp_path / 'other.pt')
    recipe = ['-f', 'digits_baseline.yaml', *recipe_options]
    for arguments, line in [
        (['--checkpoint', 'none.pt', *recipe], 'cannot load the checkpoint none.pt: no such file'),
        (['--checkpoint', 'none.pt'], 'cannot load the checkpoint none.pt: no such file'),
        (['--checkpoint', str(write(tmp_path / 'odd.pt', b'PK')), *recipe], 'odd.pt: '),
        (['--checkpoint', 'other.pt', *recipe], 'cannot load the checkpoint other.pt: '),
        (['--checkpoint', 'other.pt', *recipe, 'eval_dataset=null'], 'eval_dataset: is required'),
        (['--checkpoint', 'other.pt'], 'recipe.yaml'),
        (['--checkpoint', 'other.pt', *recipe, '--out', 'odd.pt/below'], 'odd.pt/below cannot be made'),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith('error: ') and line in error and error.count('\n') == 1, (arguments, error)
    for option, line in [
        (['--corruptions', 'frog'], "unknown 'frog'; did you mean 'fog'?"),
        (['--severities', '1,x'], "expected values separated by commas, got '1,x'"),
        (['--sigmas', 'all'], "expected values separated by commas, got 'all'"),
    ]:
        with pytest.raises(SystemExit, match='2'):
            main(['--checkpoint', 'other.pt', *recipe, *option])
        assert line in capsys.readouterr().err
