"""class SeedEachBatch: global random streams that are functions of (seed, rank, batch), which a resumed run repeats."""

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
    """Global random streams of torch, NumPy and Python that are seeded anew for each batch.

    Composer saves these streams, but it does not restore them from a checkpoint in mid-epoch of streamed data, and it
    does not rewind them before it tries a batch again that ran out of memory. Dropout, and algorithms that draw from
    these streams, would then differ from the unbroken run. With this algorithm first in the list they repeat.

    ``composer train.py`` adds it to every run. The draws of the DataLoader and of SBA do not need it.

    Note:
        Runs on AFTER_DATALOADER, and on BEFORE_TRAIN_BATCH, where a batch is tried again. The streams are functions of
        (the Trainer's seed, rank, batch). State saved: none. See :func:`sort_seed_first`.

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
        """Seed the streams; each of the two events has its own seed."""
        moment = int(event == Event.BEFORE_TRAIN_BATCH)
        seed = hash_key(state.rank_zero_seed, dist.get_global_rank(), state.timestamp.batch.value, moment)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        if state.device.name == 'cpu':
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)  # which takes 0.1 ms more where there is no accelerator to seed


def sort_seed_first(algorithms: Sequence[Algorithm], event: Event) -> Sequence[Algorithm]:
    """Run SeedEachBatch before anything draws: a pass for ``Trainer(algorithm_passes=[sort_seed_first])``.

    Composer runs algorithms in the reverse of their order at AFTER_DATALOADER.

    Example:
        >>> from composer.algorithms import ColOut
        >>> [type(each).__name__ for each in sort_seed_first([ColOut(), SeedEachBatch()], Event.AFTER_DATALOADER)]
        ['SeedEachBatch', 'ColOut']
    """
    return sort_to_front(algorithms, SeedEachBatch)
