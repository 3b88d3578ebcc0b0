"""Convert images to MDS shards, which recipes read: ``python -m composer_sba.convert``."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from composer_sba.arguments import convert_parser as _parser

if __name__ == '__main__':  # --help and mistakes do not wait for the imports below
    _parser().parse_args()

from tqdm import tqdm

from composer_sba.data.conversion import convert as convert
from composer_sba.data.mds_index import INDEX, RECORD
from composer_sba.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.convert') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): Arguments; ``None`` takes those of the process. Default: ``None``.
        prog (str, optional): Name of the program in its help.

    Returns:
        int: Exit code: 0, or 2 after a mistake of the user, which one line on stderr describes.
    """
    args = _parser(prog).parse_args(argv)
    out = os.path.expanduser(args.out or f'data/{args.dataset}')
    start = time.perf_counter()
    try:
        counts = convert(
            args.dataset,
            args.source,
            out,
            max_side=args.max_side,
            quality=args.quality,
            overwrite=args.overwrite,
        )
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    total = sum(counts.values())
    few = ' and '.join(f'{count:,} {split}' for split, count in counts.items())
    print(f'{few if len(counts) == 2 else total} images in {seconds:.1f} s ({total / seconds:,.0f} images/s): {out}')
    if args.dataset == 'imagefolder':
        print(stored(out))
    if args.dataset == 'cifar10c':
        print(f'To evaluate: composer-sba evaluate --checkpoint FILE --published {out}')
        return 0
    print(
        f'In a recipe:\n  train_dataset: {{name: {args.dataset}, local: {out}, split: train}}\n'
        f'  eval_dataset: {{name: {args.dataset}, local: {out}, split: val}}'
    )
    return 0


def stored(out: str) -> str:
    """Return in one line what a conversion did with the files of an image folder, from its record in ``out``."""
    record = json.loads(Path(out, 'train', INDEX).read_text())[RECORD]
    before, after = (f'{tqdm.format_sizeof(record[key])}B' for key in ('source_bytes', 'stored_bytes'))
    if record['max_side'] is None:
        return f'All files unchanged, {after} (--max-side PIXELS would store larger images resized).'
    return (
        f'{record["resized"]:,} images beyond {record["max_side"]} pixels resized and stored as JPEG of quality '
        f'{record["quality"]}, the other files unchanged: {before} before, {after} after.'
    )


if __name__ == '__main__':
    sys.exit(main())
