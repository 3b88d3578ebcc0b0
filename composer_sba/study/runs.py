"""A run of a study: its recipe, the hash that identifies it, and the layers that a study can cut."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from composer_sba.data.config import KNOWN_DATASETS
from composer_sba.recipe.recipe import Recipe, component_arguments
from composer_sba.recipe.registry import construct

# The keys that do not change the trained model: how a run is observed and stored. They are not part of its hash.
_INCIDENTAL = (
    *('run_name', 'device', 'dist_timeout', 'loggers', 'autoresume', 'load_path', 'progress_bar', 'log_to_console'),
    *('console_log_interval', 'python_log_level', 'save_folder', 'save_filename', 'save_latest_filename'),
    *('save_interval', 'save_num_checkpoints_to_keep', 'save_overwrite', 'save_weights_only'),
)
_INCIDENTAL_DATA = ('local', 'remote', 'num_workers', 'cache_limit', 'download_timeout', 'verify')


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
        study (str): The name of the study.
        network, dataset, method (str): The parts of the recipe's file name.
        setting (dict): The values that the study varies, for example ``{'eta': 0.1}``.
        recipe (Recipe): The complete recipe.
    """

    study: str
    network: str
    dataset: str
    method: str
    setting: dict[str, Any]
    recipe: Recipe = field(repr=False)

    @property
    def name(self) -> str:
        """The name of the run in lines of output."""
        setting = ''.join(f' {key}={value}' for key, value in self.setting.items())
        return f'{self.network} {self.dataset} {self.method}{setting} seed {self.recipe.seed}'

    def with_seed(self, seed: int) -> 'Run':
        """Return the same run with another seed."""
        return replace(self, recipe=replace(self.recipe, seed=seed))

    @property
    def facts(self) -> dict[str, Any]:
        """The part of the recipe that decides which model is trained."""
        facts = {key: value for key, value in self.recipe.to_dict().items() if key not in _INCIDENTAL}
        for section in ('train_dataset', 'eval_dataset'):
            data = facts[section] or {}
            known = KNOWN_DATASETS.get(data.get('name', ''))
            # The images of a known size are always the same. Of other datasets, the place says which images they are.
            places = () if known is not None and known.size is not None else ('local', 'remote')
            facts[section] = {k: v for k, v in data.items() if k in places or k not in _INCIDENTAL_DATA}
        return facts

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits, equal for equal facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:12]


def cut_layers(recipe: Recipe) -> list[str]:
    """Return the names of the network's stages that have parameters, and the head.

    Example:
        >>> from composer_sba.recipe.recipe import load
        >>> cut_layers(load('yamls/resnet44_cifar10_baseline.yaml'))
        ['stem', 'stage1', 'stage2', 'stage3', 'head']
    """
    network: nn.Module = construct('model', recipe.model['name'], component_arguments(recipe.model))
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    stages = [name for name, stage in network.named_children() if stage is not last and [*stage.parameters()]]
    return [*stages, 'head']
