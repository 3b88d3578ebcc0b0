"""Models of torchvision, timm and HuggingFace by name: what a recipe makes of them, and each mistake's one line.

The networks are tiny and have random weights, which the tests save; nothing is downloaded.

Run: pytest tests/test_libraries.py
"""

import json
import re
import sys
import urllib.error
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
import transformers
from composer.models import ComposerClassifier

from composer_sba import layers
from composer_sba.data import DatasetConfig
from composer_sba.data.config import KNOWN_DATASETS
from composer_sba.errors import UserError
from composer_sba.libraries import find
from composer_sba.recipe import load
from composer_sba.recipe.build import build_components, load_network
from composer_sba.recipe.recipe import to_yaml
from composer_sba.train import main

DIGITS = 'yamls/digits_baseline.yaml'
SIDE = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
TORCHVISION = '{name: torchvision/shufflenet_v2_x0_5, num_classes: 10}'
TIMM = '{name: timm/test_vit, num_classes: 10, img_size: 8, patch_size: 4}'


@pytest.fixture(scope='module')
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as HuggingFace saves it: a ViT of 8-pixel images and 4 classes, its weights, its image processor."""
    folder = tmp_path_factory.mktemp('models') / 'vit'
    config = transformers.ViTConfig(**SIDE, image_size=8, patch_size=4, num_labels=4)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    size = {'height': 8, 'width': 8}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5, 0.5, 0.4], image_std=[0.5, 0.5, 0.3]).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and no weights that an earlier run has fetched."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError('Name or service not known')

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', refuse)


def parts(model: str, *overrides: str) -> dict[str, Any]:
    return build_components(load(DIGITS, [f'model={model}', *overrides]))


@pytest.mark.parametrize(
    ('model', 'problem'),
    [
        ('{name: timn/test_vit}', "model.name: unknown library 'timn' in 'timn/test_vit'; did you mean 'timm'?"),
        ('{name: torchvision/resnet19}', "model.name: unknown model 'resnet19'; nearest in torchvision: resnet18, "),
        ('{name: torchvision/fcn_resnet50}', "model.name: unknown model 'fcn_resnet50'; nearest in torchvision: "),
        ('{name: timm/test_vitt}', "model.name: unknown model 'test_vitt'; nearest in timm: test_vit, "),
        ('{name: timm/test_vit.r16}', "unknown model 'test_vit.r16'; nearest in timm: test_vit.r160_in1k"),
        ('{name: huggingface/vitt}', "model.name: unknown model 'vitt'; nearest in huggingface: vit, "),
        ('{name: huggingface//nowhere/vit}', 'or give an existing folder, or a model of huggingface.co'),
        ('{name: huggingface/bert, num_classes: 4}', "unknown model 'bert'"),
        ('{name: torchvision/resnet18}', 'model.num_classes: is required (int)'),
        ('{name: timm/test_vit, num_classes: two}', "model.num_classes: expected int or null, got 'two'"),
        ('{name: timm/test_vit, num_classes: 4, pretrained: 1}', 'model.pretrained: expected bool, got 1'),
        ('{name: torchvision/resnet18, num_classes: 4, pretraned: true}', "did you mean 'pretrained'?"),
        (
            '{name: torchvision/resnet18, num_classes: 4, zero_init_residuals: true}',
            "model.zero_init_residuals: unknown key; did you mean 'zero_init_residual'?",
        ),
        (
            '{name: timm/test_vit, num_classes: 4, embed_dims: 3}',
            "model.embed_dims: unknown key; did you mean 'embed_dim'?",
        ),
        (
            '{name: huggingface/vit, num_classes: 4, hiden_size: 32}',
            "model.hiden_size: unknown key; did you mean 'hidden_size'?",
        ),
        ('{name: timm/test_vit, num_classes: 4, embed_dim: wide}', 'model: '),
        ('{name: huggingface/vit, num_classes: 4, pretrained: true}', "model.pretrained: 'vit' is an architecture"),
    ],
)
def test_a_mistake_ends_in_one_line(model: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['-f', DIGITS, f'model={model}', 'save_folder=null']) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: command line: model') or 'is required' in error, error
    assert problem in error and error.count('\n') == 1, error


@pytest.mark.parametrize(
    ('name', 'module', 'extra'),
    [('timm/test_vit', 'timm', 'timm'), ('huggingface/vit', 'transformers', 'huggingface')],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"model.name: {name} needs {module}: pip install 'composer-sba\[{extra}\]'"):
        load(DIGITS, [f'model={{name: {name}, num_classes: 10}}'])


@pytest.mark.usefixtures('offline')
@pytest.mark.parametrize(
    ('name', 'key'),
    [
        ('torchvision/resnet18', 'model.pretrained: the weights cannot be fetched: '),
        ('timm/test_vit', 'model.pretrained: the weights cannot be fetched: '),
        ('huggingface/nobody/nothing', "model.name: the configuration of 'nobody/nothing' cannot be read: "),
    ],
)
def test_without_a_network_pretrained_weights_are_refused_in_one_line(
    name: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['-f', DIGITS, f'model={{name: {name}, pretrained: true, num_classes: 10}}', 'save_folder=null']) == 2
    error = capsys.readouterr().err
    assert key in error and error.count('\n') == 1, error


def test_dry_run_fetches_no_weights(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ('torchvision/resnet18', 'timm/test_vit'):
        assert main(['-f', DIGITS, '--dry-run', f'model={{name: {name}, pretrained: true, num_classes: 10}}']) == 0
        assert 'pretrained: true' in capsys.readouterr().out


class TestPretrained:
    """Load weights from a file instead of downloading them."""

    @pytest.fixture
    def fetched(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
        state = torchvision.models.resnet18().state_dict()
        monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: state)
        return state

    @pytest.mark.parametrize('classes', [10, 1000])
    def test_torchvision_replaces_the_classifier_for_another_number_of_classes(
        self, classes: int, fetched: dict[str, torch.Tensor]
    ) -> None:
        network = find('torchvision/resnet18').build(num_classes=classes, pretrained=True)
        differ = {key for key, value in network.state_dict().items() if not torch.equal(value, fetched[key])}
        assert differ == ({'fc.weight', 'fc.bias'} if classes == 10 else set())
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, classes)

    @pytest.mark.parametrize('name', ['googlenet', 'inception_v3'])
    def test_auxiliary_heads_are_left_out(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        state = torchvision.models.get_model(name, weights=None, init_weights=False, aux_logits=True).state_dict()
        monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: state)
        pretrained, random = (find(f'torchvision/{name}').build(5, pretrained=each) for each in (True, False))
        images = torch.rand(2, 3, 96, 96)
        assert pretrained.train()(images).shape == (2, 5)
        random.load_state_dict(pretrained.state_dict())
        assert torch.equal(pretrained.eval()(images), random.eval()(images))

    def test_a_classifier_that_is_no_linear_layer_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = torchvision.models.squeezenet1_1().state_dict()
        monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: state)
        with pytest.raises(UserError, match='model.num_classes: expected 1000, as the weights of squeezenet1_1 have'):
            parts('{name: torchvision/squeezenet1_1, pretrained: true, num_classes: 10}')

    def test_timm_loads_the_file_that_a_recipe_names(self, tmp_path: Path) -> None:
        state = timm.create_model('test_vit').state_dict()
        torch.save(state, tmp_path / 'vit.pth')
        arguments = {'pretrained': True, 'pretrained_cfg_overlay': {'file': str(tmp_path / 'vit.pth')}}
        network = find('timm/test_vit').build(num_classes=10, **arguments)
        assert torch.equal(network.patch_embed.proj.weight, state['patch_embed.proj.weight'])
        assert network.head.weight.shape == (10, state['head.weight'].shape[1])

    def test_huggingface_loads_the_folder_and_gives_it_another_classifier(self, vit: Path) -> None:
        saved = transformers.ViTForImageClassification.from_pretrained(vit)
        same, other = (find(f'huggingface/{vit}').build(classes, pretrained=True).module for classes in (4, 10))
        assert torch.equal(same.classifier.weight, saved.classifier.weight)
        assert other.classifier.weight.shape == (10, 32)
        for network in (same, other):
            assert torch.equal(network.vit.layernorm.weight, saved.vit.layernorm.weight)
            value = 'vit.embeddings.cls_token'
            assert torch.equal(network.get_parameter(value), saved.get_parameter(value))

    def test_without_pretrained_the_weights_are_random(self, vit: Path) -> None:
        saved = transformers.ViTForImageClassification.from_pretrained(vit)
        network = find(f'huggingface/{vit}').build(4).module
        assert not torch.equal(network.vit.embeddings.cls_token, saved.vit.embeddings.cls_token)


def images_of(name: str, dataset: str = 'imagefolder', **arguments: Any) -> dict[str, Any]:
    """Return what a recipe's training data has beyond what the recipe gives."""
    model = json.dumps({'name': name, 'num_classes': 10, **arguments})
    found = load(DIGITS, [f'model={model}', f'train_dataset={{name: {dataset}}}']).train_dataset
    return {key: value for key, value in found.items() if key != 'name'}


class TestImages:
    """Mean, standard deviation and size of the images."""

    def test_timm_gives_its_own_and_a_size_that_is_asked_for(self) -> None:
        half = {'mean': [0.5] * 3, 'std': [0.5] * 3}
        assert images_of('timm/test_vit') == {**half, 'crop_size': 160, 'resize_size': 168}  # 160 / 0.95
        assert images_of('timm/test_vit', img_size=96) == {**half, 'crop_size': 96, 'resize_size': 101}
        assert images_of('timm/test_vit', 'cifar10') == half  # whose images have one size

    def test_torchvision_gives_those_of_its_weights(self) -> None:
        statistics = {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}
        sizes = {'crop_size': 224, 'resize_size': 232}
        assert images_of('torchvision/resnet50', pretrained=True) == {**statistics, **sizes}
        assert images_of('torchvision/resnet50') == {}
        assert images_of('torchvision/vit_b_16', image_size=96) == {'crop_size': 96, 'resize_size': 96}

    def test_huggingface_gives_those_of_the_folder(self, vit: Path, tmp_path: Path) -> None:
        statistics = {'mean': [0.5, 0.5, 0.4], 'std': [0.5, 0.5, 0.3]}
        name = f'huggingface/{vit}'
        assert images_of(name) == {**statistics, 'crop_size': 8, 'resize_size': 8}
        assert images_of(name, image_size=16) == {**statistics, 'crop_size': 16, 'resize_size': 16}
        assert images_of('huggingface/vit') == {'crop_size': 224, 'resize_size': 224}  # has no image processor
        transformers.ConvNextConfig().save_pretrained(tmp_path)
        transformers.ConvNextImageProcessor(size={'shortest_edge': 224}, do_normalize=False).save_pretrained(tmp_path)
        assert images_of(f'huggingface/{tmp_path}') == {
            **{'mean': [0.0] * 3, 'std': [1.0] * 3},
            **{'crop_size': 224, 'resize_size': 256},  # crop_pct is 0.875
        }

    def test_what_the_recipe_gives_comes_first(self) -> None:
        given = 'train_dataset={name: imagefolder, mean: [0.1, 0.2, 0.3], crop_size: 64}'
        recipe = load(DIGITS, ['model={name: timm/test_vit, num_classes: 10}', given])
        expected = {'name': 'imagefolder', 'mean': [0.1, 0.2, 0.3], 'std': [0.5] * 3, 'crop_size': 64}
        assert recipe.train_dataset == expected
        DatasetConfig(**recipe.train_dataset)

    @pytest.mark.parametrize('name', ['timm/test_vit', 'huggingface/vit'])
    def test_a_model_that_takes_no_such_images_is_refused_in_one_line(
        self, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(['-f', DIGITS, f'model={{name: {name}, num_classes: 10}}', 'save_folder=null']) == 2
        error = capsys.readouterr().err
        assert 'model: takes no images of 8x8 pixels, as train_dataset digits has: ' in error, error
        assert error.count('\n') == 1


@pytest.fixture(params=['torchvision', 'timm', 'huggingface'])
def model(request: pytest.FixtureRequest, vit: Path) -> str:
    """The model section of a recipe for the digits."""
    huggingface = f'{{name: huggingface/{vit}, num_classes: 10}}'
    return {'torchvision': TORCHVISION, 'timm': TIMM, 'huggingface': huggingface}[request.param]


def test_the_model_has_the_metrics_of_this_package(model: str) -> None:
    built = parts(model)['model']
    assert isinstance(built, ComposerClassifier)
    assert list(built.get_metrics(is_train=True)) == ['MulticlassAccuracy']
    assert sorted(built.get_metrics(is_train=False)) == [
        'CrossEntropy',
        'MulticlassAccuracy',
        'MulticlassCalibrationError',
    ]


def test_training_is_summarized_and_resumes(
    model: str, few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f'model={model}', 'algorithms={sba: {}}', 'save_overwrite=false', 'autoresume=true']
    options += ['eval_subset_num_batches=1']
    for folder in ('broken', 'whole'):
        folders = [
            f'save_folder={tmp_path / folder}',
            *(f'{s}_dataset.local={few_digits}' for s in ('train', 'eval')),
        ]
        for duration in ('2ba', '4ba') if folder == 'broken' else ('4ba',):
            arguments = [*options, *folders, f'max_duration={duration}', 'save_interval=2ba', 'run_name=run']
            assert main(['-f', DIGITS, *arguments, 'scheduler=null']) == 0
        assert 'eval accuracy' in capsys.readouterr().out
    states = [
        torch.load(tmp_path / folder / 'latest-rank0.pt', weights_only=False)['state'] for folder in ('broken', 'whole')
    ]
    assert all(torch.equal(value, states[1]['model'][key]) for key, value in states[0]['model'].items())
    saved = load(tmp_path / 'whole' / 'recipe.yaml')
    means = {'timm': [0.5] * 3, 'huggingface': [0.5, 0.5, 0.4], 'torchvision': [*KNOWN_DATASETS['digits'].mean]}
    assert saved.train_dataset['mean'] == means[saved.model['name'].split('/')[0]]
    again = load(DIGITS, [*options, *folders, *arguments[-3:], 'scheduler=null'])
    assert to_yaml(saved) == to_yaml(again)  # with the defaults, which the saved one has


@pytest.mark.parametrize('layers', ['head', 'input'])
def test_sba_trains_the_model(layers: str, model: str, few_digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sba = f'algorithms={{sba: {{layers: {layers}, augment_prob: 1}}}}'
    data = [f'{section}_dataset.local={few_digits}' for section in ('train', 'eval')]
    assert main(['-f', DIGITS, f'model={model}', sba, *data, 'save_folder=null', 'max_duration=2ba']) == 0
    printed = capsys.readouterr().out
    assert '100.0 % of steps' in printed and float(re.search(r'SBA KL *│ ([\d.e-]+)', printed)[1]) > 0, printed


@pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
@pytest.mark.parametrize(
    'mixing',
    [
        'manifold_mixup: {layers: head}',
        pytest.param('mixup: {}', marks=pytest.mark.nightly),  # it mixes images, whatever the model is
        pytest.param('cutmix: {interpolate_loss: true}', marks=pytest.mark.nightly),
    ],
)
def test_other_algorithms_train_with_the_model(mixing: str, model: str, few_digits: Path) -> None:
    algorithms = f'{{{mixing}, label_smoothing: {{}}, batch_augmentation: {{fold: 2}}, ema: {{}}}}'
    data = [f'{section}_dataset.local={few_digits}' for section in ('train', 'eval')]
    short = ['save_folder=null', 'max_duration=2ba', 'device_train_microbatch_size=32']
    assert main(['-f', DIGITS, f'model={model}', f'algorithms={algorithms}', *data, *short]) == 0


@pytest.mark.usefixtures('offline')
def test_a_checkpoint_of_a_pretrained_model_is_evaluated_without_fetching(few_digits: Path, tmp_path: Path) -> None:
    data = [f'{section}_dataset.local={few_digits}' for section in ('train', 'eval')]
    run = tmp_path / 'run'
    assert main(['-f', DIGITS, f'model={TIMM}', *data, f'save_folder={run}', 'max_duration=1ba']) == 0
    recipe = load(run / 'recipe.yaml', ['model.pretrained=true'])
    network, _ = load_network(recipe, (run / 'latest-rank0.pt').resolve())
    trained = torch.load(run / 'latest-rank0.pt', weights_only=False)['state']['model']
    assert torch.equal(network.head.weight, trained['module.head.weight'])


def test_a_trained_model_of_huggingface_is_saved_as_the_page_says(vit: Path, few_digits: Path, tmp_path: Path) -> None:
    data = [f'{section}_dataset.local={few_digits}' for section in ('train', 'eval')]
    model = f'model={{name: huggingface/{vit}, pretrained: true, num_classes: 10}}'
    assert main(['-f', DIGITS, model, *data, f'save_folder={tmp_path / "run"}', 'max_duration=2ba']) == 0
    page = (Path(__file__).parents[1] / 'docs' / 'recipes' / 'libraries.md').read_text()
    names: dict[str, Any] = {}
    exec(re.search(r'```python\n(.*?)```', page, re.DOTALL)[1], names)
    names['save_pretrained'](tmp_path / 'run', tmp_path / 'vit')
    saved = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'vit').state_dict()
    trained = torch.load(tmp_path / 'run' / 'latest-rank0.pt', weights_only=False)['state']['model']
    assert {f'module.module.{key}' for key in saved} == set(trained)
    assert all(torch.equal(value, trained[f'module.module.{key}']) for key, value in saved.items())


@pytest.mark.parametrize(
    ('arguments', 'cuts'),
    [
        ('--model timm/test_vit img_size=8 patch_size=4 --image-size 8', ['input', 'patch_embed', 'blocks.0', 'head']),
        ('--model timm/test_resnet --num-classes 5', ['input', 'layer1', 'layer2', 'layer3', 'layer4', 'head']),
        ('--model torchvision/shufflenet_v2_x0_5 --image-size 32', ['input', 'stage2', 'stage3', 'conv5', 'head']),
        ('--model huggingface/{vit}', ['input', 'vit.embeddings', 'vit.layernorm', 'head']),
    ],
)
def test_the_layers_of_a_model_are_listed(
    arguments: str, cuts: list[str], vit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert layers.main(arguments.format(vit=vit).split()) == 0
    printed = capsys.readouterr().out
    names = {name for line in printed.splitlines() if line.startswith('│') for name in line.split('│')[1].split(', ')}
    assert set(cuts) <= {name.strip() for name in names}, printed


def test_layers_uses_the_size_of_the_model(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert layers.main(['--model', f'huggingface/{vit}']) == 0
    assert ', 8 px, ' in ' '.join(capsys.readouterr().out.split())
    assert layers.main(['--model', 'timm/test_vitt']) == 2
    assert "error: --model: unknown model 'test_vitt'; nearest in timm: test_vit" in capsys.readouterr().err
