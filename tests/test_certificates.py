"""Certificates against the closed form of a linear classifier, SciPy's distributions and ART's certifier.

Run: pytest tests/test_certificates.py
"""

import re

import numpy as np
import pytest
import torch
from scipy.stats import beta, binom, norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_sba.errors import UserError
from composer_sba.robustness import (
    ABSTAIN,
    PixelClassifier,
    Smoothing,
    certified_radius,
    certify,
    certify_to_file,
    evaluate,
)

HEADER = 'idx\tlabel\tpredict\tradius\tcorrect\ttime'


def linear_model():
    """Return a classifier of two classes in pixel units, its unit normal and its offset."""
    torch.manual_seed(0)
    normal = torch.randn(12)
    normal /= normal.norm()
    linear = nn.Linear(12, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([normal, -normal]))
        linear.bias.zero_()
    return PixelClassifier(nn.Sequential(nn.Flatten(), linear), mean=[0.5] * 3, std=[1.0] * 3).eval(), normal


def at_distance(normal, distance):
    return 0.5 + (distance * normal).view(3, 2, 2)


def test_radius_is_that_of_the_exact_bound():
    """Clopper and Pearson: the probability for which ``count`` or more has probability alpha."""
    for n, alpha in ((100, 0.001), (1000, 0.05)):
        smoothing = Smoothing(sigma=0.5, n=n, alpha=alpha)
        for count in (0, n // 2, int(0.7 * n), n - 1, n):
            bound = beta.ppf(alpha, count, n - count + 1) if count else 0
            assert certified_radius(count, smoothing) == pytest.approx(max(0, 0.5 * norm.ppf(bound)), abs=1e-6)
            if bound > 0.5:
                assert binom.sf(count - 1, n, bound) == pytest.approx(alpha, rel=1e-6)
    most = certified_radius(10_000, Smoothing(sigma=1, n=10_000, alpha=0.001))
    assert most == pytest.approx(norm.ppf(0.001 ** (1 / 10_000)), rel=1e-6)


def test_a_linear_classifier_is_certified_to_just_below_its_distance():
    """Smoothing does not change it: p_A = Φ(d / σ), so a perfect estimate would certify the distance d itself."""
    model, normal = linear_model()
    smoothing = Smoothing(sigma=0.25, n0=50, n=20_000, alpha=0.001)
    for distance in (0.1, 0.3, -0.3, 0.5):
        predict, radius = certify(model, at_distance(normal, distance), smoothing, batch_size=4000, seed=1)
        assert predict == (0 if distance > 0 else 1)
        assert radius < abs(distance), (radius, distance)
        # Three standard errors of the share below the true probability are below the bound at alpha = 0.001
        chance = norm.cdf(abs(distance) / 0.25)
        near = 0.25 * norm.ppf(chance - 7 * np.sqrt(chance * (1 - chance) / 20_000))
        assert radius > near, (radius, near)


def test_beyond_the_bound_of_n_and_below_certainty():
    model, normal = linear_model()
    smoothing = Smoothing(sigma=0.25, n0=20, n=1000)
    _, far = certify(model, at_distance(normal, 5.0), smoothing)
    assert far == certified_radius(1000, smoothing)
    assert certify(model, at_distance(normal, 0.0), smoothing) == (ABSTAIN, 0.0)


def test_noise_is_in_pixel_units_and_unclipped():
    seen = []

    class Record(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1)[:, :2]

    certify(Record(), torch.ones(3, 2, 2), Smoothing(sigma=0.5, n0=1000, n=1000), batch_size=700)
    assert [len(each) for each in seen] == [700, 700, 600]
    noise = torch.cat(seen).flatten() - 1
    assert noise.max() > 1 and noise.min() < -1.5
    assert noise.mean().abs() < 4 * 0.5 / len(noise) ** 0.5
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert len(noise.unique()) > 0.99 * len(noise), 'draws repeat'


def test_agrees_with_art_within_the_error_of_sampling():
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images, smoothing = torch.rand(12, 3, 2, 2), Smoothing(sigma=0.5, n0=100, n=4000, alpha=0.001)
    certifier = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), (3, 2, 2), 3, sample_size=100, scale=0.5, alpha=0.001, device_type='cpu'
    )
    # Their bound needs statsmodels; it is SciPy's
    certifier._lower_confidence_bound = lambda count, n: beta.ppf(0.001, count, n - count + 1)
    theirs = list(zip(*certifier.certify(images.numpy(), n=4000, batch_size=4000), strict=True))
    ours = [certify(network, image, smoothing, batch_size=4000, seed=i) for i, image in enumerate(images)]
    agreed = 0
    for (predict, radius), (their_predict, their_radius) in zip(ours, theirs, strict=True):
        if ABSTAIN in (predict, their_predict):
            assert max(radius, their_radius) < 0.1, (radius, their_radius)  # one of the two is not certain
            continue
        agreed += 1
        assert predict == their_predict
        share = norm.cdf(their_radius / 0.5)
        spread = 0.5 / norm.pdf(norm.ppf(share)) * np.sqrt(2 * share * (1 - share) / 4000)
        assert abs(radius - their_radius) < 4 * spread, (radius, their_radius, spread)
    assert agreed >= 8


# --- the file ---------------------------------------------------------------------------------------------------------


def images_of(normal):
    return [(7 * i, at_distance(normal, distance), 0) for i, distance in enumerate((0.4, -0.4, 0.0, 0.2))]


def certified(path, images, **options):
    return list(certify_to_file(linear_model()[0], images, Smoothing(n0=20, n=500), path, **options))


def without_time(text):
    return re.sub(r'\d:\d\d:\d\d(\.\d+)?$', '', text, flags=re.MULTILINE)


def test_a_file_has_the_columns_of_cohen_et_al_and_is_continued(tmp_path):
    images = images_of(linear_model()[1])
    rows = certified(tmp_path / 'whole.tsv', images)
    whole = (tmp_path / 'whole.tsv').read_text()
    assert whole.splitlines()[0] == HEADER
    assert [row['idx'] for row in rows] == [0, 7, 14, 21]
    assert [row['correct'] for row in rows] == [1, 0, 0, 1]
    assert rows[2]['predict'] == ABSTAIN and rows[2]['radius'] == 0
    table = np.genfromtxt(tmp_path / 'whole.tsv', delimiter='\t', names=True, dtype=None, encoding='utf-8')
    assert table['radius'] == pytest.approx([row['radius'] for row in rows])
    calls = []
    for cut in (whole[:20], whole[: whole.index('\n14') + 9], whole[: whole.index('\n14') + 1], whole):
        path = tmp_path / 'cut.tsv'
        path.write_text(cut)
        again = certified(path, images)
        calls.append(len(again))
        assert without_time(path.read_text()) == without_time(whole)
        assert [row['radius'] for row in again] == [row['radius'] for row in rows]
        if cut == whole:
            assert path.read_text() == whole, 'an image was certified again'


def test_files_of_something_else_are_refused(tmp_path):
    images = images_of(linear_model()[1])
    path = tmp_path / 'file.tsv'
    for text, line in [
        ('idx,label\n', 'is not a file of certificates'),
        (f'{HEADER}\n0\t0\tzero\t0.1\t1\t0:00:01\n', 'line 2: not a certificate'),
        (f'{HEADER}\n0\t0\t0\t0.1\t1\t0:00:01\n9\t0\t0\t0.1\t1\t0:00:01\n', 'line 3: has image 9, expected 7'),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=line):
            certified(path, images)
        assert path.read_text() == text


def test_evaluate_summarizes_the_file(tmp_path):
    model, normal = linear_model()
    distances = torch.tensor([0.4, -0.4, 0.0, 0.2, 0.8, 0.3])
    images = torch.stack([at_distance(normal, distance) for distance in distances])
    loader = DataLoader(TensorDataset(images.clamp(0, 1), torch.zeros(6, dtype=torch.long)), 4)
    options = {'mean': [0.5] * 3, 'std': [1.0] * 3, 'sigmas': [], 'corruptions': []}
    smoothing = Smoothing(n0=20, n=500)
    path = tmp_path / 'certificates.tsv'
    result = evaluate(model.network, loader, smoothing=smoothing, certified_images=3, certificates=path, **options)[
        'certificates'
    ]
    lines = [line.split('\t') for line in path.read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == ['0', '2', '4']  # at equal distances
    radii = [float(line[3]) for line in lines]
    assert result['images'] == 3 and result['abstained'] == pytest.approx(1 / 3)
    assert (result['sigma'], result['n0'], result['n'], result['alpha']) == (0.25, 20, 500, 0.001)
    assert result['average_radius'] == pytest.approx(sum(radii) / 3)
    for entry in result['certified_error']:
        right = sum(line[4] == '1' and radius >= entry['radius'] for line, radius in zip(lines, radii, strict=True))
        assert entry['error'] == pytest.approx(1 - right / 3), entry


@pytest.mark.parametrize('wrong', [{'sigma': 0}, {'n0': 0}, {'n': 1.5}, {'alpha': 0}, {'alpha': 1}])
def test_values_out_of_range(wrong):
    with pytest.raises(UserError, match=f'Expected {next(iter(wrong))} to be'):
        Smoothing(**wrong)
