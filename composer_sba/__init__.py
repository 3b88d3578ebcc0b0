"""Stochastic Batch Augmentation (Li et al., 2020, arXiv 2006.15284) for MosaicML Composer."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composer_sba.algorithms import BatchAugmentation as BatchAugmentation
    from composer_sba.algorithms import MajorityVote as MajorityVote
    from composer_sba.algorithms import SeedEachBatch as SeedEachBatch
    from composer_sba.algorithms import sort_seed_first as sort_seed_first
    from composer_sba.latent import LatentExpander as LatentExpander
    from composer_sba.sba import SBA as SBA
    from composer_sba.sba import sort_sba_last as sort_sba_last
    from composer_sba.vicinity import Vicinity as Vicinity

# Imported when they are used: Composer takes seconds, which `composer-sba --help` must not wait for
_MODULES = {
    'SBA': 'sba',
    'BatchAugmentation': 'algorithms',
    'LatentExpander': 'latent',
    'MajorityVote': 'algorithms',
    'SeedEachBatch': 'algorithms',
    'Vicinity': 'vicinity',
    'sort_sba_last': 'sba',
    'sort_seed_first': 'algorithms',
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f'{__name__}.{_MODULES[name]}'), name)
    if not name.startswith('_') and importlib.util.find_spec(f'{__name__}.{name}') is not None:
        return importlib.import_module(f'{__name__}.{name}')
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
