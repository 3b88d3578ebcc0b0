"""The paper's results: Table 1 as data, the doubts about some of its cells, and the claims about Fig. 2 and 3.

Source: `Li et al., 2020 <https://arxiv.org/abs/2006.15284>`_. Its figures have no numbers, so the claims are in words.
"""

from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of Table 1: the error in per cent, M if the method has one, and the reason to doubt the cell if any."""

    error: float
    fold: int | None = None
    doubt: str = ''


_NO_NORM = 'VGG16 with batch normalization reaches {}, so this one lacks it or its images lack augmentation'

# (dataset, network) -> method -> cell. The table's third column is Cutout + BA on CIFAR and BA alone on ImageNet; its
# second column, Cutout, is empty on ImageNet. The doubts cite uoguelph-mlrg/Cutout (WRN, Shake-shake),
# huyvnphan/PyTorch_CIFAR10 and weiaicunzai/pytorch-cifar100 (VGG16), edadaltocg (VGG16) and torchvision.
TABLE_1: dict[tuple[str, str], dict[str, Cell]] = {
    ('cifar10', 'resnet44'): {
        'baseline': Cell(6.92),
        'cutout': Cell(6.28),
        'cutout_ba': Cell(4.56, 40),
        'sba': Cell(3.23, 40, 'WRN-28-10 with Cutout, with 55 times the parameters, reaches 3.08 %'),
    },
    ('cifar10', 'vgg16'): {
        'baseline': Cell(16.25, doubt=_NO_NORM.format('6 %')),
        'cutout': Cell(6.17),
        'cutout_ba': Cell(4.69, 32),
        'sba': Cell(2.73, 32, 'below the 2.86 % of Shake-shake and the 3.08 % of WRN-28-10 with Cutout'),
    },
    ('cifar10', 'alexnet'): {
        'baseline': Cell(23.88),
        'cutout': Cell(21.34),
        'cutout_ba': Cell(20.00, 32),
        'sba': Cell(18.03, 32),
    },
    ('cifar100', 'resnet44'): {
        'baseline': Cell(28.01),
        'cutout': Cell(27.04),
        'cutout_ba': Cell(25.85, 40),
        'sba': Cell(24.61, 40),
    },
    ('cifar100', 'vgg16'): {
        'baseline': Cell(38.67, doubt=_NO_NORM.format('27 %')),
        'cutout': Cell(27.00),
        'cutout_ba': Cell(24.69, 32),
        'sba': Cell(22.19, 32, 'published results of VGG16 with batch normalization are 25.06 to 27.3 %'),
    },
    ('imagenet', 'resnet50'): {
        'baseline': Cell(23.73),
        'ba': Cell(23.16, 4),
        'sba': Cell(22.72, 4),
    },
    ('imagenet', 'vgg16'): {
        'baseline': Cell(23.78, doubt='torchvision has 28.41 % on a single crop, or 26.64 % with batch normalization'),
        'ba': Cell(21.29, 4),
        'sba': Cell(19.37, 4, "torchvision's ResNet50 reaches 19.14 % with a recipe of 600 epochs"),
    },
    ('imagenet', 'alexnet'): {
        'baseline': Cell(41.69),
        'ba': Cell(37.73, 8),
        'sba': Cell(34.40, 8, 'noise at the last layers would gain 7.3 points'),
    },
}

# The η with the highest accuracy (Sec. 4.2, Fig. 2)
BEST_ETA: dict[tuple[str, str], float] = {
    ('cifar10', 'alexnet'): 0.01,
    ('cifar10', 'resnet44'): 0.01,
    ('cifar10', 'vgg16'): 0.1,
    ('cifar100', 'resnet44'): 0.1,
    ('cifar100', 'vgg16'): 0.1,
}

CLAIMS = {
    'eta': 'The paper finds η = 0.01 best for AlexNet and ResNet44 on CIFAR-10 and 0.1 best for its other networks. It '
    'reports no significant difference between 0 and 10 (Sec. 4.2, Fig. 2).',
    'layers': 'The paper reports that SBA converges faster than BA, and to a higher accuracy, at every layer of VGG16 '
    '(Sec. 4.3, Fig. 3).',
}


def cell(dataset: str, network: str, method: str) -> Cell | None:
    """Return a cell of Table 1.

    Args:
        dataset (str): For example ``'cifar10'``.
        network (str): For example ``'resnet44'``.
        method (str): ``'baseline'``, ``'cutout'``, ``'cutout_ba'``, ``'ba'`` or ``'sba'``.

    Returns:
        Cell | None: None if the table has no such cell.

    Example:
        >>> cell('cifar10', 'resnet44', 'sba').error, cell('cifar10', 'resnet8', 'sba')
        (3.23, None)
    """
    return TABLE_1.get((dataset, network), {}).get(method)
