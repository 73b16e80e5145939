"""The HTML around it all: one file that needs nothing but a browser.

What enters: texts, numbers, charts, pictures as text. What leaves: the page's bytes. Its content
security policy forbids the network and every script and style but the two that are named by their
hash, so text that got past all escaping would still not run.

Each image's pictures stand in a block of their own that the script reads when it is looked at: a
page of hundreds of images opens at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from zsplg_ray import __version__
from zsplg_ray.views.report.card import Card, percent, two
from zsplg_ray.views.report.colours import class_colours
from zsplg_ray.views.report.records import Reason, Tuned

SCRIPTS = ("maps.js", "state.js", "grid.js", "viewer.js", "main.js")
MEASURES = {
    "doubt": (
        "doubt",
        "The mean of what is known: 1 - confidence, the share that differs from the truth, the "
        "largest share that differs from a compared run.",
    ),
    "confidence": ("confidence", "Mean score of the pixels that have a label, 0 to 1."),
    "coverage": ("coverage", "Share of the pixels with a class other than background."),
    "miou": (
        "mIoU",
        "Overlap of labels and truth over their union, mean over the classes that occur. The mIoU "
        "of a run counts the pixels of all images together.",
    ),
    "wrong": (
        "differs from truth",
        "Share of the pixels with a truth that are labelled otherwise or left open.",
    ),
    "differs": (
        "differs between runs",
        "Share of the pixels that a compared run says something else of; the largest of several.",
    ),
}
"""What images can be sorted and filtered by: its name, and what it is."""


@dataclass(frozen=True)
class Content:
    """What stands on a page."""

    title: str
    kind: str
    folder: str
    classes: Sequence[str]
    layers: Sequence[tuple[str, str]]
    """Name and kind of each label map, in the order in which images have them; truth is last."""
    facts: Sequence[tuple[str, str]]
    settings: Sequence[tuple[str, str]]
    images: Sequence[Mapping[str, Any]]
    """Numbers of each image that is shown."""
    data: Sequence[Mapping[str, Any]]
    """Its pictures."""
    labelled: int
    counted: int
    with_truth: int
    misfits: Sequence[str]
    failed: int
    reasons: Sequence[Reason]
    coverage: float | None
    open_share: float | None
    confidence: float | None
    miou: float | None
    differs: float | None
    cards: Sequence[Card]
    tuned: Tuned | None


def render(content: Content) -> bytes:
    """The page."""
    room = files("zsplg_ray.views.report") / "page"
    style = (room / "page.css").read_text("utf-8") + _class_styles(len(content.classes))
    script = "\n".join((room / name).read_text("utf-8") for name in SCRIPTS)
    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters |= {"percent": percent, "two": two, "number": lambda n: f"{n:,}"}
    template = jinja.from_string((room / "page.html").read_text("utf-8"))
    html = template.render(
        c=content,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        index=embedded(_index(content)),
        data=[embedded(item) for item in content.data],
        lead=lead(content),
        made=made(content.facts),
        helps=[MEASURES[key] for key in _measures(content)],
        version=__version__,
        pictures=[
            (told, base64.b64encode(data).decode())
            for told, data in (content.tuned.pictures if content.tuned else ())
        ],
    )
    return html.encode("utf-8", "replace")


def lead(content: Content) -> str:
    """The run in a sentence or two."""
    n, k = content.labelled, len(content.classes) - 1
    images, classes = f"{n:,} image{'s'[: n != 1]}", f"{k} class{'es'[: 2 * (k != 1)]}"
    told = [f"{images} with {content.kind} of {classes}"]
    others = [name for name, _ in content.layers[1:-1]]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        told.append(f"compared with {', '.join(others[:3])}{more}")
    if content.with_truth:
        told.append(f"judged by {content.with_truth:,} mask{'s'[: content.with_truth != 1]}")
    if content.open_share:
        told.append(f"{percent(content.open_share)} of the pixels are left open")
    return "; ".join(told) + "."


def made(facts: Sequence[tuple[str, str]]) -> str:
    """How the run was made, on a line."""
    some = ("made by", "model", "SAM", "CLIP", "embedder", "images from", "speed", "run.json of")
    known = dict(facts)
    short = {"made by": "", "model": "", "embedder": "", "speed": "", "run.json of": ""}
    words = {name: short.get(name, f"{name} ") for name in some}
    return " · ".join(f"{words[name]}{known[name]}" for name in some if name in known)


def embedded(value: object) -> Markup:
    """A value as JSON for a script element; nothing in it can end that element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _index(content: Content) -> dict[str, Any]:
    has_maps = [any(i["maps"][at] for i in content.images) for at in range(len(content.layers))]
    return {
        "classes": list(content.classes),
        "colours": class_colours(len(content.classes)),
        "layers": [
            {"name": name, "kind": kind, "shown": has}
            for (name, kind), has in zip(content.layers, has_maps, strict=True)
        ],
        "measures": {
            key: {"name": MEASURES[key][0], "help": MEASURES[key][1]} for key in _measures(content)
        },
        "images": list(content.images),
    }


def _measures(content: Content) -> list[str]:
    """Those that some image has."""
    return [k for k in MEASURES if any(image["m"][k] is not None for image in content.images)]


def _class_styles(n_classes: int) -> str:
    """A rule for each class's colour; policy lets no element bring its own style."""
    rules = (
        f".sw.k{k}{{background:{colour}}}.fill-k{k}{{fill:{colour}}}"
        for k, colour in enumerate(class_colours(n_classes))
    )
    return "\n".join(rules) + "\n"


def _hash(text: str) -> str:
    """As a content security policy names a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
