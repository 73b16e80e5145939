"""Pooling of a coarse feature map over fine masks: one weight per mask and patch.

Enters: segments, whose masks are runs, and the size of a patch grid. Leaves: weights [R, N];
`weights @ features` is the mean of the bilinearly upsampled features over each mask.

Why weights: upsampling is linear, so instead of carrying the features up to the image (512 numbers
a pixel) the masks are carried down. With Ry, Rx the interpolation matrices, the weights of a mask S
are Ry^T S Rx / area. This is exact, costs nothing per feature, and serves other features of the
same masks without being done again.

Why it never touches a pixel: a vertical span y0 <= y < y1 of column x adds the difference of two
rows of the running sum of Ry. A row of that running sum is trivial but for two entries: patches
above have all their weight, patches below none. So a span's end is booked as "all patches above
here" (one number, spread by a second running sum once a mask) and two entries, each in the two
columns of patches between which x lies: a dozen additions an end, however long the span.

Why compiled: the same in numpy spends its time on index arrays, tens of times as long.

Shape suffixes: R segments, H W rows and columns of the patch grid, N patches = H * W, Y image rows.
"""

from __future__ import annotations

import math

import numpy as np

from zsplg_ray.label.kernels import compiled
from zsplg_ray.label.segments import Segments


def pooling_weights(segments: Segments, grid_hw: tuple[int, int]) -> np.ndarray:
    """How much each patch of a coarse grid counts in the mean over each mask.

    `weights @ features` equals upsampling the features bilinearly (half-pixel centres, as
    `F.interpolate(align_corners=False)`) to the image and averaging them over the mask; larger
    grids than the image are sampled down in the same way.

    Args:
        segments: R masks.
        grid_hw: rows and columns of the patch grid.

    Returns:
        weight_RN, float32 [R, rows * columns] (summed in float64), each row adding up to 1; NaN for
        a mask without a pixel.

    Source: f_k = sum(I * S_k) / sum(S_k), Saito et al., arXiv 2505.19846.
    """
    ends = np.cumsum([0, *map(len, segments.rle)], dtype=np.int64)
    code = np.frombuffer(b"".join(segments.rle), np.uint8)
    vertical = _bilinear_taps(segments.size_hw[0], grid_hw[0])
    horizontal = _bilinear_taps(segments.size_hw[1], grid_hw[1])
    weight_RHW = np.empty((len(segments), *grid_hw), np.float32)
    _pool_all(code, ends, *vertical, *horizontal, weight_RHW)
    return weight_RHW.reshape(len(segments), grid_hw[0] * grid_hw[1])


def _bilinear_taps(n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `n_out` samples lies among `n_in`, half-pixel centres.

    Returns:
        low, int64 [n_out], and the weight of low + 1, float64 [n_out], that of low being the rest.
        Past the last centre low is the last sample and the weight 0.
    """
    place = np.maximum((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, 0.0)
    low = np.minimum(place.astype(np.int64), n_in - 1)
    return low, np.where(low < n_in - 1, place - low, 0.0)


@compiled
def _pool_all(code, ends, low_Y, part_Y, low_X, part_X, weight_RHW):
    """Fill weight_RHW from the compressed counts; mask r is code[ends[r]:ends[r + 1]]."""
    rows, columns = weight_RHW.shape[1:]
    edge = _running_sum(low_Y, part_Y, rows)
    # One row and column more than there are patches: low + 1 may lie past the last, with weight 0.
    booked = np.empty((2, rows + 1, columns + 1))
    for r in range(len(ends) - 1):
        booked[:] = 0
        area = _book_mask(code[ends[r] : ends[r + 1]], edge, low_Y, low_X, part_X, booked)
        _spread(booked, edge[-1], area, weight_RHW[r])


@compiled
def _running_sum(low_Y, part_Y, rows):
    """The running sum of the vertical interpolation matrix, with only what is not trivial.

    Row y + 1 holds the sums over image rows 0 to y for patches low_Y[y] and low_Y[y] + 1; the last
    row holds the sums over all image rows for every patch, which those above low_Y[y] have reached.
    """
    height = len(low_Y)
    edge = np.zeros((height + 2, max(rows + 1, 2)))
    total = edge[-1]
    for y in range(height):
        total[low_Y[y]] += 1 - part_Y[y]
        total[low_Y[y] + 1] += part_Y[y]
        edge[y + 1, 0] = total[low_Y[y]]
        edge[y + 1, 1] = total[low_Y[y] + 1]
    return edge


@compiled
def _book_mask(code, edge, low_Y, low_X, part_X, booked):
    """Read one mask's compressed counts and book every vertical span; returns the area.

    Source: the format is that of pycocotools (rleFrString in maskApi.c, BSD); see `rle_runs`.
    """
    height, n_px = len(low_Y), len(low_Y) * len(low_X)
    start, area, n_runs = 0, 0, 0
    run = before = before_that = 0
    count, shift = 0, 0
    for byte in code:
        group = np.int64(byte) - 48
        count |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            count |= -1 << shift
        run = count + before_that if n_runs > 2 else count
        before_that, before = before, run
        assert 0 <= run <= n_px - start, "segments check their runs; here memory depends on it"
        if n_runs & 1:
            area += run
            x, y0 = divmod(start, height)
            end = start + run
            while start < end:
                y1 = min(height, y0 + end - start)
                if y0 > 0:
                    _book_end(y0, -1.0, x, edge, low_Y, low_X, part_X, booked)
                _book_end(y1, 1.0, x, edge, low_Y, low_X, part_X, booked)
                start += y1 - y0
                x, y0 = x + 1, 0
        else:
            start += run
        n_runs += 1
        count, shift = 0, 0
    return area


@compiled
def _book_end(y, sign, x, edge, low_Y, low_X, part_X, booked):
    """Book `sign` times row y >= 1 of the running sum, in the two columns around x."""
    i, j = low_Y[y - 1], low_X[x]
    for k, weight in ((j, sign * (1 - part_X[x])), (j + 1, sign * part_X[x])):
        booked[0, i, k] += weight  # "all patches above row i"
        booked[1, i, k] += weight * edge[y, 0]
        booked[1, i + 1, k] += weight * edge[y, 1]


@compiled
def _spread(booked, total_H, area, weight_HW):
    """Turn what was booked into one mask's weights."""
    rows, columns = weight_HW.shape
    for j in range(columns):
        below = 0.0
        for i in range(rows - 1, -1, -1):
            weight = booked[1, i, j] + below * total_H[i]
            weight_HW[i, j] = weight / area if area else math.nan
            below += booked[0, i, j]
