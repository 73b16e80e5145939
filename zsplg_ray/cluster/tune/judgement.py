"""What a setting is worth: on the images that a search saw, and on those that it did not.

What enters: confusion counts of each group of images, for the settings that the labels were made
with and for those that searches found. What leaves: means over folds, and which settings to use.

Only held-out images decide. That decision, between three variants, is all that they are used for:
with one fold the winner's figure is a little flattered by it; what the searches themselves do is
never seen by the images that judge them. Images of a test set belong nowhere near.

Shape suffixes: I images, G groups of images, K classes (0 is background), L = K + 1 (the last
column: no label).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.space import SCORE, TEMPLATES
from zsplg_ray.label.sweep import Sweep, miou
from zsplg_ray.metrics import scores
from zsplg_ray.settings import from_mapping
from zsplg_ray.vocab import ClassList

VARIANTS = ("default", "tuned", "per_class")
"""As the labels were made; the best setting of a search, simplified; and that with a threshold for
each class. A later one has to be better than those before it, by more than `TIE`."""

TIE = 0.001
"""Difference of mIoU that is not worth a setting."""

_COMPOSE = "compose."


@dataclass(frozen=True, eq=False)
class Subject:
    """A run whose settings are searched for."""

    sweep: Sweep
    group_I: np.ndarray
    """int64 [I], the group of each image."""
    n_groups: int
    classes: ClassList

    def confusion(self, settings: Mapping[str, Any]) -> np.ndarray:
        """Confusion counts of each group, int64 [G, K, K + 1], for settings by dotted name."""
        config = compose_config(settings)
        return self.sweep.confusion(config, settings[TEMPLATES], self.group_I, self.n_groups)

    def with_class_thresholds(
        self, settings: Mapping[str, Any], held_out: int | None
    ) -> dict[str, Any]:
        """The settings with the best threshold of each class on all but the held-out group."""
        config, templates = compose_config(settings), settings[TEMPLATES]
        found, _ = self.sweep.class_thresholds(config, templates, self.all_but(held_out))
        return {**settings, "compose.min_similarity": found}

    def all_but(self, held_out: int | None) -> np.ndarray:
        """Which images are not in a group, bool [I]; None: all."""
        return np.full(len(self.group_I), True) if held_out is None else self.group_I != held_out

    def score_ends(self, settings: Mapping[str, Any]) -> tuple[float, float]:
        """Lowest and highest score of a segment, on the scale of the settings' score."""
        config = compose_config(settings)
        quantiles = getattr(self.sweep.ranges(settings[TEMPLATES], config), config.score)
        return float(quantiles[0]), float(quantiles[-1])


def compose_config(settings: Mapping[str, Any]) -> ComposeConfig:
    """The compose settings among dotted names."""
    mine = {k[len(_COMPOSE) :]: v for k, v in settings.items() if k.startswith(_COMPOSE)}
    return from_mapping(ComposeConfig, mine)


def marks(confusion_KL: np.ndarray) -> dict[str, float]:
    """What is told of confusion counts.

    Returns: `miou` as in metrics.py; `coverage`, the share of pixels that are given a class other
        than background (a label map without open pixels covers everything else by definition); and
        `precision`, the share of those pixels whose class is right, 0.0 where there are none.
    """
    named_K = confusion_KL[:, 1:-1].sum(axis=0)
    right = int(np.diagonal(confusion_KL)[1:].sum())
    named, pixels = int(named_K.sum()), int(confusion_KL.sum())
    return {
        "miou": miou(confusion_KL),
        "coverage": named / pixels if pixels else 0.0,
        "precision": right / named if named else 0.0,
    }


@dataclass(frozen=True, eq=False)
class Verdict:
    """What one search found, with counts of every group for each variant."""

    held_out: int | None
    settings: Mapping[str, Mapping[str, Any]]
    """Variant -> all settings."""
    confusion: Mapping[str, np.ndarray]
    """Variant -> int64 [G, K, K + 1]."""

    def part(self, variant: str, held: bool) -> np.ndarray:
        """Counts of the held-out group, or of all others, int64 [K, K + 1]."""
        counts_GKL = self.confusion[variant]
        held_KL = counts_GKL[self.held_out] if self.held_out is not None else 0 * counts_GKL[0]
        return held_KL if held else counts_GKL.sum(axis=0) - held_KL


def judge(
    subject: Subject,
    default: Mapping[str, Any],
    best: Mapping[str, Any],
    held_out: int | None,
    per_class: bool,
) -> Verdict:
    """Simplify, look for class thresholds if asked for, and count for every variant."""
    tuned = simplified(subject, default, best, held_out)
    settings = {"default": dict(default), "tuned": tuned}
    if per_class:
        settings["per_class"] = subject.with_class_thresholds(tuned, held_out)
    counts = {name: subject.confusion(values) for name, values in settings.items()}
    return Verdict(held_out, settings, counts)


def simplified(
    subject: Subject, default: Mapping[str, Any], best: Mapping[str, Any], held_out: int | None
) -> dict[str, Any]:
    """The best setting of a search with everything as in the default that makes no difference.

    A search moves all settings at once, most of them by chance. One after the other goes back to
    what it was, the most useless first, as long as mIoU on the tuning part does not fall by more
    than `TIE` in all; often it rises.
    """

    def tuning_miou(settings: Mapping[str, Any]) -> float:
        counts_GKL = subject.confusion(settings)
        held_KL = counts_GKL[held_out] if held_out is not None else 0
        return miou(counts_GKL.sum(axis=0) - held_KL)

    now = dict(best)
    floor = tuning_miou(now) - TIE
    while True:
        tries = [now | _together(name, default) for name in now if now[name] != default[name]]
        simpler = max(tries, key=tuning_miou, default=now)
        if simpler is now or (reached := tuning_miou(simpler)) < floor:
            return now
        now, floor = simpler, max(floor, reached - TIE)


def _together(name: str, default: Mapping[str, Any]) -> dict[str, Any]:
    """A setting as in the default, and with the kind of score what is measured in it."""
    names = (SCORE, "compose.min_similarity", "compose.min_margin") if name == SCORE else (name,)
    return {name: default[name] for name in names}


def choose(folds: Sequence[Verdict]) -> str:
    """The variant to use: one that beats those before it, in mean mIoU on held-out images."""
    chosen, best = VARIANTS[0], -1.0
    for name in VARIANTS:
        if name not in folds[0].settings:
            continue
        mean = statistics.fmean(miou(fold.part(name, held=True)) for fold in folds)
        if mean > best + TIE:
            chosen, best = name, mean
    return chosen


def compared(folds: Sequence[Verdict], names: Sequence[str]) -> dict[str, Any]:
    """Plain figures for tune.json.

    Args:
        folds: Verdicts of searches that held something out.
        names: Of the classes.

    Returns: variant -> `tuning` and `held_out`: `miou`, mean over folds, `sd` between folds (None
        of one fold), `folds`, each one's, `coverage` and `precision`; of the held-out images `iou`
        by class too, from counts summed over folds, and `gain`: mean and sd of the difference to
        the default, fold by fold.
    """
    result: dict[str, Any] = {}
    for name in folds[0].settings:
        parts = {}
        for part, held in (("tuning", False), ("held_out", True)):
            counts = [fold.part(name, held) for fold in folds]
            pooled = marks(np.sum(counts, axis=0))
            parts[part] = {
                **_spread([miou(c) for c in counts]),
                "coverage": pooled["coverage"],
                "precision": pooled["precision"],
            }
        parts["held_out"]["iou"] = scores(pooled_held_out(folds, name), names)["iou"]
        default = [miou(fold.part("default", True)) for fold in folds]
        mine = parts["held_out"]["folds"]
        gain = _spread([m - d for m, d in zip(mine, default, strict=True)])
        parts["held_out"]["gain"] = {"miou": gain["miou"], "sd": gain["sd"]}
        result[name] = parts
    return result


def pooled_held_out(folds: Sequence[Verdict], name: str) -> np.ndarray:
    """Counts of a variant over all held-out images, each judged by the search that did not see
    it; int64 [K, K + 1].
    """
    return np.sum([fold.part(name, held=True) for fold in folds], axis=0)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"miou": statistics.fmean(values), "sd": sd, "folds": list(values)}
