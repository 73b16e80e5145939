"""Which `compose` settings are worth a try, as a space that a search can draw from.

What enters: what the segments of the labelled images are like (their scores, areas, qualities), and
the settings of the run. What leaves: a `Space`: for each setting its bounds or choices, and when it
exists. Bounds come from the data, because a cosine of 0.2 is high for one CLIP and low for another;
a search that draws from [-1, 1] spends nearly all of its trials where everything or nothing passes.

A threshold on softmax scores and one on cosines are two dimensions, of which one exists at a time;
so is the temperature, which only a softmax has. `compose.unsure` is no matter of search: it says
what a pixel without an answer is to become, and mIoU would always have it one way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from zsplg_ray.label.sweep import QUANTILES, Ranges
from zsplg_ray.settings import complain, nearest

SCORE, TEMPLATES = "compose.score", "prompts.templates"
SEARCHED = (
    SCORE,
    TEMPLATES,
    "compose.min_similarity",
    "compose.min_margin",
    "compose.temperature",
    "compose.order",
    "compose.min_area_px",
    "compose.min_predicted_iou",
    "compose.min_stability",
)
"""Every setting that can be searched over, by its dotted name; most important levels first."""

_DIGITS = 4
"""Digits that a drawn number keeps, before it is evaluated: what is written is what was judged."""


_LARGE_AREA = 0.05
"""Share of an image above which no segment is dropped for being small."""


@dataclass(frozen=True)
class Limits:
    """What segments are like, as far as it bounds a search; each from low to high.

    The bounds of areas and qualities end at the median: a search that may drop more than half of
    the segments for being small or bad spends most of its trials on doing so.
    """

    cosine: tuple[float, float]
    """From a cosine that all segments reach to one that nearly none does."""
    softmax: tuple[float, float]
    """The same of softmax scores, at any temperature."""
    margin: tuple[float, float]
    """Median and high lead over the second best cosine."""
    area_px: tuple[float, float]
    """Small and large area, pixels."""
    predicted_iou: tuple[float, float]
    stability: tuple[float, float]

    @classmethod
    def of(cls, ranges: Sequence[Ranges], image_px: float, n_classes: int) -> Limits:
        """The limits of some segments.

        Args:
            ranges: Of the same segments, one for each set of templates.
            image_px: Pixels of an image, about.
            n_classes: K; the best of K softmax scores is never below 1 / K.

        Raises: ValueError if no segment has a score.
        """

        def ends(name: str, low: float, high: float) -> tuple[float, float]:
            both = np.array([getattr(one, name) for one in ranges])
            places = [QUANTILES.index(q) for q in (low, high)]
            return float(both[:, places[0]].min()), float(both[:, places[1]].max())

        cosine = ends("cosine", 0.0, 0.99)
        if not math.isfinite(cosine[0]):
            fix = "label more images by hand, or check how segments were made"
            raise ValueError(complain("run", "with segments in the labelled images", "none", fix))
        middle, high = ends("cosine_margin", 0.5, 0.75)
        smallest, largest = ends("area_px", 0.01, 0.5)
        return cls(
            cosine=cosine,
            softmax=(1 / n_classes, 1.0),
            margin=(max(middle, 0.0), max(high, 0.0)),
            area_px=(max(smallest, 1.0), max(min(largest, _LARGE_AREA * image_px), smallest, 1.0)),
            predicted_iou=_shares(ends("predicted_iou", 0.0, 0.5)),
            stability=_shares(ends("stability", 0.0, 0.5)),
        )


@dataclass(frozen=True)
class Dimension:
    """One setting of a search: choices, or an interval."""

    setting: str
    """Dotted name."""
    options: tuple[Any, ...] = ()
    """The choices; none for a number."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Drawn evenly by magnitude."""
    whole: bool = False
    """A whole number."""
    score: str | None = None
    """The `compose.score` with which it exists; None: always."""

    @property
    def name(self) -> str:
        """What tells it from others, also from those of the same setting."""
        return self.setting if self.score is None else f"{self.setting} ({self.score})"

    def rounded(self, value: Any) -> Any:
        """A drawn number as it is to be used."""
        if self.options:
            return value
        if self.whole:
            return round(value)
        if not self.log or value == 0:
            return round(float(value), _DIGITS)
        return float(f"{value:.{_DIGITS}g}")

    def clipped(self, value: float) -> float:
        """The nearest value that a search can draw."""
        inside = min(max(value, self.low), self.high)
        return self.rounded(inside) if self.whole else float(inside)

    def levels(self, n: int) -> list[Any]:
        """All choices, or `n` numbers from end to end; fewer where whole numbers coincide."""
        if self.options:
            return list(self.options)
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        step = (ends[1] - ends[0]) / (n - 1)
        values = [ends[0] + i * step for i in range(n)]
        values = [self.clipped(math.exp(v) if self.log else v) for v in values]
        return list(dict.fromkeys(values))


@dataclass(frozen=True)
class Space:
    """Settings of a search.

    Raises: ValueError if nothing is left to search over.
    """

    default: Mapping[str, Any]
    """All settings as they are now, by dotted name; `prompts.templates` is the name of a set."""
    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What is not as in the default, though nothing is searched there."""

    def __post_init__(self) -> None:
        if not self.dimensions:
            fix = "label more images, or name other settings in search.over"
            rule = "given for settings that make a difference on these segments"
            raise ValueError(complain("search.over", rule, "none", fix))

    def active(self, params: Mapping[str, Any]) -> list[Dimension]:
        """The dimensions that exist, given the kind of score in `params` (else the default's)."""
        score = params.get(SCORE, self.default[SCORE])
        return [d for d in self.dimensions if d.score in (None, score)]

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """All settings for drawn values by dimension name."""
        return {
            **self.default,
            **self.fixed,
            **{d.setting: d.rounded(params[d.name]) for d in self.active(params)},
        }

    def default_params(self) -> dict[str, Any]:
        """The point of the space that is nearest to the default."""
        params: dict[str, Any] = {}
        for dimension in self.active({}):
            value = self.default[dimension.setting]
            if isinstance(value, Mapping):  # one threshold a class
                value = sum(value.values()) / len(value)
            if not dimension.options:
                params[dimension.name] = dimension.clipped(value)
            elif value in dimension.options:
                params[dimension.name] = value
        return params

    def grid(self, most: int) -> list[dict[str, Any]]:
        """All combinations of as many levels as fit, at least two of every number.

        Levels are added one at a time, in the order of the dimensions.

        Raises: ValueError if not even two levels fit.
        """
        levels = dict.fromkeys((d.name for d in self.dimensions if not d.options), 2)
        if (least := self._count(levels)) > most:
            fix = "raise it, search over fewer settings (search.over), or search by tpe"
            rule = f">= {least + 1} for a grid of two levels a setting"
            raise ValueError(complain("trials", rule, most + 1, fix))
        growing = list(levels)
        while growing:
            for name in list(growing):
                more = {**levels, name: levels[name] + 1}
                if self._count(levels) < self._count(more) <= most:
                    levels = more
                else:
                    growing.remove(name)
        return [point for score in self._scores() for point in self._points(score, levels)]

    def _scores(self) -> list[str]:
        """Kinds of score that are searched over, or the one that stays."""
        mine = (d.options for d in self.dimensions if d.setting == SCORE)
        return list(next(mine, (self.default[SCORE],)))

    def _axes(self, score: str, levels: Mapping[str, int]) -> dict[str, list[Any]]:
        return {
            d.name: [score] if d.setting == SCORE else d.levels(levels.get(d.name, 0))
            for d in self.active({SCORE: score})
        }

    def _count(self, levels: Mapping[str, int]) -> int:
        axes = (self._axes(score, levels) for score in self._scores())
        return sum(math.prod(map(len, axis.values())) for axis in axes)

    def _points(self, score: str, levels: Mapping[str, int]) -> list[dict[str, Any]]:
        axes = self._axes(score, levels)
        return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def compose_space(
    default: Mapping[str, Any],
    limits: Limits,
    templates: Sequence[str] = ("run",),
    over: Sequence[str] | None = None,
) -> Space:
    """The space of a run.

    Args:
        default: All compose settings that the labels were made with, resolved, and the name of the
            set of templates, by dotted name.
        limits: Of its segments.
        templates: Names of sets to choose among.
        over: Settings to search over; None: all.

    Raises:
        ValueError: `over` names what cannot be searched, or a kind of score without a threshold.
    """
    chosen = check_over(over, templates)
    kinds = ("cosine", "softmax") if SCORE in chosen else (default[SCORE],)
    if over is not None and "compose.temperature" in over and "softmax" not in kinds:
        fix = f"add {SCORE} and compose.min_similarity, or leave compose.temperature out"
        got = f"compose.temperature, with {SCORE} {default[SCORE]}"
        raise ValueError(complain("search.over", "settings that make a difference", got, fix))
    found = [Dimension(SCORE, ("cosine", "softmax")), Dimension(TEMPLATES, tuple(templates))]
    middle, high = limits.margin
    ends = {"cosine": limits.cosine, "softmax": limits.softmax}
    lead = {"cosine": (0.0, high), "softmax": (0.0, limits.softmax[1])}
    for kind in kinds:
        found.append(_number("compose.min_similarity", ends[kind], score=kind))
        found.append(_number("compose.min_margin", lead[kind], score=kind))
    if "softmax" in kinds:
        # Between picking the best class alone and blurring what the median segment is surest of.
        warm = (middle / 10, middle * 3, default["compose.temperature"])
        span = max(min(warm), 1e-6), min(max(warm), 1e3)
        found.append(_number("compose.temperature", span, log=True, score="softmax"))
    found.append(Dimension("compose.order", ("score", "area")))
    least, most = (round(area) for area in limits.area_px)
    found.append(Dimension("compose.min_area_px", (), least, most, log=True, whole=True))
    found.append(_number("compose.min_predicted_iou", limits.predicted_iou))
    found.append(_number("compose.min_stability", limits.stability))
    kept = (d for d in found if d.setting in chosen)
    dimensions = tuple(d for d in kept if len(d.options) > 1 or d.low < d.high)
    return Space(default, dimensions, fixed={TEMPLATES: templates[0]})


def _shares(ends: tuple[float, float]) -> tuple[float, float]:
    """Within [0, 1], where the thresholds lie; the IoU that SAM predicts may be above."""
    return min(max(ends[0], 0.0), 1.0), min(max(ends[1], 0.0), 1.0)


def _number(
    setting: str, ends: tuple[float, float], *, log: bool = False, score: str | None = None
) -> Dimension:
    low, high = ends
    return Dimension(setting, low=low, high=high, log=log, score=score)


def check_over(over: Sequence[str] | None, templates: Sequence[str]) -> set[str]:
    """The settings that are searched over; all that can be where `over` is None.

    Raises: ValueError, see `compose_space`.
    """
    if over is None:
        return set(SEARCHED)
    for name in over:
        if name not in SEARCHED:
            near = nearest(name, SEARCHED)
            fix = f"did you mean {near}?" if near else f"known: {', '.join(SEARCHED)}"
            raise ValueError(complain("search.over", "settings that can be searched", name, fix))
    if not over:
        fix = "leave it out to search over all"
        raise ValueError(complain("search.over", "at least one setting", "none", fix))
    if SCORE in over and "compose.min_similarity" not in over:
        fix = "add compose.min_similarity: one threshold does not fit both kinds of score"
        raise ValueError(complain("search.over", "complete", " ".join(over), fix))
    if TEMPLATES in over and len(templates) < 2:
        fix = "name more sets, such as --templates run photo seven"
        raise ValueError(complain("templates", "two or more to search", " ".join(templates), fix))
    if TEMPLATES not in over and len(templates) > 1:
        fix = f"add {TEMPLATES} to search.over, or name one set"
        raise ValueError(complain("templates", "one set", " ".join(templates), fix))
    return set(over)
