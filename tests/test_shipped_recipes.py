"""The recipes of the package: every file in yamls/ is read, and everything but its data is built on the meta device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from composer_sba import SBA, BatchAugmentation
from composer_sba.data.config import DatasetConfig, resolve
from composer_sba.recipe.build import build_components
from composer_sba.recipe.recipe import load, save, to_yaml

YAMLS = Path(__file__).parent.parent / 'yamls'


def facts(parts: dict[str, Any]) -> list[Any]:
    """What components were built with, as far as they tell."""
    hparams = [getattr(each, 'local_hparams', type(each)) for each in (*parts['algorithms'], *parts['callbacks'])]
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items() if key != 'params'}
        for group in parts['optimizers'].param_groups
    ]
    scheduler = parts['schedulers'].__wrapped__.__self__ if 'schedulers' in parts else None
    times = {key: value for key, value in vars(scheduler).items() if key != 'warmup_scheduler'}
    return [str(parts['model']), hparams, groups, type(scheduler), times]


@pytest.mark.parametrize('path', sorted(YAMLS.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_yaml_is_read_and_built_and_saved_with_all_defaults(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    with torch.device('meta'):
        parts = build_components(recipe)
    save(recipe, tmp_path / 'saved.yaml')
    saved = load(tmp_path / 'saved.yaml')
    assert to_yaml(saved) == to_yaml(recipe)
    with torch.device('meta'):
        again = build_components(saved)
    assert facts(again) == facts(parts)
    for section in ('train_dataset', 'eval_dataset'):
        assert resolve(DatasetConfig(**getattr(saved, section))).crop_size
    ours = [type(each) for each in parts['algorithms'] if isinstance(each, SBA | BatchAugmentation)]
    words = set(path.stem.split('_'))
    if words & {'sba', 'latent'}:
        assert ours == [SBA]
    else:
        assert ours == ([BatchAugmentation] if words & {'ba', 'ba2'} else [])
    assert ('cutout' in recipe.train_dataset) == ('cutout' in path.stem)
    first = path.read_text().splitlines()
    assert first[0].startswith('#')
    assert any(f'composer train.py -f yamls/{path.name}' in line for line in first)


@pytest.mark.parametrize('path', sorted((YAMLS / 'methods').glob('*.yaml')), ids=lambda path: path.stem)
@pytest.mark.filterwarnings('ignore:SAM has known issues')
def test_every_method_merges_over_a_baseline(path: Path) -> None:
    baseline = YAMLS / 'resnet44_cifar10_baseline.yaml'
    recipe, before = load([baseline, path]), load(baseline).to_dict()
    with torch.device('meta'):
        build_components(recipe)
    changed = {key for key, value in recipe.to_dict().items() if value != before[key]}
    assert recipe.run_name == f'resnet44_cifar10_baseline+{path.stem}'
    assert changed - {'run_name', 'save_folder'}, 'the method changes nothing'
    assert f'-f yamls/methods/{path.name}' in path.read_text()


@pytest.mark.parametrize('stem', ['resnet44_cifar10', 'vgg16_cifar10', 'resnet50_imagenet', 'digits'])
def test_sba_robust_in_a_recipe_is_that_in_python(stem: str) -> None:
    own = [YAMLS / f'{stem}_sba_robust.yaml']
    files = own if own[0].exists() else [YAMLS / f'{stem}_baseline.yaml', YAMLS / 'methods' / 'sba_robust.yaml']
    assert own[0].exists() == (stem != 'digits')
    with torch.device('meta'):
        [built] = build_components(load(files))['algorithms']
    assert built.local_hparams == SBA.robust().local_hparams
