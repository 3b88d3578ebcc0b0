"""Networks, data sets, methods and durations as a reader is told of them."""

import re
from collections.abc import Mapping
from typing import Any

from composer.core import Time

LONGER = ('longer', 'twice')  # the baseline trained for longer: the methods whose duration is not that of their group

_NAMES = {
    'alexnet': 'AlexNet',
    'ba': 'BA',
    'ba2': 'BA',  # the label adds M
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'cutmix': 'CutMix',
    'cutout': 'Cutout',
    'cutout_ba': 'Cutout + BA',
    'cutout_ba2': 'Cutout + BA',
    'cutout_sba': 'Cutout + SBA',
    'ema': 'EMA',
    'imagenet': 'ImageNet',
    'latent_ba': 'latent BA',
    'longer': 'baseline',  # the label adds the duration
    'manifold_mixup': 'Manifold Mixup',
    'mixup': 'Mixup',
    'r_drop': 'R-Drop',
    'sam': 'SAM',
    'sba': 'SBA',
    'sba_conv': 'SBA at conv layers',
    'sba_strong': 'strong SBA',
    'twice': 'baseline',
}


def name(word: str) -> str:
    """A network, data set or method as it is written.

    Example:
        >>> name('resnet44'), name('vgg16'), name('cifar100'), name('label_smoothing')
        ('ResNet44', 'VGG16', 'CIFAR-100', 'label smoothing')
    """
    network = re.sub(r'^resnet(?=\d)', 'ResNet', re.sub(r'^vgg(?=\d)', 'VGG', word))
    return _NAMES.get(word, network.replace('_', ' '))


def length(recipe: Mapping[str, Any]) -> Time:
    """How long a recipe trains: its ``max_duration`` as its ``scale_schedule_ratio`` scales it.

    Args:
        recipe (Mapping[str, Any]): That of a record.

    Raises:
        ValueError: If there is no such duration.

    Example:
        >>> length({'max_duration': '30ep', 'scale_schedule_ratio': 1.3}).to_timestring()
        '39ep'
    """
    return Time.from_input(recipe.get('max_duration', ''), 'ep') * float(recipe.get('scale_schedule_ratio') or 1.0)


def duration(text: str) -> str:
    """A duration of Composer's in words.

    Example:
        >>> duration('30ep'), duration('1ep'), duration('2500ba')
        ('30 epochs', '1 epoch', '2,500 steps')
    """
    time = Time.from_timestring(text)
    noun = {'ep': 'epoch', 'ba': 'step'}.get(time.unit.value)
    return f'{time.value:,} {noun}{"s" if time.value != 1 else ""}' if noun else text


def label(run: Mapping[str, Any]) -> str:
    """What tables and figures call the method of a run: with its setting, and M where its recipe says it.

    Args:
        run (Mapping[str, Any]): A :class:`composer_sba.study.records.Record`.

    Example:
        >>> recipe = {'max_duration': '30ep', 'algorithms': {'sba': {'fold': 4}}}
        >>> label({'method': 'sba', 'setting': {'layer': 'conv4'}, 'recipe': recipe})
        'SBA at conv4 (M = 4)'
        >>> label({'method': 'twice', 'setting': {}, 'recipe': {'max_duration': '30ep', 'scale_schedule_ratio': 2.0}})
        'baseline, 60 epochs'
    """
    said = name(run['method'])
    if run['method'] in LONGER:
        said += f', {duration(length(run["recipe"]).to_timestring())}'
    for key, value in run['setting'].items():
        said += {'layer': f' at {value}', 'eta': f', η = {value}'}.get(key, f', {key} = {value}')
    algorithms = run['recipe'].get('algorithms') or {}
    folds = [(algorithms.get(each) or {}).get('fold') for each in ('sba', 'batch_augmentation')]
    return said + ''.join(f' (M = {fold})' for fold in folds if fold and 'fold' not in run['setting'])
