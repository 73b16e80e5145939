"""Image -> segments: SAM's automatic mask generation, the same masks many times faster.

What enters: uint8 RGB images and a stock `Sam`. What leaves: `Segments` without embeddings, in the
official generator's order, equal to its records (up to rounding of the logits, see the parts; on a
GPU torch itself rounds the official convolutions to TF32 unless it is told not to).

A grid of points is laid over the image (and over crops of it), every point is a prompt, and of the
three masks of each prompt those stay that SAM itself rates well, that are stable under another
cut-off, and that no better mask has nearly the same box as. The official generator does this an
image at a time and makes every candidate full-size before it looks at it. Here:

- images go through encoder and decoder together, as many as `budget` allows;
- `encoder` and `decoder` compute the same numbers in fewer operations, and masks whose predicted
  IoU is too low are never upscaled;
- `fullsize` answers what the full-size mask would say (counts, box) from the low-resolution logits;
- only what survives non-maximal suppression is written as RLE.

Until then a candidate is the window of its low-resolution logits in which the mask lies.

Shape suffixes: I images or crops under way, Q points, M masks, C channels, H W pixels.

Source: segment_anything's SamAutomaticMaskGenerator and SamPredictor (Apache-2.0).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.amg import (
    build_all_layer_point_grids,
    generate_crop_boxes,
    is_box_near_crop_edge,
)
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.transforms.functional import resize, to_pil_image

from zsplg_ray.config import SamConfig
from zsplg_ray.label.budget import images_at_once, memory_gib, points_together
from zsplg_ray.label.decoder import PointDecoder
from zsplg_ray.label.encoder import ImageEncoder
from zsplg_ray.label.fullsize import FullSize
from zsplg_ray.label.proposals import Proposals, join_crops, unlike
from zsplg_ray.label.segments import Segments


class MaskProposer:
    """SAM and the settings of its mask generator."""

    def __init__(self, sam: Sam, config: SamConfig, gpu_share: float = 1.0) -> None:
        """Prepare the model's weights; nothing of `sam` is changed.

        Args:
            sam: On its device, in eval mode.
            config: Resolved (`presets.resolve_sam`).
            gpu_share: Part of the GPU that is ours, (0, 1]; counts if `memory_gib` is not given.
        """
        self.sam, self.config, self.rules = sam, config, _Rules.of(config)
        self.encoder = ImageEncoder(sam.image_encoder, config.precision)
        self.decoder = PointDecoder(sam)
        gib = memory_gib(sam, config, sam.device, share=gpu_share)
        self.images_at_once = images_at_once(sam, config, gib, sam.device)
        self.grids = build_all_layer_point_grids(
            self.rules.points_per_side,
            config.crop_n_layers,
            config.crop_n_points_downscale_factor,
        )

    def propose(self, image_HWC: np.ndarray, points_per_batch: int | None = None) -> Segments:
        """Segments of one image; see `propose_many`."""
        return self.propose_many([image_HWC], points_per_batch)[0]

    def propose_many(
        self, images: Sequence[np.ndarray], points_per_batch: int | None = None
    ) -> list[Segments]:
        """Segments of each image.

        Args:
            images: uint8 RGB [H, W, C], of any sizes; `images_at_once` of them go together.
            points_per_batch: Most points of an image decoded at a time, never more than configured.
                Fewer take less memory.
        """
        return [found.to_segments() for found in self.proposals(images, points_per_batch)]

    @torch.inference_mode()
    def proposals(
        self, images: Sequence[np.ndarray], points_per_batch: int | None = None
    ) -> list[Proposals]:
        """The same with SAM's own boxes, points and crops."""
        config = self.config
        most = config.points_per_batch
        points = points_together(self.sam, min(points_per_batch or most, most), self.sam.device)
        views = [view for i, image in enumerate(images) for view in self._views(i, image)]
        crops: list[list[Proposals]] = [[] for _ in images]
        for together in _groups(views, self.images_at_once):
            found = self._search(together, points)
            for view, proposals in zip(together, found, strict=True):
                crops[view.image].append(proposals)
        joined = [join_crops(of_image, config.crop_nms_thresh) for of_image in crops]
        if not self.rules.min_mask_region_area:
            return joined
        alike = max(self.rules.box_nms_thresh, config.crop_nms_thresh)
        return [
            found.without_small_regions(self.rules.min_mask_region_area, alike) for found in joined
        ]

    def _views(self, index: int, image_HWC: np.ndarray) -> Iterator[_View]:
        size_hw = (image_HWC.shape[0], image_HWC.shape[1])
        crops = generate_crop_boxes(
            size_hw, self.config.crop_n_layers, self.config.crop_overlap_ratio
        )
        for (x0, y0, x1, y1), layer in zip(*crops, strict=True):
            if x0 < x1 and y0 < y1:  # of a few pixels, crops are empty
                pixels_HWC = image_HWC[y0:y1, x0:x1]
                side = self.sam.image_encoder.img_size
                input_hw = ResizeLongestSide.get_preprocess_shape(y1 - y0, x1 - x0, side)
                input_hw = (max(1, input_hw[0]), max(1, input_hw[1]))
                yield _View(index, size_hw, [x0, y0, x1, y1], layer, pixels_HWC, input_hw)

    def _search(self, views: Sequence[_View], points: int) -> list[Proposals]:
        """The masks of views of one layer, duplicates dropped."""
        low_hw = self.sam.prompt_encoder.mask_input_size
        model_px = self.sam.image_encoder.img_size
        frames = [FullSize(low_hw, model_px, view.input_hw, view.crop_hw) for view in views]
        rows, columns = np.max([frame.extent_hw for frame in frames], axis=0)
        feature_ICHW = self.encoder(torch.cat([self._input(view) for view in views]))
        side = self.decoder.prepare(feature_ICHW, (int(rows), int(columns)))
        grid_Q2 = self.grids[views[0].layer]
        point_IQ2 = np.stack([grid_Q2 * view.crop_hw[::-1] for view in views])
        scale_I12 = np.array([[np.divide(v.input_hw, v.crop_hw)[::-1]] for v in views])
        model_IQ2 = torch.from_numpy(point_IQ2 * scale_I12).to(self.sam.device)
        kept: list[list[_Kept]] = [[] for _ in views]
        for start in range(0, len(grid_Q2), points):
            chunk = slice(start, start + points)
            decoded = self.decoder.decode(side, model_IQ2[:, chunk], self.rules.pred_iou_thresh)
            iou_IK = decoded.iou_IQ3.flatten(1).cpu().numpy()
            index_M = decoded.index_M.cpu().numpy()
            bounds = np.searchsorted(index_M, np.arange(len(views) + 1) * iou_IK.shape[1])
            for i, (first, last) in enumerate(itertools.pairwise(bounds.tolist())):
                mask_M = index_M[first:last] - i * iou_IK.shape[1]
                point_M2 = point_IQ2[i, chunk][mask_M // decoded.iou_IQ3.shape[2]]
                kept[i].append(
                    self._keep(
                        views[i],
                        frames[i],
                        decoded.logit_MHW[first:last],
                        iou_IK[i, mask_M],
                        point_M2,
                    )
                )
            del decoded  # or the logits of two chunks would be held
        return [self._finish(*each) for each in zip(views, frames, kept, strict=True)]

    def _input(self, view: _View) -> Tensor:
        """One view as the encoder takes it, float32 [1, C, H, W]."""
        resized_HWC = np.array(resize(to_pil_image(view.pixels_HWC), list(view.input_hw)))
        pixels = torch.from_numpy(resized_HWC).to(self.sam.device)
        return self.sam.preprocess(pixels.permute(2, 0, 1).contiguous()[None])

    def _keep(
        self,
        view: _View,
        frame: FullSize,
        logit_MHW: Tensor,
        iou_M: np.ndarray,
        point_M2: np.ndarray,
    ) -> _Kept:
        """The masks of one view that pass all filters."""
        rules = self.rules
        measured = frame.measure(logit_MHW, self.sam.mask_threshold, rules.stability_score_offset)
        height, width = view.size_hw
        box_M4 = torch.as_tensor(measured.box_M4)
        passed_M = ~is_box_near_crop_edge(box_M4, view.crop_xyxy, [0, 0, width, height]).numpy()
        if rules.stability_score_thresh > 0:
            passed_M &= measured.stability_M >= rules.stability_score_thresh
        keep = np.flatnonzero(passed_M)
        windows = measured.window_M4[keep].tolist()
        if logit_MHW.is_cuda:  # one copy of all, since launches cost more there than memory
            kept_MHW = logit_MHW[torch.from_numpy(keep).to(logit_MHW.device)]
            logits = [kept_MHW[i, y0:y1, x0:x1] for i, (y0, x0, y1, x1) in enumerate(windows)]
        else:
            pairs = zip(keep, windows, strict=True)
            logits = [logit_MHW[m, y0:y1, x0:x1].clone() for m, (y0, x0, y1, x1) in pairs]
        return _Kept(
            logits,
            measured.window_M4[keep],
            measured.box_M4[keep],
            measured.stability_M[keep],
            iou_M[keep],
            point_M2[keep],
        )

    def _finish(self, view: _View, frame: FullSize, chunks: Sequence[_Kept]) -> Proposals:
        """Drop duplicates; RLE, boxes and points of the rest in the frame of the image."""
        logits = [logit_HW for chunk in chunks for logit_HW in chunk.logits]
        window_M4, box_M4, stability_M, iou_M, point_M2 = (
            np.concatenate(column) for column in zip(*(chunk[1:] for chunk in chunks), strict=True)
        )
        keep = unlike(box_M4, iou_M, self.rules.box_nms_thresh)
        x0, y0 = view.crop_xyxy[:2]
        rle = frame.encode(
            [logits[m] for m in keep],
            window_M4[keep],
            self.sam.mask_threshold,
            image_hw=view.size_hw,
            origin_xy=(x0, y0),
        )
        return Proposals(
            size_hw=view.size_hw,
            rle=rle,
            box_xyxy=box_M4[keep] + np.array([x0, y0, x0, y0]),
            predicted_iou=iou_M[keep],
            stability=stability_M[keep],
            point_xy=point_M2[keep] + np.array([x0, y0]),
            crop_xyxy=np.tile(np.array(view.crop_xyxy, np.int64), (len(keep), 1)),
        )


class _Rules(NamedTuple):
    """The settings that presets fill in, all given."""

    points_per_side: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    min_mask_region_area: int

    @classmethod
    def of(cls, config: SamConfig) -> _Rules:
        given = {name: getattr(config, name) for name in cls._fields}
        assert None not in given.values(), "presets.resolve_sam comes first"
        return cls(**given)


@dataclass(frozen=True, eq=False)
class _View:
    """An image or a crop of it."""

    image: int
    size_hw: tuple[int, int]
    """Of the whole image."""
    crop_xyxy: list[int]
    layer: int
    pixels_HWC: np.ndarray
    """uint8, of the crop."""
    input_hw: tuple[int, int]
    """To what it is resized, so that the longest side is the model's."""

    @property
    def crop_hw(self) -> tuple[int, int]:
        return self.pixels_HWC.shape[0], self.pixels_HWC.shape[1]


class _Kept(NamedTuple):
    """Masks of one view that have passed all filters, in the order of their points."""

    logits: list[Tensor]
    """Each the window of a mask's low-resolution logits."""
    window_M4: np.ndarray
    box_M4: np.ndarray
    stability_M: np.ndarray
    iou_M: np.ndarray
    point_M2: np.ndarray


def _groups(views: list[_View], most: int) -> Iterator[list[_View]]:
    """Views of the same layer (so of as many points), at most `most` together."""
    for layer in sorted({view.layer for view in views}):
        of_layer = [view for view in views if view.layer == layer]
        for start in range(0, len(of_layer), most):
            yield of_layer[start : start + most]
