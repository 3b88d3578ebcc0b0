"""Our copy of the paper's Table 1 compared with the improvements that the paper computes from it.

Run: pytest tests/test_paper.py
"""

import pytest

from composer_sba.study import paper


def test_table_1_is_consistent():
    improvements = {  # the last column of the paper's Table 1, in per cent
        ('cifar10', 'resnet44'): 53.32,
        ('cifar10', 'vgg16'): 83.20,
        ('cifar10', 'alexnet'): 24.50,
        ('cifar100', 'resnet44'): 12.14,
        ('cifar100', 'vgg16'): 42.62,
        ('imagenet', 'resnet50'): 4.26,
        ('imagenet', 'vgg16'): 18.54,
        ('imagenet', 'alexnet'): 17.49,
    }
    found = {
        key: 100 * (1 - cells['sba'].error / cells['baseline'].error) for key, cells in paper.TABLE_1.items()
    }  # fmt: skip
    assert found == pytest.approx(improvements, abs=0.01)
