"""Charts of the page: scores, thresholds, classes, who is taken for whom.

What enters: `Totals`. What leaves: cards, each a title, a sentence on how to read it, and markup.
A card is left out where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from zsplg_ray.metrics import scores
from zsplg_ray.records import IGNORE
from zsplg_ray.views.report import svg
from zsplg_ray.views.report.card import Card, percent, three, two
from zsplg_ray.views.report.counts import STEPS, Totals
from zsplg_ray.views.report.matrix import confusion_card
from zsplg_ray.views.report.svg import tag

MOST_CLASSES = 30
"""Classes that bars are shown for before the rest is folded away."""
_BINS = 32


@dataclass(frozen=True)
class Words:
    """Names that charts use."""

    classes: Sequence[str]
    run: str
    others: Sequence[str]
    unsure_is_open: bool
    """Whether pixels below the threshold are left open rather than background."""


def cards(totals: Totals, class_images: Sequence[int], words: Words) -> list[Card]:
    """All charts that there is something for.

    Args:
        totals: Of the counted images.
        class_images: Of each class, how many of the counted images have it.
        words: Names.
    """
    made = []
    if _judged(totals):
        made += [confusion_card(totals.confusion_KL, words.classes), _iou(totals, words)]
    if totals.score_256.any():
        made += [_threshold(totals, words), _histogram(totals)]
    if totals.images:
        made.append(_balance(totals, class_images, words))
    for i, other in enumerate(words.others):
        if totals.compared[i]:
            made.append(_agreement(totals, i, other, words))
    return made


def mean_iou(totals: Totals, names: Sequence[str]) -> float | None:
    """Over all counted images with a mask; None if no pixel has a truth."""
    return scores(totals.confusion_KL, names)["miou"] if totals.with_truth else None


def coverage(totals: Totals) -> float | None:
    """Share of all counted pixels with a class other than background."""
    all_px = int(totals.px_256.sum())
    return int(totals.px_256[1:IGNORE].sum()) / all_px if all_px else None


def open_share(totals: Totals) -> float | None:
    """Share of all counted pixels that are left open."""
    all_px = int(totals.px_256.sum())
    return int(totals.px_256[IGNORE]) / all_px if all_px else None


def _judged(totals: Totals) -> bool:
    """Whether any pixel has a truth; masks may be all 255."""
    return bool(totals.confusion_KL.any())


def _swatch(index: int, name: str) -> Markup:
    """A class's colour and name."""
    return tag("span", {"class": "class"}, tag("i", {"class": f"sw k{index}"}), name)


def _key(names: Sequence[str]) -> Markup:
    items = (tag("li", {}, tag("i", {"class": f"s{i % 6}"}), name) for i, name in enumerate(names))
    return tag("ul", {"class": "key"}, *items)


def _rows(head: Sequence[str], rows: Sequence[Markup], caption: str) -> Markup:
    """A table of bars; what is more than MOST_CLASSES is folded away."""
    cells = (tag("th", {"scope": "col", "class": "num" if i > 1 else ""}, name)
             for i, name in enumerate(head))  # fmt: skip
    top = tag("thead", {}, tag("tr", {}, *cells))

    def table(some: Sequence[Markup]) -> Markup:
        words = tag("caption", {"class": "unseen"}, caption)
        return tag("table", {"class": "bars"}, words, top, tag("tbody", {}, *some))

    first, rest = table(rows[:MOST_CLASSES]), rows[MOST_CLASSES:]
    if not rest:
        return first
    return first + tag("details", {}, tag("summary", {}, f"{len(rest)} more"), table(rest))


def _cell(*inside: object) -> Markup:
    return tag("td", {}, *inside)


def _number(told: str) -> Markup:
    return tag("td", {"class": "num"}, told)


# Cards -------------------------------------------------------------------------------------------


def _balance(totals: Totals, class_images: Sequence[int], words: Words) -> Card:
    """Share of pixels and of images by class."""
    px, all_px = totals.px_256, int(totals.px_256.sum())
    order = sorted(range(1, len(words.classes)), key=lambda k: (-int(px[k]), k))
    most = max((int(px[k]) for k in order), default=0) / all_px or 1.0
    rows, never = [], []
    for k in order:
        name, share = words.classes[k], int(px[k]) / all_px
        if not px[k]:
            never.append(name)
            continue
        mark = svg.bar(share / most, f"fill-k{k}", f"{name}: {percent(share)} of all pixels")
        label = tag("th", {"scope": "row"}, _swatch(k, name))
        images = _number(f"{class_images[k]}")
        rows.append(tag("tr", {}, label, _cell(mark), _number(percent(share)), images))
    rest = f"Background has {percent(int(px[0]) / all_px)} of the pixels"
    if px[IGNORE]:
        rest += f", {percent(int(px[IGNORE]) / all_px)} are left open"
    body = _rows(("class", "", "pixels", "images"), rows, "Share of pixels and images by class")
    body += tag("p", {"class": "small"}, f"{rest}.")
    if never:
        shown = ", ".join(never[:20]) + (f" and {len(never) - 20} more" if len(never) > 20 else "")
        body += tag("p", {"class": "small"}, f"Never found: {shown}.")
    return Card("balance", "Class balance", "How much of the pixels each class was given.", body)


def _iou_rows(
    results: Mapping[str, Mapping[str, float | None]], words: Words
) -> tuple[list[Markup], list[str]]:
    """A row a class with a bar for each result, best of the first on top; and absent classes."""
    index = {name: k for k, name in enumerate(words.classes)}
    known = [n for n in words.classes if any(r[n] is not None for r in results.values())]
    first = next(iter(results.values()))
    rows = []
    for name in sorted(known, key=lambda n: (-(first[n] or 0), index[n])):
        bars, numbers = [], []
        for i, (result, iou) in enumerate(results.items()):
            told = f"{name}, {result}: IoU {two(iou[name])}"
            bars.append(svg.bar(iou[name] or 0.0, f"fill-s{i % 6}", told))
            numbers.append(tag("span", {"class": "line"}, two(iou[name])))
        label = tag("th", {"scope": "row"}, _swatch(index[name], name))
        rows.append(tag("tr", {}, label, _cell(*bars), tag("td", {"class": "num"}, *numbers)))
    return rows, [n for n in words.classes if n not in known]


def _iou(totals: Totals, words: Words) -> Card:
    told = {words.run: scores(totals.confusion_KL, words.classes)}
    for name, counts_KL in zip(words.others, totals.others_KL, strict=True):
        if counts_KL.any():
            told[name] = scores(counts_KL, words.classes)
    rows, absent = _iou_rows({name: result["iou"] for name, result in told.items()}, words)
    key = [f"{name}: mIoU {three(result['miou'])}" for name, result in told.items()]
    body = _key(key) + _rows(("class", "", "IoU"), rows, "IoU by class")
    if absent:
        shown = ", ".join(absent[:20]) + (f", {len(absent) - 20} more" if len(absent) > 20 else "")
        body += tag("p", {"class": "small"}, f"In neither truth nor labels: {shown}.")
    note = "Overlap of labels and truth over their union; 1 is perfect. "
    note += f"Counted over {totals.with_truth} images with a mask."
    return Card("iou", "IoU by class", note, body)


def _agreement(totals: Totals, i: int, other: str, words: Words) -> Card:
    result = scores(totals.agreement_KL[i], words.classes)
    rows, _ = _iou_rows({other: result["iou"]}, words)
    body = _rows(("class", "", "IoU"), rows, f"Agreement with {other} by class")
    note = f"IoU between {words.run} and {other}: where it is low, the two see different things. "
    note += f"Over {totals.compared[i]} images that both have; the mean is {two(result['miou'])}."
    return Card(f"agreement{i}", f"Agreement with {other}", note, body)


def _histogram(totals: Totals) -> Card:
    """Pixels by score."""
    bins = totals.score_256.reshape(_BINS, -1).sum(axis=1) / totals.score_256.sum()
    plot = svg.Plot("score", 1.0, float(bins.max()))
    for i, share in enumerate(bins.tolist()):
        low, high = i / _BINS, (i + 1) / _BINS
        told = f"score {low:.2f} to {high:.2f}: {percent(share)}"
        if share:
            plot.column(low, high, share, "fill-s0", told)
    values = np.arange(256) / 255
    mean = float((values * totals.score_256).sum() / totals.score_256.sum())
    note = f"Share of the pixels that have a class, by score; the mean is {mean:.2f}."
    return Card("scores", "Scores", note, plot.svg(note))


def _threshold(totals: Totals, words: Words) -> Card:
    """What a minimum score would leave, and how good that would be."""
    key, plot = ["coverage"], svg.Plot("minimum score")
    if not _judged(totals):
        left = totals.score_256.reshape(STEPS, -1).sum(axis=1)[::-1].cumsum()[::-1]
        coverage = left / max(1, int(totals.px_256.sum()))
        points = [(b / STEPS, float(c)) for b, c in enumerate(coverage)]
        plot.line(points, "stroke-s0", "coverage")
        note = "Share of all pixels that would keep a class if lower scores did not count."
        return Card("threshold", "If a minimum score were set", note, _key(key) + plot.svg(note))
    lines: dict[str, list[tuple[float, float]]] = {"coverage": [], "precision": [], "mIoU": []}
    for b, counts_KL in enumerate(_thresholded(totals.joint_SKL, words.unsure_is_open)):
        classed = counts_KL[:, 1:-1].sum()
        lines["coverage"].append((b / STEPS, float(classed / max(1, counts_KL.sum()))))
        if classed:
            right = float(np.diagonal(counts_KL)[1:].sum() / classed)
            lines["precision"].append((b / STEPS, right))
        miou = scores(counts_KL, words.classes)["miou"]
        if miou is not None:
            lines["mIoU"].append((b / STEPS, miou))
    for i, (name, points) in enumerate(lines.items()):
        plot.line(points, f"stroke-s{i}", name)
    best = max(lines["mIoU"], key=lambda p: p[1], default=(0.0, 0.0))
    became = "open" if words.unsure_is_open else "background"
    note = f"If pixels below a minimum score became {became}: how much would keep a class, how "
    note += "much of that is right, and mIoU, which is highest "
    note += f"({best[1]:.3f}) at {best[0]:.2f}." if best[0] else f"({best[1]:.3f}) without."
    body = _key(list(lines)) + plot.svg(note)
    return Card("threshold", "If a minimum score were set", note, body)


def _thresholded(joint_SKL: np.ndarray, open_: bool) -> list[np.ndarray]:
    """Confusion for each lower end of a step, if pixels with a class below it lost that."""
    lost_K = np.zeros(joint_SKL.shape[1], np.int64)
    kept = joint_SKL.sum(axis=0)
    made = []
    for step_KL in joint_SKL:
        now = kept.copy()
        now[:, -1 if open_ else 0] += lost_K
        made.append(now)
        kept[:, 1:-1] -= step_KL[:, 1:-1]
        lost_K += step_KL[:, 1:-1].sum(axis=1)
    return made
