"""The stream of draws and its seeds: the same for ever, whoever asks."""

import pickle

import numpy as np
import pytest

from zsplg_ray.student.draws import (
    Stream,
    chunks,
    derive,
    image_seed,
    permutation,
    step_draws,
    uniform,
)


def test_seeds_are_the_same_for_ever():
    """A change here changes every run that is resumed: it must not happen unnoticed."""
    assert image_seed(0, "labelled", 0, 0) == 8931456985202081752
    assert image_seed(7, "unlabelled", 3, 1_000_000) == 3278543917353618811
    assert permutation(1, "labelled", 2, 10).tolist() == [9, 0, 8, 4, 5, 2, 1, 6, 3, 7]
    assert uniform(np.array([5]), 3)[0].tolist() == [
        0.386768045983934,
        0.7523070158382239,
        0.2327091656774618,
    ]


def test_uniform_numbers_are_those_of_the_reference_implementation():
    # The first outputs of splitmix64.c with the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [(bits >> 11) / 2**53 for bits in published]
    assert uniform(np.array([1234567]), 3)[0].tolist() == expected


def test_parts_of_a_seed_all_matter():
    seeds = [
        derive(0),
        derive(1),
        *(derive(0, part) for part in (0, 1, "a", "b", -1)),
        *(derive(0, *parts) for parts in ((0, 0), (0, 1), (1, 0), ("a", "b"), ("b", "a"))),
    ]
    assert len({int(seed) for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_arrays_of_seeds_equal_single_ones():
    many = derive(3, "labelled", np.array([[0], [1]]), np.arange(5))
    assert many.shape == (2, 5)
    assert many[1, 4] == image_seed(3, "labelled", 1, 4)


def test_uniform_numbers_are_uniform_and_independent():
    draws_BN = uniform(derive(0, np.arange(200)), 500)
    assert draws_BN.min() >= 0 and draws_BN.max() < 1
    counts, _ = np.histogram(draws_BN, bins=20, range=(0, 1))
    expected = draws_BN.size / 20
    assert (np.abs(counts - expected) < 5 * expected**0.5).all()
    along, across = (
        np.corrcoef(d)[np.triu_indices(50, 1)] for d in (draws_BN[:50], draws_BN.T[:50])
    )
    assert np.abs(along).max() < 0.25 and np.abs(across).max() < 0.4
    assert abs(along.mean()) < 0.01 and abs(across.mean()) < 0.01


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_every_pass_holds_every_image_once(n):
    stream = Stream(0, "labelled", n)
    for number in range(3):
        drawn = [stream.at(draw) for draw in range(number * n, (number + 1) * n)]
        assert sorted(image for image, _ in drawn) == list(range(n))
        assert {its_pass for _, its_pass in drawn} == {number}


def test_orders_differ_by_seed_kind_and_pass():
    orders = [
        permutation(seed, kind, number, 50).tolist()
        for seed in (0, 1)
        for kind in ("labelled", "unlabelled")
        for number in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_a_stream_can_be_asked_in_any_order_and_travels_small():
    stream = Stream(0, "unlabelled", 1000)
    straight = [stream.at(draw) for draw in range(5000)]
    again = pickle.loads(pickle.dumps(stream))
    assert [again.at(draw) for draw in reversed(range(5000))] == straight[::-1]
    assert len(pickle.dumps(stream)) < 200


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_shares_of_all_workers_make_up_the_step(batch, world, accumulate):
    parts = [
        part for rank in range(world) for part in step_draws(4, batch, rank, world, accumulate)
    ]
    assert len(parts) == world * accumulate
    assert [draw for part in parts for draw in part] == list(range(4 * batch, 5 * batch))


def test_steps_follow_one_another_without_a_gap():
    draws = [d for step in range(10) for part in step_draws(step, 8, 0, 1, 1) for d in part]
    assert draws == list(range(80))


def test_parts_differ_by_at_most_one():
    lengths = [len(part) for part in chunks(range(100, 117), 5)]
    assert sum(lengths) == 17 and max(lengths) - min(lengths) == 1
