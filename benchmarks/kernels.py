"""Compare the kernels of composer_sba.kernels with operators of PyTorch on this machine's GPU, in value and in time.

Run: python benchmarks/kernels.py
"""

import argparse
import sys
from collections.abc import Callable

import torch

import composer_sba.functional as sbaf
from composer_sba import Vicinity, kernels

SHAPES = {'head of VGG16': (128, 512), 'head of ResNet50': (64, 2048), 'input of ResNet44': (512, 3, 32, 32)}


def microseconds(run: Callable[[], object]) -> float:
    """Return the time of one call, the mean of 50 after 10."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for calls in (10, 50):
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / 50 * 1000


def compare_draws(shape: tuple[int, ...]) -> str:
    """Compare moments of the virtual samples, the gradient of a sum, and the time of both passes."""
    latent = torch.randn(shape, device='cuda', requires_grad=True)
    vicinity, generator = Vicinity(sigma=0.3), torch.Generator('cuda')
    fused = vicinity.expand(latent, 4, 7)
    eager = vicinity.expand(latent, 4, generator.manual_seed(7))
    moments = [
        f'{name} {function(fused):.4f} / {function(eager):.4f}'
        for name, function in {
            'sd': lambda rows: (rows.view(5, *shape)[1:3] - latent).std().item(),
            'largest': lambda rows: (rows.view(5, *shape)[1:3] - latent).abs().max().item(),
            'kept': lambda rows: (rows.view(5, *shape)[3:] != 0).float().mean().item(),
        }.items()
    ]
    weight = torch.randn_like(fused)
    (gradient,) = torch.autograd.grad(fused, latent, weight, retain_graph=True)
    (exact,) = torch.autograd.grad(fused, latent, weight, create_graph=True)
    error = (gradient - exact).abs().max().item()
    times = [
        microseconds(lambda source=source: torch.autograd.grad(vicinity.expand(latent, 4, source()), latent, weight))
        for source in (lambda: 7, lambda: torch.Generator('cuda').manual_seed(7))
    ]
    return f'{", ".join(moments)}; gradient differs by {error:.1e}; {times[0]:.0f} / {times[1]:.0f} µs'


def compare_losses(rows: int, classes: int) -> str:
    """Compare the soft label loss, its gradient and the time of both."""
    raw, virtual = torch.randn(rows, classes, device='cuda'), torch.randn(4, rows, classes, device='cuda')
    kl, gradient = kernels.soft_label_kl(raw, virtual)
    exact = virtual.double().requires_grad_()  # in float64, operators compute it
    expected = sbaf.soft_label_kl(raw.double(), exact)
    (slope,) = torch.autograd.grad(expected, exact)
    error = (gradient - slope).abs().max().item()
    time = microseconds(lambda: kernels.soft_label_kl(raw, virtual))
    return f'{kl.item():.6f} / {expected.item():.6f}; gradient differs by {error:.1e}; {time:.0f} µs'


def main() -> int:
    """Print the comparisons; return 1 if no kernel can run."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available() or not kernels.are_usable_on(torch.zeros(1, device='cuda')):
        print('no GPU on which kernels can run')
        return 1
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; kernel / operators')
    for name, shape in SHAPES.items():
        print(f'{name} {shape}: {compare_draws(shape)}')
    for rows, classes in (128, 10), (64, 1000):
        print(f'loss of {rows} rows, {classes} classes: {compare_losses(rows, classes)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
