"""The Parquet door: schemas that others rest on, and the PNG codec."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from zsplg_ray.records import (
    ERRORS,
    LABELS,
    decode_png,
    encode_png,
    encode_score,
    segments_schema,
)

MAPS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))


@given(MAPS)
def test_label_maps_come_back_exactly(map_HW):
    data = encode_png(map_HW)
    back = decode_png(data)
    np.testing.assert_array_equal(back, map_HW)
    assert back.dtype == np.uint8 and back.flags.writeable
    assert encode_png(map_HW.copy()) == data, "the same map gives other bytes"
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", map_HW.shape[::-1])


def test_views_are_written_as_what_they_show():
    map_HW = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for view in (map_HW.T, map_HW[::-1], map_HW[:, ::2], np.asfortranarray(map_HW)):
        np.testing.assert_array_equal(decode_png(encode_png(view)), view)


def test_palette_masks_are_read_as_indices():
    image = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8)).convert("P")
    image.putpalette([9, 9, 9] * 256)
    out = io.BytesIO()
    image.save(out, "PNG")
    np.testing.assert_array_equal(decode_png(out.getvalue()), np.array(image))


def test_large_label_maps_are_read_whatever_pillow_thinks(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_png(encode_png(np.zeros((9, 9), np.uint8))).shape == (9, 9)


def saved(array, **options):
    out = io.BytesIO()
    Image.fromarray(array).save(out, **options)
    return out.getvalue()


GREY = np.zeros((4, 4), np.uint8)
WHOLE = encode_png(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no image",
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:30],
        saved(np.zeros((4, 4, 3), np.uint8), format="PNG"),
        saved(np.zeros((4, 4), np.uint16), format="PNG"),
        saved(GREY, format="JPEG"),
    ],
    ids=["empty", "text", "cut", "cut early", "rgb", "16 bits", "jpeg"],
)
def test_what_is_no_label_map_is_refused_in_one_line(data):
    with pytest.raises(ValueError, match=r"^label_png must be ") as caught:
        decode_png(data)
    assert len(str(caught.value).splitlines()) == 1


@given(st.floats(0, 1))
def test_scores_are_rounded_to_the_nearest_of_256_steps(score):
    stored = decode_png(encode_score(np.full((1, 2), score, np.float32)))
    assert abs(stored[0, 1] / 255 - score) <= 0.5 / 255 + 1e-6


def test_scores_beyond_their_range_are_clipped():
    score_HW = np.array([[-0.5, 0.0, 1.0, 1.5]])
    assert decode_png(encode_score(score_HW)).tolist() == [[0, 0, 255, 255]]


def test_the_schemas_of_the_contract():
    assert dict(zip(LABELS.names, map(str, LABELS.types), strict=True)) == {
        "image_id": "string",
        "uri": "string",
        "width": "int32",
        "height": "int32",
        "label_png": "binary",
        "score_png": "binary",
        "class_px": "list<item: int64>",
        "source": "string",
        "confidence": "float",
    }
    assert ERRORS.names == ["image_id", "uri", "stage", "error", "detail"]
    assert set(ERRORS.types) == {pa.string()}
    schema = segments_schema(5)
    assert schema.names == ["image_id", "uri", "width", "height", "image_sha256", "segments"]
    item = schema.field("segments").type.value_type
    assert {item.field(i).name: str(item.field(i).type) for i in range(item.num_fields)} == {
        "box_xyxy": "fixed_size_list<item: int32>[4]",
        "area_px": "int64",
        "rle": "binary",
        "predicted_iou": "float",
        "stability": "float",
        "embedding": "fixed_size_list<item: halffloat>[5]",
    }
