"""Corrected masks of any source, by image of the run.

What enters: the masks' source and the run that they were made from. What leaves: `Returned`, which
draws the label map of an image in the run's own numbers when asked for; and what of the source is
of no image, not submitted or broken, so that nothing is lost in silence.

Shapes: H, W pixels.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from zsplg_ray.labels import Labels
from zsplg_ray.masks import Truth, open_truth
from zsplg_ray.safe_text import shortened
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place
from zsplg_ray.views.review.names import ImageNames, renumbered
from zsplg_ray.views.review.studio import Painted, is_studio, load_json, read_tasks
from zsplg_ray.vocab import ClassList

Draw = Callable[[tuple[int, int]], np.ndarray]
"""Size (height, width) of an image -> its label map; ValueError or OSError if that is broken."""


@dataclass
class Returned:
    """What has come back."""

    draws: dict[str, Draw] = field(default_factory=dict)
    """Image id -> what makes its label map, uint8 [H, W] in the run's numbers."""
    unmatched: list[str] = field(default_factory=list)
    """Names that no image of the run has."""
    errors: list[tuple[str, str]] = field(default_factory=list)
    """Image id or name, and why its mask is of no use."""
    not_annotated: int = 0
    """Label Studio's tasks without an annotation."""
    cancelled: int = 0
    """Label Studio's tasks that were skipped."""


def open_returned(source: str, labels: Labels, names: ImageNames) -> Returned:
    """Look through a source; its masks are drawn later.

    Raises: ValueError if there is no such source, or nothing in it.
    """
    place = Place.parse(source)
    if place.suffix == ".json" and place.kind() == "file" and is_studio(data := load_json(place)):
        return _studio(data, source, labels, names)
    try:
        truth = open_truth(source)
    except ValueError as e:
        told = str(e)
        raise ValueError(told.replace("truth must", "masks must", 1)) from e
    return _truth(truth, labels, names)


def _truth(truth: Truth, labels: Labels, names: ImageNames) -> Returned:
    """Masks that `masks.open_truth` reads."""
    found = Returned()
    for key in truth.ids:
        _take(found, names, (key,), partial(_read, truth, key, labels.classes), again=False)
    return found


def _read(truth: Truth, key: str, classes: ClassList, size_hw: tuple[int, int]) -> np.ndarray:
    label_HW = truth.read(key)
    if label_HW.shape != size_hw:
        rule = f"of the image's size {size_hw[1]} x {size_hw[0]}"
        shown = f"{label_HW.shape[1]} x {label_HW.shape[0]}"
        raise ValueError(complain("mask", rule, shown, "do not scale what you correct"))
    return renumbered(label_HW, truth.classes, classes)


def _studio(tasks: list[object], source: str, labels: Labels, names: ImageNames) -> Returned:
    """Label Studio's tasks; of several of one image the one with the newest annotation."""
    read = read_tasks(tasks, source)
    found = Returned(errors=read.broken, not_annotated=read.not_annotated, cancelled=read.cancelled)
    addresses: dict[str, set[str | None]] = defaultdict(set)
    for called in read.called:
        with contextlib.suppress(ValueError):  # those that are painted are told below
            if (image_id := _find(names, called.names)) is not None:
                addresses[image_id].add(called.address)
    for painted in sorted(read.painted, key=lambda p: p.when):
        called = painted.called
        one = partial(_of_one, addresses) if called.guessed else None
        draw = partial(_draw, painted, labels.classes)
        _take(found, names, called.names, draw, again=True, check=one)
    return found


def _of_one(addresses: Mapping[str, set[str | None]], image_id: str) -> None:
    """Raise ValueError if images at several addresses are taken for one image of the run."""
    several = sorted(a for a in addresses[image_id] if a is not None)
    if len(several) > 1:
        shown = f"{shortened(several[0], 200)} and {shortened(several[1], 200)} for {image_id}"
        fix = "give the tasks an image_id in their data"
        raise ValueError(complain("task", "of one image", shown, fix))


def _draw(painted: Painted, classes: ClassList, size_hw: tuple[int, int]) -> np.ndarray:
    return painted.draw(size_hw, classes)


def _find(names: ImageNames, called: Sequence[str]) -> str | None:
    """The first image that is called so. Raises: ValueError if several are."""
    return next((i for i in map(names.find, called) if i is not None), None)


def _take(
    found: Returned,
    names: ImageNames,
    called: tuple[str, ...],
    draw: Draw,
    *,
    again: bool,
    check: Callable[[str], None] | None = None,
) -> None:
    """Note a mask for the image that it is called after; a second one replaces it if it may."""
    try:
        image_id = _find(names, called)
        if image_id is not None and check is not None:
            check(image_id)
    except ValueError as e:
        found.errors.append((called[0], str(e)))
        return
    if image_id is None:
        found.unmatched.append(called[0])
    elif image_id in found.draws and not again:
        found.errors.append((called[0], f"a second mask of image {image_id}; the first counts"))
    else:
        found.draws[image_id] = draw
