"""The masks that SAM's automatic generator would return for one image, in its order.

What enters: for each crop of an image, the masks that passed the filters. What leaves: the same
without duplicates, with small regions removed, and in the end `Segments`. This is the part of the
generator that works on finished masks; finding them is `label.sam`.

Why beside `Segments`: SAM also tells which point and which crop a mask came from, and its boxes end
at the last pixel; both matter for filters and for comparing with the official generator, and
neither is stored.

Shape suffixes: R masks.

Source: segment_anything's automatic_mask_generator.py and utils/amg.py (Apache-2.0): the rules are
theirs, and its helpers for boxes and small regions are called, not rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from segment_anything.utils.amg import batched_mask_to_box, remove_small_regions
from torchvision.ops import batched_nms, box_area

from zsplg_ray.label.segments import Segments, decode_mask, encode_mask


@dataclass(frozen=True, eq=False)
class Proposals:
    """R masks of one image, or of one crop of it in the frame of the image."""

    size_hw: tuple[int, int]
    """Height and width of the image, pixels."""
    rle: list[bytes]
    """COCO compressed counts of the masks in the image."""
    box_xyxy: np.ndarray
    """int64 [R, 4], pixels in the image; x1, y1 are the last column and row, as SAM counts."""
    predicted_iou: np.ndarray
    """float32 [R]."""
    stability: np.ndarray
    """float32 [R]."""
    point_xy: np.ndarray
    """float64 [R, 2], pixels in the image: the prompt."""
    crop_xyxy: np.ndarray
    """int64 [R, 4], pixels, half-open: the crop that SAM looked at."""

    def __len__(self) -> int:
        return len(self.rle)

    def select(self, index: np.ndarray) -> Proposals:
        """A copy with some masks only, int64 indices in the given order."""
        rle = [self.rle[i] for i in index]
        return dataclasses.replace(
            self,
            rle=rle,
            **{name: getattr(self, name)[index] for name in _ARRAYS},
        )

    def without_small_regions(self, min_area_px: int, nms_thresh: float) -> Proposals:
        """Holes and islands of fewer pixels removed, and what is then alike dropped again.

        Masks that did not have to be changed win over those that had.

        Args:
            min_area_px: >= 1.
            nms_thresh: Of two masks whose boxes overlap more (IoU) one stays.
        """
        if not len(self):
            return self
        rle, box_xyxy, unchanged = list(self.rle), self.box_xyxy.copy(), np.ones(len(self))
        for r, counts in enumerate(self.rle):
            mask_HW = decode_mask(counts, self.size_hw)
            mask_HW, filled = remove_small_regions(mask_HW, min_area_px, mode="holes")
            mask_HW, cleared = remove_small_regions(mask_HW, min_area_px, mode="islands")
            if filled or cleared:
                unchanged[r] = 0
                rle[r] = encode_mask(mask_HW)
                box_xyxy[r] = batched_mask_to_box(torch.from_numpy(mask_HW)).numpy()
        keep = unlike(box_xyxy, unchanged.astype(np.float32), nms_thresh)
        return dataclasses.replace(self, rle=rle, box_xyxy=box_xyxy).select(keep)

    def to_segments(self) -> Segments:
        """As the project's own record, without embeddings; points and crops are forgotten."""
        return Segments.measured(self.size_hw, self.rle, self.predicted_iou, self.stability)


_ARRAYS = ("box_xyxy", "predicted_iou", "stability", "point_xy", "crop_xyxy")


def join_crops(crops: Sequence[Proposals], nms_thresh: float) -> Proposals:
    """The masks of all crops of an image, one after the other, duplicates dropped.

    Of masks that are alike, the one from the smallest crop stays.

    Args:
        crops: At least one; already without duplicates in themselves.
        nms_thresh: Of two masks whose boxes overlap more (IoU) one stays; not applied to one crop.
    """
    if len(crops) == 1:
        return crops[0]
    joined = dataclasses.replace(
        crops[0],
        rle=[rle for crop in crops for rle in crop.rle],
        **{name: np.concatenate([getattr(crop, name) for crop in crops]) for name in _ARRAYS},
    )
    score = 1 / box_area(torch.from_numpy(joined.crop_xyxy))
    return joined.select(unlike(joined.box_xyxy, score.numpy(), nms_thresh))


def unlike(box_xyxy: np.ndarray, score: np.ndarray, nms_thresh: float) -> np.ndarray:
    """Indices of the boxes that stay, best first (greedy non-maximal suppression).

    The same call as SAM's, because how ties are ordered depends on the implementation; always on
    the host, where boxes are by then.

    Args:
        box_xyxy: int64 [R, 4].
        score: float32 [R], higher is better.
        nms_thresh: IoU in [0, 1] above which the lower score goes.
    """
    boxes = torch.from_numpy(box_xyxy).float()
    same_kind = torch.zeros(len(boxes))
    return batched_nms(boxes, torch.from_numpy(score), same_kind, nms_thresh).numpy()
