"""The data order: every sample once an epoch, the same stream however the work is shared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import Batches, DataOrder, Slot, split_batch, substitute
from training.data.permutation import RULE
from training.errors import UserError


def stream(order: DataOrder, processes: int, micro: int, accumulation: int, steps: int) -> list[list[Slot]]:
    """The global batches that all processes together see, in the order of their slots."""
    shares = [list(Batches(order, micro, accumulation, rank, processes, 0, steps)) for rank in range(processes)]
    assert all(len(share) == steps * accumulation for share in shares)
    batches = []
    for step in range(steps):
        parts = slice(step * accumulation, (step + 1) * accumulation)
        batches.append(sorted((s for share in shares for m in share[parts] for s in m), key=lambda s: s.slot))
    return batches


@settings(max_examples=60, deadline=None)
@given(
    processes=st.integers(1, 4),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**63 - 1),
    rule=st.sampled_from([1, 2]),
)
def test_the_stream_is_one(processes: int, micro: int, accumulation: int, extra: int, seed: int, rule: int) -> None:
    batch = processes * micro * accumulation
    order = DataOrder(batch + extra, batch, seed, rule=rule)
    steps = 2 * order.samples // batch + 2
    batches = stream(order, processes, micro, accumulation, steps)
    assert batches == stream(order, 1, batch, 1, steps)
    flat = [slot for one in batches for slot in one]
    assert [s.slot for s in flat] == list(range(steps * batch))
    for epoch in range(2):  # two whole epochs, joined end to end
        seen = flat[epoch * order.samples : (epoch + 1) * order.samples]
        assert sorted(s.index for s in seen) == list(range(order.samples))
        assert {s.epoch for s in seen} == {epoch}


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**63 - 1),
    layout=st.sampled_from([(1, 4, 1), (2, 2, 1), (4, 1, 1), (2, 1, 2)]),
    rule=st.sampled_from([1, 2]),
)
def test_shards_in_windows(shards: list[int], window: int, seed: int, layout: tuple[int, int, int], rule: int) -> None:
    shards = [*shards, 4]  # at least a batch
    order = DataOrder(sum(shards), 4, seed, shards=tuple(shards), window=window, rule=rule)
    steps = 2 * order.samples // 4 + 2
    batches = stream(order, *layout, steps)
    assert batches == stream(order, 1, 4, 1, steps)
    flat = [slot for one in batches for slot in one]
    home = [number for number, size in enumerate(shards) for _ in range(size)]
    for epoch in range(2):
        seen = flat[epoch * order.samples : (epoch + 1) * order.samples]
        assert sorted(s.index for s in seen) == list(range(order.samples))
        visited = list(dict.fromkeys(home[s.index] for s in seen))  # in order of first sight
        for first in range(0, len(shards), window):  # the shards of a window are read out before any other
            group = visited[first : first + window]
            now = [s for s in seen if home[s.index] in group]
            assert [s.slot for s in now] == list(range(now[0].slot, now[0].slot + sum(shards[i] for i in group)))
            for s in now:
                ahead = order.ahead(s.slot)
                assert set(ahead[: len(group)]) == set(group) and len(ahead) <= 2 * window
            after = flat[now[-1].slot + 1 : now[-1].slot + 2]
            assert all(home[s.index] in order.ahead(now[0].slot)[len(group) :] for s in after)


@pytest.mark.parametrize("rule", [1, 2])
def test_windows_differ_by_seed_and_epoch(rule: int) -> None:
    orders = [DataOrder(90, 9, seed, shards=(9,) * 10, window=3, rule=rule) for seed in (0, 1)]
    epochs = [tuple(s.index for s in order.at(10 * epoch, 0, 90)) for order in orders for epoch in range(3)]
    assert len({epoch[:9] for epoch in epochs}) == 6
    within = [[s.index % 9 for s in orders[0].at(0, 27 * part, 27)] for part in range(3)]
    assert len(set(map(tuple, within))) == 3  # no two windows are mixed alike


SIZES = (3, 5, 2, 4, 6, 1, 7)
FIRST = {1: [0, 5, 7, 8, 4, 1, 9, 2, 8, 5], 2: [8, 1, 0, 3, 2, 6, 5, 4, 3, 9]}
SECOND = {
    1: [24, 25, 26, 3, 4, 7, 5, 6, 12, 11, 13, 0, 8, 2, 1, 9],
    2: [10, 13, 19, 15, 14, 16, 18, 17, 6, 3, 5, 4, 9, 7, 12, 11],
}
INSTEAD = {1: [1, 15, 1, 0, 18, 12, 18, 10], 2: [9, 22, 9, 8, 25, 1, 26, 27]}


@pytest.mark.parametrize("rule", [1, 2])
def test_an_order_is_what_it_was(rule: int) -> None:
    """Runs go on by the rule they began with: these places are of its first version, with rule 1 of the first at all.
    """
    assert [s.index for s in DataOrder(10, 5, 7, rule=rule).at(1, 0, 10)] == FIRST[rule]
    order = DataOrder(28, 4, 11, (0, 0), SIZES, 3, rule)
    assert [s.index for s in order.at(0, 20, 16)] == SECOND[rule]
    stand_ins = [substitute(slot, 0, 28, 11, SIZES, 3, rule) for slot in order.at(0, 0, 8)]
    assert [slot.index for slot in stand_ins] == INSTEAD[rule]


def test_a_rule_of_later_programs_is_refused() -> None:
    with pytest.raises(UserError, match="an order of rule 3; this program understands 1 to 2") as caught:
        DataOrder(10, 5, 7, rule=RULE + 1)
    assert caught.value.code == 4 and caught.value.hint == "update it"


def test_a_billion_samples_in_windows() -> None:
    """Places far apart, one after the other: of the samples nothing is held."""
    order = DataOrder(10**9, 256, 0, shards=(10_000,) * 100_000, window=16)
    for step in (0, 1, 3_906_249):
        slots = order.at(step, 0, 256)
        at_hand = order.ahead(slots[0].slot) + order.ahead(slots[-1].slot)
        assert {slot.index // 10_000 for slot in slots} <= set(at_hand) and len({slot.index for slot in slots}) == 256


def test_a_resumed_stream_is_the_rest() -> None:
    order = DataOrder(13, 4, 5)
    whole = list(Batches(order, 2, 2, 0, 1, 0, 9))
    for start in range(10):
        assert list(Batches(order, 2, 2, 0, 1, start, 9)) == whole[2 * start :]


def test_seeds_and_epochs_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [s.index for s in DataOrder(100, 10, seed).at(10 * number, 0, 100)]

    orders = [epoch(seed, number) for seed in (0, 1) for number in range(4)]
    for i, ours in enumerate(orders):
        for theirs in orders[:i]:  # two unrelated permutations agree in one place on average
            assert sum(a == b for a, b in zip(ours, theirs, strict=True)) < 8


def test_too_few_samples() -> None:
    with pytest.raises(UserError, match=r"7 samples, fewer than one global batch \(8\)") as caught:
        DataOrder(7, 8, 0)
    assert caught.value.code == 3 and caught.value.hint.startswith("--batch-size 7 at the most")


@settings(deadline=None)
@given(
    batch=st.integers(1, 200),
    micro=st.integers(0, 9),
    accumulation=st.none() | st.integers(1, 5),
    processes=st.integers(1, 5),
    given_=st.booleans(),
)
def test_split(batch: int, micro: int, accumulation: int | None, processes: int, given_: bool) -> None:
    try:
        whole, each, passes = split_batch(batch, micro, accumulation, processes, explicit_batch=given_)
    except UserError as problem:
        near = [int(n) for n in problem.hint.removeprefix("nearest --batch-size: ").split(" or ")]
        for size in near:  # the advice works
            assert split_batch(size, micro, accumulation, processes)[0] == size
        return
    assert whole == each * passes * processes and each >= 1
    assert whole == batch or (not given_ and micro)
    assert accumulation in (None, passes) and micro in (0, each)


def test_split_refuses_no_accumulation() -> None:
    with pytest.raises(UserError, match="must be >= 1"):
        split_batch(8, 0, 0, 1)


@pytest.mark.parametrize("rule", [1, 2])
def test_a_substitute_lies_in_a_shard_of_the_same_window(rule: int) -> None:
    """At an address any other shard would have to be fetched for it; a folder's are drawn as ever."""
    sizes, window, seed = SIZES, 3, 11
    order = DataOrder(sum(sizes), 4, seed, (0, 0), sizes, window, rule)
    shard_of = [number for number, size in enumerate(sizes) for _ in range(size)]
    for slot in order.at(0, 0, 28) + order.at(7, 0, 28):
        now = order.ahead(slot.slot)
        drawn = [substitute(slot, attempt, 28, seed, sizes, window, rule).index for attempt in range(60)]
        assert all(shard_of[index] in now[:window] for index in drawn) and len(set(drawn)) > 4
        assert drawn == [substitute(slot, attempt, 28, seed, sizes, window, rule).index for attempt in range(60)]
    assert [substitute(Slot(7, 0, 7), attempt, 150, 3).index for attempt in range(3)] == [79, 27, 133]
