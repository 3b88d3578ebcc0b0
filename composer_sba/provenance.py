"""The facts that every measurement is reported with: hardware, package versions and the commit of the code."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ('composer-sba', 'mosaicml', 'mosaicml-streaming', 'torch', 'torchvision')


def hardware(device: str) -> str:
    """Describe the device that a run uses.

    Args:
        device (str): Composer's name of the device. ``'gpu'`` gives the GPU's name, anything else the CPU's name with
            the number of threads and cores.

    Returns:
        str: For example ``'Intel(R) Xeon(R) Processor, 1 of 2 cores'``.
    """
    if device == 'gpu':
        return f'1 {torch.cuda.get_device_name()}'
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    cores = len(os.sched_getaffinity(0))
    return f'{names[0] if names else platform.machine()}, {torch.get_num_threads()} of {cores} cores'


def versions() -> dict[str, str]:
    """Return the versions of this package, of the packages that training depends on, and of Python."""
    return {**{package: version(package) for package in PACKAGES}, 'python': platform.python_version()}


def commit() -> str:
    """Return the commit of the code, with a ``+`` if a tracked ``.py`` or ``.yaml`` file differs from it.

    Returns:
        str: Twelve hexadecimal digits, or ``'unknown'`` if git does not track this file. That is the case for a package
        that is installed into an environment inside another project's checkout.
    """
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        subprocess.run([*git, 'ls-files', '--error-unmatch', Path(__file__).name], capture_output=True, check=True)
        head = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', ':/*.py', ':/*.yaml'], check=False)
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return head.stdout.strip() + ('+' if changes.returncode else '')


def software() -> str:
    """Return versions and commit as one phrase for a report."""
    return f'{", ".join(f"{package} {number}" for package, number in versions().items())}; commit {commit()}'
