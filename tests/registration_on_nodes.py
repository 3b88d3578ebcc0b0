"""One rank of a run on two nodes, which registers its dataset: its run, its node and a folder for the runs' stores.

Run by tests/test_sharing.py
"""

import os
import platform
import sys
import time
from datetime import timedelta
from pathlib import Path

run, node, folder = sys.argv[1:]
os.environ |= {'RANK': node, 'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': node}
platform.node = lambda: f'node{node}'

import torch.distributed as dist  # noqa: E402  # Composer reads the rank when it is imported

from composer_sba import sharing  # noqa: E402

store = dist.FileStore(f'{folder}/{run}', 2)
dist.init_process_group('gloo', store=store, rank=int(node), world_size=2, timeout=timedelta(seconds=30))
dist.barrier()
Path(folder, f'{run}{node}.here').touch()
while len(list(Path(folder).glob('*.here'))) < 4:
    time.sleep(0.01)
if (run == 'a') != (node == '0'):
    time.sleep(1)
sharing._SHARED_MEMORY = Path(folder, node)
with sharing.registration():
    pass
print('registered')
