"""One rank of a run on two nodes, which registers a dataset: its run, its node, its shared memory and a common folder.

Run by tests/test_shared_memory.py
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from composer_sba.data import shared_memory


def main(run: str, node: str, memory: str, folder: str, ranks: str) -> None:
    os.environ |= {'RANK': node, 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': node}
    shared_memory._SHARED_MEMORY = Path(memory)
    store = dist.FileStore(f'{folder}/{run}', 2)
    dist.init_process_group('gloo', store=store, rank=int(node), world_size=2, timeout=timedelta(seconds=30))
    dist.barrier()
    Path(folder, f'{run}{node}.here').touch()
    while len(list(Path(folder).glob('*.here'))) < int(ranks):
        time.sleep(0.01)
    if (run == 'a') != (node == '0'):
        time.sleep(1)  # the two runs arrive at the nodes in opposite orders
    with shared_memory.registration():
        pass


if __name__ == '__main__':
    main(*sys.argv[1:])
