"""A chart of the page with its words, and numbers as people read them."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Card:
    """One chart of the page."""

    key: str
    title: str
    note: str
    body: Markup
    wide: bool = False


def percent(share: float | None) -> str:
    """A share for people: 12 %, 3.4 %, 0.05 %."""
    if share is None:
        return "–"
    value = 100 * share
    if value == 0 or value >= 9.95:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.095 else f"{value:.1g} %"


def three(value: float | None) -> str:
    """A score for people, where small differences count."""
    return "–" if value is None else f"{value:.3f}"


def two(value: float | None) -> str:
    """A score for people."""
    return "–" if value is None else f"{value:.2f}"
