"""Arguments of ``train`` for tests of whole runs: the recipe of the digits, for one batch."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
SHORT = ['max_duration=1ba', 'eval_subset_num_batches=1', 'progress_bar=false', 'train_dataset.in_memory=true']


def options(folder: Path, *more: str) -> list[str]:
    return ['-f', RECIPE, *SHORT, f'train_dataset.local={folder}', f'eval_dataset.local={folder}', *more]
