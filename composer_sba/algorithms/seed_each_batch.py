"""class SeedEachBatch: what a batch draws is a function of (seed, rank, batch), so that a resumed run repeats it."""

import random
from collections.abc import Sequence

import numpy
import torch
from composer.core import Algorithm, Event, State
from composer.core.passes import sort_to_front
from composer.loggers import Logger
from composer.utils import dist

from composer_sba.schedule import hash_key


class SeedEachBatch(Algorithm):
    """Seeds the global random streams of torch, NumPy and Python anew for each batch.

    Composer saves them, but does not restore them from a checkpoint in mid-epoch of streamed data, and does not rewind
    them when a batch ran out of memory and is tried again. So dropout and the algorithms that draw from them would go
    on with other draws than the unbroken run. With this one, first in the list, they repeat.

    ``composer train.py`` has it in every run. What the DataLoader and SBA draw needs no such help.

    Note:
        Runs on AFTER_DATALOADER, and on BEFORE_TRAIN_BATCH, which is where a batch is tried again. The streams are
        functions of (the Trainer's seed, rank, batch). State saved: none. See :func:`sort_seed_first`.

    Example:
        >>> from composer import Trainer
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model=model,
        ...     train_dataloader=dataloader,
        ...     algorithms=[SeedEachBatch(), SBA()],
        ...     algorithm_passes=[sort_seed_first],
        ... )
    """

    def __repr__(self) -> str:
        return 'SeedEachBatch()'

    def match(self, event: Event, state: State) -> bool:
        """Run on AFTER_DATALOADER and BEFORE_TRAIN_BATCH."""
        return event in (Event.AFTER_DATALOADER, Event.BEFORE_TRAIN_BATCH)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Seed them; two events have two seeds."""
        moment = int(event == Event.BEFORE_TRAIN_BATCH)
        seed = hash_key(state.rank_zero_seed, dist.get_global_rank(), state.timestamp.batch.value, moment)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def sort_seed_first(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Seed before anything draws: a pass for ``Trainer(algorithm_passes=[sort_seed_first])``.

    Composer runs algorithms in the reverse of their order at AFTER_DATALOADER.

    Example:
        >>> from composer.algorithms import ColOut
        >>> [type(each).__name__ for each in sort_seed_first([ColOut(), SeedEachBatch()], Event.AFTER_DATALOADER)]
        ['SeedEachBatch', 'ColOut']
    """
    return sort_to_front(algorithms, SeedEachBatch)
