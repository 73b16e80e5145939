"""Score settings of `compose` against true label maps, on regions instead of pixels, exactly.

Enters: for each labelled image its regions (`regions.cut`), the qualities of its segments and how
similar they are to the classes. Leaves: confusion counts, the very numbers that composing each
image and comparing pixel by pixel would give; and the best threshold of each class on its own.

Why it is quick: all images' segments lie end to end in flat arrays, and what a setting says of each
segment is found by the functions that `compose` itself uses, for all at once; the scores are kept
for the settings that follow. What is left is to find, for each region, the segment that wins there,
among the few that cover it.

The arrays may be read-only, as Ray's object store gives them back; they always are, so that the
loops are compiled for one kind.

Shape suffixes: I images, R segments of all images, N regions of all images, E counts of all
regions (one for each true class in a region), K classes (0 is background), L = K + 1 (the last
column: no label), G groups of images.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.compose import (
    Scored,
    kept_segments,
    minimum_by_class,
    minimum_scores,
    precedence,
    score_segments,
)
from zsplg_ray.label.regions import Regions
from zsplg_ray.label.sweep_kernels import Flat, tally, turned
from zsplg_ray.label.thresholds import ThresholdSearch
from zsplg_ray.settings import complain
from zsplg_ray.vocab import ClassList

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Of what `Sweep.ranges` tells."""

_REMEMBERED = 16
"""Scores of so many (templates, score, temperature) are kept by a process; 16 bytes a segment each,
and 8 for what follows from them."""


@dataclass(frozen=True)
class Ranges:
    """Where the numbers lie that thresholds act on: their `QUANTILES` over segments, float64.

    Only finite ones are counted; NaN where there is none.
    """

    cosine: np.ndarray
    """Highest cosine similarity of a segment."""
    softmax: np.ndarray
    """Highest softmax score, at the temperature that was given."""
    cosine_margin: np.ndarray
    """Lead of the highest cosine similarity."""
    softmax_margin: np.ndarray
    """Lead of the highest softmax score."""
    area_px: np.ndarray
    """Pixels of a segment."""
    predicted_iou: np.ndarray
    """Quality that SAM predicts."""
    stability: np.ndarray
    """IoU of the mask at a higher and a lower cut-off."""


class Qualities(Protocol):
    """What a sweep must know of one image's R segments beside their masks; `Segments` knows it."""

    @property
    def area_px(self) -> np.ndarray:
        """int64 [R], pixels."""
        ...

    @property
    def predicted_iou(self) -> np.ndarray:
        """float32 [R], the quality that SAM predicts."""
        ...

    @property
    def stability(self) -> np.ndarray:
        """float32 [R], IoU of the mask at a higher and a lower cut-off."""
        ...

    def __len__(self) -> int:
        """R."""
        ...


class Sweep:
    """Labelled images, ready to be scored under any setting of `compose`; cheap to pickle."""

    def __init__(
        self,
        regions: Sequence[Regions],
        qualities: Sequence[Qualities],
        sims: Mapping[str, Sequence[np.ndarray]],
        classes: ClassList,
    ) -> None:
        """Lay the images end to end.

        Args:
            regions: one for each image.
            qualities: the segments that cut them, for area, predicted IoU and stability.
            sims: name of a set of templates -> for each image float32 [R, K], see `compose`.
            classes: the K classes, background first.

        Raises:
            ValueError: what is given for an image does not belong together.
        """
        _check_images(regions, qualities, sims, classes)
        self._classes = classes
        self._flat = _laid_out(regions)
        n_segments = [len(one) for one in qualities]
        self._image_R = _frozen(np.repeat(np.arange(len(qualities)), n_segments))
        self._area_px, self._predicted_iou, self._stability = (
            _frozen(_joined([getattr(one, name) for one in qualities], dtype))
            for name, dtype in _QUALITIES.items()
        )
        none = np.empty((0, len(classes)), np.float32)
        self._sims = {
            key: _frozen(np.concatenate([none, *sim]).astype(np.float32, copy=False))
            for key, sim in sims.items()
        }
        self._make_caches()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found again when it is needed."""
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for array in (*self._flat, *self._sims.values(), *self._gates(), self._image_R):
            _frozen(array)
        self._make_caches()

    @property
    def n_images(self) -> int:
        """The number of images I."""
        return len(self._flat.region_start) - 1

    def confusion(
        self,
        config: ComposeConfig,
        templates: str,
        group_I: np.ndarray | None = None,
        n_groups: int = 1,
    ) -> np.ndarray:
        """What `metrics.confusion` gives for the composed images, summed over each group.

        Args:
            config: the setting.
            templates: a key of `sims`.
            group_I: int [I], group of each image in [0, n_groups), or -1 to leave it out. None:
                all images are group 0.
            n_groups: G.

        Returns:
            int64 [G, K, K + 1]: rows are the truth, columns the label, the last one pixels without.

        Raises:
            ValueError: `group_I` does not fit, or as `compose.minimum_by_class`.
        """
        n_classes = len(self._classes)
        group_I = self._groups(group_I, n_groups)
        counts_GKL = np.zeros((n_groups, n_classes, n_classes + 1), np.int64)
        scored, rank_R = self._ranked(config, templates)
        min_score_K = minimum_scores(config, self._classes)
        kept_R = kept_segments(scored, *self._gates(), config, min_score_K)
        rank_R = np.where(kept_R, rank_R, -np.inf)
        tally(self._flat, rank_R, scored.best_R, _empty(config, n_classes), group_I, counts_GKL)
        return counts_GKL

    def class_thresholds(
        self, config: ComposeConfig, templates: str, image_I: np.ndarray
    ) -> tuple[dict[str, float], float]:
        """The best minimum score of each class, one class at a time, all else as it is.

        For each class every minimum that makes a difference is tried: between any two scores of
        its segments, at the lowest, and above the highest. The best mean IoU wins, of equal ones
        what is nearest to the value before. This goes on until no class improves, so the result is
        as good as any that differs from it in one class. Background is searched if it is named.

        Args:
            config: where the search starts.
            templates: a key of `sims`.
            image_I: bool [I], the images that count.

        Returns:
            `compose.min_similarity` by class name, and the mean IoU of these images with it.

        Raises:
            ValueError: `image_I` does not fit, or as `compose.minimum_by_class`.
        """
        image_I = self._images(image_I)
        minimum = minimum_by_class(config, self._classes)
        scored, rank_R = self._ranked(config, templates)
        search = ThresholdSearch(
            classes=self._classes,
            flat=self._flat,
            covered=self._covered(),
            scored=scored,
            rank_R=rank_R,
            kept=lambda min_score_K: kept_segments(scored, *self._gates(), config, min_score_K),
            empty=_empty(config, len(self._classes)),
            group_I=np.where(image_I, 0, -1),
            counts_R=image_I[self._image_R],
        )
        return search.run(minimum, minimum_scores(config, self._classes))

    def ranges(
        self, templates: str, config: ComposeConfig, image_I: np.ndarray | None = None
    ) -> Ranges:
        """Where the numbers lie that thresholds act on.

        Args:
            templates: a key of `sims`.
            config: gives the temperature; nothing else of it is used.
            image_I: bool [I], the images that count; None: all.

        Raises:
            ValueError: `image_I` does not fit.
        """
        chosen_R = self._images(image_I)[self._image_R]
        cosine, softmax = (
            self._scored(templates, score, config.temperature) for score in ("cosine", "softmax")
        )
        numbers = (cosine.score_R, softmax.score_R, cosine.margin_R, softmax.margin_R)
        return Ranges(*(_quantiles(number_R[chosen_R]) for number_R in (*numbers, *self._gates())))

    def _make_caches(self) -> None:
        self._scored = functools.lru_cache(_REMEMBERED)(self._score)
        self._covered = functools.lru_cache(1)(lambda: turned(self._flat, len(self._image_R)))

    def _score(self, templates: str, score: Any, temperature: float) -> Scored:
        if templates not in self._sims:
            rule = f"one of {', '.join(self._sims)}"
            raise ValueError(complain("templates", rule, templates, "embed its prompts first"))
        return score_segments(self._sims[templates], score, temperature)

    def _ranked(self, config: ComposeConfig, templates: str) -> tuple[Scored, np.ndarray]:
        """Scores, and the number by which segments compete."""
        temperature = config.temperature if config.score == "softmax" else 1.0  # cosine has none
        scored = self._scored(templates, config.score, temperature)
        return scored, precedence(scored, self._area_px, config)

    def _gates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._area_px, self._predicted_iou, self._stability

    def _groups(self, group_I: np.ndarray | None, n_groups: int) -> np.ndarray:
        """`group_I` as int64, checked: the loops do not look."""
        if group_I is None:
            return np.zeros(self.n_images, np.int64)
        if group_I.shape != (self.n_images,) or not np.issubdtype(group_I.dtype, np.integer):
            got = f"{group_I.dtype} {list(group_I.shape)}"
            fix = "give one group per image"
            raise ValueError(complain("group_I", f"integers [{self.n_images}]", got, fix))
        if ((group_I < -1) | (group_I >= n_groups)).any():
            fix = "count groups from 0"
            raise ValueError(complain("group_I", f"in [-1, {n_groups})", group_I[:8], fix))
        return np.array(group_I, np.int64)  # a copy, because it may be read-only

    def _images(self, image_I: np.ndarray | None) -> np.ndarray:
        if image_I is None:
            return np.ones(self.n_images, np.bool_)
        if image_I.shape != (self.n_images,) or image_I.dtype != np.bool_:
            got = f"{image_I.dtype} {list(image_I.shape)}"
            fix = "say of each image whether it counts"
            raise ValueError(complain("image_I", f"bool [{self.n_images}]", got, fix))
        return image_I


_CACHES = ("_scored", "_covered")
_QUALITIES = {"area_px": np.int64, "predicted_iou": np.float32, "stability": np.float32}


def miou(confusion_KL: np.ndarray) -> float:
    """Mean IoU over the classes that occur in truth or prediction; 0.0 where none does.

    Args:
        confusion_KL: int64 [K, K + 1], as `metrics.confusion`.
    """
    hits_K = confusion_KL.diagonal()
    union_K = confusion_KL.sum(axis=1) + confusion_KL[:, :-1].sum(axis=0) - hits_K
    present_K = union_K > 0
    if not present_K.any():
        return 0.0
    return float((hits_K[present_K] / union_K[present_K]).mean())


def _empty(config: ComposeConfig, n_classes: int) -> int:
    """The column of what no painted segment covers."""
    return n_classes if config.unsure == "ignore" else 0


def _quantiles(number_R: np.ndarray) -> np.ndarray:
    number_R = number_R[np.isfinite(number_R)].astype(np.float64)
    return np.quantile(number_R, QUANTILES) if len(number_R) else np.full(len(QUANTILES), np.nan)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """Laid end to end; also of no array at all."""
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def _starts(starts: Sequence[np.ndarray]) -> np.ndarray:
    """The starts of lists that are laid end to end, int64."""
    lengths = [np.diff(start.astype(np.int64)) for start in starts]
    return np.cumsum(_joined([np.zeros(1, np.int64), *lengths], np.int64))


def _laid_out(regions: Sequence[Regions]) -> Flat:
    """The regions of all images, with segments numbered over all of them."""
    first = np.cumsum([0, *(one.n_segments for one in regions)])
    if first[-1] > np.iinfo(np.int32).max:
        rule = "fewer than 2^31 segments in all"
        raise ValueError(complain("regions", rule, first[-1], "tune on fewer images"))
    covers = [one.cover + np.int32(start) for one, start in zip(regions, first, strict=False)]
    arrays = (
        np.cumsum([0, *map(len, regions)], dtype=np.int64),
        _starts([one.cover_start for one in regions]),
        _joined(covers, np.int32),
        _starts([one.count_start for one in regions]),
        _joined([one.count_class for one in regions], np.uint8),
        _joined([one.count_px for one in regions], np.int32),
    )
    return Flat(*map(_frozen, arrays))


def _check_images(
    regions: Sequence[Regions],
    qualities: Sequence[Qualities],
    sims: Mapping[str, Sequence[np.ndarray]],
    classes: ClassList,
) -> None:
    """Raises a ValueError if lengths differ or a true class has no name."""
    lengths = {len(regions), len(qualities), *map(len, sims.values())}
    if len(lengths) > 1:
        fix = "give one of each for every image"
        raise ValueError(complain("sims", "of as many images as regions", sorted(lengths), fix))
    n_classes = len(classes)
    for i, (cut, quality) in enumerate(zip(regions, qualities, strict=True)):
        if cut.n_segments != len(quality):
            rule, got = f"those that cut image {i}, {cut.n_segments}", len(quality)
            raise ValueError(complain("qualities", rule, got, "count the regions again"))
        if cut.count_class.max(initial=0) >= n_classes:
            rule, got = f"counted with classes below {n_classes}", cut.count_class.max()
            raise ValueError(complain("regions", rule, got, "count the regions again"))
        for key, sim in sims.items():
            if sim[i].shape != (len(quality), n_classes):
                rule = f"of shape {(len(quality), n_classes)} for image {i}"
                raise ValueError(complain(f"sims[{key!r}]", rule, sim[i].shape, "embed again"))
