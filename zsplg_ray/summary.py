"""The form of what a verb says when it is done: what was done, where it is, what to do next.

What enters: lines, places and commands. What leaves: text for stdout, the same in form for all
verbs. Paths in commands are quoted, so a line can be copied as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from zsplg_ray.safe_text import masked, one_line, shortened
from zsplg_ray.storage import Place, is_address

Next = tuple[str, str]
"""What a command is good for, in a word or two, and the command."""


def told(
    done: Iterable[str], places: Mapping[str, str | None] | None = None, then: Iterable[Next] = ()
) -> str:
    """A summary.

    Args:
        done: What was done; the first line is the gist.
        places: What -> where it is; those that are None are left out.
        then: Commands that may come next, the likeliest first.
    """
    lines = [one_line(masked(shortened(line))) for line in done]
    lines += _columns([(what, where) for what, where in (places or {}).items() if where])
    commands = _columns(list(then))
    return "\n".join([*lines, "next", *commands] if commands else lines)


def _columns(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(what) for what, _ in pairs), default=0)
    return [f"  {what:<{width}}  {one_line(masked(text))}" for what, text in pairs]


def command(*words: str) -> str:
    """`zsplg` and its words, quoted where a shell wants that."""
    return shlex.join(["zsplg", *words])


def within(folder: str, name: str) -> str:
    """Where a file is in a folder, as a user writes it."""
    if is_address(folder):
        return Place.parse(folder).child(name).uri
    return str(Path(folder, name))


def counted(number: int, what: str) -> str:
    """1 image, 2 images, 1,000 images."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """3 h 20 min, 5 min 10 s, 40 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"
