"""Groups: sizes, every image once, rare classes on either side, the same draw for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsplg_ray.cluster.tune.folds import draw_groups, split

HOLDS = st.lists(st.frozensets(st.integers(1, 6), max_size=4), min_size=2, max_size=40)


@given(HOLDS, st.data())
def test_groups_have_their_sizes(holds, data):
    folds = data.draw(st.integers(2, len(holds)))
    group_I = split(holds, folds, 0.3, data.draw(st.integers(0, 99)))
    sizes = np.bincount(group_I, minlength=folds)
    assert len(group_I) == len(holds) and len(sizes) == folds
    assert sizes.max() - sizes.min() <= 1


@given(HOLDS, st.floats(0.05, 0.9), st.integers(0, 99))
def test_one_fold_holds_out_a_share(holds, holdout, seed):
    group_I = split(holds, 1, holdout, seed)
    held_out = int((group_I == 1).sum())
    assert 1 <= held_out <= len(holds) - 1
    assert abs(held_out - holdout * len(holds)) <= 1
    assert set(group_I.tolist()) == {0, 1}


@pytest.mark.parametrize("seed", range(8))
def test_rare_classes_are_spread(seed):
    """Of 40 images class 9 is in two and class 8 in four: chance would often put them together."""
    holds = [frozenset({1}) for _ in range(34)]
    holds += [frozenset({1, 9})] * 2 + [frozenset({2, 8})] * 4
    group_I = split(holds, 2, 0.3, seed)
    assert sorted(group_I[34:36].tolist()) == [0, 1]
    assert sorted(group_I[36:].tolist()) == [0, 0, 1, 1]
    one_I = split(holds, 1, 0.3, seed)
    assert (one_I[34:36] == 0).any() and (one_I[36:] == 0).any()  # a search knows of each class


def test_the_seed_decides():
    holds = [frozenset({i % 3}) for i in range(30)]
    draws = {tuple(draw_groups(holds, [15, 15], seed)) for seed in range(5)}
    assert len(draws) == 5
    assert tuple(draw_groups(holds, [15, 15], 3)) in draws
