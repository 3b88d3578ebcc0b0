"""Means over the rows of a batch, gathered microbatch by microbatch."""

import torch


class BatchMeans:
    """Adds up means of microbatches, weighted by their rows.

    Sums stay on the device until :meth:`values` is called: at the end of a batch the Trainer waits for it anyway.

    Example:
        >>> means = BatchMeans()
        >>> means.add(3, kl=torch.tensor(0.5))
        >>> means.add(1, kl=torch.tensor(0.1))
        >>> {name: round(value, 4) for name, value in means.values().items()}
        {'kl': 0.4}
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = 0

    def add(self, rows: int, **means: torch.Tensor) -> None:
        """Count the means of a microbatch of so many rows, without their graphs."""
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach() * rows
        self._rows += rows

    def values(self) -> dict[str, float]:
        """Return the means of the batch by name."""
        return {name: float(total) / self._rows for name, total in self._sums.items()}
