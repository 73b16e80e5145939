"""Names that come back from other tools -> images and classes of the run.

What enters: the ids and class list of a run. What leaves: the image that a file or task is called
after, and the index that a class name means. An export may have changed a name that no file can
have, so a name is an image's id, with or without suffix, or what `views.export.names` made of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key
from zsplg_ray.vocab import ClassList

IGNORED = re.compile(r"(zsplg )?ignore( [0-9]+)?|no label|unsure|void", re.IGNORECASE)
"""Class names that mean 255 where the run has no class of that name: those that `export` gives to
pixels without label, and what people call them.
"""


class ImageNames:
    """The images of a run by what files and tasks are called.

    Args:
        ids: All image ids of the run.
        others: Further names of the same images, each list in the order of `ids`.
    """

    def __init__(self, ids: Sequence[str], others: Sequence[Sequence[str]] = ()) -> None:
        self._of: dict[str, str | None] = {}
        for names in others:  # an id counts for more than a made name
            made: dict[str, str | None] = {}
            for image_id, name in zip(ids, names, strict=True):
                made[name] = None if made.get(name, image_id) != image_id else image_id
            self._of = made | self._of
        keys: dict[str, str | None] = {}
        for image_id in ids:
            key = image_key(image_id)
            keys[key] = None if key in keys else image_id  # a.jpg and a.png: which is meant?
        self._of |= keys
        self._of |= {image_id: image_id for image_id in ids}

    def find(self, name: str) -> str | None:
        """The image's id, None if there is none. Raises: ValueError if several are called so."""
        for known in (name, image_key(name)):
            if known in self._of:
                found = self._of[known]
                if found is None:
                    fix = "give the masks the whole names of the images, with their suffixes"
                    raise ValueError(complain("mask", "of one image", f"several {name}", fix))
                return found
        return None


def class_of(name: str, classes: ClassList) -> int:
    """The index of a class by name or alias, 255 for a name of `IGNORED`, regardless of case.

    Raises: ValueError for another name.
    """
    try:
        return classes.index(name)
    except ValueError:
        if IGNORED.fullmatch(name.strip()):
            return IGNORE
        raise


def renumbered(label_HW: np.ndarray, theirs: ClassList | None, classes: ClassList) -> np.ndarray:
    """A label map with the numbers of the run, uint8 [H, W].

    Args:
        label_HW: uint8 [H, W], 255 = ignore.
        theirs: What its numbers mean; None: what the run's mean.
        classes: Of the run.

    Raises: ValueError if a number in it is no class, or a class that the run does not have.
    """
    n = len(classes if theirs is None else theirs)
    present = np.flatnonzero(np.bincount(label_HW.ravel(), minlength=256))
    lut = np.full(256, IGNORE, np.uint8)
    for index in present.tolist():
        if index == IGNORE:
            continue
        if index >= n:
            rule, fix = f"of class indices below {n}, or {IGNORE}", "use the run's class list"
            raise ValueError(complain("mask", rule, index, fix))
        lut[index] = index if theirs is None else class_of(theirs.names[index], classes)
    return lut[label_HW]
