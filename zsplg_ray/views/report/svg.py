"""Marks of a chart as inline SVG: axes, bars, lines, in the page's own colours.

What enters: numbers and texts of any origin. What leaves: safe markup. Colours are classes of the
page's style sheet, so charts follow light and dark; every mark has a `<title>`, which browsers show
under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 40
"""Room around the plot, in px."""


def tag(name: str, attributes: Mapping[str, object], *inside: object) -> Markup:
    """An element; `_` in names of attributes stands for `-`; values and texts are escaped."""
    told = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _short(value))
        for key, value in attributes.items()
    )
    body = Markup("").join(escape(part) for part in inside)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), told, body)


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def text(x: float, y: float, words: object, css: str = "", anchor: str = "start") -> Markup:
    """A line of text."""
    return tag("text", {"x": x, "y": y, "class": css, "text_anchor": anchor}, words)


def bar(share: float, css: str, told: str, fill: str = "") -> Markup:
    """A horizontal bar that fills a share of its cell, [0, 1]."""
    width = f"{100 * min(1.0, max(0.0, share)):.2f}%"
    mark: dict[str, object] = {"class": css, "width": width, "height": "100%", "rx": 2}
    if fill:
        mark["fill"] = fill
    frame = {"class": "bar", "width": "100%", "height": "12", "role": "img", "aria_label": told}
    return tag("svg", frame, tag("title", {}, told), tag("rect", mark))


def _round(most: float) -> float:
    """The least round number that is not below, so that a fourth of it is round too."""
    if most <= 0:
        return 1.0
    ten = 10 ** math.floor(math.log10(most))
    return next(step * ten for step in (1, 2, 4, 6, 8, 10) if step * ten >= most - 1e-12)


class Plot:
    """A plot with both axes; x and y in [0, `most`] are marked in per cent or as plain numbers.

    Args:
        xlabel: What lies along the bottom.
        most_x: Right end.
        most_y: Upper end.
        percent_y: Whether y is a share.
    """

    def __init__(
        self, xlabel: str, most_x: float = 1.0, most_y: float = 1.0, *, percent_y: bool = True
    ) -> None:
        self.most_x, self.most_y = most_x, _round(most_y)
        self._marks: list[Markup] = []
        for i in range(5):
            share = i / 4
            y, x = self.y(share * self.most_y), self.x(share * most_x)
            line = {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y, "class": "rule"}
            value = share * self.most_y
            told = f"{100 * value:.3g}%" if percent_y else f"{value:.3g}"
            self._marks.append(tag("line", line))
            self._marks.append(text(LEFT - 6, y + 4, told, "tick", "end"))
            self._marks.append(
                text(x, HEIGHT - BOTTOM + 16, f"{share * most_x:.2g}", "tick", "middle")
            )
        middle = (LEFT + WIDTH - RIGHT) / 2
        self._marks.append(text(middle, HEIGHT - 6, xlabel, "tick", "middle"))

    def x(self, value: float) -> float:
        """Where a value lies, in px."""
        return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, value / self.most_x)

    def y(self, value: float) -> float:
        """The same upwards."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, value / self.most_y))

    def column(self, low: float, high: float, value: float, css: str, told: str) -> None:
        """A bar between two x."""
        x, y = self.x(low), self.y(value)
        size = {"width": max(0.5, self.x(high) - x - 1), "height": self.y(0) - y}
        rect = {"x": x, "y": y, **size, "class": css}
        self._marks.append(tag("rect", rect, tag("title", {}, told)))

    def line(self, points: Sequence[tuple[float, float]], css: str, told: str) -> None:
        """A line through points (x, y)."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self._marks.append(
            tag("polyline", {"points": path, "class": f"line {css}"}, tag("title", {}, told))
        )

    def svg(self, told: str) -> Markup:
        """The whole, with what it shows in words."""
        frame = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "class": "plot", "role": "img"}
        return tag("svg", {**frame, "aria_label": told}, *self._marks)
