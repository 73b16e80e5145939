"""Figures: that they are pictures, and that what they show follows the numbers."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from zsplg_ray.views import figures
from zsplg_ray.views.figures import (
    class_shares,
    confusion_matrix,
    coverage_precision,
    iou_bars,
    threshold_curves,
)
from zsplg_ray.views.mistaken import most_mistaken
from zsplg_ray.vocab import class_list

MANY = class_list("ade20k").names


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def ink(png: bytes, colour: str) -> int:
    """Pixels of about this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(axis=2) < 16).sum())


def test_bars_are_as_long_as_iou_is_high():
    low = iou_bars({"default": {"cat": 0.2, "dog": 0.2}})
    high = iou_bars({"default": {"cat": 0.8, "dog": 0.8}})
    ratio = ink(high, figures.COLOURS[0]) / ink(low, figures.COLOURS[0])
    assert 3 < ratio < 4.2  # the legend has the colour too
    both = iou_bars({"default": {"cat": 0.2, "dog": None}, "tuned": {"cat": 0.8, "dog": None}})
    assert ink(both, figures.COLOURS[1]) > 2 * ink(both, figures.COLOURS[0])


@pytest.mark.parametrize("n", [2, 40, 41, 151])
def test_any_number_of_classes_is_drawn_at_a_bounded_size(n):
    values = {name: i / n for i, name in enumerate(MANY[:n])}
    counts = np.eye(n, n + 1, dtype=np.int64) * 9 + 1
    pictures = [
        iou_bars({"default": values, "tuned": {**values, MANY[1]: None}}),
        class_shares(dict.fromkeys(values, 1 / n)),
        confusion_matrix(counts, list(values)),
    ]
    for png in pictures:
        height, width, _ = pixels(png).shape
        assert width < 2000 and height < 2600


def test_of_many_classes_those_that_are_mistaken_stay():
    n = len(MANY)
    counts = np.zeros((n, n + 1), np.int64)
    counts[np.arange(n - 1), np.arange(n - 1)] = 100  # the last class occurs nowhere
    counts[7, 9], counts[9, n] = 50, 20
    kept, labels, note = most_mistaken(counts, list(MANY), figures.MOST_CELLS)
    assert {MANY[7], MANY[9]} <= set(labels) and MANY[-1] not in labels
    assert len(labels) == figures.MOST_CELLS and labels[-1] == f"{n - 1 - 29} others"
    assert kept.sum() == counts.sum() and f"of {n - 1} that occur" in note
    seven, nine = labels.index(MANY[7]), labels.index(MANY[9])
    assert kept[seven, nine] == 50 and kept[nine, -1] == 20
    few, labels, note = most_mistaken(
        counts[:4, [0, 1, 2, 3, n]], list(MANY[:4]), figures.MOST_CELLS
    )
    assert labels == list(MANY[:4]) and not note and (few == counts[:4, [0, 1, 2, 3, n]]).all()


def test_shares_are_sorted_and_what_is_left_is_added_up():
    png = class_shares({"cat": 0.75, "dog": 0.25, "cow": 0.0})
    blue = (np.abs(pixels(png) - [0x00, 0x72, 0xB2]).max(axis=2) < 16).sum(axis=1)
    rows = np.flatnonzero(blue)
    top, bottom = blue[rows[0] + 2], blue[rows[-1] - 2]
    assert top == pytest.approx(3 * bottom, rel=0.05)
    with_rest = class_shares({name: 1 / len(MANY) for name in MANY})
    assert pixels(with_rest).shape == pixels(class_shares(dict.fromkeys(MANY[:41], 1.0))).shape


def test_curves_and_points():
    xs = np.linspace(0.1, 0.4, 20).tolist()
    series = {"mIoU": xs, "coverage": xs[::-1], "mean precision": [float("nan")] * 20}
    marked = threshold_curves(xs, series, chosen={"default": 0.2, "tuned": 0.3}, xlabel="cosine")
    plain = threshold_curves(xs, series, xlabel="cosine")
    assert ink(marked, figures.GREY) > ink(plain, figures.GREY) + 300
    curve = [(0.2, 0.9), (0.9, 0.5)]
    points = {"default": (0.8, 0.6), "tuned": (0.7, 0.7)}
    with_points = coverage_precision({"min_similarity": curve}, points)
    assert ink(with_points, figures.COLOURS[1]) > 100 and ink(with_points, figures.COLOURS[2]) > 100
    assert coverage_precision({}, {}) and coverage_precision({"none": []}, points)


def test_nothing_to_show_is_no_error():
    assert iou_bars({"default": {}}) and iou_bars({"default": {"cat": None}})
    assert class_shares({"cat": 0.0})
    assert confusion_matrix(np.zeros((2, 3), np.int64), ["background", "cat"])


def test_names_are_no_formulas():
    odd = {"$x^$": 0.5, "a$b": 0.25, r"\frac": None}
    drawn = [iou_bars({"tuned": odd}), confusion_matrix(np.ones((3, 4), int), list(odd))]
    assert all(ink(png, "#ffffff") for png in drawn)


def test_threads_draw_the_same():
    expected = class_shares({"cat": 0.4, "dog": 0.6})
    made: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: made.append(class_shares({"cat": 0.4, "dog": 0.6})))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [expected] * 3
