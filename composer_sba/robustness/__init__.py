"""Robustness of a trained classifier: corruptions, attacks and certificates; no recipe is needed."""

from composer_sba.robustness.corruptions import ALEXNET_ERRORS, CORRUPTIONS, SEVERITIES, corrupt
from composer_sba.robustness.evaluation import (
    SIGMAS,
    PixelClassifier,
    evaluate,
    mean_corruption_error,
    relative_corruption_error,
)

__all__ = [
    'ALEXNET_ERRORS',
    'CORRUPTIONS',
    'SEVERITIES',
    'SIGMAS',
    'PixelClassifier',
    'corrupt',
    'evaluate',
    'mean_corruption_error',
    'relative_corruption_error',
]
