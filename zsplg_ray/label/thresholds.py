"""The best minimum score of each class, exactly, one class at a time.

Enters: the regions of labelled images, and what is known of their segments under one setting.
Leaves: a minimum score for each class. `Sweep.class_thresholds` is the door to it.

Why it is quick: what a class's minimum changes is which of its own segments are painted. Adding
them one by one in falling score goes through all minimums that make a difference, and each step
touches the few regions that one segment covers. So trying every minimum costs about as much as
scoring two settings.

Shape suffixes: as in `sweep`; C segments of one class, J = C + 1 sets of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from zsplg_ray.label.compose import Scored
from zsplg_ray.label.sweep_kernels import Flat, climb, occupy
from zsplg_ray.vocab import ClassList

_MOST_ROUNDS = 50
"""Rounds over all classes; a search ends far earlier, when nothing improves."""
_ROUNDING = 1e-12
"""Mean IoUs that differ by less are equal."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ThresholdSearch:
    """All that stays the same while minimums change."""

    classes: ClassList
    """The K classes."""
    flat: Flat
    """The regions."""
    covered: tuple[np.ndarray, np.ndarray]
    """The regions of each segment, see `sweep_kernels.turned`."""
    scored: Scored
    """What each segment is most like."""
    rank_R: np.ndarray
    """float64 [R], see `compose.precedence`."""
    kept: Callable[[np.ndarray], np.ndarray]
    """float32 [K], minimums, to bool [R], the segments to paint; -inf is no minimum."""
    empty: int
    """Column of the counts for what no painted segment covers."""
    group_I: np.ndarray
    """int64 [I], 0 for the images that count, -1 for the others."""
    counts_R: np.ndarray
    """bool [R], segments of images that count."""

    def run(
        self, minimum: dict[str, float], min_score_K: np.ndarray
    ) -> tuple[dict[str, float], float]:
        """Improve one class after another, round after round, until none gets better.

        Args:
            minimum: where to start; these classes are searched.
            min_score_K: the same of all classes, float32 [K].

        Returns:
            minimum by class, and the mean IoU with it; 0.0 if no image counts.
        """
        minimum, min_score_K, best = dict(minimum), min_score_K.copy(), -1.0
        for _ in range(_MOST_ROUNDS):
            before = best
            for name, current in minimum.items():
                k = self.classes.names.index(name)
                minimum[name], best = self._improved(k, current, min_score_K)
                min_score_K[k] = minimum[name]
            if best <= before + _ROUNDING:
                break
        return minimum, best

    def _improved(self, k: int, current: float, min_score_K: np.ndarray) -> tuple[float, float]:
        """The best minimum of class k, and the mean IoU with it."""
        class_R, score_R = self.scored.best_R, self.scored.score_R
        loose_K = min_score_K.copy()
        loose_K[k] = -1.0  # the least that a minimum may be
        kept_R, mine_R = self.kept(loose_K), class_R == k
        others_R = np.where(kept_R & ~mine_R, self.rank_R, -np.inf)
        winner_N = np.empty(len(self.flat.cover_start) - 1, np.int32)
        counts_KL = np.zeros((len(self.classes), len(self.classes) + 1), np.int64)
        occupy(self.flat, others_R, class_R, self.empty, self.group_I, winner_N, counts_KL)
        added_C = np.flatnonzero(kept_R & mine_R & self.counts_R)
        added_C = added_C[np.argsort(-score_R[added_C], kind="stable")]
        score_C = score_R[added_C]
        whole = (self.flat, *self.covered, self.rank_R, class_R, self.empty)
        miou_J = climb(*whole, added_C, score_C, winner_N, counts_KL)
        return _best_minimum(current, score_C, miou_J)


def _best_minimum(current: float, score_C: np.ndarray, miou_J: np.ndarray) -> tuple[float, float]:
    """The minimum that selects the best set, and its mean IoU.

    Args:
        current: stays if no other is better.
        score_C: float32, falling.
        miou_J: mean IoU with the first j segments, see `climb`.
    """
    now = miou_J[np.count_nonzero(score_C >= np.float32(current))]
    chosen, best = current, now
    for j in np.flatnonzero(miou_J > now + _ROUNDING):
        minimum = _minimum_of(score_C, int(j))
        if minimum is None or miou_J[j] < best - _ROUNDING:
            continue
        if miou_J[j] > best + _ROUNDING or abs(minimum - current) < abs(chosen - current):
            chosen, best = minimum, miou_J[j]
    return chosen, float(best)


def _minimum_of(score_C: np.ndarray, j: int) -> float | None:
    """What selects the first j segments alone; None if that would not be in [-1, 1]."""
    if j == 0:
        above = float(np.nextafter(score_C[0], np.float32(np.inf)))
        return above if above <= 1 else None
    high = score_C[j - 1]
    if j == len(score_C):
        return min(float(high), 1.0)
    low = score_C[j]
    middle = (float(low) + float(high)) / 2
    for digits in range(4, 9):  # as short as can be, to be read by people
        short = round(middle, digits)
        if low < np.float32(short) <= high and short <= 1:
            return short
    return float(high) if high <= 1 else None
