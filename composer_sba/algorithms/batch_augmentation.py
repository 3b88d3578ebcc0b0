"""class BatchAugmentation: M transformed copies of every input (Hoffer et al.), as a Composer algorithm."""

from collections.abc import Callable
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch.utils.data import DataLoader

from composer_sba.errors import UserError, check_fold


class Copies:
    """Applies a random transform M times to one image and stacks the results, each with draws of its own.

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
        """What the transform says, for a dataset that can decode to tensors."""
        return getattr(self.transform, 'takes_tensors', False)

    def __call__(self, image: Any) -> torch.Tensor:
        """Stack the copies of ``image``, shape ``(M, *)``, or of a batch of images, shape ``(N, M, *)``."""
        return torch.stack([self.transform(image) for _ in range(self.fold)], self.dim)


def batch_augment(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten a batch of copies into rows, each with the hard label of its input; copies of one input are neighbours.

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


class BatchAugmentation(Algorithm):
    """Trains on M independently transformed copies of every input, at every step, with hard labels.

    Implements `Hoffer et al., 2019 <https://arxiv.org/abs/1901.09335>`_: the loss is the plain mean over M N rows,
    batch statistics are those of all rows, and the learning rate is left alone. The training transform makes the
    copies, in the workers of the DataLoader if it has any, so every copy has its own crop, flip and Cutout.

    Args:
        fold (int, optional): M >= 1, copies of each input. Default: ``4``.
        input_key (str | int | Callable, optional): Where a batch holds its inputs. Default: ``0``.
        target_key (str | int | Callable, optional): Where a batch holds its labels. Default: ``1``.

    Raises:
        ValueError: If ``fold`` is no integer >= 1.
        UserError: At the start of a fit, if the training dataset has no ``transform`` to multiply.

    Note:
        Runs on FIT_START (the dataset's ``transform`` is wrapped, and a fixed microbatch size counts inputs, not
        copies) and AFTER_DATALOADER (copies become rows). Time strings go on counting inputs. State saved: none.
    """

    def __init__(
        self, fold: int = 4, input_key: str | int | Callable = 0, target_key: str | int | Callable = 1
    ) -> None:
        check_fold(fold)
        self.fold = fold
        self.input_key = input_key
        self.target_key = target_key

    def __repr__(self) -> str:
        return f'BatchAugmentation(fold={self.fold})'

    def match(self, event: Event, state: State) -> bool:
        """Run on FIT_START and AFTER_DATALOADER."""
        return event in (Event.FIT_START, Event.AFTER_DATALOADER)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Wrap the transform, or flatten the batch."""
        if event == Event.FIT_START:
            self._wrap(state)
        else:
            inputs, target = batch_augment(state.batch_get_item(self.input_key), state.batch_get_item(self.target_key))
            state.batch_set_item(self.input_key, inputs)
            state.batch_set_item(self.target_key, target)

    def _wrap(self, state: State) -> None:
        dataset: Any = state.dataloader.dataset if isinstance(state.dataloader, DataLoader) else None
        transform = getattr(dataset, 'transform', None)
        if isinstance(transform, Copies):  # of an earlier fit
            return
        if dataset is None or not callable(transform):
            raise UserError(
                f'BatchAugmentation multiplies the transform of the training dataset, and {type(dataset).__name__} has '
                'none: give the dataset a transform= that returns a tensor.',
            )
        dataset.transform = Copies(transform, self.fold)
        if isinstance(state.device_train_microbatch_size, int) and not state.auto_microbatching:
            state.device_train_microbatch_size *= self.fold
