"""Compiled loops over regions: who wins each, and what that adds to the confusion counts.

Enters: the flat arrays of a `Sweep`, and for each segment the number by which it competes. Leaves:
counts. `sweep` is the door to them.

Shape suffixes: as in `sweep`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from zsplg_ray.label.kernels import compiled


class Flat(NamedTuple):
    """The regions of all images. Lists of lists: entry n is values[start[n] : start[n + 1]]."""

    region_start: Any
    """int64 [I + 1], the regions of each image."""
    cover_start: Any
    """int64 [N + 1]."""
    cover: Any
    """int32, rising, the segments that cover each region, numbered over all images."""
    count_start: Any
    """int64 [N + 1]."""
    count_class: Any
    """uint8 [E], true classes in each region."""
    count_px: Any
    """int32 [E], pixels of each."""


@compiled
def tally(flat, rank_R, class_R, empty, group_I, counts_GKL):
    """Add every region's pixels to the counts of its image's group.

    Args:
        flat: `Flat`.
        rank_R: float64, the largest wins, of equal ones the earlier; -inf: not painted.
        class_R: int64, what each segment paints.
        empty: column of a region that no painted segment covers.
        group_I: int64, group of each image; -1: left out.
        counts_GKL: int64, is added to.
    """
    for i in range(len(group_I)):
        if group_I[i] < 0:
            continue
        counts_KL = counts_GKL[group_I[i]]
        for n in range(flat.region_start[i], flat.region_start[i + 1]):
            winner = _winner(flat, n, rank_R)
            column = class_R[winner] if winner >= 0 else empty
            for e in range(flat.count_start[n], flat.count_start[n + 1]):
                counts_KL[flat.count_class[e], column] += flat.count_px[e]


@compiled
def _winner(flat, n, rank_R):
    """The segment that wins region n, -1 if none is painted there."""
    winner, top = -1, -np.inf
    for c in range(flat.cover_start[n], flat.cover_start[n + 1]):
        if rank_R[flat.cover[c]] > top:
            winner = flat.cover[c]
            top = rank_R[winner]
    return winner


@compiled
def occupy(flat, rank_R, class_R, empty, group_I, winner_N, counts_KL):
    """As `tally` for one group, and note who won each region.

    Args:
        flat: `Flat`.
        rank_R: see `tally`.
        class_R: see `tally`.
        empty: see `tally`.
        group_I: int64, 0; -1: left out.
        winner_N: int32, is given the winner, -1 where there is none; left as it is in images that
            are left out.
        counts_KL: int64, is added to.
    """
    for i in range(len(group_I)):
        if group_I[i] < 0:
            continue
        for n in range(flat.region_start[i], flat.region_start[i + 1]):
            winner_N[n] = _winner(flat, n, rank_R)
            column = class_R[winner_N[n]] if winner_N[n] >= 0 else empty
            for e in range(flat.count_start[n], flat.count_start[n + 1]):
                counts_KL[flat.count_class[e], column] += flat.count_px[e]


@compiled
def turned(flat, n_segments):
    """The other way round: the regions that each segment covers, rising, as a list of lists."""
    start_R = np.zeros(n_segments + 1, np.int64)
    for c in range(len(flat.cover)):
        start_R[flat.cover[c] + 1] += 1
    start_R = np.cumsum(start_R)
    place_R, region = start_R[:-1].copy(), np.empty(len(flat.cover), np.int32)
    for n in range(len(flat.cover_start) - 1):
        for c in range(flat.cover_start[n], flat.cover_start[n + 1]):
            r = flat.cover[c]
            region[place_R[r]] = n
            place_R[r] += 1
    return start_R, region


@compiled
def climb(flat, start_R, region, rank_R, class_R, empty, added_C, score_C, winner_N, counts_KL):
    """Paint segments of one class one after another, and see what each adds.

    Args:
        flat: `Flat`.
        start_R: see `turned`.
        region: see `turned`.
        rank_R: float64, see `tally`; finite for `added_C` and for all who won.
        class_R: see `tally`.
        empty: see `tally`.
        added_C: int64, the segments to add, all of one class and none of them painted, in the
            order of falling score.
        score_C: float32, their scores.
        winner_N: int32, who won without them; changed to who wins with all of them.
        counts_KL: int64, counts that belong to `winner_N`; changed alike.

    Returns:
        float64 [C + 1], mean IoU with the first 0, 1, ... C segments; NaN where no threshold
        selects these alone, because the next one has the same score.
    """
    n_classes = len(counts_KL)
    hits_K, union_K = np.empty(n_classes, np.int64), np.empty(n_classes, np.int64)
    for k in range(n_classes):
        hits_K[k] = counts_KL[k, k]
        union_K[k] = counts_KL[k].sum() + counts_KL[:, k].sum() - hits_K[k]
    miou_J = np.full(len(added_C) + 1, np.nan)
    miou_J[0] = _mean(hits_K, union_K)
    for c in range(len(added_C)):
        r = added_C[c]
        for place in range(start_R[r], start_R[r + 1]):
            n = region[place]
            old = winner_N[n]
            if old >= 0 and (rank_R[old] > rank_R[r] or (rank_R[old] == rank_R[r] and old < r)):
                continue
            winner_N[n] = r
            before = class_R[old] if old >= 0 else empty
            if before != class_R[r]:
                _move(flat, n, before, class_R[r], hits_K, union_K, counts_KL)
        if c + 1 == len(added_C) or score_C[c + 1] < score_C[c]:
            miou_J[c + 1] = _mean(hits_K, union_K)
    return miou_J


@compiled
def _move(flat, n, old, new, hits_K, union_K, counts_KL):
    """Region n was column `old` and becomes class `new`."""
    for e in range(flat.count_start[n], flat.count_start[n + 1]):
        k, px = flat.count_class[e], np.int64(flat.count_px[e])
        counts_KL[k, old] -= px
        counts_KL[k, new] += px
        if k == new:
            hits_K[new] += px
        else:
            union_K[new] += px
        if old == len(hits_K):
            continue
        if k == old:
            hits_K[old] -= px
        else:
            union_K[old] -= px


@compiled
def _mean(hits_K, union_K):
    """Mean IoU of the classes that occur, 0.0 if none does."""
    total, present = 0.0, 0
    for k in range(len(hits_K)):
        if union_K[k] > 0:
            total += hits_K[k] / union_K[k]
            present += 1
    return total / present if present else 0.0
