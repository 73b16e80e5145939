"""Regions against sets of pixels."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zsplg_ray.label.regions import REGIONS, Regions, cut, segments_sha256, truth_sha256
from zsplg_ray.label.segments import Segments

K = 4


def segments_of(masks_RHW):
    n = len(masks_RHW)
    return Segments.from_masks(masks_RHW, [1] * n, [1] * n)


def counts_of(regions):
    """(covering segments, true class) -> pixels."""
    counts = {}
    for n in range(len(regions)):
        cover = regions.cover[regions.cover_start[n] : regions.cover_start[n + 1]]
        for e in range(regions.count_start[n], regions.count_start[n + 1]):
            key = (tuple(cover.tolist()), int(regions.count_class[e]))
            assert key not in counts
            counts[key] = int(regions.count_px[e])
    return counts


def counted_by_pixel(masks_RHW, truth_HW):
    counts = {}
    for y, x in np.argwhere(truth_HW != 255):
        key = (tuple(np.flatnonzero(masks_RHW[:, y, x]).tolist()), int(truth_HW[y, x]))
        counts[key] = counts.get(key, 0) + 1
    return counts


def drawn_at_random(seed, n, size_hw, density):
    rng = np.random.default_rng(seed)
    masks_RHW = rng.random((n, *size_hw)) < density
    return masks_RHW, rng.choice([0, 1, 2, 3, 255], size_hw).astype(np.uint8)


@st.composite
def images(draw):
    size_hw = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    masks = draw(hnp.arrays(np.bool_, (draw(st.integers(0, 6)), *size_hw)))
    elements = st.sampled_from([0, 1, 3, 255])
    return masks, draw(hnp.arrays(np.uint8, size_hw, elements=elements))


@given(images())
@settings(max_examples=100, deadline=None)
def test_counts_equal_those_of_pixels_and_survive_parquet(image):
    masks_RHW, truth_HW = image
    segments = segments_of(masks_RHW)
    regions = cut(segments, truth_HW, K)
    assert counts_of(regions) == counted_by_pixel(masks_RHW, truth_HW)
    assert regions.n_segments == len(segments) and regions.size_hw == segments.size_hw
    table = pa.Table.from_pylist([{"image_id": "a", **regions.to_row()}], REGIONS)
    (row,) = table.to_pylist()
    again = Regions.from_row(row)
    assert row["image_id"] == "a"
    for field in dataclasses.fields(Regions):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(regions, field.name))


@pytest.mark.parametrize("n", [63, 64, 65, 128, 300])
def test_more_segments_than_a_word_has_bits(n):
    masks_RHW, truth_HW = drawn_at_random(n, n, (9, 11), 0.5)
    regions = cut(segments_of(masks_RHW), truth_HW, K)
    assert counts_of(regions) == counted_by_pixel(masks_RHW, truth_HW)
    sparse = masks_RHW & (np.arange(n) % 50 == 1)[:, None, None]  # words without a bit
    regions = cut(segments_of(sparse), truth_HW, K)
    assert counts_of(regions) == counted_by_pixel(sparse, truth_HW)


def test_large_nested_boxes():
    """A region far larger than a column, runs that go on in the next column, one empty mask."""
    masks_RHW = np.zeros((4, 700, 900), np.bool_)
    masks_RHW[0], masks_RHW[1, :, 100:500], masks_RHW[3, 300:, 200:] = True, True, True
    truth_HW = np.zeros((700, 900), np.uint8)
    truth_HW[:, 450:] = 2
    truth_HW[:10] = 255
    regions = cut(segments_of(masks_RHW), truth_HW, K)
    assert counts_of(regions) == {
        ((0,), 0): 100 * 690,
        ((0, 1), 0): 100 * 690 + 250 * 290,
        ((0, 1), 2): 50 * 290,
        ((0, 1, 3), 0): 250 * 400,
        ((0, 1, 3), 2): 50 * 400,
        ((0,), 2): 400 * 290,
        ((0, 3), 2): 400 * 400,
    }


def test_without_segments_or_without_truth():
    nothing = Segments.measured((2, 3), [], [], [])
    truth_HW = np.array([[0, 0, 1], [0, 255, 1]], np.uint8)
    assert counts_of(cut(nothing, truth_HW, K)) == {((), 0): 3, ((), 1): 2}
    unknown = cut(segments_of(np.ones((2, 2, 3), np.bool_)), np.full((2, 3), 255, np.uint8), K)
    assert len(unknown) == 0 and unknown.n_segments == 2
    assert Regions.from_row(unknown.to_row()).cover_start.tolist() == [0]


def test_layout_of_the_truth_does_not_matter(tmp_path):
    masks_RHW, truth_HW = drawn_at_random(1, 5, (8, 6), 0.4)
    segments = segments_of(masks_RHW)
    one, other = cut(segments, truth_HW, K), cut(segments, np.asfortranarray(truth_HW), K)
    assert one.to_row().keys() == set(REGIONS.names) - {"image_id"}
    path = tmp_path / "regions.parquet"
    rows = [{"image_id": str(i), **regions.to_row()} for i, regions in enumerate((one, other))]
    pq.write_table(pa.Table.from_pylist(rows, REGIONS), path)
    first, second = pq.read_table(path).drop_columns("image_id").to_pylist()
    assert first == second


def test_hashes_change_with_what_was_counted():
    masks_RHW, truth_HW = drawn_at_random(2, 3, (4, 6), 0.5)
    segments = segments_of(masks_RHW)
    regions = cut(segments, truth_HW, K)
    assert regions.truth_sha256 == truth_sha256(truth_HW)
    assert regions.segments_sha256 == segments_sha256(segments)
    other = truth_HW.copy()
    other[0, 0] ^= 1
    assert len({truth_sha256(t) for t in (truth_HW, other, truth_HW.reshape(6, 4))}) == 3
    changed = (segments, segments.select([0, 2]), segments.select([1, 0, 2]))
    assert len({segments_sha256(s) for s in changed}) == 3
    loose = dataclasses.replace(segments, stability=segments.stability / 2)
    assert segments_sha256(loose) == segments_sha256(segments), "masks alone cut"


@pytest.mark.parametrize(
    ("truth_HW", "message"),
    [
        (np.zeros((3, 2), np.uint8), r"truth_HW must be of shape \(2, 3\), got \(3, 2\)"),
        (np.zeros((2, 3), np.int64), "truth_HW must be uint8, got int64"),
        (np.full((2, 3), K, np.uint8), f"truth_HW must be class indices below {K}.*got {K}"),
        (np.full((2, 3), 254, np.uint8), "truth_HW must be class indices"),
    ],
)
def test_truth_that_does_not_fit_is_refused(truth_HW, message):
    with pytest.raises(ValueError, match=message):
        cut(segments_of(np.ones((1, 2, 3), np.bool_)), truth_HW, K)


def test_runs_that_leave_the_image_never_reach_memory():
    """Segments refuse such runs; but their list can be written to."""
    segments = segments_of(np.ones((1, 2, 3), np.bool_))
    segments.rle[0] = segments_of(np.ones((1, 90, 90), np.bool_)).rle[0]
    with pytest.raises(AssertionError, match="segments check their runs"):
        cut(segments, np.zeros((2, 3), np.uint8), K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cover": [0, 2]}, "rising numbers below 2"),
        ({"cover": [0, -1]}, "rising numbers below 2"),
        ({"cover": [1, 0], "cover_start": [0, 0, 2, 2]}, "rising numbers below 2"),
        ({"cover": [0]}, "lists that rise from 0 to their end"),
        ({"cover_start": []}, "lists that rise"),
        ({"cover_start": [0, 2, 1, 2]}, "lists that rise"),
        ({"cover_start": [0, 0, 2]}, "as many covers as counts"),
        ({"count_class": [0, 1, 255]}, "rising numbers below 255"),
        ({"count_px": [2, 0, 2]}, "pixels in every region"),
        ({"count_start": [0, 0, 1, 3]}, "pixels in every region"),
        ({"count_px": [2, 2, 200]}, "no more pixels than the image"),
        ({"count_px": [[1, 1, 1]]}, "int32 of one dimension"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(change, message):
    masks_RHW = np.array([[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]]], np.bool_)
    truth_HW = np.array([[0, 0, 1, 1, 2, 2]], np.uint8)
    row = cut(segments_of(masks_RHW), truth_HW, K).to_row()
    assert row["cover_start"].tolist() == [0, 1, 2, 2] and row["cover"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=f"regions must be {message}"):
        Regions.from_row({**row, **change})
