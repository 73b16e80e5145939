"""Image -> segments: SAM's automatic mask generation.

What enters: a uint8 RGB image. What leaves: `Segments` without embeddings, best first as SAM orders
them. This is the official generator (segment_anything, Apache-2.0) behind the project's record, so
that whoever replaces it by something faster has one function to equal: `MaskProposer.propose`.
"""

from __future__ import annotations

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from zsplg_ray.config import SamConfig
from zsplg_ray.label.segments import Segments


class MaskProposer:
    """SAM and the settings of its mask generator."""

    def __init__(self, sam: Sam, config: SamConfig) -> None:
        assert config.points_per_side is not None, "presets.resolve_label comes first"
        self.config = config
        self.generator = SamAutomaticMaskGenerator(
            sam,
            points_per_side=config.points_per_side,
            points_per_batch=config.points_per_batch,
            pred_iou_thresh=config.pred_iou_thresh,  # type: ignore[arg-type]
            stability_score_thresh=config.stability_score_thresh,  # type: ignore[arg-type]
            stability_score_offset=config.stability_score_offset,  # type: ignore[arg-type]
            box_nms_thresh=config.box_nms_thresh,  # type: ignore[arg-type]
            crop_n_layers=config.crop_n_layers,
            min_mask_region_area=config.min_mask_region_area or 0,
            output_mode="coco_rle",
        )

    def propose(self, image_HWC: np.ndarray, points_per_batch: int | None = None) -> Segments:
        """Segments of one image.

        Args:
            image_HWC: uint8 RGB.
            points_per_batch: Most points decoded at a time, never more than configured. Fewer take
                less memory.
        """
        most = self.config.points_per_batch
        self.generator.points_per_batch = min(points_per_batch or most, most)
        with torch.inference_mode():
            records = self.generator.generate(image_HWC)
        return Segments.from_sam(records, image_HWC.shape[:2])
