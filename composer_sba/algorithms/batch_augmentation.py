"""class BatchAugmentation: M transformed copies of every input (Hoffer et al.), as a Composer algorithm."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from composer.algorithms.warnings import NoEffectWarning
from composer.core import State
from composer.loggers import Logger
from torch.utils.data import DataLoader, get_worker_info

from composer_sba.algorithms._attachment import RowMultiplier
from composer_sba.errors import UserError, check_fold


class Copies:
    """A transform that applies a random transform M times to one image and stacks the results; each has its own draws.

    Args:
        transform (Callable): From an image to a tensor, shape ``(*)``; or, if it has an attribute ``batched`` that is
            true, from a batch of images to a tensor, shape ``(N, *)``.
        fold (int): M >= 1.

    Example:
        >>> Copies(lambda image: image + torch.rand(3), fold=4)(torch.zeros(3)).shape
        torch.Size([4, 3])
    """

    def __init__(self, transform: Callable[[Any], torch.Tensor], fold: int) -> None:
        self.transform = transform
        self.fold = fold
        self.dim = 1 if getattr(transform, 'batched', False) else 0

    @property
    def takes_tensors(self) -> bool:
        """Whether the transform accepts tensors, for a dataset that can decode to them."""
        return getattr(self.transform, 'takes_tensors', False)

    def __call__(self, image: Any) -> torch.Tensor:
        """Stack the copies of ``image``, shape ``(M, *)``, or of a batch of images, shape ``(N, M, *)``."""
        return torch.stack([self.transform(image) for _ in range(self.fold)], self.dim)


def batch_augment(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten a batch of copies into rows, each with the hard label of its input; copies of one input are adjacent.

    Args:
        inputs (torch.Tensor): Shape ``(N, M, *)``.
        target (torch.Tensor): Shape ``(N,)`` or ``(N, K)``.

    Returns:
        tuple: Inputs of shape ``(N * M, *)`` and targets of shape ``(N * M,)`` or ``(N * M, K)``.

    Example:
        >>> inputs, target = batch_augment(torch.zeros(2, 3, 8), torch.tensor([5, 7]))
        >>> inputs.shape, target.tolist()
        (torch.Size([6, 8]), [5, 5, 5, 7, 7, 7])
    """
    return inputs.flatten(0, 1), target.repeat_interleave(inputs.shape[1], dim=0)


class BatchAugmentation(RowMultiplier):
    """Training on M independently transformed copies of every input, on every step, with hard labels.

    Implements `Hoffer et al., 2019 <https://arxiv.org/abs/1901.09335>`_: the loss is the unweighted mean over M N rows,
    batch statistics are those of all rows, and the learning rate is unchanged. The training transform makes the
    copies, in the workers of the DataLoader if it has any, so every copy has its own crop, flip and Cutout.

    Args:
        fold (int, optional): M >= 1, copies of each input. Default: ``4``.
        input_key (str | int | Callable, optional): Where a batch holds its inputs. Default: ``0``.
        target_key (str | int | Callable, optional): Where a batch holds its labels. Default: ``1``.

    Raises:
        ValueError: If ``fold`` is not an integer >= 1.
        UserError: When the Trainer is built, if its list of algorithms has two BatchAugmentation. At the start of a
            fit, if the training dataset has no ``transform`` to apply M times.

    Note:
        Runs on FIT_START (a DataLoader that makes copies replaces the training DataLoader), AFTER_DATALOADER (copies
        become rows) and FIT_END (the training DataLoader is back). The dataset's ``transform`` is replaced only while
        a training sample is read. Evaluation or another Trainer on the same dataset therefore sees no copies, even
        after an interrupted fit. Algorithms that add to the dataset's transform, such as RandAugment, work before and
        after this one in the list.
        ``device_train_microbatch_size`` counts inputs, not copies, whether it is a number or ``'auto'``. Time strings
        count inputs too. State saved: none.
    """

    instead_of_two = 'give one the product of both folds'

    def __init__(
        self, fold: int = 4, input_key: str | int | Callable = 0, target_key: str | int | Callable = 1
    ) -> None:
        self.fold = self.rows_per_input = check_fold(fold)
        self.input_key = input_key
        self.target_key = target_key
        self._loader: CopyingLoader | None = None
        if self.fold == 1:
            warnings.warn('BatchAugmentation with fold=1 does not change training.', NoEffectWarning, stacklevel=2)

    def __repr__(self) -> str:
        return f'BatchAugmentation(fold={self.fold})'

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Turn copies into rows."""
        inputs, target = batch_augment(state.batch_get_item(self.input_key), state.batch_get_item(self.target_key))
        state.batch_set_item(self.input_key, inputs)
        state.batch_set_item(self.target_key, target)

    def _install(self, state: State) -> None:
        loader = state.dataloader
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else None
        if not isinstance(loader, DataLoader) or not callable(getattr(dataset, 'transform', None)):
            raise UserError(
                'BatchAugmentation applies the transform of the training dataset M times, and '
                f'{type(dataset).__name__} has none: give the dataset a transform= that returns a tensor.',
            )
        super()._install(state)
        self._loader = CopyingLoader(loader, self.fold)
        _replace_loader(state, self._loader)

    def _uninstall(self, state: State | None) -> None:
        super()._uninstall(state)
        if state is not None and self._loader is not None and state.dataloader is self._loader:
            _replace_loader(state, self._loader.original)
        self._loader = None


class CopyingLoader(DataLoader):
    """A view of a DataLoader that makes M copies of each sample; the DataLoader and its dataset stay as they are.

    Args:
        loader (torch.utils.data.DataLoader): The DataLoader, whose dataset has an attribute ``transform``.
        fold (int): M >= 1.
    """

    original: DataLoader
    fold: int
    _batches: DataLoader

    def __init__(self, loader: DataLoader, fold: int) -> None:
        batches = copy.copy(loader)
        batches.__dict__['worker_init_fn'] = _CopyInWorker(loader.worker_init_fn, fold)
        batches.__dict__['_iterator'] = None  # persistent workers, if any, are the loader's
        # DataLoader's constructor and __setattr__ would build another sampler
        self.__dict__.update(loader.__dict__, original=loader, fold=fold, _batches=batches)

    def __len__(self) -> int:
        return len(self.original)

    def __iter__(self) -> Any:  # torch's type of it is private
        """Iterate over batches of copies."""
        batches = iter(self._batches)
        while True:
            try:
                if self.num_workers > 0:  # which have copies of the dataset
                    batch = next(batches)
                else:
                    with _copying(self.dataset, self.fold):
                        batch = next(batches)
            except StopIteration:
                return
            yield batch


class _CopyInWorker:
    """A ``worker_init_fn`` that makes a worker's own dataset return copies."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None, fold: int) -> None:
        self.worker_init_fn = worker_init_fn
        self.fold = fold

    def __call__(self, worker_id: int) -> None:
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)
        info = get_worker_info()
        assert info is not None
        dataset: Any = info.dataset
        dataset.transform = Copies(dataset.transform, self.fold)


@contextmanager
def _copying(dataset: Any, fold: int) -> Iterator[None]:
    transform = dataset.transform
    dataset.transform = Copies(transform, fold)
    try:
        yield
    finally:
        dataset.transform = transform


def _replace_loader(state: State, loader: DataLoader) -> None:
    batches = state.dataloader_len
    state.set_dataloader(loader, state.dataloader_label, -1 if batches is None else batches)
