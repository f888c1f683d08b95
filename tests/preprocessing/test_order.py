import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.order import shuffled_rows
from preprocessing.transforms import clip_rng

shard_sizes = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def shards_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@given(sizes=shard_sizes, window=st.integers(1, 15), seed=st.integers(0, 100), epoch=st.integers(0, 100))
def test_an_order_has_each_row_once_and_few_shards_at_a_time(sizes, window, seed, epoch):
    shards = shards_of(sizes)
    rows = shuffled_rows(shards, seed, epoch, window)
    assert sorted(rows.tolist()) == list(range(len(shards)))
    assert np.array_equal(shuffled_rows(shards, seed, epoch, window), rows)
    order = shards[rows]
    for place in range(len(rows)):
        met_and_to_be_met = set(order[: place + 1].tolist()) & set(order[place:].tolist())
        assert len(met_and_to_be_met) <= window


@given(sizes=shard_sizes, seed=st.integers(0, 100))
def test_a_window_over_all_shards_makes_the_order_fully_random(sizes, seed):
    shards = shards_of(sizes)
    expected = clip_rng(seed, 3, "order of clips").permutation(len(shards))
    assert np.array_equal(shuffled_rows(shards, seed, 3, len(sizes)), expected)
    assert np.array_equal(shuffled_rows(shards, seed, 3, 1000), expected)


def test_neighbours_come_from_all_shards_of_the_window():
    shards = shards_of([100] * 40)
    order = shards[shuffled_rows(shards, 0, 0, 8)]
    in_a_batch = [len(set(order[start : start + 64].tolist())) for start in range(1000, 3000, 64)]
    assert min(in_a_batch) >= 7
    assert np.mean(order[1:] == order[:-1]) < 0.2, "1 in 8 by chance"


def test_epochs_differ_in_the_order_of_shards_and_of_clips():
    shards = shards_of([50] * 20)
    first, second = (shuffled_rows(shards, 0, epoch, 4) for epoch in (0, 1))
    assert set(shards[first[:100]].tolist()) != set(shards[second[:100]].tolist())
    inside = [rows[shards[rows] == 3].tolist() for rows in (first, second)]
    assert inside[0] != inside[1]
