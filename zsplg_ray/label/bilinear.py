"""Which numbers torch's bilinear interpolation on a CPU multiplies, and in which order.

Enters: the sizes of a step. Leaves: the two input lines and weights of each output line (`taps`),
and the order of operations (`torch_step`). With both, a single value can be computed that is equal
to `F.interpolate`'s to the last bit, which is what makes masks equal where a logit is at a cut-off.

Torch has two kernels for float32 with up to three channels, and takes another one when it has a
single thread or when height + width of the output is at most 128; each exists with and without FMA
instructions. The kernel is found by asking torch for a small example and comparing bits, not by
knowing the rule, so a torch that rounds in an unknown way is noticed: `torch_step` returns None.

Source: aten/src/ATen/native/UpSample.h and cpu/UpSampleKernel.cpp in torch (BSD-3).
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from zsplg_ray.label.kernels import Rounding, resample

SMALL_OUTPUT_PX = 128
"""Up to this height + width of the output torch takes one kernel whatever the threads."""

_EXAMPLE_HW = (7, 11)
_LARGE_HW, _SMALL_HW = (90, 75), (29, 23)


class Step(NamedTuple):
    """How torch computes a bilinear step now."""

    rounding: Rounding
    fused_index: bool
    """Whether positions are computed with FMA, too."""


def taps(lines_in: int, lines_out: int, fused_index: bool) -> tuple[np.ndarray, np.ndarray]:
    """What each output line takes, without `align_corners`.

    Args:
        lines_in: Rows (or columns) of the input, >= 1.
        lines_out: Of the output, >= 1.
        fused_index: As in `Step`.

    Returns:
        int32 [2, lines_out], input lines (at the far edge both are the last line); float32
        [2, lines_out], their weights, which add up to 1.
    """
    scale = np.float32(lines_in) / np.float32(lines_out)
    middle = np.arange(lines_out, dtype=np.float32) + np.float32(0.5)
    if fused_index:  # float64 holds the product of such numbers, so this rounds once
        position = (np.float64(scale) * middle - 0.5).astype(np.float32)
    else:
        position = scale * middle - np.float32(0.5)
    position = np.maximum(position, np.float32(0))
    near = np.minimum(position.astype(np.int32), lines_in - 1)
    far_weight = np.clip(position - near.astype(np.float32), 0, 1).astype(np.float32)
    far = np.minimum(near + 1, lines_in - 1)
    weight = np.stack([np.float32(1) - far_weight, far_weight])
    return np.stack([near, far]).astype(np.int32), weight


def torch_step(output_hw: tuple[int, int]) -> Step | None:
    """How torch computes outputs of this size with the threads it has now; None if unknown."""
    return _step(sum(output_hw) <= SMALL_OUTPUT_PX, torch.get_num_threads())


@functools.lru_cache
def _step(small: bool, threads: int) -> Step | None:
    """Found on an example; `threads` only tells cached answers apart."""
    rng = np.random.default_rng(0)
    example_HW = rng.standard_normal(_EXAMPLE_HW).astype(np.float32)
    output_hw = _SMALL_HW if small else _LARGE_HW
    asked = torch.from_numpy(example_HW)[None, None].expand(2, 3, -1, -1).contiguous()
    answer = F.interpolate(asked, output_hw, mode="bilinear", align_corners=False)[1, 2].numpy()
    for by_product, fused, fused_index in itertools.product((True, False), repeat=3):
        step = Step(Rounding(by_product, fused), fused_index)
        if np.array_equal(apply_step(example_HW, output_hw, step), answer):
            return step
    return None


def apply_step(field_HW: np.ndarray, output_hw: tuple[int, int], step: Step) -> np.ndarray:
    """`F.interpolate` of one float32 field as `step` says; slow, it is the definition."""
    rows = taps(field_HW.shape[0], output_hw[0], step.fused_index)
    columns = taps(field_HW.shape[1], output_hw[1], step.fused_index)
    return resample(np.ascontiguousarray(field_HW), *rows, *columns, step.rounding)
