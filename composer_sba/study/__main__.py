"""``python -m composer_sba.study STUDY``: run the paper's experiments and comparisons, and report the results.

Exit codes: 0 success, 1 some runs failed, 2 an error in the arguments, the recipes or the files, 130 interrupted.
"""

import sys
from collections.abc import Sequence

from composer_sba.study.arguments import study_parser


def main(argv: Sequence[str] | None = None, prog: str = 'python -m composer_sba.study') -> int:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The arguments after the program's name. Default: ``None``, the arguments of the
            process.
        prog (str, optional): The name of the program in the help.

    Returns:
        int: The exit code.
    """
    arguments = study_parser(prog).parse_args(argv)  # ends the process at --help and at mistakes

    from composer_sba.study.command import run  # imports PyTorch and Composer, which takes seconds

    return run(arguments)


if __name__ == '__main__':
    sys.exit(main())
