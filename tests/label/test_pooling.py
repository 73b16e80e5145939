"""Pooling weights against upsampling and averaging, which they replace."""

from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from zsplg_ray.label.kernels import compiled
from zsplg_ray.label.pooling import pooling_weights
from zsplg_ray.label.segments import Segments


def segments_of(masks_RHW: np.ndarray) -> Segments:
    n = len(masks_RHW)
    return Segments.from_masks(masks_RHW, [1] * n, [1] * n)


def upsampled_mean(feature_DHW: np.ndarray, masks_RHW: np.ndarray) -> np.ndarray:
    """What the weights stand for, the slow way, in float64; [R, D]."""
    size = masks_RHW.shape[1:]
    up_1DHW = F.interpolate(
        torch.from_numpy(feature_DHW)[None], size=size, mode="bilinear", align_corners=False
    )
    return np.stack([up_1DHW[0].numpy()[:, mask].mean(axis=1) for mask in masks_RHW])


def check(masks_RHW: np.ndarray, grid_hw: tuple[int, int]) -> None:
    feature_DHW = np.random.default_rng(2).uniform(-1, 1, size=(8, *grid_hw))
    weight_RN = pooling_weights(segments_of(masks_RHW), grid_hw)
    assert weight_RN.dtype == np.float32
    assert weight_RN.shape == (len(masks_RHW), grid_hw[0] * grid_hw[1])
    pooled_RD = weight_RN.astype(np.float64) @ feature_DHW.reshape(8, -1).T
    np.testing.assert_allclose(pooled_RD, upsampled_mean(feature_DHW, masks_RHW), rtol=0, atol=1e-7)
    np.testing.assert_allclose(weight_RN.sum(axis=1), 1, rtol=0, atol=1e-5)
    assert weight_RN.min() >= -1e-9


@st.composite
def masks_with_pixels(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)))
    masks = draw(hnp.arrays(np.bool_, shape, elements=st.booleans(), fill=st.booleans()))
    places = st.tuples(st.integers(0, shape[1] - 1), st.integers(0, shape[2] - 1))
    for mask in masks:
        mask[draw(places)] = True
    return masks


@given(masks_with_pixels(), st.tuples(st.integers(1, 24), st.integers(1, 24)))
@settings(max_examples=300, deadline=None)
def test_weights_equal_upsampling_and_averaging(masks, grid_hw):
    """Grids are smaller and larger than the image, by whole numbers and by others."""
    check(masks, grid_hw)


def drawn(name: str) -> np.ndarray:
    """Masks of 61 x 83 pixels that have something peculiar to them."""
    mask = np.zeros((61, 83), np.bool_)
    parts = {
        "full": np.s_[:, :],
        "first pixel": np.s_[0, 0],
        "last pixel": np.s_[60, 82],
        "pixel inside": np.s_[30, 40],
        "top": np.s_[0, :],
        "bottom": np.s_[60, :],
        "left": np.s_[:, 0],
        "right": np.s_[:, 82],
        "whole columns": np.s_[:, 20:50],
        "one row": np.s_[33, 5:70],
    }
    if name in parts:
        mask[parts[name]] = True
    elif name == "one run over several columns":
        column_major = np.zeros(61 * 83, np.bool_)
        column_major[61 * 7 + 50 : 61 * 12 + 3] = True
        mask = column_major.reshape(83, 61).T
    elif name == "all but one pixel":
        mask[:] = True
        mask[31, 41] = False
    elif name == "frame":
        mask[:] = True
        mask[1:-1, 1:-1] = False
    else:
        mask[:] = np.random.default_rng(0).random(mask.shape) < 0.5
    return mask


@pytest.mark.parametrize("grid_hw", [(28, 28), (1, 1), (4, 30), (61, 83), (122, 83), (200, 7)])
@pytest.mark.parametrize(
    "name",
    [
        *("full", "first pixel", "last pixel", "pixel inside", "top", "bottom", "left", "right"),
        *("whole columns", "one row", "one run over several columns", "all but one pixel"),
        *("frame", "noise"),
    ],
)
def test_peculiar_masks(name, grid_hw):
    check(drawn(name)[None], grid_hw)


def test_masks_with_many_and_long_counts():
    masks = np.zeros((3, 700, 1200), np.bool_)
    masks[0, 100:600, 300:900] = True
    masks[1] = np.random.default_rng(1).random((700, 1200)) < 0.1
    masks[2, 5:, :] = True
    check(masks, (28, 28))


def test_runs_without_pixels_may_stand_anywhere():
    counts = [0, 3, 0, 4, 2, 0, 1, 2, 0, 0]  # as pycocotools itself never writes them
    uncompressed: Any = {"size": [4, 3], "counts": counts}
    rle = coco.frPyObjects(uncompressed, 4, 3)["counts"]
    assert isinstance(rle, bytes)
    known = segments_of(coco.decode({"size": [4, 3], "counts": rle}).view(np.bool_)[None])
    box, area = known.box_xyxy, known.area_px
    odd = Segments((4, 3), [rle], box, area, known.predicted_iou, known.stability)
    assert odd.rle != known.rle
    np.testing.assert_array_equal(pooling_weights(odd, (2, 2)), pooling_weights(known, (2, 2)))


def test_each_mask_has_its_own_weights_whatever_stands_beside_it():
    masks = np.stack([drawn("frame"), drawn("noise"), drawn("one row")])
    together = pooling_weights(segments_of(masks), (9, 7))
    for r in range(3):
        np.testing.assert_array_equal(
            together[r], pooling_weights(segments_of(masks[r : r + 1]), (9, 7))[0]
        )


def test_no_masks_and_masks_without_pixels():
    assert pooling_weights(Segments.measured((5, 6), [], [], []), (2, 3)).shape == (0, 6)
    masks = np.stack([drawn("frame"), np.zeros((61, 83), np.bool_), drawn("noise")])
    weight_RN = pooling_weights(segments_of(masks), (2, 3))
    assert np.isnan(weight_RN).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(weight_RN[[0, 2]]).all()


def test_runs_that_leave_the_image_never_reach_memory():
    """Segments refuse such runs; but their list can be written to."""
    segments = segments_of(drawn("frame")[None])
    segments.rle[0] = segments_of(np.ones((1, 90, 90), np.bool_)).rle[0]
    with pytest.raises(AssertionError, match="segments check their runs"):
        pooling_weights(segments, (3, 3))


def test_without_a_place_for_its_cache_it_compiles_all_the_same(monkeypatch):
    real = numba.njit

    def nowhere(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert compiled(lambda x: x + 1)(2) == 3
