"""What is counted on label maps: an image's own numbers, and sums over images for the charts.

What enters: rows of labels/ (and of other runs), masks. What leaves: `Counted` for each image, and
`Totals`, counts that are divided once, at the very end. Nothing here needs the image itself.

Words: *coverage* is the share of pixels that have a class other than background, *open* the share
that is left open (255). Two maps *differ* in the share of pixels where they do not say the same.

Shapes: H, W pixels; K classes, background included; L = K + 1 (last: left open); S steps of score.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from zsplg_ray.masks import Truth
from zsplg_ray.metrics import confusion, grouped_confusion, scores
from zsplg_ray.records import IGNORE, decode_png
from zsplg_ray.safe_text import one_line, shortened
from zsplg_ray.settings import complain
from zsplg_ray.views.report.sources import Rows

STEPS = 32
"""Steps of score between which labels are told apart where there is a truth."""
_STEP = 256 // STEPS
_STRIP_PX = 4_000_000
"""Pixels that are counted at a time: counting takes some 50 bytes for each."""


@dataclass
class MapCount:
    """What one label map says of one image."""

    shares: dict[int, float]
    """Class index (255: open) -> share of pixels, what does not occur left out."""
    miou: float | None = None
    """Against the truth, [0, 1]; None without truth."""
    wrong: float | None = None
    """Share of the pixels with a truth whose label is another, [0, 1]."""
    differs: float | None = None
    """Share of pixels that the run's own labels say something else of, [0, 1]."""

    @property
    def coverage(self) -> float:
        """Share of pixels with a class other than background."""
        return sum(share for k, share in self.shares.items() if k not in (0, IGNORE))


@dataclass
class Counted:
    """One image's numbers; a map that is missing or broken is None."""

    labels: MapCount | None = None
    others: list[MapCount | None] = field(default_factory=list)
    truth: MapCount | None = None
    notes: list[str] = field(default_factory=list)
    """What is the matter with the image, in words."""


class Totals:
    """Sums over images. Threads may add to it at the same time."""

    def __init__(self, n_classes: int, n_others: int) -> None:
        self._lock = threading.Lock()
        self.images = 0
        """Images whose labels could be counted."""
        self.with_truth = 0
        self.misfits: list[str] = []
        """Why truth of images could not be compared, a line an image."""
        self.px_256 = np.zeros(256, np.int64)
        """Pixels by label."""
        self.score_256 = np.zeros(256, np.int64)
        """Pixels with a class other than background, by score * 255."""
        self.joint_SKL = np.zeros((STEPS, n_classes, n_classes + 1), np.int64)
        """Confusion with the truth by step of score."""
        self.others_KL = [np.zeros((n_classes, n_classes + 1), np.int64) for _ in range(n_others)]
        """Confusion of each other run with the truth."""
        self.agreement_KL = [
            np.zeros((n_classes, n_classes + 1), np.int64) for _ in range(n_others)
        ]
        """Confusion of each other run with this one in the place of the truth."""
        self.compared = [0] * n_others
        """Images that each other run has too."""

    @property
    def confusion_KL(self) -> np.ndarray:
        """Confusion with the truth."""
        return self.joint_SKL.sum(axis=0)

    def add(self, name: str, value: np.ndarray | int, at: int | None = None) -> None:
        """Add to one of the sums, or to that of other run `at`."""
        with self._lock:
            if at is None:
                setattr(self, name, getattr(self, name) + value)
            else:
                getattr(self, name)[at] += value

    def misfit(self, why: str) -> None:
        """Note why a mask could not be compared."""
        with self._lock:
            self.misfits.append(why)


@dataclass(frozen=True, eq=False)
class Map:
    """A label map that has been looked at."""

    label_HW: np.ndarray
    """uint8, class indices, 255: open."""
    px_256: np.ndarray
    """int64, pixels by label."""

    @property
    def shares(self) -> dict[int, float]:
        """Class index -> share of pixels, what does not occur left out."""
        total = int(self.px_256.sum())
        return {int(k): int(self.px_256[k]) / total for k in np.flatnonzero(self.px_256)}


@dataclass(frozen=True)
class Maps:
    """The label maps of one image, None where there is none that can be used."""

    labels: Map | None
    others: tuple[Map | None, ...]
    truth: Map | None
    notes: tuple[str, ...]
    misfit: str = ""
    """Why its mask could not be compared."""

    @property
    def all(self) -> tuple[Map | None, ...]:
        """In the order in which they are shown."""
        return (self.labels, *self.others, self.truth)


def read_maps(rows: Rows, truth: Truth | None, n_classes: int) -> Maps:
    """Decode what there is of an image; what does not fit is left out, with a note."""
    notes = []
    try:
        labels = _checked(decode_png(rows.row.label_png), n_classes, None)
    except ValueError:
        labels, notes = None, ["its labels are broken"]
    others: list[Map | None] = []
    for i, row in enumerate(rows.others):
        other = None
        if row is not None:
            try:
                other = _checked(decode_png(row.label_png), n_classes, labels)
            except ValueError:
                notes.append(f"the labels of comparison {i + 1} do not fit")
        others.append(other)
    mask, misfit = None, ""
    if truth is not None and truth.has(rows.row.image_id):
        try:
            mask = _checked(truth.read(rows.row.image_id), n_classes, labels)
        except (OSError, ValueError) as e:
            notes.append("its mask does not fit")
            misfit = one_line(shortened(f"{e} (image {rows.row.image_id})"))
    return Maps(labels, tuple(others), mask, tuple(notes), misfit)


def _checked(label_HW: np.ndarray, n_classes: int, labels: Map | None) -> Map:
    """The map, if it holds known classes and is of the size of the labels. Raises: ValueError."""
    if labels is not None and label_HW.shape != labels.label_HW.shape:
        (height, width), (h, w) = labels.label_HW.shape, label_HW.shape
        fix = "compare maps of the same image"
        raise ValueError(complain("map", f"{width} x {height} as the labels", f"{w} x {h}", fix))
    px_256 = _histogram(label_HW)
    wrong = np.flatnonzero(px_256[n_classes:IGNORE])
    if len(wrong):
        rule, fix = f"of class indices below {n_classes}, or {IGNORE}", "bring it to these classes"
        raise ValueError(complain("map", rule, int(wrong[0]) + n_classes, fix))
    return Map(label_HW, px_256)


def count(rows: Rows, maps: Maps, names: Sequence[str], totals: Totals | None) -> Counted:
    """An image's numbers; they are added to `totals` if there are any.

    Args:
        rows: The image.
        maps: Its label maps.
        names: The K class names.
        totals: None: only this image's numbers are wanted.
    """
    counted = Counted(notes=list(maps.notes), others=[None] * len(maps.others))
    if maps.truth is not None:
        counted.truth = MapCount(maps.truth.shares)
    if maps.labels is None:
        return counted
    counted.labels = MapCount(maps.labels.shares)
    if totals is not None:
        totals.add("images", 1)
        totals.add("px_256", maps.labels.px_256)
    _count_scores(rows, maps.labels, maps.truth, counted, names, totals)
    for i, other in enumerate(maps.others):
        if other is not None:
            counted.others[i] = _count_other(i, other, maps, names, totals)
    return counted


def _count_scores(
    rows: Rows,
    labels: Map,
    truth: Map | None,
    counted: Counted,
    names: Sequence[str],
    totals: Totals | None,
) -> None:
    """The run's own labels, by score, against the truth."""
    label_HW = labels.label_HW
    try:
        score_HW = decode_png(rows.row.score_png)
        if score_HW.shape != label_HW.shape:
            raise ValueError("another size")
    except ValueError:
        score_HW = np.zeros(label_HW.shape, np.uint8)
        counted.notes.append("its scores are broken")
    if totals is not None:
        for at in _strips(label_HW):
            classed = (label_HW[at] != 0) & (label_HW[at] != IGNORE)
            totals.add("score_256", np.bincount(score_HW[at][classed], minlength=256))
    if truth is None:
        return
    k = len(names)
    joint_SKL = np.zeros((STEPS, k, k + 1), np.int64)
    for at in _strips(label_HW):
        step_HW = score_HW[at] // _STEP
        joint_SKL += grouped_confusion(truth.label_HW[at], label_HW[at], step_HW, k, STEPS)
    if counted.labels is not None:
        _judge(counted.labels, joint_SKL.sum(axis=0), names)
    if totals is not None:
        totals.add("joint_SKL", joint_SKL)
        totals.add("with_truth", 1)


def _count_other(
    i: int, other: Map, maps: Maps, names: Sequence[str], totals: Totals | None
) -> MapCount:
    """Another run's labels against the truth and against the run's own."""
    assert maps.labels is not None
    found = MapCount(other.shares)
    found.differs = float((other.label_HW != maps.labels.label_HW).mean())
    if totals is not None:
        totals.add("compared", 1, i)
        totals.add("agreement_KL", _confusion(maps.labels, other, len(names)), i)
    if maps.truth is not None:
        counts_KL = _confusion(maps.truth, other, len(names))
        _judge(found, counts_KL, names)
        if totals is not None:
            totals.add("others_KL", counts_KL, i)
    return found


def _judge(found: MapCount, counts_KL: np.ndarray, names: Sequence[str]) -> None:
    told = scores(counts_KL, names)
    found.miou = told["miou"]
    found.wrong = None if told["pixel_accuracy"] is None else 1 - told["pixel_accuracy"]


def _confusion(truth: Map, pred: Map, n_classes: int) -> np.ndarray:
    counts = np.zeros((n_classes, n_classes + 1), np.int64)
    for at in _strips(truth.label_HW):
        counts += confusion(truth.label_HW[at], pred.label_HW[at], n_classes)
    return counts


def _histogram(map_HW: np.ndarray) -> np.ndarray:
    """Pixels by value, int64 [256]."""
    px_256 = np.zeros(256, np.int64)
    for at in _strips(map_HW):
        px_256 += np.bincount(map_HW[at].ravel(), minlength=256)
    return px_256


def _strips(map_HW: np.ndarray) -> Iterator[slice]:
    """Rows of a map, so many at a time that they are counted in bounded memory."""
    height, width = map_HW.shape
    lines = max(1, _STRIP_PX // max(1, width))
    yield from (slice(y, y + lines) for y in range(0, height, lines))


def is_number(value: float | None) -> bool:
    """Whether there is a value; confidence is nan where nothing is labelled."""
    return value is not None and math.isfinite(value)
