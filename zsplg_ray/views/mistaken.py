"""Confusion counts cut down to the classes that are worth looking at.

What enters: counts of metrics.py over any number of classes. What leaves: counts over a few: those
that pixels are most often mistaken from or for, and one for all others.

Shapes: K classes, L = K + 1 (the last column: left open).
"""

from __future__ import annotations

import numpy as np


def most_mistaken(
    counts_KL: np.ndarray, names: list[str], most: int
) -> tuple[np.ndarray, list[str], str]:
    """Counts and names of the classes that are shown, and a note on the others.

    Args:
        counts_KL: Counts [K, K + 1] as `metrics.confusion` returns them.
        names: The K class names.
        most: Classes that there is room for.
    """
    n = len(names)
    square = counts_KL[:, :n]
    occurs = (counts_KL.sum(axis=1) + square.sum(axis=0)) > 0
    if not occurs.any():
        occurs[:] = True
    keep = np.flatnonzero(occurs)
    if len(keep) <= most:
        columns = np.append(keep, n)
        return counts_KL[np.ix_(keep, columns)], [names[k] for k in keep], ""
    wrong = counts_KL.sum(axis=1) + square.sum(axis=0) - 2 * np.diagonal(square)
    worst = np.sort(keep[np.argsort(-wrong[keep], kind="stable")][: most - 1])
    others = np.setdiff1d(keep, worst)
    group = np.full(n + 1, -1)
    group[worst] = np.arange(len(worst))
    group[others] = len(worst)
    group[n] = len(worst) + 1
    merged = np.zeros((len(worst) + 1, len(worst) + 2), np.int64)
    rows = np.flatnonzero(group[:n] >= 0)
    cols = np.flatnonzero(group >= 0)
    np.add.at(merged, np.ix_(group[rows], group[cols]), counts_KL[np.ix_(rows, cols)])
    note = f"the {len(worst)} classes with the most mistaken pixels, of {len(keep)} that occur"
    labels = [names[k] for k in worst] + [f"{len(others)} others"]
    return merged, labels, note
