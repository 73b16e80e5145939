"""The official mask generator behind the project's records, and how far two results agree.

What enters: a `Sam`, settings, an image. What leaves: `Proposals` as `SamAutomaticMaskGenerator`
finds them, and an `Agreement` between two lists of proposals. Nothing of the product runs through
here: it is what the segment engine is measured against, in tests and in the benchmark.

Source: segment_anything (Apache-2.0).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from zsplg_ray.config import SamConfig
from zsplg_ray.label.proposals import Proposals

SETTINGS = (
    "points_per_side",
    "points_per_batch",
    "pred_iou_thresh",
    "stability_score_thresh",
    "stability_score_offset",
    "box_nms_thresh",
    "crop_n_layers",
    "crop_nms_thresh",
    "crop_overlap_ratio",
    "crop_n_points_downscale_factor",
    "min_mask_region_area",
)
"""Settings that both know by the same name."""


class Agreement(NamedTuple):
    """How far two lists of masks of one image (or the sum over images) are the same."""

    ours: int
    theirs: int
    same_records: int
    """Masks at the same place of both lists that come from the same point and crop."""
    identical: int
    """Of these, masks that are the same to the pixel."""
    least_iou: float
    """Lowest IoU among masks at the same place of both lists; 0 if the lists differ in length."""
    mean_best_iou: float
    """Mean over their masks of the IoU with the most similar of ours; 1 where they have none."""
    largest_score_gap: float
    """Largest difference in predicted IoU or stability at the same place."""

    @property
    def exact(self) -> bool:
        """Same masks, same order."""
        return self.ours == self.theirs == self.identical


def official_generator(sam: Sam, config: SamConfig) -> SamAutomaticMaskGenerator:
    """The official generator with the same (resolved) settings."""
    given: dict[str, Any] = {name: getattr(config, name) for name in SETTINGS}
    return SamAutomaticMaskGenerator(sam, **given, output_mode="coco_rle")


def official_proposals(generator: SamAutomaticMaskGenerator, image_HWC: np.ndarray) -> Proposals:
    """What the official generator finds in a uint8 RGB image."""
    records = generator.generate(image_HWC)

    def column(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        return np.array([record[name] for record in records], dtype).reshape(shape)

    box_xywh, crop_xywh = column("bbox", (-1, 4), np.int64), column("crop_box", (-1, 4), np.int64)
    return Proposals(
        size_hw=(image_HWC.shape[0], image_HWC.shape[1]),
        rle=[record["segmentation"]["counts"].encode("ascii") for record in records],
        box_xyxy=_corners(box_xywh),
        predicted_iou=column("predicted_iou", (-1,), np.float32),
        stability=column("stability_score", (-1,), np.float32),
        point_xy=column("point_coords", (-1, 2), np.float64),
        crop_xyxy=_corners(crop_xywh),
    )


def agreement(ours: Proposals, theirs: Proposals) -> Agreement:
    """Compare two results for the same image."""
    n = min(len(ours), len(theirs))
    same = (ours.point_xy[:n] == theirs.point_xy[:n]).all(1)
    same &= (ours.crop_xyxy[:n] == theirs.crop_xyxy[:n]).all(1)
    iou_RR = _iou(theirs, ours)
    gaps = [
        np.abs(getattr(ours, name)[:n] - getattr(theirs, name)[:n]).max(initial=0.0)
        for name in ("predicted_iou", "stability")
    ]
    return Agreement(
        ours=len(ours),
        theirs=len(theirs),
        same_records=int(same.sum()),
        identical=sum(a == b for a, b in zip(ours.rle, theirs.rle, strict=False)),
        least_iou=float(np.diag(iou_RR).min(initial=1.0)) if len(ours) == len(theirs) else 0.0,
        mean_best_iou=float(iou_RR.max(1, initial=0.0).mean()) if len(theirs) else 1.0,
        largest_score_gap=float(max(gaps)),
    )


def together(agreements: list[Agreement]) -> Agreement:
    """The agreement over several images: sums, extremes, and the mean weighted by masks."""
    n = sum(a.theirs for a in agreements)
    return Agreement(
        ours=sum(a.ours for a in agreements),
        theirs=n,
        same_records=sum(a.same_records for a in agreements),
        identical=sum(a.identical for a in agreements),
        least_iou=min(a.least_iou for a in agreements),
        mean_best_iou=sum(a.mean_best_iou * a.theirs for a in agreements) / n if n else 1.0,
        largest_score_gap=max(a.largest_score_gap for a in agreements),
    )


def _corners(box_xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([box_xywh[:, :2], box_xywh[:, :2] + box_xywh[:, 2:]], axis=1)


def _iou(first: Proposals, second: Proposals) -> np.ndarray:
    """IoU of every mask of one with every mask of the other, float64; 1 if both are empty."""
    if not (len(first) and len(second)):
        return np.zeros((len(first), len(second)))
    size = list(first.size_hw)
    rles: list[list[Any]] = [
        [{"size": size, "counts": rle} for rle in side.rle] for side in (first, second)
    ]
    iou_RR = np.asarray(coco.iou(rles[0], rles[1], [0] * len(second)))
    same_RR = np.array([[a == b for b in second.rle] for a in first.rle])
    return np.where(same_RR, 1.0, iou_RR)
