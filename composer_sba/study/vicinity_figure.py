"""The figure of the vicinal distribution: raw and virtual points in two dimensions, and the decisions of two networks.

The data are two interleaved crescents, one for each class. The cut layer is the input of the network, which makes the
plane of the points the latent space. The network is trained twice from the same initial weights and on the same
batches: without and with SBA.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import nn

from composer_sba import functional as sbaf
from composer_sba.latent.expander import LatentExpander
from composer_sba.study.figures import write_figure
from composer_sba.study.style import BLUE, GREY, INK, RED
from composer_sba.vicinity import Vicinity

STEPS = 1000
ETA, FOLD = 1.0, 8
VICINITY = Vicinity(sigma=0.15, dropout=0.1)
SEED = 0
_COLOUR_MAP = LinearSegmentedColormap.from_list('classes', [BLUE, 'white', RED])


def draw_vicinity(path: Path, steps: int = STEPS) -> list[str]:
    """Train both networks and draw the points of one augmented batch and the decision regions.

    Args:
        path (Path): The PNG to write.
        steps (int, optional): The steps of each training. Default: ``1000``.

    Returns:
        list[str]: One line for each network, with its error and NLL on 10,000 fresh points.
    """
    train, labels = crescents(60, seed=SEED)
    test, test_labels = crescents(10_000, seed=SEED + 1)
    networks = {'without SBA': fit(train, labels, 0.0, steps), 'with SBA': fit(train, labels, ETA, steps)}
    lines = []
    for name, network in networks.items():
        with torch.no_grad():
            logits = network(test)
        error = (logits.argmax(1) != test_labels).float().mean()
        lines.append(f'{name}: error {error:.1%}, NLL {F.cross_entropy(logits, test_labels):.3f} nats')

    def draw(figure: Figure) -> None:
        first, *others = figure.subplots(1, 3, sharex=True, sharey=True)
        first.set_title('raw and virtual points')
        num_gaussian = VICINITY.num_gaussian(FOLD)
        virtual = VICINITY.sample(train, FOLD, torch.Generator().manual_seed(SEED))
        kinds = ((virtual[:num_gaussian], '.', 'Gaussian'), (virtual[num_gaussian:], 'x', 'dropout'))
        for points, marker, name in kinds:
            flat = points.flatten(0, 1).T
            first.plot(*flat, marker, color=GREY, alpha=0.6, markersize=3, markeredgewidth=0.6, label=name, zorder=1)
        _draw_points(first, train, labels)
        first.legend(loc='lower left', frameon=False, handletextpad=0, fontsize=8)
        for axes, (name, network) in zip(others, networks.items(), strict=True):
            axes.set_title(f'decisions {name}')
            _draw_regions(axes, network)
            _draw_points(axes, train, labels)
        for axes in (first, *others):
            axes.set(xlim=(-2.6, 2.6), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect='equal')

    write_figure(path, (9, 2.9), draw)
    return lines


def crescents(points: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points of two interleaved half circles with noise; their mean is close to zero.

    Args:
        points (int): The number of points N, half of them in each class.
        seed (int): The seed of their generator.

    Returns:
        tuple: Points, shape ``(N, 2)``, and classes, shape ``(N,)``.
    """
    stream = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % 2
    angle = torch.pi * torch.rand(points, generator=stream)
    side = 1 - 2 * labels
    circle = torch.stack([side * angle.cos() + labels - 0.5, side * angle.sin() + 0.5 * labels - 0.25], 1)
    return 1.4 * circle + 0.35 * torch.randn(points, 2, generator=stream), labels


def fit(points: torch.Tensor, labels: torch.Tensor, eta: float, steps: int) -> nn.Sequential:
    """Train a network with two hidden layers on all points at every step, with SBA if η > 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    expander = LatentExpander(network, 'input', FOLD, VICINITY)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        if eta:
            with expander.armed(step):
                outputs = network(points)
            logits, virtual = expander.split(outputs)
            loss = F.cross_entropy(logits, labels) + eta * sbaf.soft_label_kl(logits, virtual)
        else:
            loss = F.cross_entropy(network(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expander.remove()
    return network


def _draw_points(axes: Axes, points: torch.Tensor, labels: torch.Tensor) -> None:
    for label, colour, marker in ((0, BLUE, 'o'), (1, RED, 's')):
        axes.plot(*points[labels == label].T, marker, color=colour, markersize=4.5, markeredgecolor='white', zorder=2)


def _draw_regions(axes: Axes, network: nn.Module) -> None:
    x, y = torch.linspace(-2.6, 2.6, 261), torch.linspace(-2.2, 2.2, 221)
    grid = torch.cartesian_prod(y, x).flip(1)
    with torch.no_grad():
        certainty = network(grid).softmax(1)[:, 1].reshape(len(y), len(x))
    axes.contourf(x, y, certainty, levels=[k / 10 for k in range(11)], cmap=_COLOUR_MAP, alpha=0.55, zorder=0)
    axes.contour(x, y, certainty, levels=[0.5], colors=INK, linewidths=1, zorder=1)
