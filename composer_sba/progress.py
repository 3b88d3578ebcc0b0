"""The output of training: facts before it, and a line for each epoch with, on a terminal, a bar."""

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from rich.table import Table
from torch import nn
from tqdm import tqdm

from composer_sba.algorithms._composer import network_of
from composer_sba.data.loader import DatasetConfig, dataset_classes, dataset_size, image_size
from composer_sba.latent.cut_survey import measure
from composer_sba.recipe.recipe import Recipe
from composer_sba.summary import TRAIN_LOSS, counted

TRAIN_ACCURACY = 'metrics/train/MulticlassAccuracy'
WIDTH = 80  # columns of a line
SMALL_STEP = 2e9  # floating-point operations: threads that wait for each other take longer than such a step


class EpochLines(LoggerDestination):
    """A logger that prints a line for each epoch and, if asked to, shows the epoch in progress as a bar.

    Means are over the batches that this process has trained in the epoch, those of SBA's KL over augmented batches.

    Runs on the logger's ``log_metrics``, on BATCH_START, BATCH_END, EVAL_START, EVAL_BATCH_END, EVAL_END,
    EVAL_AFTER_ALL, EPOCH_END, EPOCH_CHECKPOINT and FIT_END, and when the Trainer is closed; changes nothing in
    ``State``. State saved: none.

    Args:
        bar (bool): Whether to show a bar.
    """

    def __init__(self, bar: bool) -> None:
        self._shows_bar = bar
        self._bar: tqdm | None = None
        self._begin(None)

    def _begin(self, state: State | None) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._accuracy: tuple[str, float] | None = None
        self._evaluated: int | None = None  # the batch after which
        self._waiting = ''  # the title of a line that waits for the evaluation at the end of training
        self._start = None if state is None else (int(state.timestamp.sample), state.timestamp.total_wct)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add the train loss and SBA's metrics to their sums."""
        for name, value in metrics.items():
            if name in (TRAIN_LOSS, 'sba/augmented', 'sba/kl'):
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counts[name] = self._counts.get(name, 0) + 1
            elif name == TRAIN_ACCURACY:
                self._accuracy = ('train', float(value))

    def batch_start(self, state: State, logger: Logger) -> None:
        """Begin an epoch, or the rest of one that is resumed."""
        self._print_waiting(state)
        if self._start is None:
            self._begin(state)
        if self._bar is None:
            self._open(_title(state, begins=True), state.dataloader_len, int(state.timestamp.batch_in_epoch))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Advance the bar."""
        if self._bar is not None:
            accuracy = f', accuracy {100 * self._accuracy[1]:.1f} %' if self._accuracy else ''
            self._bar.set_postfix_str(f'loss {self._mean(TRAIN_LOSS):.3g}{accuracy}', refresh=False)
            self._bar.update()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Close the bar of the epoch."""
        self._close()

    def eval_start(self, state: State, logger: Logger) -> None:
        """Open a bar for an evaluation between epochs."""
        if self._bar is None:
            self._open('evaluation', state.dataloader_len, 0)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        """Advance the bar."""
        if self._bar is not None and self._bar.desc.startswith('evaluation'):
            self._bar.update()

    def eval_end(self, state: State, logger: Logger) -> None:
        """Keep the accuracy of the evaluation."""
        self._accuracy = ('accuracy', float(state.eval_metric_values['MulticlassAccuracy']))
        self._evaluated = int(state.timestamp.batch)
        if self._bar is not None and self._bar.desc.startswith('evaluation'):
            self._close()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Print the line of the epoch, which needs the accuracy of this evaluation."""
        self._print_waiting(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """Print the line of the epoch, unless it is the last one and will be evaluated when training has ended."""
        is_last = state.max_duration is not None and state.timestamp >= state.max_duration
        if not (is_last and state.evaluators and self._evaluated != int(state.timestamp.batch)):
            self._print(state, _title(state))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Close the bar, and keep the line of an epoch that is unfinished or still to be evaluated."""
        self._close()
        if self._counts:
            self._waiting = _title(state)

    def close(self, state: State, logger: Logger) -> None:
        """Close the bar, and print the last line if no evaluation has followed."""
        self._close()
        self._print_waiting(state)

    def _mean(self, name: str) -> float:
        return self._sums.get(name, 0.0) / self._counts.get(name, 1)

    def _open(self, title: str, batches: Any, done: int) -> None:
        if self._shows_bar and dist.get_global_rank() == 0:
            shape = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]'
            total = None if batches is None else int(batches)
            self._bar = tqdm(
                desc=title,
                total=total,
                initial=done,
                bar_format=shape,
                ncols=WIDTH,
                leave=False,
                file=sys.stderr,
                position=0,  # else a bar that another run has not closed, in this process, would move it down
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print_waiting(self, state: State) -> None:
        if self._waiting:
            self._print(state, self._waiting)

    def _print(self, state: State, title: str) -> None:
        if self._start is not None and dist.get_global_rank() == 0:
            samples, clock = self._start
            seconds = (state.timestamp.total_wct - clock).total_seconds()
            facts = [title, f'loss {self._mean(TRAIN_LOSS):.3g}']
            if self._accuracy is not None:
                facts.append(f'{self._accuracy[0]} {100 * self._accuracy[1]:.2f} %')
            if seconds > 0:
                facts.append(f'{(int(state.timestamp.sample) - samples) / seconds:,.0f} img/s')
            if 'sba/augmented' in self._counts:
                facts.append(f'augmented {100 * self._mean("sba/augmented"):.0f} %')
            if 'sba/kl' in self._counts:
                facts.append(f'KL {self._mean("sba/kl"):.3g}')
            print(' '.join(facts), file=sys.stderr, flush=True)
        self._begin(None)


def facts(recipe: Recipe, state: State, threads: str) -> Table:
    """Return a table without lines that describes the training.

    Args:
        recipe (Recipe): The recipe.
        state (State): Composer's, before training.
        threads (str): A remark about the threads of a CPU.

    Returns:
        Table: For a ``rich.console.Console`` to print.
    """
    network, rows = network_of(state.model), Table(box=None, show_header=False, pad_edge=False)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    train = DatasetConfig(**recipe.train_dataset)
    size, evaluated = image_size(train), ''
    if recipe.eval_dataset is not None:
        evaluated = f', {dataset_size(DatasetConfig(**recipe.eval_dataset)):,} to evaluate'
    rows.add_row('network', f'{recipe.model["name"]}: {parameters:,} parameters')
    images = f'{counted(dataset_size(train), "image")} to train{evaluated}'
    rows.add_row('data', f'{train.name}: {images}, {size}x{size} pixels, {dataset_classes(train)} classes')
    rows.add_row('device', f'{device(state)}{threads}, {state.precision.value}')
    rows.add_row('steps', _steps(recipe, state))
    for algorithm in state.algorithms:
        if describe := getattr(algorithm, 'describe', None):  # of SBA; importing it here would lengthen the chain
            rows.add_row('SBA', _folded(describe(network, (3, size, size)), WIDTH - len('network  ')))
    others = [name for name in recipe.algorithms if name != 'sba']
    if others:
        rows.add_row('also', ', '.join(others))
    return rows


def device(state: State) -> str:
    """Return the devices that train: ``'CPU'``, or the number and the name of the GPUs."""
    world = dist.get_world_size()
    if state.device.name == 'gpu':
        return f'{world} x {torch.cuda.get_device_name()}' if world > 1 else torch.cuda.get_device_name()
    name = state.device.name.upper()
    return f'{world} processes, {name}' if world > 1 else name


def operations_of_step(network: nn.Module, shape: Sequence[int], rows: int) -> float | None:
    """Return the floating-point operations of a plain training step, None if they cannot be counted."""
    operations, _ = measure(network, (), shape)
    return None if operations is None else rows * operations


def _steps(recipe: Recipe, state: State) -> str:
    duration, epoch, batch = state.max_duration, state.dataloader_len, recipe.global_train_batch_size
    if duration is None or epoch is None or duration.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
        return f'{duration}, {counted(batch, "image")} in a batch'
    if duration.unit == TimeUnit.BATCH:
        return f'{duration.value:,} with {counted(batch, "image")}'
    epochs, batches = counted(duration.value, 'epoch'), counted(int(epoch), 'batch')
    return f'{duration.value * int(epoch):,}: {epochs} of {batches} of {counted(batch, "image")}'


def _title(state: State, begins: bool = False) -> str:
    """Return the epoch that begins, or else the one that has ended or is under way, and the number of epochs."""
    time, duration = state.timestamp, state.max_duration
    epoch = int(time.epoch) + (begins or int(time.batch_in_epoch) > 0)
    of_all = f'/{duration.value}' if duration is not None and duration.unit == TimeUnit.EPOCH else ''
    return f'epoch {epoch}{of_all}'


def _folded(line: str, width: int) -> str:
    """Fold SBA's line before p and, if necessary, after commas and semicolons and before 'or'."""
    unbroken = '\N{NO-BREAK SPACE}'
    folded = [
        textwrap.fill(
            re.sub(r'(?<![,;]) (?!or )| (?=\d+ dropout)', unbroken, part),
            width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for part in line.replace(', p = ', ',\np = ').splitlines()
    ]
    return '\n'.join(folded).replace(unbroken, ' ')
