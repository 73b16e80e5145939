"""What SAM's low-resolution logits say about the full-size mask, without full-size floats.

Enters: float32 logits of 256 x 256 (for SAM's own sizes). Leaves: stability and box of each mask at
the size of the image (`measure`), and, for the few that are kept, their runs (`encode`). Officially
every candidate is enlarged to 1024 x 1024, cut to the part that is image, resized to the image, and
then counted. Here nothing is enlarged: see `kernels` for how, and for why the result is the same.

Two routes. Logits on a CPU go through compiled kernels whose arithmetic is torch's own, operation
by operation (`bilinear`). To be measured anywhere else, or on a CPU where torch rounds in an
unknown way, they go through `F.interpolate` twice, as many masks at a time as a budget of bytes
allows: the official computation, so bit-identical on that device. Runs are written on the host in
any case, where the kernel needs a fraction of what moving and encoding full-size masks takes.

How far the two agree with the official generator: exactly, if it runs on a CPU with the same number
of torch threads. Between devices, or between 1 and more threads, torch itself rounds differently,
and a mask may differ where a logit is within rounding of a cut-off.

Shape suffixes: M masks, B threes of masks, H W pixels (low-resolution or full-size), P full-size
lines (rows or columns), L low-resolution lines, I lines of the model's square.

Source: the steps are segment_anything's Sam.postprocess_masks and utils/amg.py (Apache-2.0).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from torch import Tensor

from zsplg_ray.label import kernels
from zsplg_ray.label.bilinear import Step, taps, torch_step
from zsplg_ray.label.kernels import Axis, Place
from zsplg_ray.label.segments import encode_mask
from zsplg_ray.settings import complain

T = TypeVar("T")

CHUNK_BYTES = 2**29
"""Full-size floats that the torch route holds at a time, unless one mask alone takes more."""

_NOT_MASK = -1e30
"""Logit outside of a window; finite, because 0 times infinity would be NaN."""


class Measured(NamedTuple):
    """What is known of M masks before one is made; on the host."""

    stability_M: np.ndarray
    """float32 [M]: IoU of the masks at the higher and the lower cut-off; NaN if both are empty."""
    box_M4: np.ndarray
    """int64 [M, 4]: x0, y0 and last column and row of the mask, pixels; zeros if it is empty."""
    window_M4: np.ndarray
    """int64 [M, 4]: y0, x0, y1, x1, half-open, low-resolution pixels: all that `encode` needs."""


class FullSize:
    """Geometry of one image or crop: low-resolution logits to the full-size mask."""

    extent_hw: tuple[int, int]
    """Rows and columns of the low-resolution logits that matter; the others belong to padding."""

    def __init__(
        self,
        low_hw: tuple[int, int],
        model_px: int,
        input_hw: tuple[int, int],
        size_hw: tuple[int, int],
        *,
        by_torch: bool = False,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """Keep the sizes.

        Args:
            low_hw: Of the decoder's logits, not larger than model_px.
            model_px: Side of the square that the model sees.
            input_hw: The part of the square that is image, 1 to model_px.
            size_hw: Of the image or crop itself, pixels.
            by_torch: Take the torch route on a CPU, too.
            chunk_bytes: Budget of the torch route.

        Raises:
            ValueError: If the sizes do not fit each other.
        """
        if not (min(low_hw) >= 1 and max(low_hw) <= model_px):
            raise ValueError(complain("low_hw", f"1 to {model_px}", low_hw, "check the model"))
        if not (min(input_hw) >= 1 and max(input_hw) <= model_px):
            raise ValueError(complain("input_hw", f"1 to {model_px}", input_hw, "resize first"))
        if min(size_hw) < 1:
            raise ValueError(complain("size_hw", "two sizes >= 1", size_hw, "check the image"))
        self.low_hw, self.model_px = low_hw, model_px
        self.input_hw, self.size_hw = input_hw, size_hw
        self.by_torch, self.chunk_bytes = by_torch, chunk_bytes
        self._axes = {
            way: tuple(_axis(low_hw[i], model_px, input_hw[i], size_hw[i], *way) for i in range(2))
            for way in itertools.product((False, True), repeat=2)
        }
        self.extent_hw = (
            max(len(rows.wide_L) for rows, _ in self._axes.values()),
            max(len(columns.wide_L) for _, columns in self._axes.values()),
        )

    def measure(self, logit_MHW: Tensor, threshold: float, offset: float) -> Measured:
        """Stability, box and window of masks.

        Args:
            logit_MHW: float32 [M, H, W], on any device, at least `extent_hw`; more does not matter.
            threshold: A pixel above it belongs to the mask.
            offset: Of the higher and the lower cut-off to the threshold, >= 0.

        Raises:
            ValueError: If the logits have another type or are too few, or the offset is negative.
        """
        _check(logit_MHW, self.extent_hw)
        if not offset >= 0:
            raise ValueError(complain("offset", ">= 0", offset, "set stability_score_offset"))
        steps = self._steps(logit_MHW.device)
        if steps is None:
            stability_M, box_M4, empty_M = self._measure_by_torch(logit_MHW, threshold, offset)
        else:
            stability_M, box_M4, empty_M = self._measure_by_kernel(
                logit_MHW, threshold, offset, steps
            )
        return Measured(stability_M, box_M4, self._windows(box_M4, empty_M))

    def encode(
        self,
        logits: Sequence[Tensor] | Sequence[np.ndarray],
        windows_M4: np.ndarray,
        threshold: float,
        image_hw: tuple[int, int],
        origin_xy: tuple[int, int],
    ) -> list[bytes]:
        """COCO compressed counts of masks, laid into an image.

        Args:
            logits: Of each mask the float32 logits in its window, on any device.
            windows_M4: int64 [M, 4], as `measure` gives them.
            threshold: As given to `measure`.
            image_hw: Of the image that the counts are for, pixels.
            origin_xy: Where the first pixel of the mask lies in it.

        Raises:
            ValueError: If a mask would not lie inside the image, or logits are not their window's.
        """
        (height, width), (x, y) = self.size_hw, origin_xy
        if min(x, y) < 0 or y + height > image_hw[0] or x + width > image_hw[1]:
            rule = f"a corner where {height} x {width} pixels fit into {image_hw}"
            raise ValueError(complain("origin_xy", rule, origin_xy, "give the crop's own corner"))
        if not len(logits):
            return []
        tensors = [torch.as_tensor(logit_HW).detach().cpu() for logit_HW in logits]
        _check_windows(tensors, windows_M4, self.extent_hw)
        steps = self._steps(torch.device("cpu"))
        if steps is None:
            return self._encode_by_torch(tensors, windows_M4, threshold, image_hw, origin_xy)
        encode = functools.partial(
            self._encode_one,
            threshold=threshold,
            steps=steps,
            image_hw=image_hw,
            origin_xy=origin_xy,
        )
        windows = [tuple(window) for window in windows_M4.tolist()]
        return list(_map(encode, tensors, windows))

    def _steps(self, device: torch.device) -> tuple[Step, Step] | None:
        """How torch computes both steps here, None for the torch route."""
        if self.by_torch or device.type != "cpu":
            return None
        first = torch_step((self.model_px, self.model_px))
        second = torch_step(self.size_hw)
        return None if first is None or second is None else (first, second)

    def _windows(self, box_M4: np.ndarray, empty_M: np.ndarray) -> np.ndarray:
        """The logits that the pixels of each box take from, int64 [M, 4].

        One more on each side, because how positions are rounded can move a pixel's taps by one
        (with a weight of next to nothing for the one that comes in).
        """
        axes = self._axes[False, False]
        window_M4 = np.empty_like(box_M4)
        for i, axis in enumerate(axes):
            first_M, last_M = box_M4[:, 1 - i], box_M4[:, 3 - i]
            window_M4[:, i] = np.maximum(axis.base_P[first_M] - 1, 0)
            end_M = _reach(axis)[last_M] + 2
            window_M4[:, i + 2] = np.minimum(end_M, self.extent_hw[i])
        window_M4[empty_M] = 0
        return window_M4

    def _measure_by_kernel(
        self, logit_MHW: Tensor, threshold: float, offset: float, steps: tuple[Step, Step]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stability, boxes, and which masks are empty."""
        first, second = steps
        axes = self._axes[first.fused_index, second.fused_index]
        logit_MHW = logit_MHW.detach().contiguous()
        values_MHW, bits_MHW = logit_MHW.numpy(), logit_MHW.view(torch.int32).numpy()
        count_M2 = np.empty((len(logit_MHW), 2), np.int64)
        box_M4 = np.empty((len(logit_MHW), 4), np.int64)
        cut_3 = np.array([threshold - offset, threshold, threshold + offset], np.float32)

        def work(part: slice) -> None:
            kernels.measure(
                values_MHW[part],
                bits_MHW[part],
                *axes,
                first.rounding,
                second.rounding,
                cut_3,
                count_M2[part],
                box_M4[part],
            )

        parts = max(1, min(torch.get_num_threads(), len(logit_MHW) // _MASKS_A_THREAD))
        bounds = np.linspace(0, len(logit_MHW), parts + 1).astype(int).tolist()
        for _ in _map(work, [slice(*pair) for pair in itertools.pairwise(bounds)]):
            pass
        empty_M = box_M4[:, 2] < 0
        box_M4[empty_M] = 0
        with np.errstate(invalid="ignore"):
            stability_M = count_M2[:, 0].astype(np.float32) / count_M2[:, 1].astype(np.float32)
        return stability_M, box_M4, empty_M

    def _encode_one(
        self,
        logit_HW: Tensor,
        window: tuple[int, int, int, int],
        threshold: float,
        steps: tuple[Step, Step],
        image_hw: tuple[int, int],
        origin_xy: tuple[int, int],
    ) -> bytes:
        first, second = steps
        rows, columns = self._axes[first.fused_index, second.fused_index]
        y0, x0, y1, x1 = window
        top, bottom = _within(rows, y0, y1)
        left, right = _within(columns, x0, x1)
        logit_HW = logit_HW.contiguous()
        turned_WH = logit_HW.T.contiguous()
        text = kernels.encode(
            logit_HW.numpy(),
            turned_WH.numpy(),
            turned_WH.view(torch.int32).numpy(),
            rows,
            columns,
            first.rounding,
            second.rounding,
            np.array([threshold] * 3, np.float32),
            Place(y0, x0, top, left, bottom, right, origin_xy[1], origin_xy[0], *image_hw),
        )
        return text.tobytes()

    def _enlarged(self, logit_MHW: Tensor) -> Iterator[Tensor]:
        """Full-size logits, float32 [m, H, W], some masks at a time: the official computation.

        Three masks are three channels, as officially, because torch chooses its kernel by that.
        """
        pixels = self.model_px**2 + self.input_hw[0] * self.input_hw[1]
        pixels += 2 * self.size_hw[0] * self.size_hw[1]
        together = 3 * max(1, self.chunk_bytes // (3 * 4 * pixels))
        (height, width), square = self.input_hw, (self.model_px, self.model_px)
        for part_MHW in logit_MHW[:, : self.low_hw[0], : self.low_hw[1]].split(together):
            masks, have_h, have_w = part_MHW.shape
            lack = (0, self.low_hw[1] - have_w, 0, self.low_hw[0] - have_h, 0, -masks % 3)
            low_B3HW = F.pad(part_MHW, lack).unflatten(0, (-1, 3))
            square_B3HW = F.interpolate(low_B3HW, square, mode="bilinear", align_corners=False)
            image_B3HW = square_B3HW[..., :height, :width]
            full_B3HW = F.interpolate(
                image_B3HW, self.size_hw, mode="bilinear", align_corners=False
            )
            yield full_B3HW.flatten(0, 1)[:masks]

    def _measure_by_torch(
        self, logit_MHW: Tensor, threshold: float, offset: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stability, boxes, and which masks are empty."""
        found = [(torch.empty(0), torch.empty(0, 4, dtype=torch.int64), torch.empty(0) > 0)]
        for full_MHW in self._enlarged(logit_MHW) if len(logit_MHW) else ():
            stability_M = calculate_stability_score(full_MHW, threshold, offset)
            mask_MHW = full_MHW > threshold
            found.append((stability_M, batched_mask_to_box(mask_MHW), ~mask_MHW.flatten(1).any(1)))
        stability_M, box_M4, empty_M = (
            torch.cat([part.to(logit_MHW.device) for part in parts]).cpu().numpy()
            for parts in zip(*found, strict=True)
        )
        return stability_M, box_M4, empty_M

    def _encode_by_torch(
        self,
        logits: Sequence[Tensor],
        windows_M4: np.ndarray,
        threshold: float,
        image_hw: tuple[int, int],
        origin_xy: tuple[int, int],
    ) -> list[bytes]:
        low_MHW = logits[0].new_full((len(logits), *self.low_hw), _NOT_MASK)
        for low_HW, logit_HW, (y0, x0, y1, x1) in zip(
            low_MHW, logits, windows_M4.tolist(), strict=True
        ):
            low_HW[y0:y1, x0:x1] = logit_HW
        (x, y), (height, width) = origin_xy, self.size_hw
        rle = []
        for full_MHW in self._enlarged(low_MHW):
            for mask_HW in (full_MHW > threshold).cpu().numpy():
                image_HW = np.zeros(image_hw, np.bool_)
                image_HW[y : y + height, x : x + width] = mask_HW
                rle.append(encode_mask(image_HW))
        return rle


_MASKS_A_THREAD = 4
"""Fewer are not worth the way to another thread."""


def _check(logit_MHW: Tensor, extent_hw: tuple[int, int]) -> None:
    shape, dtype = tuple(logit_MHW.shape), logit_MHW.dtype
    large = len(shape) == 3 and shape[1] >= extent_hw[0] and shape[2] >= extent_hw[1]
    if not large or dtype != torch.float32:
        rule = f"float32 [M, H, W] of at least {extent_hw[0]} x {extent_hw[1]}"
        raise ValueError(complain("logit_MHW", rule, f"{dtype} {list(shape)}", "decode again"))


def _check_windows(
    logits: Sequence[Tensor], windows_M4: np.ndarray, extent_hw: tuple[int, int]
) -> None:
    """Because compiled code would read past the end."""
    for logit_HW, (y0, x0, y1, x1) in zip(logits, windows_M4.tolist(), strict=True):
        inside = 0 <= y0 <= y1 <= extent_hw[0] and 0 <= x0 <= x1 <= extent_hw[1]
        if not inside or logit_HW.shape != (y1 - y0, x1 - x0) or logit_HW.dtype != torch.float32:
            rule = f"float32 [{y1 - y0}, {x1 - x0}] of a window within {extent_hw}"
            got = f"{logit_HW.dtype} {list(logit_HW.shape)}"
            raise ValueError(complain("logits", rule, got, "cut them out as measured"))


@functools.lru_cache(maxsize=16)
def _axis(
    low: int, model: int, used: int, size: int, first_fused: bool, second_fused: bool
) -> Axis:
    """Both steps along one axis: `low` lines to `model`, the first `used` of these to `size`."""
    low_tap_2I, low_weight_2I = taps(low, model, first_fused)
    tap_2P, weight_2P = taps(used, size, second_fused)
    base_P = low_tap_2I[0, tap_2P[0]]
    weight_3P = np.zeros((3, size))
    for tap_P, tap_weight_P in zip(tap_2P, weight_2P, strict=True):
        for low_P, low_weight_P in zip(low_tap_2I[:, tap_P], low_weight_2I[:, tap_P], strict=True):
            np.add.at(
                weight_3P,
                (low_P - base_P, np.arange(size)),
                tap_weight_P.astype(np.float64) * low_weight_P,
            )
    reach_P = low_tap_2I[1, tap_2P[1]]
    extent = int(reach_P.max()) + 1
    wide_L = np.zeros(extent, np.uint8)
    wide_L[base_P[reach_P - base_P == 2]] = 255
    return Axis(
        tap_2P=tap_2P,
        tap_weight_2P=weight_2P,
        low_tap_2I=low_tap_2I,
        low_tap_weight_2I=low_weight_2I,
        base_P=base_P,
        weight_3P=weight_3P.astype(np.float32),
        start_L=np.searchsorted(base_P, np.arange(extent + 1)).astype(np.int32),
        wide_L=wide_L,
    )


def _reach(axis: Axis) -> np.ndarray:
    """int32 [P], rising: the last low-resolution line that each full-size line takes from."""
    return axis.low_tap_2I[1, axis.tap_2P[1]]


def _within(axis: Axis, start: int, stop: int) -> tuple[int, int]:
    """The full-size lines, half-open, that take from lines `start` to `stop` alone."""
    first = int(np.searchsorted(axis.base_P, start))
    return first, max(first, int(np.searchsorted(_reach(axis), stop)))


def _map(function: Callable[..., T], *arguments: Sequence[Any]) -> Iterator[T]:
    """`map`, spread over torch's number of threads."""
    threads = torch.get_num_threads()
    if threads == 1 or len(arguments[0]) == 1:
        return map(function, *arguments)
    return _pool(threads).map(function, *arguments)


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fullsize")
