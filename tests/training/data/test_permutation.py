"""The permutation of an epoch, place by place: each sample once, and no arrangement of them likelier than another."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.permutation import FOLDER, ROUNDS, Shuffle


def whole(n: int, *key: int) -> np.ndarray:
    """All that a shuffle of n things holds: of seed, epoch, use, number."""
    return Shuffle(n, *key)(np.arange(n))


def z_of(counts: np.ndarray) -> float:
    """How many standard deviations the chi-square of `counts`, equally likely, lies above its mean."""
    expected, free = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40), number=st.integers(0, 9))
def test_each_once_wherever_one_asks(n: int, seed: int, epoch: int, number: int) -> None:
    order = whole(n, seed, epoch, FOLDER, number)
    assert sorted(order.tolist()) == list(range(n))
    some = np.arange(n)[:: max(1, n // 7)]
    assert np.array_equal(Shuffle(n, seed, epoch, FOLDER, number)(some), order[some])


def test_a_billion_are_held_in_two_megabytes() -> None:
    shuffle = Shuffle(10**9, 3, 1, FOLDER)
    assert sum(table.nbytes for pair in shuffle.rounds for table in pair) < 1.6e6
    found = shuffle(np.arange(10**9 - 100_000, 10**9))
    assert len(set(found.tolist())) == 100_000 and found.min() >= 0 and found.max() < 10**9
    assert found.max() - found.min() > 0.999e9  # all over it


def test_what_is_drawn_stays_as_it_is() -> None:
    """Runs begun with it go on by it."""
    assert whole(10, 7, 0, FOLDER).tolist() == [4, 7, 5, 6, 9, 8, 1, 0, 3, 2]
    assert Shuffle(10**9, 7, 0, FOLDER)(np.array([0, 1, 10**9 - 1])).tolist() == [135066994, 344913797, 827717530]


def test_every_part_of_the_key_counts() -> None:
    keys = list(itertools.product((0, 1), (0, 1, 2), (2, 3), (0, 1)))
    orders = [whole(200, *key) for key in keys]
    agree = [int((a == b).sum()) for a, b in itertools.combinations(orders, 2)]  # Poisson(1)
    assert max(agree) < 8 and abs(np.mean(agree) - 1) < 4 / math.sqrt(len(agree))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_permutations_of_few_are_equally_likely(n: int) -> None:
    found = Counter(tuple(whole(n, seed, epoch, FOLDER).tolist()) for seed in range(25) for epoch in range(100))
    assert len(found) == math.factorial(n) and abs(z_of(np.array(list(found.values())))) < 3.5


def test_odd_permutations_come_as_often_as_even_ones() -> None:
    """Of nine things, too, which make a square of odd sides."""
    orders = [whole(9, seed, 0, FOLDER) for seed in range(1000)]
    odd = sum(sum(a > b for a, b in itertools.combinations(order.tolist(), 2)) % 2 for order in orders)
    assert abs(odd - 500) < 3 * math.sqrt(250)


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_the_rounds_are_enough_for_few(n: int) -> None:
    """Of ideal rounds: the exact probability of each permutation, within 1 % of 1 / n!; with 16 rounds, 6 %."""
    shape = Shuffle(n, 0, 0, FOLDER)
    a, b, cells = shape.a, shape.b, range(shape.a * shape.b)
    left = [[(x // b + f[x % b]) % a * b + x % b for x in cells] for f in itertools.product(range(a), repeat=b)]
    right = [[x // b * b + (x % b + g[x // b]) % b for x in cells] for g in itertools.product(range(b), repeat=a)]
    odds = {tuple(cells): 1.0}
    for moves in [left, right] * (ROUNDS[0] // 2):
        after: Counter[tuple[int, ...]] = Counter()
        for order, share in odds.items():
            for move in moves:
                after[tuple(move[x] for x in order)] += share / len(moves)
        odds = dict(after)
    walked: Counter[tuple[int, ...]] = Counter()
    for order, share in odds.items():
        ends = list(order[:n])
        while max(ends) >= n:
            ends = [order[x] if x >= n else x for x in ends]
        walked[tuple(ends)] += share
    assert len(walked) == math.factorial(n)
    assert max(abs(share * math.factorial(n) - 1) for share in walked.values()) < 0.01


def test_a_thousand_are_in_no_order() -> None:
    """Of 400 keys: rank correlation of place and sample, of neighbours, neighbours that stay so, fixed points."""
    orders = np.array([whole(1000, seed, epoch, FOLDER) for seed in range(4) for epoch in range(100)])
    places = np.arange(1000)
    rank = np.array([np.corrcoef(places, order)[0, 1] for order in orders]) * math.sqrt(999)
    beside = np.array([np.corrcoef(order[1:], order[:-1])[0, 1] for order in orders]) * math.sqrt(999)
    for normal in (rank, beside):
        assert abs(normal.mean()) < 0.2 and 0.75 < normal.var() < 1.25
    assert abs((np.abs(np.diff(orders)) == 1).sum(1).mean() - 2) < 0.28  # Poisson(2)
    assert abs((orders == places).sum(1).mean() - 1) < 0.2  # Poisson(1)


def test_a_sample_lands_anywhere_and_two_anywhere_beside() -> None:
    """Of 2,000 keys, in 50 parts; neighbours, the two ends and places a row of the network apart, in 10x10 parts."""
    shuffles = [Shuffle(1000, seed, epoch, FOLDER) for seed in range(20) for epoch in range(100)]
    width = shuffles[0].b
    found = np.array([shuffle(np.array([0, 1, 999, width, 500])) for shuffle in shuffles])
    for ends in found.T:
        assert abs(z_of(np.bincount(ends // 20, minlength=50))) < 3.5
    for other in (1, 2, 3):
        assert abs(z_of(np.bincount(found[:, 0] // 100 * 10 + found[:, other] // 100, minlength=100))) < 3.5
