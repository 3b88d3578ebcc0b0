"""Composer algorithms and callbacks other than SBA."""

from composer_sba.algorithms.batch_augmentation import BatchAugmentation, Copies, batch_augment
from composer_sba.algorithms.last_epochs_median import LastEpochsMedian, last_epochs_median
from composer_sba.algorithms.majority_vote import MajorityVote
from composer_sba.algorithms.manifold_mixup import ManifoldMixup
from composer_sba.algorithms.r_drop import RDrop
from composer_sba.algorithms.seed_each_batch import SeedEachBatch, sort_seed_first

__all__ = [
    'BatchAugmentation',
    'Copies',
    'LastEpochsMedian',
    'MajorityVote',
    'ManifoldMixup',
    'RDrop',
    'SeedEachBatch',
    'batch_augment',
    'last_epochs_median',
    'sort_seed_first',
]
