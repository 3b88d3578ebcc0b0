"""Stochastic Batch Augmentation (Li et al., 2020, arXiv 2006.15284) for MosaicML Composer."""

from composer_sba.algorithms import BatchAugmentation, MajorityVote, SeedEachBatch, sort_seed_first
from composer_sba.latent import LatentExpander
from composer_sba.sba import SBA, sort_sba_last
from composer_sba.vicinity import Vicinity

__all__ = [
    'SBA',
    'BatchAugmentation',
    'LatentExpander',
    'MajorityVote',
    'SeedEachBatch',
    'Vicinity',
    'sort_sba_last',
    'sort_seed_first',
]
