"""Who is taken for whom: the confusion matrix as a card, its largest entries in words above it.

What enters: confusion counts. What leaves: a card. Of many classes those are shown that pixels are
most often mistaken from or for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from zsplg_ray.views.mistaken import most_mistaken
from zsplg_ray.views.report import svg
from zsplg_ray.views.report.card import Card, percent
from zsplg_ray.views.report.svg import tag

MOST_CLASSES = 30
"""Classes that a matrix shows."""
_MIXUPS = 5
_CELL_PX = 30
_NARROW = 14
"""A confusion matrix of more classes takes the page's whole width."""
_NAME_CHARS = 18


def confusion_card(confusion_KL: np.ndarray, names: Sequence[str]) -> Card:
    """The card; counts are int64 [K, K + 1] as `metrics.confusion` returns them."""
    counts, labels, note = most_mistaken(confusion_KL, list(names), MOST_CLASSES)
    columns = [*labels, "left open"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], labels
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    left = top = 24 + 7 * min(_NAME_CHARS, max(map(len, columns)))
    marks = []
    for y, name in enumerate(labels):
        marks.append(svg.text(left - 6, top + (y + 0.65) * _CELL_PX, _cut(name), "tick", "end"))
        for x, taken in enumerate(columns):
            marks += _matrix_cell(left, top, x, y, float(share[y, x]), f"{name} → {taken}")
    for x, name in enumerate(columns):
        at = {"transform": f"translate({left + (x + 0.6) * _CELL_PX:.0f} {top - 8}) rotate(-90)"}
        marks.append(tag("text", {**at, "class": "tick"}, _cut(name)))
    width, height = left + _CELL_PX * len(columns) + 4, top + _CELL_PX * len(labels) + 4
    mixups = _mixups(counts, share, labels, columns)
    told = f"Confusion matrix. {'; '.join(mixups) or 'No class is taken for another'}"
    frame = {"width": width, "height": height, "role": "img", "aria_label": told}
    scroll = {"class": "scroll", "tabindex": 0, "role": "region", "aria_label": "Confusion matrix"}
    items = (tag("li", {}, told) for told in mixups)
    body = tag("div", scroll, tag("svg", frame, *marks))
    if mixups:
        body = tag("ul", {"class": "plain"}, *items) + body
    reads = "Rows are the truth, columns what its pixels became, in % of the row."
    reads += f" Shown: {note}." if note else ""
    return Card("confusion", "What is taken for what", reads, body, len(labels) > _NARROW)


def _matrix_cell(left: int, top: int, x: int, y: int, share: float, told: str) -> list[Markup]:
    at = {"x": left + x * _CELL_PX, "y": top + y * _CELL_PX}
    size = {"width": _CELL_PX - 2, "height": _CELL_PX - 2, "rx": 3}
    title = tag("title", {}, f"{told}: {percent(share)}")
    made = [tag("rect", {**at, **size, "class": "cell0"}, title)]
    if share >= 0.005:
        ink = {"class": "cell", "fill_opacity": f"{share**0.5:.3f}", "pointer_events": "none"}
        made.append(tag("rect", {**at, **size, **ink}))
        css = "strong" if share > 0.3 else "weak"
        middle, base = at["x"] + _CELL_PX / 2 - 1, at["y"] + _CELL_PX * 0.62
        made.append(svg.text(middle, base, f"{100 * share:.0f}", css, "middle"))
    return made


def _mixups(
    counts: np.ndarray, share: np.ndarray, labels: Sequence[str], columns: Sequence[str]
) -> list[str]:
    """The commonest errors in words."""
    wrong = counts.astype(np.float64)
    n = min(len(labels), len(columns))
    wrong[np.arange(n), np.arange(n)] = 0
    told = []
    for at in np.argsort(-wrong, axis=None, kind="stable")[:_MIXUPS].tolist():
        y, x = divmod(at, len(columns))
        if not wrong[y, x]:
            break
        became = "left open" if columns[x] == "left open" else f"taken for {columns[x]}"
        told.append(f"{percent(float(share[y, x]))} of {labels[y]} is {became}")
    return told


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…"
