"""Names of networks, datasets and methods, and durations, as tables and figures show them."""

import re
from collections.abc import Mapping
from typing import Any

from composer.core import Time

from composer_sba.summary import counted

LONGER = ('longer', 'twice', 'gaussian_half_longer', 'gaussian_half_twice')  # these methods change the duration

_NAMES = {
    'alexnet': 'AlexNet',
    'augmix': 'AugMix',
    'ba': 'BA',
    'ba2': 'BA',  # row_label adds M
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'cutmix': 'CutMix',
    'cutout': 'Cutout',
    'cutout_ba': 'Cutout + BA',
    'cutout_ba2': 'Cutout + BA',
    'cutout_sba': 'Cutout + SBA',
    'ema': 'EMA',
    'gaussian': 'Gaussian noise',
    'gaussian_half': 'Gaussian noise on half',
    'gaussian_half_longer': 'Gaussian noise on half',  # row_label adds the duration
    'gaussian_half_twice': 'Gaussian noise on half',
    'imagenet': 'ImageNet',
    'latent_ba': 'latent BA',
    'latent_ba_input': 'latent BA at the input',
    'longer': 'baseline',  # row_label adds the duration
    'manifold_mixup': 'Manifold Mixup',
    'mixup': 'Mixup',
    'r_drop': 'R-Drop',
    'sam': 'SAM',
    'sba': 'SBA',
    'sba_conv': 'SBA at conv layers',
    'sba_robust': 'SBA at the input',
    'sba_robust_every_step': 'SBA at the input, p = 1',
    'sba_robust_gaussian_half': 'SBA at the input + Gaussian noise on half',
    'sba_strong': 'strong SBA',
    'testresnet': "timm's test_resnet",
    'twice': 'baseline',
}


def display_name(name: str) -> str:
    """Return the display name of a network, dataset or method.

    Example:
        >>> display_name('resnet44'), display_name('vgg16'), display_name('cifar100'), display_name('label_smoothing')
        ('ResNet44', 'VGG16', 'CIFAR-100', 'label smoothing')
    """
    network = re.sub(r'^resnet(?=\d)', 'ResNet', re.sub(r'^vgg(?=\d)', 'VGG', name))
    return _NAMES.get(name, network.replace('_', ' '))


def scaled_duration(recipe: Mapping[str, Any]) -> Time:
    """Return the duration of a training: ``max_duration`` times ``scale_schedule_ratio``.

    Args:
        recipe (Mapping[str, Any]): The recipe of a record.

    Raises:
        ValueError: If ``max_duration`` is not a duration.

    Example:
        >>> scaled_duration({'max_duration': '30ep', 'scale_schedule_ratio': 1.3}).to_timestring()
        '39ep'
    """
    return Time.from_input(recipe.get('max_duration', ''), 'ep') * float(recipe.get('scale_schedule_ratio') or 1.0)


def duration_in_words(duration: str) -> str:
    """Write out a Composer time string.

    Example:
        >>> duration_in_words('30ep'), duration_in_words('1ep'), duration_in_words('2500ba')
        ('30 epochs', '1 epoch', '2,500 steps')
    """
    time = Time.from_timestring(duration)
    noun = {'ep': 'epoch', 'ba': 'step'}.get(time.unit.value)
    return counted(int(time.value), noun) if noun else duration


def row_label(run: Mapping[str, Any]) -> str:
    """Return the label of a run's method in tables and figures: its name, its setting, and M if the recipe gives it.

    Args:
        run (Mapping[str, Any]): A :class:`composer_sba.study.records.Record`.

    Example:
        >>> recipe = {'max_duration': '30ep', 'algorithms': {'sba': {'fold': 4}}}
        >>> row_label({'method': 'sba', 'setting': {'layer': 'conv4'}, 'recipe': recipe})
        'SBA at conv4 (M = 4)'
        >>> row_label({'method': 'sba_robust', 'setting': {'layer': 'stem'}, 'recipe': recipe})
        'SBA at stem (M = 4)'
        >>> recipe = {'max_duration': '30ep', 'scale_schedule_ratio': 2.0}
        >>> row_label({'method': 'twice', 'setting': {}, 'recipe': recipe})
        'baseline, 60 epochs'
    """
    label = display_name(run['method'])
    if 'layer' in run['setting']:
        label = label.replace(' at the input', '')
    if run['method'] in LONGER:
        label += f', {duration_in_words(scaled_duration(run["recipe"]).to_timestring())}'
    for key, value in run['setting'].items():
        label += {'layer': f' at {value}', 'eta': f', η = {value}', 'σ of the pixel range': f', σ = {value}'}.get(
            key, f', {key} = {value}'
        )
    algorithms = run['recipe'].get('algorithms') or {}
    folds = [(algorithms.get(name) or {}).get('fold') for name in ('sba', 'batch_augmentation')]
    return label + ''.join(f' (M = {fold})' for fold in folds if fold and 'fold' not in run['setting'])
