"""Corruptions of batches against slow versions, written from the definitions with loops, NumPy, SciPy and PIL.

Run: pytest tests/test_corruptions.py
"""

import colorsys
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.stats import binomtest, kstest, norm, poisson, truncnorm

from composer_sba.conditions import CORRUPTIONS, SEVERITIES
from composer_sba.errors import UserError
from composer_sba.robustness.corruptions import ALEXNET_ERRORS, corrupt

# The constants of make_cifar_c.py and make_imagenet_c.py, severities 1 to 5
GAUSSIAN = {32: [0.04, 0.06, 0.08, 0.09, 0.10], 224: [0.08, 0.12, 0.18, 0.26, 0.38]}
SHOT = {32: [500, 250, 100, 75, 50], 224: [60, 25, 12, 5, 3]}
IMPULSE = {32: [0.01, 0.02, 0.03, 0.05, 0.07], 224: [0.03, 0.06, 0.09, 0.17, 0.27]}
SPECKLE = {32: [0.06, 0.1, 0.12, 0.16, 0.2], 224: [0.15, 0.2, 0.35, 0.45, 0.6]}
NAME_OF = {32: 'cifar', 224: 'imagenet'}
SIDE = {32: 32, 224: 72}  # of the test's images; those over 64 pixels take the constants of 224


def photographs(side, number=2):
    """Smooth images with edges, levels of 0 and 255, and grey and black parts; uint8, shape (N, 3, H, W)."""
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(rng.uniform(0, 255, (number, 3, side, side)), (0, 0, 1, 1))
    images = np.clip((images - 127) * 3 + 127, 0, 255)
    images[:, :, : side // 4, : side // 4] = images[:, :1, : side // 4, : side // 4]  # grey
    images[:, :, -side // 8 :, -side // 8 :] = 0
    return images.round().astype(np.uint8)


def as_batch(pixels):
    return torch.from_numpy(pixels).double() / 255


def assert_close(ours, slow, levels, name):
    """Compare in levels of 255."""
    difference = 255 * np.abs(ours.numpy() - np.clip(slow, 0, 1)).max()
    assert difference <= levels, f'{name}: {difference:.3g} of 255 levels'


# --- slow versions: an image of shape (H, W, 3) in [0, 1], and the constants by size ----------------------------------


def gaussian_blur(image, size, severity):
    sigma = {32: [0.4, 0.6, 0.7, 0.8, 1], 224: [1, 2, 3, 4, 6]}[size][severity - 1]
    return np.stack([ndimage.gaussian_filter(image[..., c], sigma, mode='nearest', truncate=4) for c in range(3)], -1)


def defocus_blur(image, size, severity):
    radius, softness = {
        32: [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        224: [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    }[size][severity - 1]
    extent = 8 if radius <= 8 else radius
    disk = np.zeros((2 * extent + 1, 2 * extent + 1))
    for y in range(-extent, extent + 1):
        for x in range(-extent, extent + 1):
            disk[y + extent, x + extent] = x * x + y * y <= radius * radius
    disk /= disk.sum()
    # OpenCV's kernel has 3 taps, or 5 for a large disk; its border is SciPy's 'mirror'
    edge = 1 if radius <= 8 else 2
    kernel = ndimage.gaussian_filter(disk, softness, mode='mirror', radius=edge)
    return np.stack([ndimage.correlate(image[..., c], kernel, mode='mirror') for c in range(3)], -1)


def zoom_blur(image, size, severity):
    side = len(image)
    stop, step = {
        32: [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        224: [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    }[size][severity - 1]
    total, factors = image.copy(), np.arange(1, stop, step)
    for factor in factors:
        kept = int(np.ceil(side / factor))
        top = (side - kept) // 2
        zoomed = ndimage.zoom(image[top : top + kept, top : top + kept], (factor, factor, 1), order=1)
        trim = (len(zoomed) - side) // 2
        total += zoomed[trim : trim + side, trim : trim + side]
    return total / (len(factors) + 1)


def in_hsv(image, change):
    """Change saturation and value of each pixel by the standard library's colour spaces."""
    out = np.empty_like(image)
    for at in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*image[at])
        out[at] = colorsys.hsv_to_rgb(hue, *np.clip(change(saturation, value), 0, 1))
    return out


def brightness(image, size, severity):
    amount = {32: [0.05, 0.1, 0.15, 0.2, 0.3], 224: [0.1, 0.2, 0.3, 0.4, 0.5]}[size][severity - 1]
    return in_hsv(image, lambda saturation, value: (saturation, value + amount))


def saturate(image, size, severity):
    factor, amount = {
        32: [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
        224: [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)],
    }[size][severity - 1]
    return in_hsv(image, lambda saturation, value: (saturation * factor + amount, value))


def contrast(image, size, severity):
    factor = {32: [0.75, 0.5, 0.4, 0.3, 0.15], 224: [0.4, 0.3, 0.2, 0.1, 0.05]}[size][severity - 1]
    means = image.mean((0, 1))
    return means + factor * (image - means)


def pixelate(image, size, severity):
    side = len(image)
    factor = {32: [0.95, 0.9, 0.85, 0.75, 0.65], 224: [0.6, 0.5, 0.4, 0.3, 0.25]}[size][severity - 1]
    small = int(side * factor)
    resized = Image.fromarray((image * 255).round().astype(np.uint8)).resize((small, small), Image.Resampling.BOX)
    return np.asarray(resized.resize((side, side), Image.Resampling.BOX)) / 255


def jpeg_compression(image, size, severity):
    quality = {32: [80, 65, 58, 50, 40], 224: [25, 18, 15, 10, 7]}[size][severity - 1]
    file = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(file, 'JPEG', quality=quality)
    return np.asarray(Image.open(file)) / 255


# PIL rounds to 8 bits after each of two passes
WITHOUT_NOISE = {
    each.__name__: (each, levels)
    for each, levels in (
        (gaussian_blur, 1e-6), (defocus_blur, 1e-6), (zoom_blur, 1e-6), (brightness, 1e-6), (saturate, 1e-6),
        (contrast, 1e-6), (pixelate, 1.5), (jpeg_compression, 1e-6),
    )
}  # fmt: skip


@pytest.mark.parametrize('size', [32, 224])
@pytest.mark.parametrize('name', WITHOUT_NOISE)
def test_without_noise_it_is_the_slow_version(name, size):
    slow, levels = WITHOUT_NOISE[name]
    pixels = photographs(SIDE[size], number=1)
    for severity in SEVERITIES:
        corrupted = corrupt(as_batch(pixels), name, severity)
        expected = [slow(each.transpose(1, 2, 0) / 255, size, severity).transpose(2, 0, 1) for each in pixels]
        assert_close(corrupted, np.stack(expected), levels, f'{name} {severity}')


@pytest.mark.parametrize('size', [32, 224])
@pytest.mark.parametrize('name', ['gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise'])
def test_noise_follows_its_law(name, size):
    """On grey of 0.5, far from the clip: mean, variance and shape; each test at 1 in 1,000."""
    for severity in SEVERITIES:
        batch = torch.full((64, 3, 16, 16), 0.5, dtype=torch.float64)
        generator = torch.Generator().manual_seed(severity)
        values = corrupt(batch, name, severity, generator=generator, constants=NAME_OF[size]).flatten().numpy()
        where = f'{name} {severity} at {size} pixels'
        if name == 'impulse_noise':
            amount = IMPULSE[size][severity - 1]
            assert set(np.unique(values)) == {0, 0.5, 1}, where
            for level in (0, 1):
                test = binomtest(int((values == level).sum()), len(values), amount / 2)
                assert test.pvalue > 1e-3, (where, level, test)
        elif name == 'shot_noise':
            photons = SHOT[size][severity - 1]
            counts = values * photons
            assert np.abs(counts - counts.round()).max() < 1e-6, where
            at = np.arange(0, 2 * photons)
            clipped, chances = np.minimum(at / photons, 1), poisson.pmf(at, photons / 2)
            mean, square = clipped @ chances, clipped**2 @ chances
            assert abs(values.mean() - mean) < 4 * np.sqrt((square - mean**2) / len(values)), (where, values.mean())
            assert (values**2).mean() == pytest.approx(square, rel=0.02), where
        else:
            sigma = GAUSSIAN[size][severity - 1] if name == 'gaussian_noise' else 0.5 * SPECKLE[size][severity - 1]
            inside = values[(values > 0) & (values < 1)]
            clipped = 1 - len(inside) / len(values)
            low, high = np.array([-0.5, 0.5]) / sigma
            assert abs(clipped - 2 * norm.cdf(low)) < 4 * np.sqrt(0.25 / len(values)), (where, clipped)
            test = kstest((inside - 0.5) / sigma, truncnorm(low, high).cdf)
            assert test.pvalue > 1e-3, (where, test)


def test_noise_of_a_given_draw_has_the_value_of_its_definition():
    pixels = photographs(32)
    batch = as_batch(pixels)

    def corrupted(name, severity):
        return corrupt(batch, name, severity, generator=torch.Generator().manual_seed(5))

    def draw(kind):
        return kind(batch.shape, generator=torch.Generator().manual_seed(5), dtype=batch.dtype).numpy()

    for severity in SEVERITIES:
        images, normal, uniform = batch.numpy(), draw(torch.randn), draw(torch.rand)
        amount = IMPULSE[32][severity - 1]
        counts = torch.poisson(batch * SHOT[32][severity - 1], generator=torch.Generator().manual_seed(5)).numpy()
        salted = np.where(uniform < amount / 2, 0, np.where(uniform >= 1 - amount / 2, 1, images))
        expected = {
            'gaussian_noise': images + GAUSSIAN[32][severity - 1] * normal,
            'speckle_noise': images + images * SPECKLE[32][severity - 1] * normal,
            'shot_noise': counts / SHOT[32][severity - 1],
            'impulse_noise': salted,
        }
        for name, value in expected.items():
            assert_close(corrupted(name, severity), value, 1e-9, f'{name} {severity}')


@pytest.mark.parametrize('size', [32, 224])
def test_motion_blur_averages_along_a_line(size):
    """One pixel and one tap at a time; the angles are those that the generator gives."""
    constants = {32: [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)], 224: [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]}
    pixels = photographs(12)
    angles = 90 * torch.rand(2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 45
    for severity in (1, 5):
        radius, sigma = constants[size][severity - 1]
        generator = torch.Generator().manual_seed(1)
        ours = corrupt(as_batch(pixels), 'motion_blur', severity, generator=generator, constants=NAME_OF[size])
        weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
        weights /= weights.sum()
        slow = np.zeros_like(pixels, dtype=float)
        for n, y, x in np.ndindex(2, 12, 12):
            for step, weight in enumerate(weights):
                radians = np.deg2rad(float(angles[n]))
                below, right = (int(np.ceil(step * part - 0.5)) for part in (np.sin(radians), np.cos(radians)))
                row, column = min(max(y + below, 0), 11), min(max(x + right, 0), 11)
                slow[n, :, y, x] += weight * pixels[n, :, row, column] / 255
        assert_close(ours, slow, 1e-6, f'motion_blur {severity}')


@pytest.mark.parametrize('constants', ['cifar', 'imagenet'])
def test_fog_is_the_diamond_square_algorithm(constants):
    """Point by point on the torus; the draws are those that the generator gives, in the order of the steps."""
    values = {
        'cifar': [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        'imagenet': [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    }[constants]
    pixels = photographs(12)
    batch = as_batch(pixels)
    for severity in (1, 5):
        amount, decay = values[severity - 1]
        ours = corrupt(
            batch, 'fog', severity, generator=torch.Generator().manual_seed(2), constants=constants
        )  # on a torus of 16 points
        generator = torch.Generator().manual_seed(2)
        plasma, step, reach = np.zeros((2, 16, 16)), 16, 100.0
        while step >= 2:
            half, grid = step // 2, 16 // step
            for at, moves in (
                ((half, half), [(-half, -half), (-half, half), (half, -half), (half, half)]),
                ((0, half), [(0, -half), (0, half), (-half, 0), (half, 0)]),
                ((half, 0), [(0, -half), (0, half), (-half, 0), (half, 0)]),
            ):
                draws = 2 * torch.rand(2, grid, grid, generator=generator, dtype=torch.float64).numpy() - 1
                for n, i, j in np.ndindex(2, grid, grid):
                    y, x = at[0] + i * step, at[1] + j * step
                    neighbours = [plasma[n, (y + down) % 16, (x + right) % 16] for down, right in moves]
                    plasma[n, y, x] = np.mean(neighbours) + reach * reach * draws[n, i, j]
            step, reach = half, reach / decay
        slow = []
        for image, heights in zip(batch.numpy(), plasma, strict=True):
            heights = (heights - heights.min()) / (heights - heights.min()).max()
            slow.append((image + amount * heights[:12, :12]) * image.max() / (image.max() + amount))
        assert_close(ours, np.stack(slow), 1e-6, f'fog {severity}')


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_any_size_and_dtype_stays_in_range_and_repeats_by_seed(name):
    for shape in ((2, 3, 8, 8), (2, 3, 30, 40)):
        images = torch.rand(shape)
        before = images.clone()
        for severity in SEVERITIES:
            one, other = (corrupt(images, name, severity, generator=torch.Generator().manual_seed(3)) for _ in range(2))
            assert one.shape == shape and one.dtype == torch.float32
            assert 0 <= one.min() and one.max() <= 1
            assert torch.equal(one, other)
            # The zoom of severity 1 rounds to no change on the smallest images
            assert shape[-1] == 8 or (one - images).abs().max() > 1e-3, 'nothing changed'
        assert torch.equal(images, before), 'the given images changed'


def test_an_image_is_corrupted_by_itself():
    """Without noise, an image's result does not depend on the other images of its batch."""
    images = torch.rand(3, 3, 32, 32)
    for name in WITHOUT_NOISE:
        together = corrupt(images, name, 3)
        alone = torch.cat([corrupt(image[None], name, 3) for image in images])
        assert torch.allclose(together, alone, atol=1e-6), name


def test_severity_increases_the_distance():
    """Weak severities change images less than strong ones, for each corruption and both sets of constants."""
    images = torch.from_numpy(photographs(32, 8)).float() / 255
    for constants in ('cifar', 'imagenet'):
        for name in CORRUPTIONS:
            weak, strong = (
                (corrupt(images, name, s, generator=torch.Generator().manual_seed(0), constants=constants) - images)
                .square()
                .mean()
                for s in (1, 5)
            )
            if name != 'saturate' or constants == 'imagenet':  # less colour at severities 1 and 2, more from 3 to 5
                assert weak < strong, (constants, name, weak, strong)


def test_mistakes_are_one_line():
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(UserError, match="unknown corruption 'gausian_noise'; did you mean 'gaussian_noise'"):
        corrupt(images, 'gausian_noise', 1)
    for severity in (0, 6, 1.5, True):
        with pytest.raises(UserError, match='Expected severity to be an integer from 1 to 5'):
            corrupt(images, 'fog', severity)


def test_alexnets_errors_are_those_of_the_fifteen_corruptions_of_imagenet_c():
    assert len(ALEXNET_ERRORS) == 15
    assert set(CORRUPTIONS) - set(ALEXNET_ERRORS) == {'speckle_noise', 'gaussian_blur', 'saturate'}
    assert np.mean(list(ALEXNET_ERRORS.values())) == pytest.approx(0.7887, abs=1e-3)
