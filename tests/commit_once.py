"""On import: Composer reads its commit once in a process, not for each Trainer and each checkpoint.

It lists the files of its installation for it, which takes a quarter of the time of a small run.
"""

import functools

from composer.utils import collect_env

collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)
