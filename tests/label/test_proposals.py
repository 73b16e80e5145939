"""Duplicates, crops and small regions of finished masks, against segment_anything's own code."""

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import MaskData, coco_encode_rle, mask_to_rle_pytorch

from zsplg_ray.label.proposals import Proposals, join_crops
from zsplg_ray.label.segments import encode_mask

SIZE_HW = (40, 56)


def proposals(masks_RHW: np.ndarray, crop_xyxy=(0, 0, 56, 40), seed=0) -> Proposals:
    rng = np.random.default_rng(seed)
    n = len(masks_RHW)
    boxes = []
    for mask in masks_RHW:
        y, x = mask.nonzero()
        boxes.append((x.min(), y.min(), x.max(), y.max()))
    return Proposals(
        size_hw=SIZE_HW,
        rle=[encode_mask(mask) for mask in masks_RHW],
        box_xyxy=np.array(boxes, np.int64).reshape(-1, 4),
        predicted_iou=rng.random(n).astype(np.float32),
        stability=rng.random(n).astype(np.float32),
        point_xy=rng.random((n, 2)) * 40,
        crop_xyxy=np.tile(np.array(crop_xyxy, np.int64), (n, 1)),
    )


def speckled(n: int, seed: int) -> np.ndarray:
    """Blocks with holes and islands of various sizes; some blocks without."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((n, *SIZE_HW), np.bool_)
    for i, mask in enumerate(masks):
        y, x = rng.integers(0, 20, 2)
        mask[y : y + rng.integers(8, 20), x : x + rng.integers(8, 30)] = True
        if i % 3:
            for _ in range(4):
                cy, cx, side = rng.integers(0, 38), rng.integers(0, 54), rng.integers(1, 5)
                mask[cy : cy + side, cx : cx + side] ^= True
    return masks


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_area_px", [1, 4, 12, 5000])
def test_small_regions_are_removed_as_sam_does(seed, min_area_px):
    masks = speckled(12, seed)
    given = proposals(masks)
    official = SamAutomaticMaskGenerator.postprocess_small_regions(
        MaskData(
            rles=mask_to_rle_pytorch(torch.from_numpy(masks)),
            boxes=given.box_xyxy.copy(),
            iou_preds=given.predicted_iou,
            points=given.point_xy,
        ),
        min_area_px,
        0.7,
    )
    ours = given.without_small_regions(min_area_px, 0.7)
    assert [r.decode() for r in ours.rle] == [
        coco_encode_rle(r)["counts"] for r in official["rles"]
    ]
    np.testing.assert_array_equal(ours.box_xyxy, official["boxes"])
    np.testing.assert_array_equal(ours.predicted_iou, official["iou_preds"])
    np.testing.assert_array_equal(ours.point_xy, official["points"])


def test_nothing_found_stays_nothing():
    none = proposals(np.zeros((0, *SIZE_HW), np.bool_))
    assert len(none.without_small_regions(10, 0.7)) == 0
    assert len(join_crops([none, none], 0.7)) == 0
    assert len(none.to_segments()) == 0


def test_of_like_masks_the_one_from_the_smallest_crop_stays():
    mask = np.zeros((1, *SIZE_HW), np.bool_)
    mask[0, 5:20, 5:20] = True
    other = np.zeros((1, *SIZE_HW), np.bool_)
    other[0, 30:38, 30:50] = True
    whole, crop = proposals(np.concatenate([mask, other])), proposals(mask, (0, 0, 30, 30))
    joined = join_crops([whole, crop], 0.7)
    assert joined.crop_xyxy.tolist() == [[0, 0, 30, 30], [0, 0, 56, 40]]
    assert joined.rle == [crop.rle[0], whole.rle[1]]
    assert join_crops([whole], 0.7) is whole, "nothing is dropped between crops if there is one"


def test_segments_have_half_open_boxes_and_areas():
    masks = speckled(3, 0)
    segments = proposals(masks).to_segments()
    np.testing.assert_array_equal(segments.area_px, masks.sum((1, 2)))
    np.testing.assert_array_equal(
        segments.box_xyxy, proposals(masks).box_xyxy + np.array([0, 0, 1, 1])
    )
