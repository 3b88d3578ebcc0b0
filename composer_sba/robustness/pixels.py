"""Networks and images in pixel units, [0, 1], in which noise, attacks and certificates are measured."""

from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from composer_sba.errors import UserError
from composer_sba.latent.modes import in_mode


class PixelClassifier(nn.Module):
    """A network for images in pixel units, [0, 1]: it normalizes them first.

    Args:
        network (torch.nn.Module): Maps normalized images to logits of shape ``(N, K)``.
        mean (Sequence[float]): Means of the channels, in pixel units.
        std (Sequence[float]): Their standard deviations.

    Example:
        >>> PixelClassifier(nn.Flatten(), mean=[0.5], std=[0.25])(torch.ones(1, 1, 1, 2))
        tensor([[2., 2.]])
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits, float32, of images of shape ``(N, C, H, W)``."""
        logits = self.network((images - self.mean) / self.std)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise UserError(f'expected a network that returns logits of shape (N, K), got {shape}')
        return logits.float()


@contextmanager
def pixel_classifier(
    network: nn.Module, mean: Sequence[float], std: Sequence[float], device: torch.device | str | None = None
) -> Iterator[tuple[PixelClassifier, torch.device]]:
    """Wrap a network in a :class:`PixelClassifier` in evaluation mode; restore the modes of its modules afterwards.

    Yields:
        tuple[PixelClassifier, torch.device]: On the device, which defaults to that of the network's parameters.
    """
    where = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    where = where if device is None else torch.device(device)
    with in_mode(network, training=False):
        yield PixelClassifier(network, mean, std).to(where).eval(), where


def in_pixel_units(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return images on a device as float32 in [0, 1]; raise UserError if they seem to be normalized."""
    images = images.to(device)
    if images.dtype == torch.uint8:
        return images.float() / 255
    low, high = (value.item() for value in images.aminmax())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise UserError(
            f'expected images in [0, 1] or uint8, got values from {low:.3g} to {high:.3g}: remove Normalize from the '
            'transform, and give mean and std instead'
        )
    return images.float().clamp(0, 1)


def spread(loader: DataLoader, number: int) -> tuple[list[int], DataLoader]:
    """Choose images at equal distances in a dataset, which may be sorted by class.

    Args:
        loader (torch.utils.data.DataLoader): Batches of a dataset that has a length and can be indexed.
        number (int): How many; all if there are fewer.

    Returns:
        tuple[list[int], torch.utils.data.DataLoader]: Their indices in the dataset, and their batches.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> indices, batches = spread(DataLoader(TensorDataset(torch.arange(10)), batch_size=2), 3)
        >>> indices, [batch[0].tolist() for batch in batches]
        ([0, 3, 6], [[0, 3], [6]])
    """
    size = len(cast(Sized, loader.dataset))  # a dataset that can be indexed has a length
    number = min(number, size)
    indices = [i * size // number for i in range(number)]
    chosen = Subset(loader.dataset, indices)
    return indices, DataLoader(chosen, loader.batch_size or 1, collate_fn=loader.collate_fn)
