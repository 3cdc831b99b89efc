import numpy as np
import pytest
import torch

from sdgm_edge.batches import Lanes
from sdgm_edge.runtime import ConfigError, CorpusError


def lanes(count=1000, **changes):
    base = {"tokens": np.arange(count, dtype=np.uint16), "batch_size": 4, "window": 10, "seed": 3}
    return Lanes(**{**base, **changes})


def test_targets_are_the_next_tokens_and_lanes_go_on_where_they_were():
    source = lanes()
    last = None
    for index in range(source.steps_per_epoch):
        ids, targets = source.batch(0, index)
        assert torch.equal(targets[:, :-1], ids[:, 1:])
        assert torch.equal(targets, (ids + 1) % 1000)
        if last is not None:
            assert torch.equal(ids[:, 0], last)
        last = targets[:, -1]


def test_an_epoch_sees_each_token_at_most_once_and_almost_all():
    source = lanes(1007)
    seen = torch.cat([source.batch(2, i)[0].flatten() for i in range(source.steps_per_epoch)]).tolist()
    assert len(seen) == len(set(seen)) == 4 * 25 * 10


def test_epochs_are_cut_at_other_places_and_the_same_epoch_at_the_same():
    first, again, other = lanes().batch(0, 0), lanes().batch(0, 0), lanes().batch(1, 0)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


def test_processes_share_the_lanes_of_one():
    whole = lanes().batch(1, 5)[0]
    parts = [lanes(rank=rank, world=2).batch(1, 5)[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_so_many_windows_are_fresh_and_the_same_ones_for_all_processes():
    source = lanes()
    fresh = torch.cat([source.fresh(epoch, index, 0.2) for epoch in range(20) for index in range(25)])
    assert 0.15 < fresh.float().mean() < 0.25
    whole = source.fresh(1, 5, 0.5)
    assert whole.shape == (4, 1)
    assert torch.equal(torch.cat([lanes(rank=rank, world=2).fresh(1, 5, 0.5) for rank in range(2)]), whole)
    assert not source.fresh(0, 0, 0.0).any()


def test_too_little_text_and_uneven_processes_are_told():
    with pytest.raises(CorpusError, match="has 40 tokens, but 4 windows of 10 need 41: give more text"):
        lanes(40)
    with pytest.raises(ConfigError, match="batch_size: expected a multiple of the 3 processes, got 4"):
        lanes(world=3)
