"""Compiled loops that cut an image into regions along the ends of its masks' runs.

Enters: the compressed counts of all masks, and the true class of each pixel. Leaves: which masks
cover each region, and how many of its pixels are of which class. `regions` is the door to them.

How: the image is walked once, down its columns, as the runs of COCO's RLE go. At the end of a run
one segment begins or stops to cover; between the ends nothing changes. So a bit of a set is flipped
at each end, and the set is looked up in a hash table (the hash only says where to look, the bits
decide). The ends are found through one list a pixel instead of being sorted, so time grows with
pixels + ends, also for masks that are noise.

Shape suffixes: N regions, R segments, P pixels in column-major order, K classes, S stretches of
pixels in one region and of one class.
"""

from __future__ import annotations

import numpy as np

from zsplg_ray.label.kernels import compiled
from zsplg_ray.records import IGNORE


@compiled
def cut_runs(code, ends, truth_P):
    """Regions of one image.

    Args:
        code: uint8, compressed counts of all masks; mask r is code[ends[r]:ends[r + 1]].
        ends: int64 [R + 1].
        truth_P: uint8, class indices, 255 where there is no truth.

    Returns:
        The five arrays of `Regions`.
    """
    n_segments = len(ends) - 1
    first_P, following, owner = _ends_of_runs(code, ends, len(truth_P))
    n_states = min(len(truth_P), len(owner)) + 1
    states = np.zeros((n_states, n_segments // 64 + 1), np.uint64)
    walked = _walk(truth_P, first_P, following, owner, states, n_segments)
    count_start, count_class, count_px = _count(walked)
    return _keep(states, n_segments, count_start, count_class, count_px)


@compiled
def _ends_of_runs(code, ends, n_px):
    """The ends of runs at each pixel, as linked lists.

    Returns:
        int32 [P], an end at this pixel, -1 without; then for every end the next one at the same
        pixel, and the segment that begins or stops there, int32.

    Source: the format is that of pycocotools (rleFrString in maskApi.c, BSD); see `rle_runs`.
    """
    first_P = np.full(n_px, -1, np.int32)
    following = np.empty(len(code), np.int32)
    owner = np.empty(len(code), np.int32)
    n = 0
    for r in range(len(ends) - 1):
        place = n_runs = 0
        run = before = before_that = 0
        count, shift = 0, 0
        for byte in code[ends[r] : ends[r + 1]]:
            group = np.int64(byte) - 48
            count |= (group & 31) << shift
            shift += 5
            if group & 32:
                continue
            if group & 16:
                count |= -1 << shift
            run = count + before_that if n_runs > 2 else count
            before_that, before = before, run
            assert 0 <= run <= n_px - place, "segments check their runs; here memory depends on it"
            place += run
            if place < n_px:
                following[n], owner[n], first_P[place] = first_P[place], r, n
                n += 1
            n_runs += 1
            count = shift = 0
    return first_P, following[:n], owner[:n]


@compiled
def _walk(truth_P, first_P, following, owner, states, n_segments):
    """Name the region of each pixel and count stretches of one region and class.

    Args:
        truth_P: uint8.
        first_P: see `_ends_of_runs`.
        following: see `_ends_of_runs`.
        owner: see `_ends_of_runs`.
        states: zeros uint64 [most regions, words]; row n is given the segments that cover region n.
        n_segments: R.

    Returns:
        For each stretch of known truth region int32, class uint8 and pixels int32, then the number
        of regions.
    """
    mixed_R = _random_words(n_segments)
    table = np.full(_power_of_two(2 * len(states)), -1, np.int32)
    region_S = np.empty(len(truth_P), np.int32)
    class_S = np.empty(len(truth_P), np.uint8)
    px_S = np.empty(len(truth_P), np.int32)
    state, hashed, n_regions = np.zeros(states.shape[1], np.uint64), np.uint64(0), 0
    region = last_region = last_class = stretch = begin = -1
    for p in range(len(truth_P)):
        end = first_P[p]
        if end >= 0 or p == 0:
            while end >= 0:
                r = owner[end]
                state[r >> 6] ^= np.uint64(1) << np.uint64(r & 63)
                hashed ^= mixed_R[r]
                end = following[end]
            region = _find(state, hashed, table, states, n_regions)
            n_regions = max(n_regions, region + 1)
        if truth_P[p] == last_class and region == last_region:
            continue
        if stretch >= 0 and last_class != IGNORE:
            px_S[stretch] = p - begin
        if truth_P[p] != IGNORE:
            stretch += 1
            region_S[stretch], class_S[stretch] = region, truth_P[p]
        last_region, last_class, begin = region, truth_P[p], p
    if stretch >= 0 and last_class != IGNORE:
        px_S[stretch] = len(truth_P) - begin
    n = stretch + 1
    return region_S[:n], class_S[:n], px_S[:n], n_regions


@compiled
def _find(state, hashed, table, states, n_regions):
    """The row of `states` that equals `state`; a new one if there is none."""
    mask = np.uint64(len(table) - 1)
    place = hashed & mask
    while table[place] >= 0:
        n = table[place]
        same = True
        for w in range(len(state)):
            same &= states[n, w] == state[w]
        if same:
            return n
        place = (place + np.uint64(1)) & mask
    table[place] = n_regions
    states[n_regions] = state
    return n_regions


@compiled
def _random_words(n):
    """One word a segment, so that the hash of a set is the XOR of its segments' words.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014; public domain).
    """
    words = np.empty(n, np.uint64)
    for r in range(n):
        z = np.uint64(r + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words[r] = z ^ (z >> np.uint64(31))
    return words


@compiled
def _power_of_two(at_least):
    size = 16
    while size < at_least:
        size *= 2
    return size


@compiled
def _count(walked):
    """Add up stretches: for each region its classes, rising, and their pixels, as lists."""
    region_S, class_S, px_S, n_regions = walked
    last_N = np.full(n_regions, -1, np.int32)
    before_S = np.empty(len(region_S), np.int32)
    for s in range(len(region_S)):
        before_S[s], last_N[region_S[s]] = last_N[region_S[s]], s
    start = np.zeros(n_regions + 1, np.int32)
    of_class, px = np.empty(len(region_S), np.uint8), np.empty(len(region_S), np.int32)
    sum_K = np.zeros(256, np.int32)
    n = 0
    for region in range(n_regions):
        top, s = -1, last_N[region]
        while s >= 0:
            sum_K[class_S[s]] += px_S[s]
            top = max(top, np.int64(class_S[s]))
            s = before_S[s]
        for k in range(top + 1):
            if sum_K[k]:
                of_class[n], px[n], sum_K[k] = k, sum_K[k], 0
                n += 1
        start[region + 1] = n
    return start, of_class[:n].copy(), px[:n].copy()


@compiled
def _keep(states, n_segments, count_start, count_class, count_px):
    """The lists of `Regions`, without the regions that count no pixel."""
    size = n = 0
    for region in range(len(count_start) - 1):
        if count_start[region] < count_start[region + 1]:
            for r in range(n_segments):
                size += _has(states[region], r)
            n += 1
    cover_start, cover = np.zeros(n + 1, np.int32), np.empty(size, np.int32)
    kept_start = np.zeros(n + 1, np.int32)
    n = size = 0
    for region in range(len(count_start) - 1):
        if count_start[region] < count_start[region + 1]:
            for r in range(n_segments):
                if _has(states[region], r):
                    cover[size] = r
                    size += 1
            n += 1
            cover_start[n], kept_start[n] = size, count_start[region + 1]
    return cover_start, cover, kept_start, count_class, count_px


@compiled
def _has(state, r):
    return np.int64((state[r >> 6] >> np.uint64(r & 63)) & np.uint64(1))
