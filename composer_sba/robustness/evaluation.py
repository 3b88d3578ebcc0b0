"""The errors of a classifier on clean, noisy, corrupted and attacked images, and its certificates."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCalibrationError
from tqdm import tqdm

from composer_sba.conditions import ATTACKS, CORRUPTIONS, EPSILONS, SEVERITIES, SIGMAS, Smoothing
from composer_sba.errors import UserError, check_number, nearest
from composer_sba.robustness.attacks import attack, require_toolbox
from composer_sba.robustness.certificates import certify_to_file, summarize
from composer_sba.robustness.corruptions import ALEXNET_ERRORS, corrupt, takes_cifar_constants
from composer_sba.robustness.pixels import PixelClassifier, in_pixel_units, pixel_classifier, spread
from composer_sba.schedule import hash_key


def evaluate(
    network: nn.Module,
    loader: DataLoader,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    sigmas: Sequence[float] = SIGMAS,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    published: Iterable[tuple[str, int, DataLoader]] | None = None,
    attacks: Sequence[str] = (),
    epsilons: Mapping[str, float] = EPSILONS,
    attack_steps: int = 10,
    attack_images: int = 500,
    smoothing: Smoothing | None = None,
    certified_images: int = 100,
    certificates: Path = Path('certificates.tsv'),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Measure the robustness of a classifier, with a progress bar on a terminal.

    Clean, noisy and corrupted images are measured in one pass over the loader. Noise is Gaussian, clipped to [0, 1]
    with the image, and the same draw times σ for all σ. Corruptions are those of
    :mod:`composer_sba.robustness.corruptions`. Draws depend on the seed, the condition and the batch: two networks see
    the same images if they are evaluated with the same batch size on the same kind of device. Attacks and certificates
    take fewer images, at equal distances in the dataset.

    Args:
        network (torch.nn.Module): Maps normalized images to logits of shape ``(N, K)``. It is evaluated in evaluation
            mode; the modes of its modules are restored.
        loader (torch.utils.data.DataLoader): Batches of images in pixel units, uint8 or floating in [0, 1], shape
            ``(N, 3, H, W)``, and labels, shape ``(N,)``: without ``Normalize`` and without shuffling.
        mean (Sequence[float]): Means of the channels that the network expects images to be normalized with.
        std (Sequence[float]): Their standard deviations.
        sigmas (Sequence[float], optional): Standard deviations of the noise, in units of the pixel range; 0 is the
            clean image, which is always evaluated. Default: :data:`~composer_sba.conditions.SIGMAS`.
        corruptions (Sequence[str], optional): Their names. Default: all of
            :data:`~composer_sba.conditions.CORRUPTIONS`.
        severities (Sequence[int], optional): 1 to 5. Default: all.
        published (Iterable, optional): Tuples of corruption, severity and DataLoader, of a published set such as
            CIFAR-10-C. These are evaluated then, and ``corruptions`` and ``severities`` have no effect. Default:
            ``None``.
        attacks (Sequence[str], optional): Names in :data:`~composer_sba.conditions.ATTACKS`. Default: none.
        epsilons (Mapping[str, float], optional): Largest distances of attacks, for ``'l2'`` and ``'linf'``, in units of
            the pixel range. Default: :data:`~composer_sba.conditions.EPSILONS`.
        attack_steps (int, optional): Steps of an attack. Default: ``10``.
        attack_images (int, optional): Images to attack, at equal distances in the dataset. Default: ``500``.
        smoothing (Smoothing, optional): Noise and numbers of samples of certificates. Default: ``None``, none.
        certified_images (int, optional): Images to certify, at equal distances in the dataset. Default: ``100``.
        certificates (Path, optional): File to append certificates to; it is continued if it exists. Default:
            ``certificates.tsv``.
        seed (int, optional): Seed of all draws, >= 0. Default: ``0``.
        device (torch.device | str, optional): Where to evaluate; the network is moved there. Default: that of the
            network's parameters.

    Returns:
        dict[str, Any]: Plain data. ``images``: their number; ``clean``; ``noise``: a list, each with ``sigma``;
        ``corruptions``: by name, a list, each with ``severity``. Each entry has ``error`` and ``calibration_error``
        (expected, of 15 bins), fractions of 1, and ``nll``, in nats. ``mean_corruption_error``: the unweighted mean, as
        for CIFAR-10-C; ``relative_corruption_error``: for images of ImageNet's size, relative to AlexNet's errors, as
        for ImageNet-C, over those of its 15 corruptions that were evaluated; else ``None``. ``attacks``: a list, each
        with ``attack``, ``epsilon``, ``steps``, ``images`` and ``error``, in which images that are misclassified
        without an attack count. ``certificates``: that of :func:`~composer_sba.robustness.certificates.summarize`, or
        ``None``.

    Raises:
        UserError: If images are not in [0, 1], the network does not return logits, a name is unknown, a number is out
            of range, or a library is missing.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.long))
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        >>> result = evaluate(network, DataLoader(data, 4), mean=[0.5] * 3, std=[0.25] * 3, corruptions=['contrast'])
        >>> result['images'], len(result['noise']), len(result['corruptions']['contrast'])
        (8, 6, 5)
    """
    if attacks:
        require_toolbox()
    if smoothing is not None and find_spec('scipy') is None:
        raise UserError("certificates need SciPy, which is not installed: pip install 'composer-sba[robustness]'")
    for name in attacks:
        if name not in ATTACKS:
            raise UserError(f"unknown attack '{name}'{nearest(name, ATTACKS)}", 'attacks')
    counts = {'attack_images': attack_images, 'attack_steps': attack_steps}
    counts |= {} if smoothing is None else {'certified_images': certified_images}
    for name, number in counts.items():
        check_number(name, number, 'an integer >= 1', lambda value: value >= 1, Integral)
    for epsilon in epsilons.values():
        check_number('epsilons', epsilon, 'finite numbers > 0', lambda value: 0 < value < math.inf)
    conditions: dict[tuple[str, float], _Change] = {('clean', 0): lambda images, _: images}
    for sigma in sigmas:
        if check_number('sigmas', sigma, 'finite numbers >= 0', lambda value: 0 <= value < math.inf):
            conditions['noise', sigma] = _noise(sigma, seed)
    for name in () if published is not None else corruptions:
        for severity in severities:
            conditions[name, severity] = _corruption(name, severity, seed)
    with pixel_classifier(network, mean, std, device) as (model, where):
        count, entries, size = _measure(model, where, loader, conditions, 'clean, noise, corruptions')
        for name, severity, batches in published or ():
            unchanged = {(name, float(severity)): conditions['clean', 0]}
            entries |= _measure(model, where, batches, unchanged, f'{name} {severity}')[1]
        attacked = [
            _attacked(model, where, spread(loader, attack_images)[1], name, epsilons, attack_steps, seed)
            for name in attacks
        ]
        certified = None
        if smoothing is not None:
            images = _one_by_one(*spread(loader, certified_images), where)
            rows = certify_to_file(
                model, images, smoothing, certificates, batch_size=loader.batch_size or 1000, seed=seed
            )
            total = min(certified_images, count)
            certified = summarize(list(tqdm(rows, 'certificates', total, unit=' images', disable=None)), smoothing)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for (name, level), entry in entries.items():
        if name not in ('clean', 'noise'):
            by_name.setdefault(name, []).append({'severity': int(level), **entry})
    clean = entries['clean', 0]
    noisy = [entries['noise', sigma] if sigma else clean for sigma in sigmas]
    errors = {name: [entry['error'] for entry in of_name] for name, of_name in by_name.items()}
    return {
        'images': count,
        'clean': clean,
        'noise': [{'sigma': float(sigma), **entry} for sigma, entry in zip(sigmas, noisy, strict=True)],
        'corruptions': by_name,
        'mean_corruption_error': mean_corruption_error(errors),
        'relative_corruption_error': None if takes_cifar_constants(size) else relative_corruption_error(errors),
        'attacks': attacked,
        'certificates': certified,
    }


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float | None:
    """Return the unweighted mean of errors over severities and corruptions, as for CIFAR-10-C; None if there are none.

    Args:
        errors (Mapping[str, Sequence[float]]): Errors for the severities of each corruption, fractions of 1.

    Example:
        >>> mean_corruption_error({'fog': [0.1, 0.3], 'contrast': [0.4, 0.6]})
        0.35
    """
    means = [sum(each) / len(each) for each in errors.values()]
    return sum(means) / len(means) if means else None


def relative_corruption_error(errors: Mapping[str, Sequence[float]]) -> float | None:
    """Return the mean corruption error of ImageNet-C: each corruption's mean error divided by AlexNet's, then the mean.

    Args:
        errors (Mapping[str, Sequence[float]]): Errors for the severities of each corruption, fractions of 1. Those
            without an error of AlexNet are left out.

    Returns:
        float | None: A fraction of 1: AlexNet has 1. None if no corruption remains.

    Example:
        >>> relative_corruption_error({'fog': [0.819324], 'gaussian_blur': [0.9]})
        1.0
    """
    known = {name: each for name, each in errors.items() if name in ALEXNET_ERRORS}
    return mean_corruption_error({name: [e / ALEXNET_ERRORS[name] for e in each] for name, each in known.items()})


_Change = Callable[[torch.Tensor, int], torch.Tensor]  # images and the index of their batch to changed images


def _noise(sigma: float, seed: int) -> _Change:
    def change(images: torch.Tensor, batch: int) -> torch.Tensor:
        generator = torch.Generator(images.device).manual_seed(hash_key(seed, *b'noise', batch))
        return (images + sigma * torch.randn(images.shape, generator=generator, device=images.device)).clamp(0, 1)

    return change


def _corruption(name: str, severity: int, seed: int) -> _Change:
    def change(images: torch.Tensor, batch: int) -> torch.Tensor:
        key = hash_key(seed, *name.encode(), severity, batch)
        return corrupt(images, name, severity, generator=torch.Generator(images.device).manual_seed(key))

    return change


def _attacked(
    model: PixelClassifier,
    device: torch.device,
    loader: DataLoader,
    name: str,
    epsilons: Mapping[str, float],
    steps: int,
    seed: int,
) -> dict[str, Any]:
    epsilon = epsilons[name.rpartition('_')[2]]
    count, wrong = 0, 0
    for batch, (images, labels) in enumerate(tqdm(loader, desc=name, unit=' batches', disable=None)):
        images, labels = in_pixel_units(images, device), labels.to(device)
        found = attack(model, images, labels, name, epsilon=epsilon, steps=steps, seed=hash_key(seed, batch))
        with torch.inference_mode():
            fooled = [model(each).argmax(1) != labels for each in (images, found)]
        count, wrong = count + len(labels), wrong + int((fooled[0] | fooled[1]).sum())
    return {'attack': name, 'epsilon': epsilon, 'steps': steps, 'images': count, 'error': wrong / count}


def _one_by_one(
    indices: Sequence[int], loader: DataLoader, device: torch.device
) -> Iterator[tuple[int, torch.Tensor, int]]:
    """Yield the index in the dataset, the image in pixel units and the label."""
    remaining = iter(indices)
    for images, labels in loader:
        for image, label in zip(in_pixel_units(images, device), labels.tolist(), strict=True):
            yield next(remaining), image, label


@torch.inference_mode()
def _measure(
    model: PixelClassifier,
    device: torch.device,
    loader: Iterable[Any],
    conditions: Mapping[tuple[str, float], _Change],
    title: str,
) -> tuple[int, dict[tuple[str, float], dict[str, float]], torch.Size]:
    """Return the number of images, the scores under each condition, and the shape of an image."""
    scores: dict[tuple[str, float], _Scores] = {}
    count, shape = 0, torch.Size()
    batches = len(loader) if isinstance(loader, DataLoader) else None
    with tqdm(total=batches and batches * len(conditions), desc=title, unit=' batches', disable=None) as progress:
        for batch, (images, labels) in enumerate(loader):
            images, labels = in_pixel_units(images, device), labels.to(device)
            count, shape = count + len(labels), images.shape[1:]
            for condition, change in conditions.items():
                scores.setdefault(condition, _Scores()).add(model(change(images, batch)), labels)
                progress.update()
    if not count:
        raise UserError('the loader has no images')
    return count, {condition: each.values() for condition, each in scores.items()}, shape


class _Scores:
    """Sums over the images seen under one condition, unlike Composer's CrossEntropy, which averages over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.wrong: torch.Tensor | int = 0
        self.nll: torch.Tensor | float = 0.0
        self.calibration: MulticlassCalibrationError | None = None

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.count += len(labels)
        self.wrong += (logits.argmax(1) != labels).sum()
        self.nll += F.cross_entropy(logits, labels, reduction='sum')
        if self.calibration is None:
            self.calibration = MulticlassCalibrationError(logits.shape[1], n_bins=15).to(logits.device)
        self.calibration.update(logits.softmax(1), labels)

    def values(self) -> dict[str, float]:
        assert self.calibration is not None
        return {
            'error': int(self.wrong) / self.count,
            'nll': float(self.nll) / self.count,
            'calibration_error': float(self.calibration.compute()),
        }
