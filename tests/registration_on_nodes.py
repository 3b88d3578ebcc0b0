"""One rank of a run on two nodes, which registers its dataset: its run, its node and a folder that all share.

Run by tests/test_sharing.py
"""

import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from composer_sba.data import shared_memory as sharing


def main(run: str, node: str, folder: str) -> None:
    os.environ |= {'RANK': node, 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': node}
    platform.node = lambda: f'node{node}'
    sharing._SHARED_MEMORY = Path(folder, node)
    store = dist.FileStore(f'{folder}/{run}', 2)
    dist.init_process_group('gloo', store=store, rank=int(node), world_size=2, timeout=timedelta(seconds=30))
    dist.barrier()
    Path(folder, f'{run}{node}.here').touch()
    while len(list(Path(folder).glob('*.here'))) < 4:
        time.sleep(0.01)
    if (run == 'a') != (node == '0'):
        time.sleep(1)
    with sharing.registration():
        pass
    print('registered')


if __name__ == '__main__':
    main(*sys.argv[1:])
