"""Recipes: YAML and overrides are compared with the Recipe that is read, and each mistake with its one line.

No test here needs data on disk.

    pytest tests/test_recipe.py
"""

import inspect
import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.algorithms import LabelSmoothing, MixUp
from composer.callbacks import LRMonitor
from composer.loggers import FileLogger, MLFlowLogger, WandBLogger
from composer.optim import CosineAnnealingWithWarmupScheduler, DecoupledAdamW, LinearScheduler, MultiStepScheduler
from omegaconf import OmegaConf

from composer_sba import SBA
from composer_sba.errors import UserError
from composer_sba.recipe.build import build_components, parameter_groups
from composer_sba.recipe.recipe import Recipe, TrainerOptions, load, save, to_yaml
from composer_sba.recipe.registry import canonical, complete, component_errors, components, construct, parameters
from composer_sba.tensorboard import TensorboardLogger

YAMLS = Path(__file__).parent.parent / 'yamls'
BASE = """
model: {name: digits_net, num_classes: 10}
train_dataset: {name: digits}
optimizer: {name: sgd, lr: 0.1, weight_decay: 1e-4}
scheduler: {name: multi_step, milestones: [3ep, 4ep]}
algorithms:
  sba: {fold: 2}
max_duration: 5ep
global_train_batch_size: 64
save_folder: runs/${run_name}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / 'base.yaml').write_text(BASE)
    path = tmp_path / 'mine.yaml'
    path.write_text('extends: base.yaml\n')
    return path


def built(path: Path, *overrides: str) -> dict[str, Any]:
    with torch.device('meta'):
        return build_components(load(path, overrides))


def test_options_and_defaults_are_those_of_trainer() -> None:
    parameters = inspect.signature(Trainer.__init__).parameters
    ours = {'max_duration', 'run_name', 'seed', 'eval_interval', 'progress_bar'}
    for option in fields(TrainerOptions):
        assert option.name in parameters
        assert option.name in ours or option.default == parameters[option.name].default, option.name


def test_later_layers_win(recipe: Path) -> None:
    recipe.write_text('extends: base.yaml\noptimizer: {lr: 0.2}\nmax_duration: 6ep\nseed: 1\n')
    read = load(recipe, ['seed=2', 'algorithms.sba.eta=1e-3'])
    assert read.optimizer == {'name': 'sgd', 'lr': 0.2, 'weight_decay': 1e-4}
    assert (read.max_duration, read.seed) == ('6ep', 2)
    assert read.algorithms == {'sba': {'fold': 2, 'eta': 0.001}}


def test_another_component_inherits_no_argument(recipe: Path) -> None:
    read = load(recipe, ['optimizer.betas=[0.9, 0.99]', 'optimizer.name=adam', 'scheduler.name=linear'])
    assert read.optimizer == {'name': 'adam', 'betas': [0.9, 0.99]}
    assert read.scheduler == {'name': 'linear'}


def test_null_removes_an_entry(recipe: Path) -> None:
    read = load(recipe, ['algorithms.SBA=null', 'scheduler=null', 'save_folder=null'])
    assert (read.algorithms, read.scheduler, read.save_folder) == ({}, None, None)


def test_two_names_of_one_component_merge(recipe: Path) -> None:
    recipe.write_text('extends: base.yaml\nalgorithms: {mix_up: {alpha: 0.1}}\n')
    assert load(recipe, ['algorithms.MixUp.interpolate_loss=true']).algorithms['mixup'] == {
        'alpha': 0.1,
        'interpolate_loss': True,
    }


def test_interpolation_and_run_name(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WHERE', 'there')
    assert load(recipe).save_folder == 'runs/mine'
    assert load(recipe, ['save_folder=${oc.env:WHERE}/${seed}']).save_folder == 'there/17'


@pytest.mark.parametrize(
    ('override', 'key', 'expected'),
    [
        ('save_folder=~/runs', 'save_folder', 'HOME/runs'),
        ('load_path=~/old/latest-rank0.pt', 'load_path', 'HOME/old/latest-rank0.pt'),
        ('train_dataset.local=~/data/digits', 'train_dataset.local', 'HOME/data/digits'),
        ('train_dataset={name: digits, remote: ~/data}', 'train_dataset.remote', 'HOME/data'),
        ('loggers.file.filename=~/log.txt', 'loggers.file.filename', 'HOME/log.txt'),
        ('callbacks.checkpoint_saver.folder="~/{run_name}"', 'callbacks.checkpoint_saver.folder', 'HOME/{run_name}'),
        ('load_ignore_keys=["~/a", "b~/c"]', 'load_ignore_keys', ['HOME/a', 'b~/c']),
        ('save_folder=${oc.env:WHERE}/${run_name}', 'save_folder', 'HOME/there/mine'),
        ('run_name=~tilde', 'run_name', '~tilde'),
        ('save_folder="s3://bucket/~/runs"', 'save_folder', 's3://bucket/~/runs'),
        ('load_path=~', 'load_path', None),  # YAML's null
    ],
)
def test_a_path_in_the_home_folder(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, override: str, key: str, expected: Any
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('WHERE', '~/there')
    found: Any = load(recipe, [override]).to_dict()
    for part in key.split('.'):
        found = found[part]
    assert found == json.loads(json.dumps(expected).replace('HOME', str(tmp_path / 'home')))


def test_recipes_in_the_home_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(recipe.parent))
    recipe.write_text('extends: ~/base.yaml\nseed: 3\n')
    assert load('~/mine.yaml').seed == 3


@pytest.mark.parametrize('section', ['algorithms', 'callbacks', 'loggers', 'scheduler', 'optimizer', 'model'])
def test_a_component_takes_its_defaults_as_a_recipe_writes_them(section: str) -> None:
    for name in components(section):
        values = complete(section, name, {})
        assert set(values) <= set(parameters(section, name))
        problems = [each for each in component_errors(section, name, values) if 'is required' not in each[1]]
        assert problems == [], name


def test_defaults_are_filled_in_everywhere(recipe: Path) -> None:
    keys = ['algorithms.sba.vicinity={sigma: 0.3}', 'algorithms.sba.augment_prob={name: linear}']
    keys += ['train_dataset={name: imagefolder, crop_size: 32, gaussian_noise: {sigma: 0.1, prob: 0.5}}']
    values: Any = OmegaConf.create(to_yaml(load(recipe, keys)))
    assert values.algorithms.sba.vicinity == {
        **{'gaussian_fraction': 0.5, 'sigma': 0.3, 'tau': None, 'noise_scale': 'rms', 'basis': 'identity'},
        **{'dropout': 0.5, 'rescale': True},
    }
    assert values.algorithms.sba.augment_prob == {'name': 'linear', 'alpha_i': 1.0, 'alpha_f': 0.0, 't_max': '1dur'}
    assert (values.algorithms.sba.layers, values.algorithms.sba.target) == ('head', 'soft')
    assert (values.optimizer.momentum, values.optimizer.decay_norm_and_bias) == (0, True)
    assert (values.scheduler.gamma, values.model.dropout) == (0.1, 0.0)
    data = values.train_dataset
    assert (data.local, data.augment, data.crop_size, data.resize_size) == ('data/imagefolder', True, 32, 36)
    assert data.gaussian_noise == {'sigma': 0.1, 'prob': 0.5}
    plain: Any = OmegaConf.to_container(values)
    assert (plain['save_folder'], plain['run_name']) == ('runs/${run_name}', 'mine')


def test_a_replaced_folder_is_saved_as_it_is(recipe: Path) -> None:
    """A study gives its runs names and folders of their own."""
    values: Any = OmegaConf.to_container(OmegaConf.create(to_yaml(replace(load(recipe), save_folder='runs/other'))))
    assert values['save_folder'] == 'runs/other'


def test_a_dataset_that_cannot_be_is_named(recipe: Path) -> None:
    with pytest.raises(UserError, match='^command line: train_dataset: crop_size and resize_size do not apply'):
        to_yaml(load(recipe, ['train_dataset.crop_size=8']))


def test_saved_recipe_is_read_back_equal(recipe: Path, tmp_path: Path) -> None:
    read = load(recipe, ['seed=3', 'callbacks.lr_monitor={}', 'optimizer.lr=1e-5', 'algorithms.sba.layers=[a.b, head]'])
    save(read, tmp_path / 'recipe.yaml')
    assert to_yaml(load(tmp_path / 'recipe.yaml')) == to_yaml(read)
    saved: Any = OmegaConf.load(tmp_path / 'recipe.yaml')
    for key, value in read.to_dict().items():
        assert saved[key] == value or isinstance(value, dict), key
    assert saved.optimizer.lr == 1e-5 and saved.algorithms.sba.layers == ['a.b', 'head']
    assert set(OmegaConf.load(tmp_path / 'recipe.yaml')) == {f.name for f in fields(Recipe)} - {'sources'}


@pytest.mark.parametrize(
    ('section', 'names', 'cls'),
    [
        ('algorithms', ['mixup', 'mix_up', 'MixUp'], MixUp),
        ('algorithms', ['label_smoothing', 'labelsmoothing'], LabelSmoothing),
        ('algorithms', ['sba', 'SBA'], SBA),
        ('callbacks', ['lr_monitor', 'LRMonitor'], LRMonitor),
        ('loggers', ['file', 'file_logger'], FileLogger),
        ('loggers', ['tensorboard', 'TensorboardLogger'], TensorboardLogger),
        ('loggers', ['wandb'], WandBLogger),
        ('loggers', ['mlflow'], MLFlowLogger),
        ('scheduler', ['multi_step', 'MultiStepScheduler'], MultiStepScheduler),
        ('scheduler', ['cosine_annealing_with_warmup'], CosineAnnealingWithWarmupScheduler),
        ('optimizer', ['sgd', 'SGD'], torch.optim.SGD),
        ('optimizer', ['decoupled_adamw'], DecoupledAdamW),
    ],
)
def test_names_are_lenient(section: str, names: list[str], cls: type) -> None:
    for name in names:
        assert components(section)[str(canonical(section, name))] is cls


def test_loggers_by_name(tmp_path: Path) -> None:
    assert isinstance(construct('loggers', 'file', {'filename': str(tmp_path / 'log.txt')}), FileLogger)
    assert isinstance(construct('loggers', 'tensorboard', {'log_dir': str(tmp_path)}), TensorboardLogger)


def test_scheduler_for_a_probability(recipe: Path) -> None:
    [sba] = built(recipe, 'algorithms.sba.augment_prob={name: linear, alpha_i: 0, alpha_f: 1}')['algorithms']
    assert isinstance(sba.augment_prob, LinearScheduler)
    assert (sba.augment_prob.alpha_i, sba.augment_prob.alpha_f) == (0, 1)


def test_mapping_for_a_vicinity(recipe: Path) -> None:
    [sba] = built(recipe, 'algorithms.sba.vicinity={sigma: 0.3, basis: normalized}')['algorithms']
    assert (sba.vicinity.sigma, sba.vicinity.basis) == (0.3, 'normalized')


def test_norm_and_bias_are_exempt_from_decay(recipe: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    decayed, exempt = parameter_groups(network, decay_norm_and_bias=False)
    assert [id(p) for p in decayed['params']] == [id(network[0].weight), id(network[2].weight)]
    assert len(exempt['params']) == 4 and exempt['weight_decay'] == 0
    assert len(parameter_groups(network, decay_norm_and_bias=True)) == 1
    optimizer = built(recipe, 'optimizer.decay_norm_and_bias=false')['optimizers']
    assert [group['weight_decay'] for group in optimizer.param_groups] == [1e-4, 0]


@pytest.mark.parametrize(
    ('override', 'line'),
    [
        ('optimiser.lr=1', "optimiser: unknown key; did you mean 'optimizer'?"),
        ('lr=0.05', 'lr: unknown key; did you mean optimizer.lr?'),
        ('eta=1', 'eta: unknown key; did you mean algorithms.sba.eta?'),
        ('algorithms.sba.sigma=1', "algorithms.sba.sigma: unknown key; did you mean 'vicinity.sigma'?"),
        ('algorithms.sba.basis=hadamard', "algorithms.sba.basis: unknown key; did you mean 'vicinity.basis'?"),
        ('algorithms.sba.layer=conv2', "algorithms.sba.layer: unknown key; did you mean 'layers'?"),
        ('epochs=3', 'epochs: unknown key; did you mean max_duration?'),
        ('batch_size=32', 'batch_size: unknown key; did you mean global_train_batch_size?'),
        ('learning_rate=0.1', 'learning_rate: unknown key; did you mean optimizer.lr?'),
        ('optimizer=adam', "optimizer: expected a mapping such as {name: adam}, got 'adam'"),
        ('model=resnet_cifar', "model: expected a mapping such as {name: resnet_cifar}, got 'resnet_cifar'"),
        ('algorithms=sba', "algorithms: expected a mapping of names to arguments, such as {sba: {}}, got 'sba'"),
        ('algorithms={sab: {}}', "algorithms.sab: unknown algorithm 'sab'; did you mean 'sba'?"),
        ('sigma=1', 'sigma: unknown key; did you mean algorithms.sba.vicinity.sigma?'),
        (
            'num_workers=0',
            'num_workers: unknown key; did you mean train_dataset.num_workers or eval_dataset.num_workers?',
        ),
        ('model.name=resnet18', "model.name: unknown model 'resnet18'; write 'torchvision/resnet18'"),
        ('model.name=test_vit', "model.name: unknown model 'test_vit'; write 'timm/test_vit'"),
        ('model.name=resnet_cifer', "model.name: unknown model 'resnet_cifer'; did you mean 'resnet_cifar'?"),
        ('train_dataset.locla=x', "train_dataset.locla: unknown key; did you mean 'local'?"),
        ('algorithms.sba.foldd=3', "algorithms.sba.foldd: unknown key; did you mean 'fold'?"),
        ('algorithms.sba.vicinity.taau=3', "algorithms.sba.vicinity.taau: unknown key; did you mean 'tau'?"),
        ('model.depth=44', 'model.depth: unknown key; expected one of dropout, num_classes'),
        ('parallelism.fsdp.shard=1', 'parallelism.fsdp.shard: unknown key'),
        ('algorithms.mixpu={}', "algorithms.mixpu: unknown algorithm 'mixpu'; did you mean 'mixup'?"),
        ('scheduler.name=lineer', "scheduler.name: unknown scheduler 'lineer'; did you mean 'linear'?"),
        ('loggers.tensorbord={}', "loggers.tensorbord: unknown logger 'tensorbord'; did you mean 'tensorboard'?"),
        ('seed=1.5', 'seed: expected int, got 1.5'),
        ('optimizer.lr=fast', "optimizer.lr: expected float, got 'fast'"),
        ('algorithms.sba=true', 'algorithms.sba: expected a mapping, {} for its defaults, got true'),
        ('algorithms=[sba]', "algorithms: expected a mapping of names to arguments, got ['sba']"),
        ('precision=bf16', "precision: expected 'fp32' or 'amp_fp16' or 'amp_bf16' or 'amp_fp8' or null, got 'bf16'"),
        ('algorithms.sba.augment_prob=1.5', 'algorithms.sba.augment_prob: Expected augment_prob'),
        ('algorithms.sba.augment_prob={name: lin}', 'algorithms.sba.augment_prob.name: unknown scheduler'),
        (
            'algorithms.sba.augmentprob={name: linear}',
            "algorithms.sba.augmentprob: unknown key; did you mean 'augment_prob'?",
        ),
        ('algorithms.sba.fold={name: linear}', "algorithms.sba.fold: expected int, got {'name': 'linear'}"),
        ('algorithms.sba.layers=[]', 'algorithms.sba.layers: Expected layers'),
        ('algorithms.sba.target=medium', "algorithms.sba.target: expected 'soft' or 'hard', got 'medium'"),
        ('algorithms.manifold_mixup.alpha=-1', 'algorithms.manifold_mixup.alpha: Expected alpha'),
        ('model={name: resnet_cifar, num_classes: 10, depth: 45}', 'model.depth: resnet_cifar: depth must be'),
        ('algorithms.sba.vicinity.tau=-1', 'algorithms.sba.vicinity.tau: Expected tau'),
        ('algorithms.sba.fold=0', 'algorithms.sba.fold: Expected fold'),
        ('optimizer.lr=-1', 'optimizer: Invalid learning rate: -1'),
        ('optimizer.decay_norm_and_bias=1', 'optimizer.decay_norm_and_bias: expected bool, got 1'),
        ('optimizer.differentiable=true', 'optimizer.differentiable: cannot be used: Composer takes no gradients'),
        ('max_duration=5epp', "max_duration: expected int or a time such as '5ep' or '100ba', got '5epp'"),
        ('max_duration="5"', "max_duration: expected int or a time such as '5ep' or '100ba', got '5'"),
        (
            'scheduler.milestones=[3]',
            "scheduler.milestones: expected a list, each a time such as '5ep' or '100ba', got",
        ),
        ('global_train_batch_size=0', 'global_train_batch_size: expected at least 1, got 0'),
        ('train_subset_num_batches=0', 'train_subset_num_batches: expected -1 for all, or at least 1, got 0'),
        ('max_duration=-1', 'max_duration: must not be negative, got -1'),
        ('max_duration=0ba', "max_duration: '0ba' only evaluates, which needs an eval_dataset"),
        ('model.num_classes=0', 'model.num_classes: expected 2 to 1000000, got 0'),
        ('scale_schedule_ratio=0.001', "scale_schedule_ratio: 0.001 shortens max_duration '5ep' to 0"),
        ('scale_schedule_ratio=-1', 'scale_schedule_ratio: expected a positive number, got -1'),
        ('dist_timeout=.inf', 'dist_timeout: expected a number of seconds, at most 1000000000, got inf'),
        ('seed=-1', 'seed: expected 0 to 4294967295, got -1'),
        (
            'save_folder=~nobody-of-this-name/runs',
            "save_folder: '~nobody-of-this-name/runs' names the home folder of an unknown user",
        ),
        ('optimizer.momentum=.nan', 'optimizer.momentum: expected a number, got nan'),
        ('seed=18446744073709551616', 'seed: expected an integer of at most 64 bits, got 18446744073709551616'),
        ('compile_config.mdoe=x', "compile_config.mdoe: unknown key; did you mean 'mode'?"),
        (
            'algorithms.ema=null',
            'algorithms.ema: null removes an inherited entry, but none is inherited; write {} for the defaults',
        ),
        ('algorithms={mixup: {}, mix_up: {}}', "algorithms: 'mixup' is named twice"),
        ('seed', "expected key=value or key.sub=value, got 'seed'"),
        ('seed=[1,', "seed: expected YAML after =, got 'seed=[1,'"),
        ('save_folder=${oc.env:SBA_NOWHERE}', 'save_folder: KeyError raised while resolving interpolation'),
        ('save_folder=${nowhere}', "save_folder: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_mistake_is_described_in_one_line(recipe: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        built(recipe, override)
    assert str(caught.value).startswith(f'command line: {line}')
    assert '\n' not in str(caught.value)


def test_a_mistake_names_the_file_that_has_it(recipe: Path) -> None:
    (recipe.parent / 'base.yaml').write_text(BASE + 'sede: 1\n')
    with pytest.raises(UserError, match=r"/base.yaml: sede: unknown key; did you mean 'seed'\?$"):
        load(recipe)


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('a: [1,\nb: 2\n', 'mine.yaml: line 3, column 1: not YAML: '),
        ('a: 1\na: 2\n', 'mine.yaml: line 2, column 1: not YAML: found duplicate key a'),
        ('a: !!python/name:os.system\n', 'mine.yaml: line 1, column 4: not YAML: could not determine a constructor'),
        ('- 1\n', 'mine.yaml: expected a mapping of keys, got a list'),
        ('3\n', 'mine.yaml: expected a mapping of keys, got another kind of YAML'),
        ('extends: mine.yaml\n', 'mine.yaml: extends: a cycle, mine.yaml -> mine.yaml'),
        ('extends: gone.yaml\n', 'mine.yaml: extends: FOLDER/gone.yaml: No such file or directory'),
        ('extends: [a]\n', "mine.yaml: extends: expected the name of a file, got ['a']"),
        ('seed: 1\n', 'mine.yaml: max_duration: is required'),
    ],
)
def test_a_bad_file_is_described_in_one_line(recipe: Path, tmp_path: Path, text: str, line: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        load(recipe)
    assert line.replace('FOLDER', str(tmp_path)) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_missing_library_is_named(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(UserError, match=r"loggers.wandb: needs a library .*: pip install 'mosaicml\[wandb\]'$"):
        built(recipe, 'loggers.wandb={}')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('lr: 0.1', 'lr: unknown key; expected one of algorithms, '),
        ('epochs: 5\ntrain_dataset: {name: digits}', 'epochs: unknown key; did you mean max_duration?'),
    ],
)
def test_an_unknown_key_is_explained_in_a_recipe_without_a_model(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / 'short.yaml').write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load(tmp_path / 'short.yaml')
