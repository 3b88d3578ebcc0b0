"""The partition of an epoch over ranks: each sample once, from shards and in memory alike, on any number of ranks.

Run: pytest tests/test_partition.py
"""

import pytest

from composer_sba.data.in_memory import EachOnce
from composer_sba.data.partition import partition, shared_samples


class Samples:
    """The attributes of a MemoryDataset that a sampler uses."""

    def __init__(self, size):
        self.size, self.seed, self.epoch = size, 3, 0

    def __len__(self):
        return self.size


def batches_of_ranks(size, ranks, batch_size, drop_last=False, epoch=0):
    dealt = []
    for rank in range(ranks):
        sampler = EachOnce(Samples(size), batch_size, num_replicas=ranks, rank=rank, drop_last=drop_last)
        sampler.set_epoch(epoch)
        samples = list(sampler)
        assert len(samples) == len(sampler) and sampler.dataset.epoch == epoch
        dealt.append([samples[i : i + batch_size] for i in range(0, len(samples), batch_size)])
    return dealt


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('size', [1, 5, 16, 97])
@pytest.mark.parametrize('ranks', [1, 2, 3, 4])
def test_ranks_share_an_epoch_as_streaming_shares_it(ranks, size, drop_last):
    for batch_size in (1, 4):
        dealt = batches_of_ranks(size, ranks, batch_size, drop_last)
        positions = partition(size, 1, 1, ranks, 1, batch_size, drop_last=drop_last)[0, :, 0]
        sizes = [[len(batch) for batch in batches] for batches in dealt]
        assert sizes == (positions >= 0).sum(-1).tolist()
        assert len({len(batches) for batches in dealt}) == 1, f'ranks differ in batches: {sizes}'
        samples = [sample for batches in dealt for batch in batches for sample in batch]
        assert len(samples) == len(set(samples)) == shared_samples(size, ranks, batch_size, drop_last)
        assert set(samples) <= set(range(size))


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    whole = [set(batch) for batch in batches_of_ranks(97, 1, 12)[0][:8]]
    for ranks in (2, 3, 4):
        dealt = batches_of_ranks(97, ranks, 12 // ranks)
        assert [set().union(*batches) for batches in zip(*dealt, strict=True)] == whole, ranks


def test_each_epoch_leaves_out_different_samples():
    left_out = [set(range(97)).difference(*batches_of_ranks(97, 2, 4, drop_last=True, epoch=i)[0]) for i in range(2)]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize(
    ('samples', 'nodes', 'ranks', 'workers', 'batch_size'), [(97, 1, 3, 2, 4), (64, 2, 2, 1, 4), (61, 2, 4, 3, 2)]
)
def test_partition_resumes_on_other_nodes_in_the_same_order(samples, nodes, ranks, workers, batch_size):
    def batches(dealt):
        by_step = dealt.transpose(3, 2, 0, 1, 4).reshape(dealt.shape[3] * dealt.shape[2], -1)
        return [{int(i) for i in step if i >= 0} for step in by_step if (step >= 0).any()]

    steps = batches(partition(samples, nodes, nodes, ranks, workers, batch_size))
    whole = set().union(*steps)
    assert sum(map(len, steps)) == len(whole) > samples - nodes * ranks
    rest = partition(samples, nodes, 1, nodes * ranks, workers, batch_size, 2 * nodes * ranks * batch_size)
    assert batches(rest) == steps[2:]
