r"""Certificates of robustness by randomized smoothing.

The smoothed classifier predicts the class that a network predicts most often for an image with Gaussian noise. If that
class has a probability of at least :math:`\underline{p_A} > 1/2`, the prediction is the same for every image within the
ℓ2 distance

.. math:: R = σ\,Φ^{-1}(\underline{p_A})

(`Cohen et al., 2019 <https://arxiv.org/abs/1902.02918>`_, Theorem 1). Sampling bounds
:math:`p_A` from below, so each certificate is wrong with a probability of at most α. Noise is in pixel units and is not
clipped, which the theorem needs.

A certificate holds for the smoothed classifier, which needs thousands of predictions, and not for the network itself.
:class:`.MajorityVote` certifies nothing: it votes in latent space, counts too few votes and has no bound.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from composer_sba.conditions import Smoothing
from composer_sba.errors import UserError
from composer_sba.schedule import hash_key

ABSTAIN = -1
"""Prediction of a smoothed classifier whose most frequent class is not certain."""
COLUMNS = ('idx', 'label', 'predict', 'radius', 'correct', 'time')
"""Columns of the file of certificates, those of Cohen et al.'s code."""
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Radii of :func:`summarize`, ℓ2 in units of the pixel range."""


def certified_radius(count: int, smoothing: Smoothing) -> float:
    """Return the radius that is certain if ``count`` of n samples have the class; 0 if none is.

    The lower bound of the class's probability is that of Clopper and Pearson, one-sided at 1 - α.

    Example:
        >>> round(certified_radius(990, Smoothing(sigma=0.5, n=1000)), 3)
        0.989
        >>> certified_radius(500, Smoothing(n=1000))
        0.0
    """
    from scipy.stats import binomtest, norm  # of the extra `robustness`

    bound = binomtest(count, smoothing.n, alternative='greater').proportion_ci(1 - smoothing.alpha, method='exact').low
    return smoothing.sigma * max(0.0, float(norm.ppf(bound)))


@torch.inference_mode()
def certify(
    model: nn.Module, image: torch.Tensor, smoothing: Smoothing, *, batch_size: int = 1000, seed: int = 0
) -> tuple[int, float]:
    """Predict an image with the smoothed classifier, and certify a radius.

    Args:
        model (torch.nn.Module): Maps images in pixel units to logits, in evaluation mode: a
            :class:`~composer_sba.robustness.pixels.PixelClassifier`.
        image (torch.Tensor): Shape ``(C, H, W)``, in pixel units, on the model's device.
        smoothing (Smoothing): Noise and numbers of samples.
        batch_size (int, optional): Samples that are predicted at once. Default: ``1000``.
        seed (int, optional): Seed of the noise. Default: ``0``.

    Returns:
        tuple[int, float]: The class, or :data:`ABSTAIN`, and the certified ℓ2 radius in units of the pixel range, which
        is 0 after an abstention.
    """
    generator = torch.Generator(image.device).manual_seed(hash_key(seed))
    total, predictions = smoothing.n0 + smoothing.n, []
    for start in range(0, total, batch_size):
        shape = (min(batch_size, total - start), *image.shape)
        noise = torch.randn(shape, generator=generator, device=image.device)
        predictions.append(model(image + smoothing.sigma * noise).argmax(1))
    chosen, counted = torch.cat(predictions).split([smoothing.n0, smoothing.n])
    best = int(chosen.bincount().argmax())
    radius = certified_radius(int((counted == best).sum()), smoothing)
    return (best, radius) if radius > 0 else (ABSTAIN, 0.0)


def certify_to_file(
    model: nn.Module,
    images: Iterable[tuple[int, torch.Tensor, int]],
    smoothing: Smoothing,
    path: Path,
    *,
    batch_size: int = 1000,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Certify images one after the other and append a line for each to a file of tab-separated values.

    A file that exists already is continued: its images are not certified again, and an incomplete last line is removed.
    It must come from the same model, images, smoothing and seed, which the file does not record.

    Args:
        model (torch.nn.Module): As for :func:`certify`.
        images (Iterable[tuple[int, torch.Tensor, int]]): Index in the dataset, image and label.
        smoothing (Smoothing): Noise and numbers of samples.
        path (Path): The file, with the columns :data:`COLUMNS`.
        batch_size (int, optional): As for :func:`certify`. Default: ``1000``.
        seed (int, optional): Seed of the noise, which also depends on the index. Default: ``0``.

    Yields:
        dict[str, Any]: A line, by column.

    Raises:
        UserError: If the file holds something else.
    """
    done = _resume(path)
    with path.open('a') as file:
        for number, (index, image, label) in enumerate(images):
            if number < len(done):
                if (done[number]['idx'], done[number]['label']) != (index, label):
                    problem = f'has image {done[number]["idx"]}, expected {index}'
                    raise UserError(f'{path}, line {number + 2}: {problem}: remove the file, or choose another')
                yield done[number]
                continue
            start = time.perf_counter()
            predict, radius = certify(model, image, smoothing, batch_size=batch_size, seed=hash_key(seed, index))
            taken = timedelta(seconds=time.perf_counter() - start)
            row = {'idx': index, 'label': label, 'predict': predict, 'radius': radius, 'correct': int(predict == label)}
            file.write('\t'.join(map(str, [*row.values(), taken])) + '\n')
            file.flush()
            yield row | {'time': str(taken)}


def summarize(rows: Sequence[dict[str, Any]], smoothing: Smoothing) -> dict[str, Any]:
    """Summarize certificates.

    Args:
        rows (Sequence[dict]): Lines, from :func:`certify_to_file`.
        smoothing (Smoothing): Noise and numbers of samples.

    Returns:
        dict[str, Any]: The smoothing; ``images``; ``abstained``, a fraction of 1; ``average_radius``, in which wrong
        predictions count as 0; ``certified_error``: by radius, the fraction of images that are not certified to be
        predicted correctly within it.
    """
    radii = [row['radius'] if row['correct'] else -1.0 for row in rows]
    return {
        **vars(smoothing),
        'images': len(rows),
        'abstained': sum(row['predict'] == ABSTAIN for row in rows) / len(rows),
        'average_radius': sum(max(radius, 0.0) for radius in radii) / len(rows),
        'certified_error': [{'radius': at, 'error': sum(radius < at for radius in radii) / len(rows)} for at in RADII],
    }


def _resume(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file, and leave only these in it; a new file gets its header."""
    header = '\t'.join(COLUMNS)
    text = path.read_text() if path.exists() else ''
    complete = text[: text.rfind('\n') + 1]
    lines = complete.splitlines()
    if not lines:
        path.write_text(f'{header}\n')
        return []
    if lines[0] != header:
        raise UserError(
            f'{path} is not a file of certificates: expected the first line {header!r}; choose another file'
        )
    if complete != text:
        path.write_text(complete)
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        values = line.split('\t')
        try:
            index, label, predict, radius, correct, taken = values
            numbers = {'idx': int(index), 'label': int(label), 'predict': int(predict)}
            rows.append({**numbers, 'radius': float(radius), 'correct': int(correct), 'time': taken})
        except ValueError as error:
            raise UserError(f'{path}, line {number}: not a certificate: remove the line') from error
    return rows
