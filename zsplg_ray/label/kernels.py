"""Compiled loops that read a full-size mask off low-resolution logits without making it.

Enters: low-resolution logits, for rows and for columns a `Axis` (which logits a full-size pixel is
a mixture of), and how torch rounds (`Rounding`). Leaves: counts and boxes (`measure`), or runs in
COCO's compressed form (`encode`). `fullsize` is the door to them and says what they mean.

How it is fast. A full-size value is a mixture of at most 3 x 3 neighbouring logits. So:
1. Each logit is classified: which of the three cut-offs it surely exceeds, with a margin for
   rounding. A cell is a logit and its neighbours to the right and below; where all of a cell's
   logits are in one class, so are the full-size pixels that begin in it: they are only counted.
2. The other cells lie along contours. Their pixels are computed as one mixture of up to nine
   logits, which differs from torch's two steps by rounding only.
3. Where such a value is nearer to a cut-off than the margin, it is computed again, in exactly
   torch's operations (`_exact`). This is rare, and it is what makes the result the same to the bit.
The cost is one look at each logit and work in proportion to the length of the contours.

The margin is 1e-5 of the largest logit in magnitude. Both ways of computing a value consist of
convex combinations with fewer than 20 roundings, 1.2e-6, so it is safe by a wide factor. If there
are infinities, the margin is infinite, and all that is not known for certain is computed exactly.

Compiled functions that call each other are in one file, because numba's cache of a function is
renewed when its own file changes, not when that of a function it calls does.

Shape suffixes: M masks, H W low-resolution rows and columns, L low-resolution lines, I lines of the
square that the model sees, P full-size lines. A line is a row or a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import intrinsic

_UNDECIDED = _NO = np.uint8(0)
_ABOVE_NONE = np.uint8(1)
_ABOVE_LOW = np.uint8(2)
_ABOVE_CUT = np.uint8(4)
_ABOVE_HIGH = np.uint8(8)
"""Classes of a cell's pixels. A logit may belong to several: it does near a cut-off."""

_MARGIN = np.float32(1e-5)

_U = np.uintp
_U1, _U2, _U3 = _U(1), _U(2), _U(3)
"""For indices: numba tests signed ones for being negative, and that keeps loops from SIMD."""


class Axis(NamedTuple):
    """How full-size rows (or columns) are mixed from low-resolution ones.

    Torch's two steps, for `_exact`: a full-size line takes from two lines of the model's square,
    and each of these from two low-resolution lines. Both steps in one: three low-resolution lines.
    """

    tap_2P: np.ndarray
    """int32 [2, P], lines of the square."""
    tap_weight_2P: np.ndarray
    """float32 [2, P]."""
    low_tap_2I: np.ndarray
    """int32 [2, I], low-resolution lines."""
    low_tap_weight_2I: np.ndarray
    """float32 [2, I]."""
    base_P: np.ndarray
    """int32 [P], rising: the first of the low-resolution lines, and the cell that P begins in."""
    weight_3P: np.ndarray
    """float32 [3, P], for the lines `base_P` + 0, 1, 2."""
    start_L: np.ndarray
    """int32 [L + 1]: cell c has the full-size lines start_L[c] to start_L[c + 1]."""
    wide_L: np.ndarray
    """uint8 [L], 255 where a line of the cell takes from three low-resolution lines, else 0."""


class Rounding(NamedTuple):
    """The order of operations in a bilinear step of torch, which differs between its kernels."""

    by_product: bool
    """Weights of x and y are multiplied with each other first; else x is mixed first, then y."""
    fused: bool
    """Products are added without being rounded (FMA)."""


class Place(NamedTuple):
    """Where a window and its mask lie."""

    y0: int
    x0: int
    """First row and column of the window, low-resolution pixels."""
    top: int
    left: int
    bottom: int
    right: int
    """The full-size pixels that take from nothing but the window, half-open."""
    image_y: int
    image_x: int
    """Of the first full-size pixel in the image."""
    image_height: int
    image_width: int


class _Cuts(NamedTuple):
    low: Any
    cut: Any
    high: Any
    margin: Any


class _Field(NamedTuple):
    """What `_exact` needs."""

    logit_HW: Any
    rows: Any
    columns: Any
    y0: Any
    x0: Any
    first: Any
    second: Any


class _Work(NamedTuple):
    """Memory that is used again and again."""

    class_LL: Any
    """uint8, with two more lines and columns, of no class."""
    joined_L: Any
    """uint8, with two more."""
    cell_L: Any
    """uint8."""
    mixed_L: Any
    """float32, as long as the axis along the lines, with two more zeros."""
    value_P: Any
    """float32."""


def compiled(function: Callable[..., Any]) -> Any:
    """`numba.njit` that lets other threads run, and keeps what it compiled where it may write."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


def _make_fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return numba.float32(numba.float32, numba.float32, numba.float32), generate


_fma: Any = intrinsic(_make_fma)
"""(a, b, c) -> a * b + c, rounded once, float32."""


@compiled
def blend(a, b, c, d, x0, x1, y0, y1, rounding):
    """One bilinear value as torch computes it on a CPU: a, b over c, d; all float32.

    Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp in torch (BSD-3); which products are fused
    was found by comparing bits.
    """
    if rounding.by_product:
        if rounding.fused:
            return _fma(y1 * x1, d, _fma(y1 * x0, c, _fma(y0 * x0, a, (y0 * x1) * b)))
        return (((y0 * x0) * a + (y0 * x1) * b) + (y1 * x0) * c) + (y1 * x1) * d
    if rounding.fused:
        return _fma(_fma(a, x0, b * x1), y0, _fma(c, x0, d * x1) * y1)
    return (a * x0 + b * x1) * y0 + (c * x0 + d * x1) * y1


@compiled
def resample(field_HW, tap_2P, weight_2P, column_tap_2P, column_weight_2P, rounding):
    """One bilinear step over a whole field, value by value; for comparing with torch."""
    out = np.empty((tap_2P.shape[1], column_tap_2P.shape[1]), np.float32)
    for y in range(out.shape[0]):
        upper, lower = field_HW[tap_2P[0, y]], field_HW[tap_2P[1, y]]
        for x in range(out.shape[1]):
            left, right = column_tap_2P[0, x], column_tap_2P[1, x]
            out[y, x] = blend(
                upper[left],
                upper[right],
                lower[left],
                lower[right],
                column_weight_2P[0, x],
                column_weight_2P[1, x],
                weight_2P[0, y],
                weight_2P[1, y],
                rounding,
            )
    return out


@compiled
def _square(field, row, column):
    """A value of the square that the model sees: torch's first step."""
    rows, columns = field.rows, field.columns
    upper, lower = rows.low_tap_2I[0, row] - field.y0, rows.low_tap_2I[1, row] - field.y0
    left, right = columns.low_tap_2I[0, column] - field.x0, columns.low_tap_2I[1, column] - field.x0
    return blend(
        field.logit_HW[upper, left],
        field.logit_HW[upper, right],
        field.logit_HW[lower, left],
        field.logit_HW[lower, right],
        columns.low_tap_weight_2I[0, column],
        columns.low_tap_weight_2I[1, column],
        rows.low_tap_weight_2I[0, row],
        rows.low_tap_weight_2I[1, row],
        field.first,
    )


@compiled
def _exact(field, y, x):
    """A full-size value, bit by bit as torch's two steps give it."""
    rows, columns = field.rows, field.columns
    upper, lower = rows.tap_2P[0, y], rows.tap_2P[1, y]
    left, right = columns.tap_2P[0, x], columns.tap_2P[1, x]
    return blend(
        _square(field, upper, left),
        _square(field, upper, right),
        _square(field, lower, left),
        _square(field, lower, right),
        columns.tap_weight_2P[0, x],
        columns.tap_weight_2P[1, x],
        rows.tap_weight_2P[0, y],
        rows.tap_weight_2P[1, y],
        field.second,
    )


@compiled
def _mix(
    logit_LL,
    line,
    weight_3P,
    p,
    base_P,
    along_weight_3P,
    along0,
    start,
    stop,
    cuts,
    mixed_L,
    value_P,
):
    """Fill `value_P` for some pixels of a line, which takes from three lines of logits.

    Returns how many of them are too near a cut-off to be relied on.

    Args:
        logit_LL: float32, lines first.
        line: The first of the three.
        weight_3P: Weights of the three.
        p: The full-size line.
        base_P: Of the pixels along the line.
        along_weight_3P: Of the same.
        along0: What `base_P` calls the first logit of a line.
        start: The first pixel.
        stop: The last one + 1, > start.
        cuts: `_Cuts`.
        mixed_L: float32, is given a line mixed of the three; 0 beyond the end of the logits.
        value_P: float32, is given the values.
    """
    start, stop, line, along0 = _U(start), _U(stop), _U(line), _U(along0)
    last = _U(logit_LL.shape[0] - 1)
    second, third = min(line + _U1, last), min(line + _U2, last)
    w1, w2, w3 = weight_3P[0, _U(p)], weight_3P[1, _U(p)], weight_3P[2, _U(p)]
    end = min(_U(base_P[stop - _U1]) + _U3, along0 + _U(logit_LL.shape[1]))
    for c in range(_U(base_P[start]), end):
        further = _fma(w2, logit_LL[second, c - along0], w3 * logit_LL[third, c - along0])
        mixed_L[c] = _fma(w1, logit_LL[line, c - along0], further)
    near = np.int32(0)
    for q in range(start, stop):
        c = _U(base_P[q])
        further = _fma(
            along_weight_3P[1, q], mixed_L[c + _U1], along_weight_3P[2, q] * mixed_L[c + _U2]
        )
        value = _fma(along_weight_3P[0, q], mixed_L[c], further)
        value_P[q] = value
        near += np.int32(_is_near(value, cuts))
    return near


@compiled
def _correct(field, turned, p, start, stop, cuts, value_P):
    """Replace what `_mix` could not decide."""
    for q in range(start, stop):
        if _is_near(value_P[q], cuts):
            value_P[q] = _exact(field, q, p) if turned else _exact(field, p, q)


@compiled
def _is_near(value, cuts):
    """Whether rounding might decide on which side of a cut-off it lies; so for NaN."""
    low, cut = abs(value - cuts.low) > cuts.margin, abs(value - cuts.cut) > cuts.margin
    return not (low & cut & (abs(value - cuts.high) > cuts.margin))


@compiled
def _ordered(bits):
    """Bits of a float32 as an int32 of the same order, and back."""
    return np.int32(bits ^ np.int32((bits >> 31) & 0x7FFFFFFF))


@compiled
def _extremes(bits_HW, height, width):
    """Each row's largest logit, and in the end the largest magnitude, float32 [height + 1].

    Reduced as integers, because only these are reduced with SIMD.
    """
    extreme = np.empty(height + 1, np.int32)
    peak = np.int32(0)
    for r in range(height):
        row_W, top = bits_HW[r], np.int32(-(2**31))
        for c in range(width):
            magnitude = np.int32(row_W[c] & np.int32(0x7FFFFFFF))
            ordered = _ordered(row_W[c])
            top = ordered if ordered > top else top
            peak = magnitude if magnitude > peak else peak
        extreme[r] = _ordered(top)
    extreme[height] = peak
    return extreme.view(np.float32)


@compiled
def _cuts(peak, threshold_3):
    margin = peak * _MARGIN if peak < np.inf else np.float32(np.inf)
    return _Cuts(threshold_3[0], threshold_3[1], threshold_3[2], margin)


@compiled
def _classify(line_L, cuts, class_L, seen_L):
    """The classes that each logit may belong to; `seen_L` gathers those of many lines."""
    low_or_less, above_low = cuts.low - cuts.margin, cuts.low + cuts.margin
    cut_or_less, above_cut = cuts.cut - cuts.margin, cuts.cut + cuts.margin
    high_or_less, above_high = cuts.high - cuts.margin, cuts.high + cuts.margin
    for c in range(len(class_L)):
        v = line_L[c]
        none = _NO if v > above_low else _ABOVE_NONE
        first = _ABOVE_LOW if (v > low_or_less) & (not v > above_cut) else _NO
        second = _ABOVE_CUT if (v > cut_or_less) & (not v > above_high) else _NO
        third = _ABOVE_HIGH if v > high_or_less else _NO
        class_L[c] = none | first | second | third
        seen_L[c] |= class_L[c]


@compiled
def _unite(class_LL, r, wide, wide_L, joined_L, cell_L):
    """The classes of all cells of line r, or `_UNDECIDED`.

    The arguments are cut to the cells to look at; `class_LL` and `joined_L` have two more.
    """
    first_L, second_L, third_L = class_LL[r], class_LL[r + 1], class_LL[r + 2]
    for c in range(len(joined_L)):
        joined_L[c] = first_L[c] | second_L[c] | (third_L[c] & wide)
    for c in range(len(cell_L)):
        may = np.uint8(joined_L[c] | joined_L[c + 1] | (joined_L[c + 2] & wide_L[c]))
        cell_L[c] = _UNDECIDED if np.uint8(may & np.uint8(may - _ABOVE_NONE)) else may


@compiled
def _span_end(cell_L, first):
    """End of the span of equal cells that begins at `first`."""
    c = first + 1
    while c < len(cell_L) and cell_L[c] == cell_L[first]:
        c += 1
    return c


@compiled
def measure(logit_MHW, bits_MHW, rows, columns, first, second, threshold_3, count_M2, box_M4):
    """Counts and boxes of M full-size masks.

    Args:
        logit_MHW: float32, contiguous, with at least the rows and columns that the axes take from.
        bits_MHW: The same memory as int32.
        rows: `Axis`.
        columns: `Axis`.
        first: `Rounding` of the step to the model's square.
        second: `Rounding` of the step to full size.
        threshold_3: float32 [3], rising: the lower cut-off, the mask's and the higher one.
        count_M2: int64, is given the number of pixels above the higher and above the lower one.
        box_M4: int64, is given x0, y0, x1, y1 of the pixels above the mask's, ends included; x1
            is -1 if there are none.
    """
    height, width = len(rows.wide_L), len(columns.wide_L)
    work = _workplace(height, columns, 0, width)
    for m in range(len(logit_MHW)):
        top_H = _extremes(bits_MHW[m], height, width)
        cuts = _cuts(top_H[height], threshold_3)
        field = _Field(logit_MHW[m], rows, columns, 0, 0, first, second)
        count_M2[m, :] = 0
        box_M4[m] = len(columns.base_P), len(rows.base_P), -1, -1
        _measure_one(field, top_H, cuts, work, count_M2[m], box_M4[m])


@compiled
def _workplace(lines, along, along0, length):
    """For `lines` lines of logits, which begin at `along0` of the other axis."""
    return _Work(
        np.zeros((lines + 2, length + 2), np.uint8),
        np.empty(length + 2, np.uint8),
        np.empty(length, np.uint8),
        np.zeros(along0 + length + 2, np.float32),
        np.empty(len(along.base_P), np.float32),
    )


@compiled
def _measure_one(field, top_H, cuts, work, count_2, box_4):
    logit_HW, rows, columns = field.logit_HW, field.rows, field.columns
    row_start_L, start_L, row_wide_L = rows.start_L, columns.start_L, rows.wide_L
    row_base_P, row_weight_3P = rows.base_P, rows.weight_3P
    base_P, weight_3P, class_LL = columns.base_P, columns.weight_3P, work.class_LL
    mixed_L, value_P = work.mixed_L, work.value_P
    top, bottom, left, right = _classify_all(logit_HW, top_H, cuts, class_LL, work.cell_L)
    wide_L, cell_L = columns.wide_L[left:right], work.cell_L[left:right]
    class_LL, joined_L = class_LL[:, left : right + 2], work.joined_L[left : right + 2]
    for r in range(top, bottom):
        y0, y1 = row_start_L[r], row_start_L[r + 1]
        if y0 == y1:
            continue
        _unite(class_LL, r, row_wide_L[r], wide_L, joined_L, cell_L)
        end = 0
        while end < len(cell_L):
            c, end = end, _span_end(cell_L, end)
            x0, x1 = start_L[left + c], start_L[left + end]
            if x0 == x1 or cell_L[c] == _ABOVE_NONE:
                continue
            if cell_L[c] != _UNDECIDED:
                _count_all(cell_L[c], x0, y0, x1, y1, count_2, box_4)
                continue
            for y in range(y0, y1):
                line = row_base_P[y]
                if _mix(
                    logit_HW,
                    line,
                    row_weight_3P,
                    y,
                    base_P,
                    weight_3P,
                    0,
                    x0,
                    x1,
                    cuts,
                    mixed_L,
                    value_P,
                ):
                    _correct(field, False, y, x0, x1, cuts, value_P)
                _count(value_P, cuts, y, x0, x1, count_2, box_4)


@compiled
def _classify_all(logit_HW, top_H, cuts, class_LL, seen_L):
    """Classify the rows that may hold pixels; returns the cells to look at, half-open.

    A cell begins up to two logits before the logit that makes it interesting.
    """
    floor, top, bottom, right = cuts.low - cuts.margin, 0, len(top_H) - 1, len(seen_L)
    while top < bottom and top_H[top] <= floor:
        top += 1
    while bottom > top and top_H[bottom - 1] <= floor:
        bottom -= 1
    for r in (top - 2, top - 1, bottom, bottom + 1):
        if 0 <= r < len(top_H) - 1:
            class_LL[r, :right] = _ABOVE_NONE
    seen_L[:] = _ABOVE_NONE
    for r in range(top, bottom):
        _classify(logit_HW[r], cuts, class_LL[r, :right], seen_L)
    left = 0
    while left < right and seen_L[left] == _ABOVE_NONE:
        left += 1
    while right > left and seen_L[right - 1] == _ABOVE_NONE:
        right -= 1
    return max(top - 2, 0), bottom, max(left - 2, 0), right


@compiled
def _count(value_P, cuts, y, start, stop, count_2, box_4):
    """Add pixels `start` to `stop` of row y."""
    part_P = value_P[start:stop]
    high = low = np.int32(0)
    for x in range(len(part_P)):
        high += np.int32(part_P[x] > cuts.high)
        low += np.int32(part_P[x] > cuts.low)
    count_2[0] += high
    count_2[1] += low
    if box_4[0] <= start and stop <= box_4[2] + 1 and box_4[1] <= y <= box_4[3]:
        return
    for x in range(len(part_P)):
        if part_P[x] > cuts.cut:
            _widen(box_4, start + x, y, start + x, y)


@compiled
def _count_all(kind, x0, y0, x1, y1, count_2, box_4):
    """Add a rectangle of pixels of one class, half-open."""
    pixels = (y1 - y0) * (x1 - x0)
    count_2[1] += pixels
    if kind == _ABOVE_HIGH:
        count_2[0] += pixels
    if kind >= _ABOVE_CUT:
        _widen(box_4, x0, y0, x1 - 1, y1 - 1)


@compiled
def _widen(box_4, x0, y0, x1, y1):
    box_4[0], box_4[1] = min(box_4[0], x0), min(box_4[1], y0)
    box_4[2], box_4[3] = max(box_4[2], x1), max(box_4[3], y1)


@compiled
def encode(logit_HW, turned_WH, bits_WH, rows, columns, first, second, threshold_3, place):
    """COCO compressed counts of one full-size mask, uint8.

    Args:
        logit_HW: float32, contiguous: a window of low-resolution logits.
        turned_WH: The same, columns first, contiguous, because the runs go down the columns.
        bits_WH: The memory of `turned_WH` as int32.
        rows: `Axis`.
        columns: `Axis`.
        first: `Rounding` of the step to the model's square.
        second: `Rounding` of the step to full size.
        threshold_3: float32 [3], three times the mask's threshold.
        place: `Place` of the window and of the mask.
    """
    width, height = turned_WH.shape
    cuts = _cuts(_extremes(bits_WH, width, height)[width], threshold_3)
    field = _Field(logit_HW, rows, columns, place.y0, place.x0, first, second)
    work = _workplace(width, rows, place.y0, height)
    for c in range(width):
        _classify(turned_WH[c], cuts, work.class_LL[c, :height], work.cell_L)
    pixels = (place.bottom - place.top) * (place.right - place.left)
    toggle_N = np.empty(2 * pixels + 2, np.int64)
    n = 0
    for c in range(width):
        n = _run_cells(field, turned_WH, cuts, work, c, place, toggle_N, n)
    return _compressed(toggle_N[:n], place.image_height * place.image_width)


@compiled
def _run_cells(field, turned_WH, cuts, work, c, place, toggle_N, n):
    """Append the runs of the columns of pixels that begin in column c of logits."""
    rows, columns, column = field.rows, field.columns, c + place.x0
    base_P, weight_3P, start_L = rows.base_P, rows.weight_3P, rows.start_L
    column_weight_3P, cell_L, value_P = columns.weight_3P, work.cell_L, work.value_P
    wide_L = rows.wide_L[place.y0 : place.y0 + len(cell_L)]
    _unite(work.class_LL, c, columns.wide_L[column], wide_L, work.joined_L, cell_L)
    x0 = max(columns.start_L[column], place.left)
    x1 = min(columns.start_L[column + 1], place.right)
    for x in range(x0, x1):
        origin = (x + place.image_x) * place.image_height + place.image_y
        end = 0
        while end < len(cell_L):
            r, end = end, _span_end(cell_L, end)
            y0 = max(start_L[r + place.y0], place.top)
            y1 = min(start_L[end + place.y0], place.bottom)
            if y0 >= y1 or cell_L[r] == _ABOVE_NONE:
                continue
            if cell_L[r] == _ABOVE_HIGH:
                n = _append(toggle_N, n, origin + y0, origin + y1)
                continue
            if _mix(
                turned_WH,
                c,
                column_weight_3P,
                x,
                base_P,
                weight_3P,
                place.y0,
                y0,
                y1,
                cuts,
                work.mixed_L,
                value_P,
            ):
                _correct(field, True, x, y0, y1, cuts, value_P)
            for y in range(y0, y1):
                if value_P[y] > cuts.cut:
                    n = _append(toggle_N, n, origin + y, origin + y + 1)
    return n


@compiled
def _append(toggle_N, n, start, stop):
    """Add a run of pixels, or make the last one longer."""
    if n and toggle_N[n - 1] == start:
        toggle_N[n - 1] = stop
        return n
    toggle_N[n], toggle_N[n + 1] = start, stop
    return n + 2


@compiled
def _compressed(toggle_N, pixels):
    """Run lengths as COCO writes them: five bits a character, from the third on as differences.

    Source: rleToString in pycocotools' maskApi.c (BSD).
    """
    text = np.empty(7 * (len(toggle_N) + 1), np.uint8)
    size, before, last, two_ago = 0, 0, 0, 0
    for i in range(len(toggle_N) + 1):
        end = toggle_N[i] if i < len(toggle_N) else pixels
        run = end - before
        before = end
        if i == len(toggle_N) and run == 0:
            break
        rest = run - two_ago if i > 2 else run
        two_ago, last = last, run
        more = True
        while more:
            bits = rest & 31
            rest >>= 5
            more = rest != -1 if bits & 16 else rest != 0
            text[size] = bits + (32 if more else 0) + 48
            size += 1
    return text[:size]
