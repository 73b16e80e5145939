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

from zsplg_ray.labels import LabelledImage
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


def label_map(row: LabelledImage | None, n_classes: int) -> np.ndarray | None:
    """The label map of a row, uint8 [H, W], None for no row.

    Raises: ValueError if it is broken or holds classes that there are not.
    """
    return None if row is None else _checked(decode_png(row.label_png), n_classes, "labels")


def _checked(label_HW: np.ndarray, n_classes: int, name: str) -> np.ndarray:
    found = np.bincount(label_HW.ravel(), minlength=256)
    wrong = np.flatnonzero(found[n_classes:IGNORE])
    if len(wrong):
        rule = f"class indices below {n_classes}, or {IGNORE}"
        raise ValueError(complain(name, rule, int(wrong[0]) + n_classes, "mend the map"))
    return label_HW


@dataclass(frozen=True)
class Maps:
    """The label maps of one image, uint8 [H, W], None where there is none that can be used."""

    labels: np.ndarray | None
    others: tuple[np.ndarray | None, ...]
    truth: np.ndarray | None
    notes: tuple[str, ...]
    misfit: str = ""
    """Why its mask could not be compared."""

    @property
    def all(self) -> tuple[np.ndarray | None, ...]:
        """In the order in which they are shown."""
        return (self.labels, *self.others, self.truth)


def read_maps(rows: Rows, truth: Truth | None, n_classes: int) -> Maps:
    """Decode what there is of an image; what does not fit is left out, with a note."""
    notes = []
    try:
        labels = label_map(rows.row, n_classes)
    except ValueError:
        labels, notes = None, ["its labels are broken"]
    others = []
    for i, row in enumerate(rows.others):
        try:
            other = _fitting(label_map(row, n_classes), labels)
        except ValueError:
            other = None
            notes.append(f"the labels of comparison {i + 1} do not fit")
        others.append(other)
    mask, misfit = None, ""
    if truth is not None and truth.has(rows.row.image_id):
        try:
            mask = _fitting(_checked(truth.read(rows.row.image_id), n_classes, "truth"), labels)
        except (OSError, ValueError) as e:
            notes.append("its mask does not fit")
            misfit = one_line(shortened(f"{e} (image {rows.row.image_id})"))
    return Maps(labels, tuple(others), mask, tuple(notes), misfit)


def _fitting(map_HW: np.ndarray | None, labels_HW: np.ndarray | None) -> np.ndarray | None:
    """The map, if it has the size of the labels. Raises: ValueError."""
    if map_HW is None or labels_HW is None or map_HW.shape == labels_HW.shape:
        return map_HW
    rule = f"{labels_HW.shape[1]} x {labels_HW.shape[0]} as its labels"
    shown = f"{map_HW.shape[1]} x {map_HW.shape[0]}"
    raise ValueError(complain("map", rule, shown, "compare maps of the same image"))


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
        counted.truth = MapCount(_shares(maps.truth))
    labels = maps.labels
    if labels is None:
        return counted
    px = np.bincount(labels.ravel(), minlength=256)
    counted.labels = MapCount(_shares_of(px))
    if totals is not None:
        totals.add("images", 1)
        totals.add("px_256", px)
    _count_scores(rows, maps, counted, names, totals)
    for i, other in enumerate(maps.others):
        if other is not None:
            _count_other(i, other, maps, counted, names, totals)
    return counted


def _count_scores(
    rows: Rows, maps: Maps, counted: Counted, names: Sequence[str], totals: Totals | None
) -> None:
    """The run's own labels, by score, against the truth."""
    labels = maps.labels
    assert labels is not None and counted.labels is not None
    try:
        score = decode_png(rows.row.score_png)
        if score.shape != labels.shape:
            raise ValueError("another size")
    except ValueError:
        score = np.zeros(labels.shape, np.uint8)
        counted.notes.append("its scores are broken")
    if totals is not None:
        classed = (labels != 0) & (labels != IGNORE)
        totals.add("score_256", np.bincount(score[classed], minlength=256))
    if maps.truth is None:
        return
    k = len(names)
    joint = np.zeros((STEPS, k, k + 1), np.int64)
    for at in _strips(labels):
        joint += grouped_confusion(maps.truth[at], labels[at], score[at] // _STEP, k, STEPS)
    _judge(counted.labels, joint.sum(axis=0), names)
    if totals is not None:
        totals.add("joint_SKL", joint)
        totals.add("with_truth", 1)


def _count_other(
    i: int,
    other: np.ndarray,
    maps: Maps,
    counted: Counted,
    names: Sequence[str],
    totals: Totals | None,
) -> None:
    """Another run's labels against the truth and against the run's own."""
    assert maps.labels is not None
    found = MapCount(_shares(other))
    found.differs = float((other != maps.labels).mean())
    counted.others[i] = found
    if totals is not None:
        totals.add("compared", 1, i)
        totals.add("agreement_KL", _confusion(maps.labels, other, len(names)), i)
    if maps.truth is not None:
        counts_KL = _confusion(maps.truth, other, len(names))
        _judge(found, counts_KL, names)
        if totals is not None:
            totals.add("others_KL", counts_KL, i)


def _judge(found: MapCount, counts_KL: np.ndarray, names: Sequence[str]) -> None:
    told = scores(counts_KL, names)
    found.miou = told["miou"]
    found.wrong = None if told["pixel_accuracy"] is None else 1 - told["pixel_accuracy"]


def _confusion(truth_HW: np.ndarray, pred_HW: np.ndarray, n_classes: int) -> np.ndarray:
    counts = np.zeros((n_classes, n_classes + 1), np.int64)
    for at in _strips(truth_HW):
        counts += confusion(truth_HW[at], pred_HW[at], n_classes)
    return counts


def _strips(map_HW: np.ndarray) -> Iterator[slice]:
    """Rows of a map, so many at a time that they are counted in bounded memory."""
    height, width = map_HW.shape
    lines = max(1, _STRIP_PX // max(1, width))
    yield from (slice(y, y + lines) for y in range(0, height, lines))


def _shares(map_HW: np.ndarray) -> dict[int, float]:
    return _shares_of(np.bincount(map_HW.ravel(), minlength=256))


def _shares_of(px_256: np.ndarray) -> dict[int, float]:
    total = int(px_256.sum())
    return {int(k): int(px_256[k]) / total for k in np.flatnonzero(px_256)}


def is_number(value: float | None) -> bool:
    """Whether there is a value; confidence is nan where nothing is labelled."""
    return value is not None and math.isfinite(value)
