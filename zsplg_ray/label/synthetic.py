"""Made-up SAM logits that load the post-processing like a real image does.

Enters: a seed and sizes. Leaves: for each point of the grid the low-resolution logits and predicted
IoUs of three masks, as SAM's decoder would return them. For measuring speed only: a decoder with
random weights gives noise, which costs the post-processing far more or far less than masks do.

The image is cut into warped Voronoi cells three times: wholes (8), parts (35), subparts (140). A
point's three masks are the cells it lies in. A logit is a slope times the signed distance to the
cell's border, levelled off at +-20, plus smooth noise that differs from candidate to candidate. The
slopes and the predicted IoUs are drawn so that, of the 3,072 masks of a 32 x 32 grid, about 1,675
are rated above 0.88 and 1,290 of them have a stability of at least 0.95 (offset 1); about 740 are
above 0.92, and 480 of these reach 0.96.

Shape suffixes: Q points, M masks (three a point), K cells, H W low-resolution pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import build_point_grid
from torch import Tensor

LEVELS = (8, 35, 140)
"""Cells of the image at each of the three levels."""

_LEVEL_OFF = 20.0
_WARP_PX = 0.03
"""Standard deviation of the warp, as part of the longest side."""
_NOISE = 0.4
"""Standard deviation of the noise on a logit."""
_IOU_MEAN, _IOU_STD = 0.8855, 0.0488
_UNSTABLE_MEDIAN, _UNSTABLE_SIGMA = 0.0315, 0.63
"""1 - stability is log-normal."""


class VoronoiLogits:
    """The decoder's answers for a grid of points, made when they are asked for."""

    def __init__(
        self, seed: int, points_per_side: int, low_px: int, extent_hw: tuple[int, int]
    ) -> None:
        """Cut the image into cells.

        Args:
            seed: The same seed gives the same answers, however they are cut into chunks.
            points_per_side: Points are laid out as SAM does, row by row.
            low_px: Side of the square of logits, 256 for SAM.
            extent_hw: The part of the square that the image covers; the rest is padding.
        """
        self._seed, self._low_px = seed, low_px
        rng = np.random.default_rng(seed)
        position_HW2 = _warped(rng, low_px, extent_hw)
        self._levels = [_Cells.cut(rng, position_HW2, cells, extent_hw) for cells in LEVELS]
        grid_Q2 = build_point_grid(points_per_side) * np.array(extent_hw[::-1])
        self._pixel_Q2 = grid_Q2.astype(np.int64)

    def __len__(self) -> int:
        """The number of points."""
        return len(self._pixel_Q2)

    def chunk(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The answers for points `start` to `stop`.

        Returns:
            float32 [Q, 3, low_px, low_px], logits; float32 [Q, 3], predicted IoU.
        """
        points = range(*slice(start, stop).indices(len(self)))
        logit_QMHW = torch.empty(len(points), 3, self._low_px, self._low_px)
        iou_QM = np.empty((len(points), 3), np.float32)
        for row, point in enumerate(points):
            rng = np.random.default_rng([self._seed, point])
            x, y = self._pixel_Q2[point]
            unstable_M = _UNSTABLE_MEDIAN * np.exp(_UNSTABLE_SIGMA * rng.standard_normal(3))
            noise_MHW = _smooth(rng, 3, self._low_px, 12) * _NOISE
            for m, cells in enumerate(self._levels):
                distance_HW, slope = cells.of(int(y), int(x), float(unstable_M[m]))
                level_HW = torch.tanh(distance_HW * (slope / _LEVEL_OFF)) * _LEVEL_OFF
                logit_QMHW[row, m] = level_HW + noise_MHW[m]
            iou_QM[row] = rng.normal(_IOU_MEAN, _IOU_STD, 3).clip(0, 1)
        return logit_QMHW, torch.from_numpy(iou_QM)


class _Cells(NamedTuple):
    """One level."""

    label_HW: np.ndarray
    """int64, the cell of each pixel."""
    distance_KHW: Tensor
    """float32, pixels to the border of each cell, negative outside of it."""
    perimeter_per_area_K: np.ndarray

    @classmethod
    def cut(
        cls, rng: np.random.Generator, position_HW2: Tensor, cells: int, extent_hw: tuple[int, int]
    ) -> _Cells:
        seed_K2 = torch.from_numpy(rng.uniform(0, 1, (cells, 2)) * extent_hw).float()
        away_HWK = torch.cdist(position_HW2, seed_K2)
        nearest = away_HWK.topk(2, largest=False)
        label_HW, (best_HW, second_HW) = nearest.indices[..., 0], nearest.values.unbind(-1)
        distance_KHW = torch.empty(cells, *label_HW.shape)
        for k in range(cells):
            rival_HW = torch.where(label_HW == k, second_HW, best_HW)
            distance_KHW[k] = (rival_HW - away_HWK[..., k]) / 2
        inside_KHW = distance_KHW[:, : extent_hw[0], : extent_hw[1]]
        area_K = (inside_KHW > 0).sum((1, 2)).clamp(min=1)
        border_K = ((inside_KHW > -1).sum((1, 2)) - (inside_KHW > 1).sum((1, 2))) / 2
        return cls(label_HW.numpy(), distance_KHW, (border_K / area_K).numpy())

    def of(self, y: int, x: int, unstable: float) -> tuple[Tensor, float]:
        """Distance to the border of a pixel's cell; the slope that gives this instability."""
        k = int(self.label_HW[y, x])
        return self.distance_KHW[k], float(2 * self.perimeter_per_area_K[k] / unstable)


def _warped(rng: np.random.Generator, low_px: int, extent_hw: tuple[int, int]) -> Tensor:
    """Position of each pixel after the warp, float32 [H, W, 2] (y, x)."""
    axis = torch.arange(low_px, dtype=torch.float32) + 0.5
    position_HW2 = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    shift_HW2 = _smooth(rng, 2, low_px, 10).permute(1, 2, 0)
    return position_HW2 + shift_HW2 * (_WARP_PX * max(extent_hw))


def _smooth(rng: np.random.Generator, fields: int, low_px: int, knots: int) -> Tensor:
    """Smooth noise of about unit variance, float32 [fields, H, W]."""
    knot = torch.from_numpy(rng.standard_normal((fields, 1, knots, knots))).float()
    size = (low_px, low_px)
    field = F.interpolate(knot, size, mode="bicubic", align_corners=False)[:, 0]
    return field * math.sqrt(1.8)
