"""Measures what an augmented step costs: ResNet44, 32 px, one Trainer whose batches are plain and augmented in turn.

Run: python benchmarks/step_overhead.py [--pairs 20] [--batch 128] [--layers head] [--fold 4]
"""

import argparse
import statistics
import time

import torch
from composer import Callback, Logger, State, Trainer
from composer.utils import get_device
from torch.utils.data import DataLoader, TensorDataset

from composer_sba import SBA
from composer_sba.models import classifier, resnet_cifar


class StepTimer(Callback):
    """Seconds of each batch, from its arrival on the device to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """Start the clock; the batch is on the device."""
        self.start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop the clock when the device has done all that the batch asked for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    """Print the median ratio and its quartiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', type=int, default=20)
    parser.add_argument('--batch', type=int, default=128)
    parser.add_argument('--layers', nargs='+', default=['head'])
    parser.add_argument('--fold', type=int, default=4)
    args = parser.parse_args()

    warm_up = 1
    timer = StepTimer()
    data = TensorDataset(torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,)))
    model = classifier(resnet_cifar(10, depth=44), num_classes=10)
    Trainer(
        model=model,
        train_dataloader=DataLoader(data, args.batch),
        max_duration=f'{2 * (args.pairs + warm_up)}ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        # A coin that falls on either side in turn, so that each pair of batches is timed under the same load.
        algorithms=[SBA(args.layers, args.fold, augment_prob=lambda state: float(state.timestamp.batch.value % 2))],
        callbacks=[timer],
        progress_bar=False,
        seed=17,
    ).fit()
    plain, augmented = timer.seconds[2 * warm_up :: 2], timer.seconds[2 * warm_up + 1 :: 2]
    ratios = [b / a for a, b in zip(plain, augmented, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    print(
        f'ResNet44, 32 px, batch {args.batch}, cut {" ".join(args.layers)}, M={args.fold}, {get_device(None).name}, '
        f'torch {torch.__version__}, {torch.get_num_threads()} threads: plain {statistics.median(plain):.3f} s, '
        f'augmented ÷ plain {median:.4f}, quartiles {low:.4f} and {high:.4f}, n={args.pairs} pairs',
    )


if __name__ == '__main__':
    main()
