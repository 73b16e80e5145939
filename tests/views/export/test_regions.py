"""Regions and run lengths, against pycocotools and by hand."""

import numpy as np
import pytest
from pycocotools import mask as rle_codec

from tests.views.export.runs import blobs
from zsplg_ray.views.export.cvat import row_runs
from zsplg_ray.views.export.regions import coco_rle, regions


def painted(found, size_hw) -> np.ndarray:
    label_HW = np.zeros(size_hw, np.uint8)
    for region in found:
        x, y, w, h = region.box_xywh
        assert region.mask_hw.shape == (h, w) and region.area_px == region.mask_hw.sum()
        for side in (region.mask_hw[0], region.mask_hw[-1], *region.mask_hw.T[[0, -1]]):
            assert side.any(), "the box is too large"
        box = label_HW[y : y + h, x : x + w]
        assert not box[region.mask_hw].any(), "regions overlap"
        box[region.mask_hw] = region.index
    return label_HW


@pytest.mark.parametrize("instances", ["components", "classes"])
def test_regions_make_up_the_label_map(instances):
    for seed in range(5):
        label_HW = blobs((50, 70), seed)
        found = regions(label_HW, instances, ignore=True)
        assert (painted(found, label_HW.shape) == label_HW).all()
        without = regions(label_HW, instances)
        assert {r.index for r in found} - {r.index for r in without} == {255}
        if instances == "classes":
            assert len(found) == len({r.index for r in found})


def test_parts_touch_across_corners_and_small_ones_can_be_left_out():
    label_HW = np.array([[1, 0, 0, 2], [0, 1, 0, 2], [3, 0, 0, 0], [0, 0, 1, 255]], np.uint8)
    found = regions(label_HW, "components")
    assert [(r.index, r.area_px) for r in found] == [(1, 2), (1, 1), (2, 2), (3, 1)]
    larger = regions(label_HW, "components", 2, ignore=True)
    assert [(r.index, r.area_px) for r in larger] == [(1, 2), (2, 2), (255, 1)]
    assert [r.area_px for r in regions(label_HW, "classes", 3)] == [3]


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 9), (9, 1), (7, 5), (64, 48)])
def test_run_lengths_are_those_of_pycocotools(size_hw):
    rng = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.95, 1.0):
        label_HW = (rng.random(size_hw) < share).astype(np.uint8)
        for region in regions(label_HW, "components") + regions(label_HW, "classes"):
            mask_HW = np.zeros(size_hw, np.uint8, order="F")
            x, y, w, h = region.box_xywh
            mask_HW[y : y + h, x : x + w] = region.mask_hw
            theirs = rle_codec.encode(mask_HW)
            ours = coco_rle(region, size_hw)
            assert ours["size"] == list(size_hw)
            assert ours["counts"].encode() == theirs["counts"]


def test_runs_along_rows_start_outside():
    mask_hw = np.array([[0, 1, 1], [1, 0, 0]], bool)
    assert row_runs(mask_hw) == [1, 3, 2]
    assert row_runs(~mask_hw) == [0, 1, 3, 2]
    assert row_runs(np.ones((2, 2), bool)) == [0, 4]
