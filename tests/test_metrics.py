"""Confusion counts against counting pixel by pixel, scores against their definitions."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zsplg_ray.metrics import confusion, grouped_confusion, scores

K = 4
INDICES = st.sampled_from([0, 1, 2, 3, 255])


@st.composite
def pairs(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    maps = hnp.arrays(draw(st.sampled_from([np.uint8, np.int64])), shape, elements=INDICES)
    return draw(maps), draw(hnp.arrays(np.uint8, shape, elements=INDICES))


def brute_confusion(truth, pred):
    counts = np.zeros((K, K + 1), dtype=int)
    for t, p in zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True):
        if t != 255:
            counts[t, K if p == 255 else p] += 1
    return counts


@given(pairs(), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_groups_are_counted_apart(pair, seed):
    truth, pred = pair
    group = np.random.default_rng(seed).integers(0, 3, truth.shape, dtype=np.uint8)
    counts = grouped_confusion(truth, pred, group, K, 3)
    for g in range(3):
        where = group == g
        assert (counts[g] == brute_confusion(truth[where], pred[where])).all()


def test_every_pixel_needs_a_group():
    with pytest.raises(ValueError, match="group_HW must be of shape"):
        grouped_confusion(np.zeros((1, 2), int), np.zeros((1, 2), int), np.zeros((2, 1)), K, 3)


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_confusion_counts_every_pixel(pair):
    truth, pred = pair
    counts = confusion(truth, pred, K)
    assert counts.dtype == np.int64
    assert counts.shape == (K, K + 1)
    assert (counts == brute_confusion(*pair)).all()


@given(pairs())
@settings(max_examples=150, deadline=None)
def test_scores_follow_from_sets_of_pixels(pair):
    truth, pred = pair
    names = ["background", "a", "b", "c"]
    got = scores(confusion(truth, pred, K), names)
    json.dumps(got, allow_nan=False)
    valid = truth != 255
    ious = {}
    for k, name in enumerate(names):
        in_truth, in_pred = valid & (truth == k), valid & (pred == k)
        hits, union = (in_truth & in_pred).sum(), (in_truth | in_pred).sum()
        ious[name] = hits / union if union else None
        assert got["precision_by_class"][name] == (hits / in_pred.sum() if in_pred.any() else None)
        assert got["recall_by_class"][name] == (hits / in_truth.sum() if in_truth.any() else None)
    assert got["iou"] == pytest.approx(ious)
    there = [v for v in ious.values() if v is not None]
    assert got["miou"] == (pytest.approx(np.mean(there)) if there else None)
    assert got["pixels"] == valid.sum()
    if valid.any():
        assert got["pixel_accuracy"] == pytest.approx((truth == pred)[valid].mean())
        assert got["coverage"] == pytest.approx((pred != 255)[valid].mean())
    else:
        assert got["pixel_accuracy"] is got["coverage"] is None


def test_counts_add_up_over_parts():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, K, (2, 20, 30))
    parts = [confusion(truth[i : i + 5], pred[i : i + 5], K) for i in range(0, 20, 5)]
    assert (np.sum(parts, axis=0) == confusion(truth, pred, K)).all()


def test_an_open_pixel_is_a_miss_but_no_false_alarm():
    truth = np.array([[1, 1, 1, 1]])
    got = scores(confusion(truth, np.array([[1, 1, 255, 255]]), 2), ["background", "a"])
    assert got["iou"] == {"background": None, "a": 0.5}
    assert got["miou"] == got["pixel_accuracy"] == got["coverage"] == 0.5
    assert got["precision_by_class"]["a"] == 1


def test_most_classes():
    every = np.arange(256).reshape(16, 16)
    counts = confusion(every, every, 255)
    assert (counts[:, :255] == np.eye(255)).all()
    assert not counts[:, 255].any()


@pytest.mark.parametrize(
    ("truth", "pred", "n", "words"),
    [
        ([[4]], [[0]], 4, "truth_HW must be class indices below 4, or 255 to ignore, got 4"),
        ([[255]], [[7]], 4, "pred_HW must be class indices below 4, or 255 to ignore, got 7"),
        ([[0]], [[-1]], 4, "got -1"),
        ([[0]], [[256]], 4, "got 256"),
        ([[0.0]], [[0]], 4, "truth_HW must be integers, got float64"),
        ([[0, 0]], [[0]], 4, "pred_HW must be of shape (1, 2), got (1, 1)"),
        ([[0]], [[0]], 0, "n_classes must be in [1, 255], got 0"),
        ([[0]], [[0]], 256, "n_classes"),
    ],
)
def test_confusion_refuses(truth, pred, n, words):
    with pytest.raises(ValueError) as caught:
        confusion(np.array(truth), np.array(pred), n)
    assert words in str(caught.value)


def test_scores_refuse():
    with pytest.raises(ValueError, match="confusion must be counts"):
        scores(np.zeros((2, 2), int), ["a", "b"])
    with pytest.raises(ValueError, match="least -1"):
        scores(np.full((1, 2), -1), ["a"])
