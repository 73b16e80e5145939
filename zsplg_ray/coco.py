"""COCO's instance annotations as JSON: the images they list, and label maps drawn from them.

Enters: a JSON file with `images`, and for label maps `annotations` and `categories`. Leaves: file
names, a class list, uint8 [H, W] label maps.

Decisions: class k is the k-th category in the order of category ids, 0 is background (a category
that is itself called "background" is 0 as well). Polygons and run lengths, compressed or not, are
drawn from the largest to the smallest, so that what stands before something stays visible. A crowd
is a region of its category like any other, but drawn first: instances lie on top of it. A pixel
that no annotation covers is background, or 255 where the image's entry `ignore_rle` covers it: a
run length that `zsplg export` writes and other readers pass over. So what a person draws on pixels
without a label counts.

Shapes: H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from zsplg_ray.images import MOST_PX
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place
from zsplg_ray.vocab import BACKGROUND, ClassList


def load_coco(place: Place, name: str) -> dict[str, Any]:
    """The parsed file, with its list of images checked.

    Args:
        place: the JSON file.
        name: the setting that it was given for, for errors.

    Raises:
        ValueError: it is no JSON, or `images` is no list of objects that each have a `file_name`.
    """
    try:
        data = json.loads(place.read())
    except ValueError as error:  # covers broken JSON and broken UTF-8
        fix = f"mend it ({error})"
        raise ValueError(complain(name, "a COCO file in JSON", place.uri, fix)) from error
    except RecursionError as error:
        raise ValueError(
            complain(name, "a COCO file", place.uri, "it is nested too deeply")
        ) from error
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        fix = "it needs a list called images"
        raise ValueError(complain(name, "a COCO file", place.uri, fix))
    for position, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            fix = "each image needs a file_name"
            where = f"images[{position}] = {_glimpse(image)} in {place.uri}"
            raise ValueError(complain(name, "a COCO file", where, fix))
    return data


MAX_OUTLINE_PX = 4_000_000
"""Length of all polygons of one object: that of a line through every pixel of 2000 x 2000."""

_encode: Any = rle_codec.frPyObjects
"""Polygons or counts -> compressed run lengths; its type stubs do not know all that it takes."""


def _glimpse(value: Any) -> str:
    """The beginning of what a file holds, for an error."""
    try:
        return str(value)[:80]
    except (RecursionError, ValueError):  # too deep, or a number of thousands of digits
        return f"a {type(value).__name__}"


class CocoMasks:
    """Label maps of a COCO file by file name; drawn when asked for."""

    def __init__(self, place: Place) -> None:
        """Reads the file; raises a ValueError if it lacks something or contradicts itself."""
        self._uri = place.uri
        data = load_coco(place, "truth")
        images, categories = data["images"], self._list(data, "categories")
        try:
            named = {c["id"]: str(c["name"]) for c in sorted(categories, key=lambda c: c["id"])}
            self._sizes = {i["file_name"]: (int(i["height"]), int(i["width"])) for i in images}
            self._ignored = {i["file_name"]: i["ignore_rle"] for i in images if "ignore_rle" in i}
            owner = {i["id"]: i["file_name"] for i in images}
            if any(min(size_hw) < 1 for size_hw in self._sizes.values()):
                raise ValueError("an image without pixels")
            if any(height * width > MOST_PX for height, width in self._sizes.values()):
                raise ValueError(f"an image of more than {MOST_PX} pixels")
            if not len(self._sizes) == len(owner) == len(images):
                raise ValueError("two images with the same id or file_name")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._error(f"{error!r}", "images and categories need their fields") from error
        things = {k: n for k, n in named.items() if n.casefold() != BACKGROUND}
        self.classes = ClassList.of(things.values())
        self._index = dict.fromkeys(named, 0) | {k: i for i, k in enumerate(things, start=1)}
        self._annotations: dict[str, list[Mapping[str, Any]]] = {n: [] for n in self._sizes}
        for annotation in self._list(data, "annotations"):
            try:
                known = (
                    annotation["category_id"] in named and annotation["segmentation"] is not None
                )
                self._annotations[owner[annotation["image_id"]]].append(annotation)
            except (KeyError, TypeError) as error:
                fix = "it needs a segmentation, a category_id, and the image_id of an image"
                raise self._error(f"annotation {_glimpse(annotation)}", fix) from error
            if not known:
                where = f"annotation {_glimpse(annotation)}"
                raise self._error(where, "it needs a segmentation and the id of a category")

    @property
    def file_names(self) -> list[str]:
        """The images, in the file's order; those without any annotation too."""
        return list(self._sizes)

    def draw(self, file_name: str) -> np.ndarray:
        """The uint8 [H, W] label map of an image; a ValueError if a segmentation is broken."""
        size_hw = self._sizes[file_name]
        layers = []
        for annotation in self._annotations[file_name]:
            rle = self._rle(annotation, size_hw)
            index = self._index[annotation["category_id"]]
            layers.append((not annotation.get("iscrowd"), -int(rle_codec.area(rle)), index, rle))
        label_HW = np.zeros(size_hw, dtype=np.uint8)
        if file_name in self._ignored:
            ignored = {"id": f"ignore_rle of {file_name}", "segmentation": self._ignored[file_name]}
            label_HW[rle_codec.decode(self._rle(ignored, size_hw)).view(np.bool_)] = IGNORE
        for _, _, index, rle in sorted(layers, key=lambda layer: layer[:2]):
            label_HW[rle_codec.decode(rle).view(np.bool_)] = index  # one dense mask at a time
        return label_HW

    def _rle(self, annotation: Mapping[str, Any], size_hw: tuple[int, int]) -> Any:
        """The mask of one annotation as pycocotools' compressed run lengths."""
        outline = annotation["segmentation"]
        where = f"annotation {annotation.get('id')}"
        if isinstance(outline, list):
            return self._polygons(outline, size_hw, where)
        try:
            counts, size = outline["counts"], tuple(outline["size"])
        except (KeyError, TypeError) as error:
            raise self._error(
                where, "write polygons, or a run length of counts and size"
            ) from error
        if size != size_hw:
            raise self._error(f"{where} of size {size}", f"its image is {size_hw}")
        try:
            lengths = counts if isinstance(counts, list) else _run_lengths(counts)
            # Checked here, for pycocotools fills missing runs with whatever is in memory.
            if not all(type(length) is int for length in lengths):
                raise ValueError("its counts are whole numbers")
            if min(lengths, default=0) < 0 or sum(lengths) != size_hw[0] * size_hw[1]:
                raise ValueError("its counts do not add up to the image's size")
            return _encode({"size": list(size_hw), "counts": lengths}, *size_hw)
        except (IndexError, TypeError, ValueError, OverflowError) as error:
            raise self._error(where, f"mend its run length ({error})") from error

    def _polygons(self, outline: list[Any], size_hw: tuple[int, int], where: str) -> Any:
        """The union of polygons, each x1, y1, x2, y2, ... in pixels, as run lengths."""
        polygons, around_px = [], 0.0
        for polygon in outline:
            try:
                point_P2 = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
            except (TypeError, ValueError) as error:
                raise self._error(where, "a polygon is x1, y1, x2, y2, ...") from error
            if not np.isfinite(point_P2).all():
                raise self._error(where, "a polygon's points are finite numbers")
            with np.errstate(over="ignore"):
                around_px += float(np.abs(point_P2 - np.roll(point_P2, 1, axis=0)).sum())
                around_px += float(np.abs(point_P2[:1]).sum())  # how far away it begins
            if not around_px <= MAX_OUTLINE_PX:  # pycocotools keeps memory for each pixel of it
                fix = f"polygons of one object are at most {MAX_OUTLINE_PX} pixels long"
                raise self._error(where, fix)
            if len(point_P2) >= 3:  # fewer points enclose nothing
                polygons.append(point_P2.ravel().tolist())
        if not polygons:
            n_px = size_hw[0] * size_hw[1]
            return _encode({"size": list(size_hw), "counts": [n_px]}, *size_hw)
        return rle_codec.merge(_encode(polygons, *size_hw))

    def _list(self, data: Mapping[str, Any], key: str) -> list[Any]:
        """A list that a file with masks has to have."""
        value = data.get(key)
        if not isinstance(value, list):
            raise self._error(f"{key} of type {type(value).__name__}", f"it needs a list of {key}")
        return value

    def _error(self, value: str, fix: str) -> ValueError:
        """What every refusal of this file looks like."""
        return ValueError(complain("truth", "a COCO file", f"{value} in {self._uri}", fix))


def _run_lengths(text: str) -> list[int]:
    """The counts in COCO's compressed form: down the columns, outside first.

    Each count is the difference to the one before last, in groups of five bits, lowest first; a
    character is 48 + a group, + 32 if more follow.

    Source: cocodataset/cocoapi, common/maskApi.c (rleFrString), Simplified BSD licence.
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        group = ord(char) - 48
        if not 0 <= group < 64:
            raise ValueError(f"{char!r} is not part of one")
        if shift > 45:
            raise ValueError("a count of more than 50 bits")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:  # the sign bit
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts
