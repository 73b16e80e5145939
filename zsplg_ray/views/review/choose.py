"""Which images to pick: those whose parts weigh most, but not ten that are alike.

What enters: the parts of each image (signs), weights, a budget. What leaves: picks in the order in
which they were taken, with the share that each part had in it. A greedy choice: after each pick the
images like it and the classes in it are worth less.

Why greedy: the best set under a k-center term is NP-hard to find, the greedy one is within a factor
of two (Gonzalez 1985), and its order is a ranking, so that half a budget is the first half of the
picks. Images beyond the `pool` best by themselves are not weighed against picks, which bounds the
work at pool x budget.

Shapes: N images, P parts, K classes, D features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from zsplg_ray.config import ReviewWeights
from zsplg_ray.views.review.signs import PARTS, Signs

DIVERSITY, COVERAGE = "diversity", "coverage"
COLUMNS: tuple[str, ...] = (*PARTS, DIVERSITY, COVERAGE)
"""What a pick's total is the sum of."""

POOL = 2000
"""Least number of images that the greedy choice weighs; more with a large budget."""


@dataclass(frozen=True)
class Pick:
    """One image that was picked, and why."""

    position: int
    """In the run's labels."""
    values: dict[str, float]
    """Each part's own value in [0, 1], as `signs` tells; diversity and coverage when picked."""
    weighed: dict[str, float]
    """What each part added to the total: weight * value / largest value in the run."""

    @property
    def total(self) -> float:
        """Sum of `weighed`."""
        return sum(self.weighed.values())

    @property
    def why(self) -> str:
        """The three parts that added most."""
        best = sorted(self.weighed.items(), key=lambda item: (-item[1], item[0]))[:3]
        return ", ".join(f"{name} {value:.2f}" for name, value in best if value > 0)


def choose(
    signs: Signs, budget: int, weights: ReviewWeights, known: Collection[int] = ()
) -> list[Pick]:
    """Pick images greedily; of equal ones the first.

    Args:
        signs: Of all images.
        budget: How many at most.
        weights: Of parts, diversity and coverage.
        known: Positions of images that are corrected already: they are not picked, and what is
            like them is worth less.

    Returns: Picks, the first taken first; all that are not known if the budget allows.
    """
    weighed_NP = _weighed(signs.value_NP, weights)
    own_N = weighed_NP.sum(axis=1)
    known_N = np.array([p in known for p in signs.positions], bool)
    ranked = np.argsort(-own_N.round(9), kind="stable")
    pool = np.sort(ranked[~known_N[ranked]][: max(POOL, 20 * budget)])
    holds_NK = signs.holds_NK[pool][:, 1:].astype(np.float64)
    feature_ND = signs.feature_ND[pool]
    seen_K = signs.holds_NK[known_N][:, 1:].sum(axis=0).astype(np.float64)
    apart_N = np.ones(len(pool))
    for feature_D in signs.feature_ND[known_N]:
        apart_N = np.minimum(apart_N, _distance(feature_ND, feature_D))
    picks: list[Pick] = []
    free_N = np.ones(len(pool), bool)
    for _ in range(min(budget, len(pool))):
        fresh_N = holds_NK @ (1 / (1 + seen_K)) / max(1, len(seen_K))
        total_N = own_N[pool] + weights.diversity * apart_N + weights.coverage * fresh_N
        at = int(np.where(free_N, total_N.round(9), -np.inf).argmax())
        n = int(pool[at])
        apart, fresh = float(apart_N[at]), float(fresh_N[at])
        values = [*signs.value_NP[n].tolist(), apart, fresh]
        added = [*weighed_NP[n].tolist(), weights.diversity * apart, weights.coverage * fresh]
        pairs = (dict(zip(COLUMNS, row, strict=True)) for row in (values, added))
        picks.append(Pick(signs.positions[n], *pairs))
        free_N[at] = False
        seen_K += holds_NK[at]
        apart_N = np.minimum(apart_N, _distance(feature_ND, feature_ND[at]))
    return picks


def _weighed(value_NP: np.ndarray, weights: ReviewWeights) -> np.ndarray:
    """Values over the largest in the run, times their weights, float64 [N, P]."""
    largest_P = value_NP.max(axis=0, initial=0.0)
    weight_P = np.array([getattr(weights, part) for part in PARTS])
    return value_NP / np.where(largest_P > 0, largest_P, 1.0) * weight_P


def _distance(feature_ND: np.ndarray, feature_D: np.ndarray) -> np.ndarray:
    """Half of 1 - cosine, float64 [N] in [0, 1]."""
    return np.clip((1 - feature_ND.astype(np.float64) @ feature_D) / 2, 0, 1)
