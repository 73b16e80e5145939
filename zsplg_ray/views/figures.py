"""Figures of a run or a study: curves over a threshold, bars by class, who is taken for whom.

What enters: plain numbers. What leaves: PNG bytes. Each figure is an object of its own, never
pyplot's current one, so any thread may draw. Colours are those of Okabe and Ito, which people who
see colours differently can tell apart; of many classes those are shown that matter, and how many
are left out is said.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

from zsplg_ray.views.mistaken import most_mistaken

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Okabe and Ito's, without the yellow, which white paper swallows."""
GREY = "#767676"
MOST_BARS = 40
"""Classes that a bar chart shows one by one; of more the best and the worst."""
MOST_CELLS = 30
"""Classes that a confusion matrix shows."""

_ANNOTATED = 14
"""Up to so many classes every cell of a confusion matrix has its number."""
_NAME_CHARS = 28
"""A longer name is cut off at the axis of a bar chart."""
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def threshold_curves(
    xs: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    chosen: Mapping[str, float] | None = None,
    xlabel: str,
) -> bytes:
    """Scores against a threshold.

    Args:
        xs: Thresholds, ascending.
        series: Name -> a score in [0, 1] at each threshold; nan where there is none.
        chosen: Name -> a threshold to mark, such as the default and the tuned one.
        xlabel: What the threshold is, with its unit.
    """
    figure, ax = _figure(7.0, 4.2)
    for i, (name, ys) in enumerate(series.items()):
        ax.plot(xs, ys, color=_colour(i), lw=2, label=name)
    at = ax.get_xaxis_transform()
    for i, (name, x) in enumerate((chosen or {}).items()):
        ax.axvline(x, color=GREY, lw=1.2, ls=("--", "-", ":")[i % 3], zorder=0)
        ax.text(x, 1.01 + 0.055 * i, f"{name} {x:.3g}", transform=at, ha="center", color=GREY)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("share")
    _grid(ax, "both")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return _png(figure)


def iou_bars(iou: Mapping[str, Mapping[str, float | None]]) -> bytes:
    """IoU by class, one bar for each of one or more results, best class on top.

    Args:
        iou: Name of the result -> class name -> IoU in [0, 1], None where the class does not occur.
            The last result is the one that is sorted by.
    """
    last = list(iou.values())[-1]
    known = {name: value for name, value in last.items() if value is not None}
    order = sorted(known, key=lambda name: (-known[name], name))
    order += [name for name in last if name not in known]
    note, cut = "", None
    if len(order) > MOST_BARS:
        order = order[: len(known)]
    if len(order) > MOST_BARS:
        cut = MOST_BARS // 2 - 5
        note = f"; the {cut} best and the {cut} worst of {len(known)} classes that occur"
        order = order[:cut] + order[-cut:]
    thick = 0.8 / len(iou)
    figure, ax = _figure(7.0, 1.1 + (0.14 + 0.13 * len(iou)) * max(len(order), 2))
    spots = np.arange(len(order))
    for i, (name, values) in enumerate(iou.items()):
        present = [v for v in values.values() if v is not None]
        mean = f" (mean {np.mean(present):.3f})" if present else ""
        lengths = [values.get(c) for c in order]
        heights = spots + (i - (len(iou) - 1) / 2) * thick
        label = f"{name}{mean}"
        numbers = [0.0 if v is None else v for v in lengths]
        ax.barh(heights, numbers, thick * 0.92, color=_colour(i), label=label)
        for y, value in zip(heights, lengths, strict=True):
            told = "none" if value is None else f"{value:.2f}"
            x = 0.0 if value is None else value
            ax.text(x + 0.008, y, told, va="center", fontsize=7, color=GREY)
    _class_axis(ax, order)
    ax.set_xlim(0, 1.06)
    ax.set_xlabel(f"IoU{note}")
    if cut is not None:
        ax.axhline(cut - 0.5, color="black", lw=0.8, ls=(0, (2, 4)))
    _legend_above(figure, ax)
    return _png(figure)


def class_shares(shares: Mapping[str, float]) -> bytes:
    """How much of all pixels each class has, largest on top.

    Args:
        shares: Class name -> share of pixels in [0, 1]; what has none is left out.
    """
    order = sorted((n for n in shares if shares[n] > 0), key=lambda n: (-shares[n], n))
    left = order[MOST_BARS:]
    bars = {name: shares[name] for name in order[:MOST_BARS]}
    if left:
        bars[f"{len(left)} more classes"] = sum(shares[name] for name in left)
    figure, ax = _figure(7.0, 0.9 + 0.24 * max(len(bars), 2))
    spots = np.arange(len(bars))
    ax.barh(spots, list(bars.values()), 0.72, color=COLOURS[0])
    widest = max(bars.values(), default=1.0)
    for y, value in enumerate(bars.values()):
        told = f"{value:.1%}" if value >= 0.001 else f"{100 * value:.1g}%"
        ax.text(value + 0.01 * widest, y, told, va="center", fontsize=8, color=GREY)
    _class_axis(ax, list(bars))
    ax.set_xlim(0, 1.12 * widest)
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    empty = len(shares) - len(order)
    note = f"; classes without any: {empty}" if empty else ""
    ax.set_xlabel(f"share of pixels{note}")
    return _png(figure)


def confusion_matrix(confusion_KL: np.ndarray, names: Sequence[str]) -> bytes:
    """What the pixels of each true class became, in shares of the class.

    Args:
        confusion_KL: Counts [K, K + 1] as `metrics.confusion` returns them; the last column counts
            the pixels that were left open.
        names: The K class names. Those that occur nowhere are left out; of more than MOST_CELLS
            those stay that most pixels are mistaken from or for, the others become one.
    """
    counts, labels, note = most_mistaken(
        np.asarray(confusion_KL, np.int64), _plain(names), MOST_CELLS
    )
    n = len(labels)
    columns = [*labels, "left open"]
    if not counts[:, -1].any():
        counts, columns = counts[:, :-1], labels
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    side = max(3.4, 1.4 + 0.36 * n) if n <= _ANNOTATED else 2.0 + 0.26 * n
    figure, ax = _figure(side + 1.6, side + 0.6)
    norm = PowerNorm(0.5, 0, 1)  # else a few per cent, which is what one looks for, stay white
    shown = ax.imshow(share, cmap="Blues", norm=norm, aspect="equal")
    size = 9 if n <= _ANNOTATED else 8
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    ax.set_yticks(range(n), labels, fontsize=size)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if n <= _ANNOTATED:
        for y, x in np.argwhere(share >= 0.005).tolist():
            ink = "white" if share[y, x] > 0.3 else "black"
            ax.text(x, y, f"{100 * share[y, x]:.0f}", ha="center", va="center", c=ink, fontsize=8)
    ax.set_xlabel("predicted" + (f"\n{note}" if note else ""))
    ax.set_ylabel("true")
    bar = figure.colorbar(shown, ax=ax, shrink=0.6, aspect=25, format=lambda x, _: f"{x:.0%}")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label("share of the true class's pixels")
    return _png(figure)


def coverage_precision(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, tuple[float, float]],
) -> bytes:
    """How good labels are against how much is labelled.

    Args:
        curves: Name -> (coverage, precision), each in [0, 1], along a threshold.
        points: Name -> (coverage, precision) of settings to mark; one that is called like a curve
            lies on it, and has its colour.
    """
    figure, ax = _figure(6.4, 4.4)
    colours = {name: _colour(i) for i, name in enumerate(dict.fromkeys([*curves, *points]))}
    for name, curve in curves.items():
        xy = np.asarray(curve, float).reshape(-1, 2)
        label = name if name not in points else f"{name}, other thresholds"
        ax.plot(xy[:, 0], xy[:, 1], color=colours[name], lw=2, label=label)
    for i, (name, (x, y)) in enumerate(points.items()):
        mark = _MARKS[i % len(_MARKS)]
        ax.plot([x], [y], mark, color=colours[name], ms=9, mec="white", label=name, clip_on=False)
    both = np.array([*(p for curve in curves.values() for p in curve), *points.values()])
    both = both.reshape(-1, 2)[np.isfinite(both.reshape(-1, 2)).all(axis=1)]
    low = both[:, 1].min(initial=1.0) if len(both) else 0.0
    ax.set_xlim(0, min(1.0, 1.15 * both[:, 0].max(initial=0.0)) or 1.0)
    ax.set_ylim(max(0.0, np.floor(10 * low - 0.5) / 10), 1.01)
    ax.set_xlabel("coverage: share of pixels that are labelled")
    ax.set_ylabel("precision: share of these that are right")
    _grid(ax, "both")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return _png(figure)


# What all share ----------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and its one plot, sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _grid(ax: Axes, axis: str) -> None:
    ax.grid(axis=axis, color="#dddddd", lw=0.8)  # pyright: ignore[reportArgumentType]
    ax.set_axisbelow(True)


def _plain(names: Sequence[str]) -> list[str]:
    """Names as they are: matplotlib takes what stands between dollars for mathematics."""
    return [name.replace("$", r"\$") for name in names]


def _class_axis(ax: Axes, names: Sequence[str]) -> None:
    """Class names down the left side, the first one on top."""
    shown = [name if len(name) <= _NAME_CHARS else f"{name[: _NAME_CHARS - 1]}…" for name in names]
    ax.set_yticks(range(len(names)), _plain(shown))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.spines["left"].set_visible(False)
    _grid(ax, "x")


def _legend_above(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9)


def _png(figure: Figure) -> bytes:
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a dollar in the name of a class begins no formula
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
