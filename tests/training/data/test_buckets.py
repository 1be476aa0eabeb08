"""The order of samples in buckets: batches of one bucket each, every sample at most once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import Batches, BucketOrder, Laid, Slot, substitute_alike
from training.data.permutation import RULE
from training.errors import UserError

LAYOUTS = [(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2), (1, 1, 4)]


def laid(counts: list[list[int]]) -> tuple[tuple[range, ...], ...]:
    """Buckets of shards of so many samples: the first shard of each, then the second of each, so that those of one
    bucket do not lie side by side."""
    buckets: list[list[range]] = [[] for _ in counts]
    start = 0
    for turn in range(max(map(len, counts))):
        for bucket, sizes in zip(buckets, counts, strict=True):
            if turn < len(sizes):
                bucket.append(range(start, start + sizes[turn]))
                start += sizes[turn]
    return tuple(map(tuple, buckets))


def stream(order: BucketOrder, layout: tuple[int, int, int], first: int, steps: int) -> list[list[Slot]]:
    processes, micro, accumulation = layout
    shares = [
        list(Batches(order, micro, accumulation, rank, processes, first, first + steps)) for rank in range(processes)
    ]
    parts = [slice(step * accumulation, (step + 1) * accumulation) for step in range(steps)]
    return [sorted((s for share in shares for m in share[part] for s in m), key=lambda s: s.slot) for part in parts]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5),
    seed=st.integers(0, 2**63 - 1),
    layout=st.sampled_from(LAYOUTS),
)
def test_every_batch_is_of_one_bucket_and_every_sample_comes_once(
    counts: list[list[int]], seed: int, layout: tuple[int, int, int]
) -> None:
    buckets = laid([*counts, [3, 6]])  # at least a batch of one
    order, batch = BucketOrder(buckets, 4, seed), 4
    home = {place: number for number, ranges in enumerate(buckets) for part in ranges for place in part}
    batches = stream(order, layout, 0, 2 * order.batches)
    assert batches == stream(order, (1, batch, 1), 0, 2 * order.batches)
    assert [s.slot for one in batches for s in one] == list(range(2 * order.batches * batch))
    assert all(len({home[s.index] for s in one}) == 1 for one in batches)
    for epoch in range(2):
        seen = [s for one in batches[epoch * order.batches : (epoch + 1) * order.batches] for s in one]
        assert len({s.index for s in seen}) == len(seen) and {s.epoch for s in seen} == {epoch}
        for number, ranges in enumerate(buckets):  # all of a bucket, but for what fills no batch
            own = sum(map(len, ranges))
            assert sum(home[s.index] == number for s in seen) == own - own % batch
    # From any step on, without what came before: what a resumed run reads.
    assert stream(order, layout, 3, 5) == stream(order, (1, batch, 1), 0, 8)[3:]


def test_batches_and_samples_are_mixed_anew_in_each_epoch_and_by_the_seed() -> None:
    buckets = laid([[40], [40], [43]])
    runs = [stream(BucketOrder(buckets, 4, seed), (1, 4, 1), 0, 60) for seed in (0, 1)]

    def of(batches: list[list[Slot]]) -> list[int]:
        return [sum(one[0].index >= ranges[0].start for ranges in buckets) for one in batches]

    orders = [of(runs[0][:30]), of(runs[0][30:]), of(runs[1][:30])]
    assert len({tuple(order) for order in orders}) == 3 and all(sorted(o) == sorted(orders[0]) for o in orders)
    assert all(order != sorted(order) for order in orders)
    left = [set(buckets[2][0]) - {s.index for one in runs[0][e : e + 30] for s in one} for e in (0, 30)]
    assert [len(some) for some in left] == [3, 3] and left[0] != left[1]


def test_after_a_change_of_the_batch_it_goes_on_from_its_place() -> None:
    order = BucketOrder(laid([[20], [30]]), 4, 5, base=(7, 40))
    assert order.place(7) == 40 and [s.slot for s in order.at(8, 1, 2)] == [45, 46]
    plain = BucketOrder(laid([[20], [30]]), 4, 5)
    assert order.at(7, 0, 4) == plain.at(10, 0, 4)


def test_nothing_of_the_samples_is_held() -> None:
    order = BucketOrder(laid([[10_000] * 50_000, [10_000] * 50_000]), 256, 0)
    indices = [s.index for s in order.at(3_000_000, 0, 256)]
    assert len(set(indices)) == 256 and max(indices) - min(indices) > 10**8


def test_who_stands_in_is_of_the_same_bucket() -> None:
    buckets = laid([[5, 5], [2]])
    drawn = [substitute_alike(Slot(0, 0, slot), attempt, 3, buckets[0]) for slot in range(40) for attempt in range(2)]
    assert {slot.index for slot in drawn} == {place for part in buckets[0] for place in part}
    assert [slot.slot for slot in drawn] == [slot for slot in range(40) for _ in range(2)]
    assert Laid(buckets[0])(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]


def test_what_fills_no_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"no bucket has as many samples as one global batch \(8\): the largest has 7"):
        BucketOrder(laid([[7], [5]]), 8, 0)
    with pytest.raises(UserError, match="update it"):
        BucketOrder(laid([[8]]), 8, 0, rule=RULE + 1)
