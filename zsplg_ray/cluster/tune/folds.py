"""Which labelled images a search may look at, and which ones judge it.

What enters: the classes that each image holds, and a seed. What leaves: the number of a group for
each image. Images are drawn by chance, but so that the groups hold each class in proportion: of a
class that is in two images only, both could else be held out, and no search would know of it.

Source: iterative stratification, Sechidis, Tsoumakas, Vlahavas, "On the stratification of
multi-label data", ECML PKDD 2011: the rarest class first, each of its images to the group that
lacks it most.

Shape suffixes: I images, G groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np


def split(holds: Sequence[frozenset[int]], folds: int, holdout: float, seed: int) -> np.ndarray:
    """The group of each image, int64 [I].

    Args:
        holds: Classes of each image.
        folds: 1: group 0 is searched on and group 1 is held out; k > 1: k groups of like size, to
            be held out in turn.
        holdout: Share that is held out where `folds` is 1; at least one image on either side.
        seed: Of the draw.
    """
    n = len(holds)
    if folds == 1:
        held_out = min(max(round(holdout * n), 1), n - 1)
        return draw_groups(holds, [n - held_out, held_out], seed)
    return draw_groups(holds, [n // folds + (g < n % folds) for g in range(folds)], seed)


def draw_groups(holds: Sequence[frozenset[int]], sizes: Sequence[int], seed: int) -> np.ndarray:
    """Groups of the given sizes, each class spread over them in proportion; int64 [I]."""
    assert sum(sizes) == len(holds), "every image belongs to one group"
    left = np.random.default_rng(seed).permutation(len(holds)).tolist()
    room_G = np.array(sizes)
    total = Counter(k for classes in holds for k in classes)
    want = {k: room_G * (count / len(holds)) for k, count in total.items()}
    group_I = np.full(len(holds), -1)
    while left:
        count = Counter(k for i in left for k in holds[i])
        rarest = min(count, key=lambda k: (count[k], k), default=None)
        mine = [i for i in left if rarest is None or rarest in holds[i]]
        for i in mine:
            lack_G = want[rarest] if rarest is not None else room_G
            free = np.flatnonzero(room_G > 0)
            group = max(free, key=lambda g: (lack_G[g], room_G[g], -g))
            group_I[i] = group
            room_G[group] -= 1
            for k in holds[i]:
                want[k][group] -= 1
        taken = set(mine)
        left = [i for i in left if i not in taken]
    return group_I
