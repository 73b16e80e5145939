"""Label Studio's JSON export: what people have painted, as label maps.

What enters: the file that a project's "Export > JSON" gives. What leaves: a `Painted` a task, drawn
when asked for. Decisions:

- of a task's annotations the newest counts (`updated_at`, else `created_at`, else the id), also
  over several tasks of one image; cancelled ("skipped") ones, drafts and predictions do not;
- brushes, polygons and rectangles are drawn in the order in which they stand, a later one over an
  earlier one; what nothing covers is background. A brush of a label called as in `names.IGNORED`
  is 255;
- a task that tells its image's id is of that image or of none; else its image's address is tried,
  ever less of it, for a store's folders are no part of an id. An address may be percent-quoted or
  not;
- choices, texts, ratings and relations say nothing about pixels and are passed over. Any other kind
  of region makes its task an error: a correction must not be lost in silence.

Shapes: H, W pixels; Q corners.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
from pycocotools import mask as rle_codec

from zsplg_ray.label_studio import decode_brush
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place
from zsplg_ray.views.review.names import class_of
from zsplg_ray.vocab import ClassList

_encode: Any = rle_codec.frPyObjects
_PASSED = frozenset(
    {
        *("choices", "textarea", "rating", "number", "datetime", "taxonomy", "relation"),
        *("pairwise", "ranker"),
    }
)
"""Results that are about the whole image."""
_MAX_CORNERS = 100_000
_FAR = 1e6
"""Percent of the image beyond which a corner is taken to be no further off."""


@dataclass(frozen=True)
class Called:
    """What a task says of which image it is about."""

    names: tuple[str, ...]
    """What the image may be called, the surest first: its id alone where the task tells it."""
    address: str | None
    """Of the image as Label Studio has it, None if there is none."""
    guessed: bool
    """Whether the names are made of the address."""


@dataclass(frozen=True)
class Painted:
    """The newest annotation of an image."""

    called: Called
    when: tuple[str, int]
    """Time and id of the annotation: the greatest is the newest."""
    result: list[Any]
    """Its regions as Label Studio tells them."""

    def draw(self, size_hw: tuple[int, int], classes: ClassList) -> np.ndarray:
        """The label map, uint8 [H, W].

        Raises: ValueError for a region of another size, an unknown class or kind, or broken.
        """
        label_HW = np.zeros(size_hw, np.uint8)
        for region in self.result:
            if not isinstance(region, Mapping):
                raise _error("a list of regions", type(region).__name__)
            kind, value = str(region.get("type")), region.get("value")
            if kind in _PASSED:
                continue
            if kind not in _DRAWN or not isinstance(value, Mapping):
                raise _error(f"regions of {', '.join(_DRAWN)}", kind)
            names = value.get(kind)
            if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
                raise _error("regions with one label each", str(names)[:100])
            size = (region.get("original_height"), region.get("original_width"))
            if size != size_hw:
                rule = f"of the image's size {size_hw[1]} x {size_hw[0]}"
                raise _error(rule, f"{size[1]} x {size[0]}")
            if region.get("image_rotation") not in (None, 0):
                raise _error("of an image that is not turned", str(region["image_rotation"])[:20])
            index = class_of(names[0], classes)
            label_HW[_DRAWN[kind](value, size_hw)] = index
        return label_HW


@dataclass
class StudioMasks:
    """All annotations of a file, by image."""

    painted: list[Painted] = field(default_factory=list)
    """One a task that has any; of one image there may be several."""
    called: list[Called] = field(default_factory=list)
    """Of every task, annotated or not."""
    not_annotated: int = 0
    """Tasks that nobody has submitted anything for."""
    cancelled: int = 0
    """Tasks that were skipped."""
    broken: list[tuple[str, str]] = field(default_factory=list)
    """What a task is called, and why it cannot be read."""


def is_studio(data: Any) -> bool:
    """Whether parsed JSON is what Label Studio exports: a list of tasks."""
    return isinstance(data, list)


def load_json(place: Place) -> Any:
    """What a JSON file holds. Raises: ValueError if it is none."""
    try:
        return json.loads(place.read())
    except (ValueError, RecursionError) as e:
        fix = f"export it again ({' '.join(str(e).split())[:100]})"
        raise ValueError(complain("masks", "a JSON file", place.uri, fix)) from e


def read_tasks(tasks: list[Any], source: str) -> StudioMasks:
    """Sort what a file holds.

    Raises: ValueError if its entries are no tasks, such as those of the JSON-MIN export.
    """
    found = StudioMasks()
    if not any(isinstance(t, Mapping) and isinstance(t.get("data"), Mapping) for t in tasks):
        fix = "export the project as JSON, not as JSON-MIN"
        raise ValueError(complain("masks", "Label Studio's tasks, with data in each", source, fix))
    for position, task in enumerate(tasks):
        try:
            called = _called(task)
            found.called.append(called)
            annotations = [a for a in task.get("annotations") or () if isinstance(a, Mapping)]
            kept = [a for a in annotations if not a.get("was_cancelled")]
            if not kept:
                found.cancelled += bool(annotations)
                found.not_annotated += not annotations
                continue
            newest = max(kept, key=_when)
            result = newest.get("result")
            if not isinstance(result, list):
                raise _error("annotations with a list called result", type(result).__name__)
            found.painted.append(Painted(called, _when(newest), result))
        except (ValueError, TypeError, AttributeError) as e:
            told = " ".join(str(e).split())
            name = task.get("id", position) if isinstance(task, Mapping) else position
            found.broken.append((f"task {name}", told))
    return found


def _called(task: Any) -> Called:
    """Which image a task is about. Raises: ValueError if it says nothing of it."""
    data, meta = task["data"], task.get("meta")
    ids = [data.get("image_id"), meta.get("image_id") if isinstance(meta, Mapping) else None]
    image_id = next((i for i in ids if isinstance(i, str) and i), None)
    address = data.get("image")
    address = address if isinstance(address, str) and address else None
    if image_id is not None:
        return Called((image_id,), address, guessed=False)
    names = tuple(dict.fromkeys(_made(address))) if address is not None else ()
    if not names:
        raise _error("tasks with an image", "none")
    return Called(names, address, guessed=True)


def _made(address: str) -> Iterator[str]:
    """Names that an address may stand for: ever less of its path, as it is and unquoted."""
    # /data/local-files/?d=folder/a.jpg, s3://bucket/folder/a.jpg, /data/upload/1/0a1b-a.jpg
    plain = address.partition("?d=")[2] or address.partition("?")[0]
    paths = [unquote(plain), plain]
    if not address.startswith(("/", "http://", "https://")):  # a key in a store may hold anything
        paths = [address, plain, unquote(plain)]
    split = [path.split("/") for path in dict.fromkeys(paths)]
    for n in range(max(map(len, split)), 0, -1):
        names = ("/".join(parts[-n:]) for parts in split if n <= len(parts))
        yield from (name for name in names if name)
    for parts in split:
        head, dash, tail = parts[-1].partition("-")
        if dash and len(head) == 8 and tail:  # how an uploaded file is kept
            yield tail


def _when(annotation: Mapping[str, Any]) -> tuple[str, int]:
    times = [annotation.get("updated_at"), annotation.get("created_at"), ""]
    number = annotation.get("id")
    return next(t for t in times if isinstance(t, str)), number if isinstance(number, int) else -1


def _brush(value: Mapping[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    if value.get("format") != "rle":
        raise _error("brushes of format rle", str(value.get("format"))[:20])
    rle = value.get("rle")
    if not isinstance(rle, list):  # of a number, bytes() would make that many zeros
        raise _error("brushes with an rle that is a list", type(rle).__name__)
    return decode_brush(rle, *size_hw)


def _polygon(value: Mapping[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    return _filled(_numbers(value.get("points"), (-1, 2)), size_hw)


def _rectangle(value: Mapping[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    """Turned clockwise around its upper left corner."""
    given = [value.get(k, 0) for k in ("x", "y", "width", "height", "rotation")]
    x, y, width, height, turn = _numbers(given, (5,)).tolist()
    high, wide = size_hw
    a = math.radians(turn)
    across = np.array([math.cos(a), math.sin(a)]) * width / 100 * wide
    down = np.array([-math.sin(a), math.cos(a)]) * height / 100 * high
    corner = np.array([x / 100 * wide, y / 100 * high])
    corners_Q2 = np.stack([corner, corner + across, corner + across + down, corner + down])
    return _filled(corners_Q2 / (wide, high) * 100, size_hw)


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Finite numbers, float64. Raises: ValueError."""
    try:
        numbers = np.asarray(value, np.float64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as e:
        raise _error("of numbers", str(value)[:50]) from e
    if not np.isfinite(numbers).all() or numbers.size > 2 * _MAX_CORNERS:
        raise _error(f"of at most {_MAX_CORNERS} finite corners", f"{numbers.size} numbers")
    return numbers


def _filled(percent_Q2: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A polygon with corners in percent of width and height, bool [H, W]; cut at the edges."""
    if len(percent_Q2) < 3:
        return np.zeros(size_hw, bool)
    corner_Q2 = np.clip(percent_Q2, -_FAR, _FAR) / 100 * (size_hw[1], size_hw[0])
    corner_Q2 = _cut(corner_Q2, size_hw)
    if len(corner_Q2) < 3:
        return np.zeros(size_hw, bool)
    merged = rle_codec.merge(_encode([corner_Q2.ravel().tolist()], *size_hw))
    return rle_codec.decode(merged).view(np.bool_)


def _cut(corner_Q2: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """What of a polygon lies in the image, corners (x, y) in pixels, float64 [Q, 2].

    The codec draws corners outside somewhere else, and moving each to the edge would bend the sides
    between. So each of the image's four sides cuts the polygon in turn.

    Source: Sutherland and Hodgman, "Reentrant polygon clipping", 1974.
    """
    high, wide = size_hw
    for axis, side, sign in ((0, 0, 1), (0, wide, -1), (1, 0, 1), (1, high, -1)):
        depth_Q = sign * (corner_Q2[:, axis] - side)
        next_Q2, deep_Q = np.roll(corner_Q2, -1, axis=0), np.roll(depth_Q, -1)
        crosses_Q = (depth_Q >= 0) != (deep_Q >= 0)
        share_Q = depth_Q / np.where(crosses_Q, depth_Q - deep_Q, 1)
        cross_Q2 = corner_Q2 + share_Q[:, None] * (next_Q2 - corner_Q2)
        cross_Q2[:, axis] = side
        kept_Q2 = np.stack([depth_Q >= 0, crosses_Q], axis=1)
        corner_Q2 = np.stack([corner_Q2, cross_Q2], axis=1)[kept_Q2]
    return corner_Q2


_DRAWN = {"brushlabels": _brush, "polygonlabels": _polygon, "rectanglelabels": _rectangle}


def _error(rule: str, value: str) -> ValueError:
    """What every refusal of a task looks like."""
    fix = "correct it in Label Studio and export again"
    return ValueError(complain("annotation", rule, value, fix))
