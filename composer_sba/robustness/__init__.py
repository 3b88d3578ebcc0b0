"""Robustness of a trained classifier: corruptions, attacks and certificates; no recipe is needed."""

from composer_sba.conditions import ATTACKS, CORRUPTIONS, EPSILONS, SEVERITIES, SIGMAS, Smoothing
from composer_sba.robustness.attacks import attack
from composer_sba.robustness.certificates import ABSTAIN, certified_radius, certify, certify_to_file
from composer_sba.robustness.corruptions import ALEXNET_ERRORS, corrupt
from composer_sba.robustness.evaluation import evaluate, mean_corruption_error, relative_corruption_error
from composer_sba.robustness.pixels import PixelClassifier

__all__ = [
    'ABSTAIN',
    'ALEXNET_ERRORS',
    'ATTACKS',
    'CORRUPTIONS',
    'EPSILONS',
    'SEVERITIES',
    'SIGMAS',
    'PixelClassifier',
    'Smoothing',
    'attack',
    'certified_radius',
    'certify',
    'certify_to_file',
    'corrupt',
    'evaluate',
    'mean_corruption_error',
    'relative_corruption_error',
]
