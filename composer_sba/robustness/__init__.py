"""Robustness of a trained classifier: corruptions, attacks and certificates; plain PyTorch."""

from composer_sba.robustness.corruptions import ALEXNET_ERRORS, CORRUPTIONS, SEVERITIES, corrupt

__all__ = ['ALEXNET_ERRORS', 'CORRUPTIONS', 'SEVERITIES', 'corrupt']
