"""Which scenes of the embedded world are labelled: a fair few, and their split files.

What enters: the masks of some scenes. What leaves: ids, and files as `zsplg train` takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zsplg_ray.masks import Truth

LEAST_SCENES = 2
"""Labelled scenes that hold a class, at least."""


def few_labelled(truth: Truth, n: int, seed: int) -> list[str]:
    """Ids of `n` scenes, drawn until every class occurs in at least two (or in what most draws of
    so few could hold).
    """
    holds = {i: set(np.unique(truth.read(i)).tolist()) - {0, 255} for i in truth.ids}
    every = set().union(*holds.values())
    rng = np.random.default_rng(seed)
    drawn = [sorted(rng.choice(truth.ids, n, replace=False).tolist()) for _ in range(200)]
    return max(drawn, key=lambda ids: _least(holds, ids, every))


def _least(holds: dict[str, set[int]], ids: list[str], every: set[int]) -> int:
    """In how many scenes the rarest class occurs, two being enough."""
    return min(LEAST_SCENES, *(sum(k in holds[i] for i in ids) for k in every))


def write_splits(folder: Path, chosen: Sequence[str], every: Sequence[str]) -> dict[str, str]:
    """Split files of labelled scenes and the others: the settings `labeled` and `unlabeled`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"labeled": chosen, "unlabeled": sorted(set(every) - set(chosen))}
    for kind, ids in files.items():
        lines = (f"JPEGImages/{i}.jpg SegmentationClass/{i}.png\n" for i in ids)
        (folder / f"{kind}.txt").write_text("".join(lines))
    return {kind: str(folder / f"{kind}.txt") for kind in files}
