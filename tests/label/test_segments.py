"""The segment record: boxes and runs against dense masks, round trips, what is refused."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from zsplg_ray.label import segments as segments_module
from zsplg_ray.label.segments import Segments, rle_runs
from zsplg_ray.records import segments_schema


@st.composite
def masks_RHW(draw):
    shape = draw(st.tuples(st.integers(0, 4), st.integers(1, 12), st.integers(1, 12)))
    return draw(hnp.arrays(np.bool_, shape))


def segments_of(masks):
    n = len(masks)
    return Segments.from_masks(masks, [0.5 + r / 8 for r in range(n)], [0.9] * n)


def blobs(n=3, size_hw=(37, 53), seed=0):
    masks = np.zeros((n, *size_hw), np.bool_)
    rng = np.random.default_rng(seed)
    for r in range(n):
        y, x = rng.integers(0, 30, 2)
        masks[r, y : y + 7, x : x + 11] = rng.random((7, 11))[: size_hw[0] - y] > 0.3
    return masks


def embedding_of(segments: Segments) -> np.ndarray:
    assert segments.embedding_RD is not None
    return segments.embedding_RD


def box_by_pixels(mask_HW):
    y, x = np.nonzero(mask_HW)
    return [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(y) else [0, 0, 0, 0]


def assert_same(a, b):
    for field in dataclasses.fields(Segments):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right, field.name


@given(masks_RHW())
@settings(max_examples=150, deadline=None)
def test_masks_come_back_and_boxes_and_areas_are_those_of_the_pixels(masks):
    segments = segments_of(masks)
    assert len(segments) == len(masks)
    np.testing.assert_array_equal(segments.masks_RHW(), masks)
    assert segments.masks_RHW().dtype == np.bool_
    assert segments.area_px.tolist() == masks.sum((1, 2)).tolist()
    assert segments.box_xyxy.tolist() == [box_by_pixels(m) for m in masks]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9))
@settings(max_examples=150, deadline=None)
def test_runs_are_those_that_were_written(counts):
    # Only the first run and none inside may be empty in what pycocotools writes; any may be read.
    n_px = sum(counts)
    rle = coco.frPyObjects({"size": [n_px, 1], "counts": counts}, n_px, 1)["counts"]
    assert isinstance(rle, bytes)
    assert rle_runs(rle, n_px).tolist() == counts


def test_large_masks_have_long_counts():
    masks = np.zeros((2, 1500, 2000), np.bool_)
    masks[0, 700:, 1000:] = True
    masks[1, :, 3:1999] = True
    segments = segments_of(masks)
    assert segments.box_xyxy.tolist() == [[1000, 700, 2000, 1500], [3, 0, 1999, 1500]]
    np.testing.assert_array_equal(segments.mask_HW(0), masks[0])


def test_a_mask_is_measured_once_and_a_wrong_box_is_still_refused(monkeypatch):
    read = []
    monkeypatch.setattr(
        segments_module, "rle_runs", lambda *of: read.append(of[0]) or rle_runs(*of)
    )
    masks = np.random.default_rng(99).random((3, 41, 43)) > 0.5  # no other test knows them
    made = segments_of(masks).with_embedding(np.ones((3, 2))).select([2, 0])
    assert len(read) == 3
    for row in (wrong := made.to_rows()):
        row["box_xyxy"] = [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"box_xyxy must be .* as its mask says"):
        Segments.from_rows(wrong, made.size_hw)
    with pytest.raises(ValueError, match="rle must be runs of 1849 pixels in all"):
        Segments.measured((43, 43), made.rle, [1.0] * 2, [1.0] * 2)


def test_no_segment_works_everywhere():
    empty = Segments.measured((4, 5), [], [], [])
    assert len(empty) == 0
    assert empty.masks_RHW().shape == (0, 4, 5)
    assert empty.to_rows() == []
    assert_same(Segments.from_rows([], (4, 5)), empty)
    assert_same(empty.select([]), empty)
    assert empty.resized((8, 8)).size_hw == (8, 8)
    assert embedding_of(empty.with_embedding(np.zeros((0, 6)))).shape == (0, 6)
    column = pa.array([[]], segments_schema(6).field("segments").type)
    read = Segments.from_arrow(column[0].values, (4, 5))
    assert embedding_of(read).shape == (0, 6)
    assert read.box_xyxy.shape == (0, 4)


def test_rows_and_arrow_are_the_contract_and_come_back():
    rng = np.random.default_rng(0)
    images = [
        segments_of(blobs(n, seed=n)).with_embedding(rng.normal(size=(n, 6))) for n in (2, 0, 3)
    ]
    embedding_of(images[0])[1] = np.nan  # could not be embedded
    column = pa.array([i.to_rows() for i in images], segments_schema(6).field("segments").type)
    column = pa.concat_arrays([column, column]).slice(2)  # offsets that are not zero
    for at, segments in enumerate([images[2], *images]):
        assert_same(Segments.from_arrow(column[at].values, (37, 53)), segments)
        if len(segments):
            assert_same(Segments.from_rows(column[at].as_py(), (37, 53)), segments)
        assert_same(
            Segments.from_rows(segments.to_rows(), (37, 53)),
            segments if len(segments) else dataclasses.replace(segments, embedding_RD=None),
        )


def test_rows_without_embeddings_come_back_without():
    segments = segments_of(blobs())
    column = pa.array([segments.to_rows()], segments_schema(6).field("segments").type)
    assert_same(Segments.from_arrow(column[0].values, (37, 53)), segments)
    assert_same(Segments.from_rows(segments.to_rows(), (37, 53)), segments)
    half = segments.to_rows()
    half[1]["embedding"] = [1.0, 0.0]
    with pytest.raises(ValueError, match="embedding must be alike in all rows, got 1 of 3"):
        Segments.from_rows(half, (37, 53))


def test_embeddings_are_rounded_to_what_is_stored():
    value = np.float32(0.1)
    stored = embedding_of(segments_of(blobs()).with_embedding(np.full((3, 2), value)))
    assert stored.dtype == np.float16
    assert (stored == np.float16(value)).all()


def test_select_takes_positions_and_booleans_in_order():
    segments = segments_of(blobs()).with_embedding(np.arange(6.0).reshape(3, 2))
    picked = segments.select([2, 0])
    np.testing.assert_array_equal(picked.masks_RHW(), blobs()[[2, 0]])
    assert picked.predicted_iou.tolist() == [0.75, 0.5]
    assert embedding_of(picked).tolist() == [[4, 5], [0, 1]]
    assert_same(segments.select(np.array([True, False, True])), segments.select([0, 2]))


@given(masks_RHW(), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_resized_takes_the_pixel_under_the_centre(masks, height, width):
    resized = segments_of(masks).resized((height, width))
    old_h, old_w = masks.shape[1:]
    for y in range(height):
        for x in range(width):
            from_y, from_x = (2 * y + 1) * old_h // (2 * height), (2 * x + 1) * old_w // (2 * width)
            assert abs((from_y + 0.5) / old_h - (y + 0.5) / height) <= 0.5 / old_h + 1e-9
            assert (resized.masks_RHW()[:, y, x] == masks[:, from_y, from_x]).all()
    assert resized.box_xyxy.tolist() == [box_by_pixels(m) for m in resized.masks_RHW()]


def test_doubling_and_halving_is_the_identity():
    segments = segments_of(blobs()).with_embedding(np.ones((3, 2)))
    doubled = segments.resized((74, 106))
    assert doubled.area_px.tolist() == (4 * segments.area_px).tolist()
    assert doubled.box_xyxy.tolist() == (2 * segments.box_xyxy).tolist()
    assert_same(doubled.resized((37, 53)), segments)
    assert segments.resized((37, 53)) is segments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size_hw": (0, 53)}, "size_hw must be two sizes >= 1"),
        ({"size_hw": (53, 38)}, "rle must be runs of 2014 pixels in all"),
        ({"rle": [b"1"] * 3}, "rle must be runs of 1961 pixels in all"),
        ({"rle": [b""] * 3}, "rle must be COCO compressed counts"),
        ({"rle": [b"\x00\xff"] * 3}, "rle must be COCO compressed counts"),
        ({"rle": [b"m"] * 3}, "rle must be COCO compressed counts"),
        ({"rle": [b"o" * 40 + b"1"] * 3}, "rle must be COCO compressed counts"),
        ({"rle": []}, r"box_xyxy must be int32 \[0, 4\], got int32 \[3, 4\]"),
        ({"box_xyxy": np.zeros((3, 4), np.int32)}, "box_xyxy must be .* as its mask says"),
        ({"area_px": np.zeros(3, np.int64)}, "area_px must be .* as its mask says, got 0; "),
        ({"area_px": np.zeros(3, np.int32)}, r"area_px must be int64 \[3\], got int32 \[3\]; "),
        ({"stability": np.zeros(2, np.float32)}, r"stability must be float32 \[3\], got"),
        ({"predicted_iou": np.zeros(3)}, r"predicted_iou must be float32 \[3\], got float64"),
        ({"embedding_RD": np.zeros((2, 6), np.float16)}, r"embedding_RD must be float16 \[3, D\]"),
        ({"embedding_RD": np.zeros((3, 6))}, r"embedding_RD must be float16 \[3, D\], got float64"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(segments_of(blobs()), **change)


def test_masks_must_be_a_stack_of_booleans():
    with pytest.raises(ValueError, match=r"masks_RHW must be bool \[R, H, W\], got uint8"):
        Segments.from_masks(np.zeros((1, 2, 2), np.uint8), [1.0], [1.0])
