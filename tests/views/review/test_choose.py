"""The greedy choice: weights, near-duplicates, coverage, what is corrected already."""

import numpy as np
import pytest

from zsplg_ray.config import ReviewWeights
from zsplg_ray.views.review.choose import choose
from zsplg_ray.views.review.signs import PARTS, Signs

NOTHING = dict.fromkeys((*PARTS, "diversity", "coverage"), 0.0)


def signs(parts=(), holds=None, feature=None, n=4):
    value_NP = np.zeros((n, len(PARTS)))
    for name, values in dict(parts).items():
        value_NP[:, PARTS.index(name)] = values
    holds = np.zeros((n, 3), bool) if holds is None else np.array(holds, bool)
    feature = np.zeros((n, 2), np.float32) if feature is None else np.array(feature, np.float32)
    return Signs(list(range(n)), value_NP, holds, feature, PARTS)


def picked(given, budget, known=(), **weights):
    weighed = ReviewWeights(**{**NOTHING, **weights})
    return [pick.position for pick in choose(given, budget, weighed, known)]


def test_weights_decide_and_equal_ones_come_in_order():
    given = signs({"confidence": [0.1, 0.4, 0.2, 0.4], "rare": [0.9, 0.0, 0.3, 0.0]})
    assert picked(given, 3, confidence=1.0) == [1, 3, 2]
    assert picked(given, 2, rare=1.0) == [0, 2]
    assert picked(given, 99, rare=1.0) == [0, 2, 1, 3], "a budget larger than the run: all"
    # Each part counts by its share of the largest: .2 / .4 + .3 / .9 < .1 / .4 + 1
    assert picked(given, 1, confidence=1.0, rare=1.0) == [0]


def test_near_duplicates_wait():
    given = signs(
        {"confidence": [1.0, 0.98, 0.7, 0.1]}, feature=[[1, 0], [1, 0.01], [-1, 0], [0, 1]]
    )
    assert picked(given, 2, confidence=1.0) == [0, 1]
    assert picked(given, 3, confidence=1.0, diversity=0.5) == [0, 2, 1]


def test_classes_that_are_seen_already_count_less():
    holds = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]]
    assert picked(signs(holds=holds), 4, coverage=1.0) == [0, 2, 1, 3]


def test_corrected_images_are_not_picked_and_push_away_what_is_like_them():
    holds = [[1, 1, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0]]
    given = signs(holds=holds, feature=[[1, 0], [1, 0], [-1, 0], [0, 1]])
    assert picked(given, 9, known={0}, coverage=1.0) == [2, 1, 3]
    assert picked(given, 2, known={0}, diversity=1.0) == [2, 3]


def test_a_pick_tells_what_each_part_was_and_added():
    given = signs({"confidence": [0.1, 0.4, 0.2, 0.3]}, holds=[[1, 1, 1]] * 4)
    first, *_ = choose(given, 2, ReviewWeights(confidence=2.0, coverage=0.5))
    assert first.position == 1 and first.values["confidence"] == 0.4
    assert first.weighed["confidence"] == 2.0 and first.weighed["coverage"] == 0.5
    assert first.total == pytest.approx(2.0 + 0.5 + 0.5)
    assert first.why.startswith("confidence 2.00, ")


def test_something_has_to_count():
    with pytest.raises(ValueError, match="weights must be above 0 for some part"):
        ReviewWeights(**NOTHING)
