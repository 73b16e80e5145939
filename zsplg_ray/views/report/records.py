"""What a run's folder tells beside its labels: how it was made, what failed, what was tuned.

What enters: run.json, errors/, tune.json and tuned/. What leaves: plain texts and numbers for the
page. Nothing here can stop a page: what is not there, or is not as a run writes it, is left out.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from zsplg_ray.labels import Labels
from zsplg_ray.rundir import RunFolder, made_by
from zsplg_ray.safe_text import masked, shortened
from zsplg_ray.storage import Place
from zsplg_ray.views.summaries import failed_alike

log = logging.getLogger(__name__)

MOST_REASONS = 20
MOST_EXAMPLES = 3
_PICTURES = {
    "tuned/thresholds.png": "Scores against the threshold",
    "tuned/coverage.png": "Coverage against precision",
}
_MOST_PICTURE_BYTES = 500_000
_VARIANTS = {"default": "as labelled", "tuned": "tuned", "per_class": "a threshold for each class"}


@dataclass(frozen=True)
class Reason:
    """Images that failed in the same way."""

    stage: str
    error: str
    images: int
    examples: list[str]


@dataclass(frozen=True)
class Tuned:
    """What `tune labels` found."""

    chosen: str
    rows: list[tuple[str, str, str]]
    """Variant, mIoU on tuning images, mIoU on held-out images."""
    pictures: list[tuple[str, bytes]]
    """What it shows, PNG."""


def facts(labels: Labels) -> list[tuple[str, str]]:
    """Name and value of what a reader wants to know first."""
    run = labels.run
    if run is None:
        return [("made by", "unknown: the folder has no run.json")]
    resolved = run["resolved"]
    told = [("made by", f"zsplg {made_by(run)}")]
    if when := finished(labels.folder):
        told.append(("run.json of", when))
    if resolved.get("images"):
        told.append(("images from", str(resolved["images"])))
    for name, key in (("SAM", "sam.model"), ("CLIP", "clip.model"), ("model", "model")):
        if resolved.get(key):
            told.append((name, str(resolved[key])))
    if resolved.get("clip.embedder"):
        told.append(("embedder", str(resolved["clip.embedder"])))
    if resolved.get("fuse"):
        told.append(("fused with", str(resolved["fuse"])))
    if _is_number(run.get("seconds")):
        told.append(("time", f"{run['seconds']:,.0f} s in the last call"))
    if _is_number(run.get("images_per_s")) and run["images_per_s"]:
        told.append(("speed", f"{run['images_per_s']:,.3g} images/s"))
    if run.get("state") not in ("complete", None):
        told.append(("state", f"{run['state']}: some images may be missing"))
    return [(name, _plain(value)) for name, value in told]


def finished(folder: RunFolder) -> str:
    """When run.json was last written, UTC; "" if the storage does not tell."""
    try:
        mtime_ns = Place.parse(folder.uri).child("run.json").stamp()[1]
    except (OSError, ValueError):
        return ""
    when = datetime.fromtimestamp(mtime_ns / 1e9, UTC)
    return f"{when.day} {when:%B %Y, %H:%M} UTC" if mtime_ns else ""


def settings(labels: Labels) -> list[tuple[str, str]]:
    """Every setting that is not None, as it was resolved, then versions and weights."""
    run = labels.run or {}
    told = []
    for group in ("resolved", "versions", "weights"):
        values = run.get(group)
        for name, value in values.items() if isinstance(values, dict) else ():
            if value is not None:
                shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                prefix = "" if group == "resolved" else f"{group}."
                told.append((f"{prefix}{_plain(name)}", _plain(shown)))
    for name in ("fingerprint", "labels_fingerprint"):
        if run.get(name):
            told.append((name, _plain(str(run[name]))))
    return told


def failures(folder: RunFolder) -> tuple[int, list[Reason]]:
    """How many images could not be done, and why, the commonest reason first.

    A reason is told in the words of its first image, IMAGE in place of its id.
    """
    try:
        alike = failed_alike(folder)
    except (OSError, ValueError, pa.ArrowException) as e:
        log.warning("errors of %s cannot be read: %s", folder.uri, e)
        return 0, []
    told = []
    for some in alike[:MOST_REASONS]:
        first = some[0]
        error = _without_id(first.error, first.image_id)
        examples = [_plain(one.image_id) for one in some[:MOST_EXAMPLES]]
        told.append(Reason(_plain(first.stage), _plain(error), len(some), examples))
    return sum(map(len, alike)), told


def _without_id(error: str, image_id: str) -> str:
    """An error with IMAGE for an id that is all between two quotes, or the end of a path."""
    if not image_id or image_id not in error:
        return error
    name = re.escape(image_id)
    whole = rf"(?<=')(?:{name})(?=')|(?<=\")(?:{name})(?=\")|(?<=/)(?:{name})(?=['\"\s:;,)]|$)"
    return re.sub(whole, "IMAGE", error)


def tuned(folder: RunFolder) -> Tuned | None:
    """What tune.json tells, if there is one."""
    try:
        study = folder.read_record("tune.json", ("chosen", "result"), "tune again")
        if study is None:
            return None
        rows = [
            (_VARIANTS[name], _score(result["tuning"]), _score(result["held_out"]))
            for name, result in study["result"].items()
            if name in _VARIANTS
        ]
        pictures = [(told, folder.read_bytes(name)) for name, told in _PICTURES.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        log.warning("tune.json of %s is not shown: %s", folder.uri, e)
        return None
    sound = [
        (told, data)
        for told, data in pictures
        if data and data.startswith(b"\x89PNG") and len(data) <= _MOST_PICTURE_BYTES
    ]
    return Tuned(_VARIANTS.get(str(study["chosen"]), ""), rows, sound)


def _score(part: Mapping[str, Any]) -> str:
    sd = f" ± {part['sd']:.3f}" if _is_number(part.get("sd")) else ""
    return f"{part['miou']:.3f}{sd}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(text: str) -> str:
    return shortened(masked(text))
