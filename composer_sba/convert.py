"""``python -m composer_sba.convert``: turn a data set of images into MDS shards that recipes read."""

import argparse
import sys
import time
from collections.abc import Sequence

from composer_sba.data.conversion import convert as convert
from composer_sba.data.readers import READERS
from composer_sba.errors import DatasetError


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.convert') -> int:
    """Run the command line.

    Args:
        argv (Sequence[str], optional): Arguments; ``None`` takes those of the process. Default: ``None``.
        prog (str, optional): What the help calls the program.

    Returns:
        int: Exit code: 0, or 2 after a mistake in what was given, told in one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('dataset', choices=sorted(READERS), help='what the source is')
    parser.add_argument(
        '--source',
        help='folder with train/<class>/ and val/<class>/ or test/<class>/ (ImageNet as '
        'well), or an archive of one; for CIFAR also the original cifar-10-python.tar.gz, '
        'cifar-100-python.tar.gz or their unpacked folders; none for digits',
    )
    parser.add_argument('--out', help='folder to make (default: data/<dataset>)')
    parser.add_argument('--overwrite', action='store_true', help='replace a dataset that is there')
    args = parser.parse_args(argv)
    out = args.out or f'data/{args.dataset}'
    start = time.perf_counter()
    try:
        counts = convert(args.dataset, args.source, out, overwrite=args.overwrite)
    except DatasetError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    images = ' and '.join(f'{count:,} {split}' for split, count in counts.items())
    print(f'{images} images in {seconds:.1f} s ({sum(counts.values()) / seconds:,.0f} images/s): {out}')
    print(
        f'In a recipe:\n  train_dataset: {{name: {args.dataset}, local: {out}, split: train}}\n'
        f'  eval_dataset: {{name: {args.dataset}, local: {out}, split: val}}'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
