"""Measure what SBA adds to an epoch: one Trainer with batches without SBA, with λ(t) = 0 and with λ(t) = 1 in turn.

Run: python benchmarks/step_overhead.py [--model resnet_cifar] [--rounds 20] [--batch 128] [--microbatch 64] [--fold 4]
"""

import argparse
import statistics
import time

import torch
from composer import Callback, Event, Logger, State, Trainer
from composer.utils import get_device
from data_path import at_least
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SBA
from composer_sba.models import classifier
from composer_sba.recipe.registry import construct

KINDS = ('without SBA', 'λ(t) = 0', 'λ(t) = 1')
ORDER = (0, 1, 2, 1, 0, 2)  # each kind follows each other one equally often: a step leaves memory to the next one
WARM_UP = 2  # rounds


def kind_of(batch: int) -> int:
    """Return the index of a batch's kind."""
    return ORDER[batch % len(ORDER)]


class SBAInTurn(SBA):
    """SBA that is absent from every third batch."""

    kind = 0

    def match(self, event: Event, state: State) -> bool:
        """Do not run in a batch without SBA, and remove the hooks for its time."""
        if event is Event.AFTER_DATALOADER:  # before the clock starts
            self.kind = kind_of(state.timestamp.batch.value)
            self._expander.remove()
            if self.kind > 0:
                self._expander.attach()
        always = event in (Event.AFTER_LOAD, Event.FIT_START, Event.FIT_END)
        return super().match(event, state) and (always or self.kind > 0)


class StepTimer(Callback):
    """The seconds of each batch, from its arrival until its metrics have been logged."""

    def __init__(self) -> None:
        self.seconds: list[list[float]] = [[] for _ in KINDS]

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock: callbacks run after algorithms."""
        synchronize()
        self.kind = kind_of(state.timestamp.batch.value)
        self.start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop the clock when the device has finished the batch."""
        synchronize()
        self.seconds[self.kind].append(time.perf_counter() - self.start)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print the median ratios and their quartiles."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--model', default='resnet_cifar')
    parser.add_argument('--rounds', type=at_least(2), default=20)
    parser.add_argument('--batch', type=at_least(2), default=128)
    parser.add_argument('--microbatch', type=at_least(1), help='Default: the batch.')
    parser.add_argument('--layers', nargs='+', default=['head'])
    parser.add_argument('--fold', type=at_least(1), default=4)
    args = parser.parse_args()

    timer = StepTimer()
    data = TensorDataset(torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,)))
    model = classifier(construct('model', args.model, {'num_classes': 10}), num_classes=10)
    Trainer(
        model=model,
        train_dataloader=DataLoader(data, args.batch),
        max_duration=f'{len(KINDS) * (args.rounds + WARM_UP)}ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9),
        algorithms=[
            SBAInTurn(
                args.layers,
                args.fold,
                augment_prob=lambda state: float(kind_of(state.timestamp.batch.value) == 2),
            )
        ],
        callbacks=[timer],
        device_train_microbatch_size=args.microbatch or args.batch,
        progress_bar=False,
        seed=17,
    ).fit()
    microbatches = f' in microbatches of {args.microbatch}' if args.microbatch else ''
    without, *others = (seconds[WARM_UP:] for seconds in timer.seconds)
    print(
        f'{args.model}, 32 px, batch {args.batch}{microbatches}, cut {" ".join(args.layers)}, M={args.fold}, '
        f'{get_device(None).name}, torch {torch.__version__}, {torch.get_num_threads()} threads, n={args.rounds}: '
        f'{statistics.median(without) * 1000:.1f} ms without SBA'
    )
    middles = []
    for kind, seconds in zip(KINDS[1:], others, strict=True):
        low, middle, high = statistics.quantiles([b / a for a, b in zip(without, seconds, strict=True)], n=4)
        middles.append(middle)
        print(f'{kind}: {middle:.4f} times as long, quartiles {low:.4f} and {high:.4f}')
    for prob in (0.25, 0.5, 1.0):
        print(f'an epoch with augment_prob={prob}: {(1 - prob) * middles[0] + prob * middles[1]:.4f}')


if __name__ == '__main__':
    main()
