"""Ground truth: where label maps made by people come from.

Enters: a folder of PNG masks, a Pascal VOC folder, a UniMatch split file, a COCO JSON or a labels/
folder of this project, each on this machine or in an object store. Leaves: a `Truth`, which gives
the label map of an image by its id.

Why this way: images and masks of a data set have the same name but other suffixes, so a mask is
found by the image's id without suffix. Masks are read when asked for, one at a time. Values are
taken as they are stored: where class 0 is not background (Cityscapes' train ids), renumber first.

Shapes: H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from zsplg_ray.coco import CocoMasks
from zsplg_ray.images import decode_indices
from zsplg_ray.parquet_texts import MAX_ID_CHARS, metadata, opened, texts
from zsplg_ray.rundir import META
from zsplg_ray.settings import complain
from zsplg_ray.sources import PARQUET_SUFFIXES, image_key, read_split
from zsplg_ray.storage import Place, cell_uris, read_bytes
from zsplg_ray.vocab import ClassList


class Truth:
    """Label maps by image id. An id is taken with or without its image suffix.

    `ids` are sorted and have no suffix. `classes` is the source's own class list, None if it has
    none.
    """

    def __init__(
        self, ids: Iterable[str], read: Callable[[str], np.ndarray], classes: ClassList | None
    ) -> None:
        """Takes the ids without suffix and what reads the label map of one of them."""
        self.ids = sorted(ids)
        self.classes = classes
        self._known = frozenset(self.ids)
        self._read = read

    def __len__(self) -> int:
        """How many images have a label map."""
        return len(self.ids)

    def has(self, image_id: str) -> bool:
        """Whether there is a label map for an image."""
        return image_key(image_id) in self._known

    def read(self, image_id: str) -> np.ndarray:
        """The label map of an image: uint8 [H, W] of class indices, 255 where there is no truth.

        Raises:
            ValueError: there is none, or it is no such map.
            FileNotFoundError: its file has vanished.
        """
        if not self.has(image_id):
            raise _error("masks of all images asked for", f"none for {image_id}", "ask has() first")
        return self._read(image_key(image_id))


def open_truth(src: str, *, root: str | None = None) -> Truth:
    """The ground truth of a source; its masks are read later.

    Args:
        src: where it is. By kind:

            - a folder of PNGs, palette or 8-bit greyscale: every one below it;
            - a folder with SegmentationClass/ in it (Pascal VOC): those there;
            - a split file (.txt) with `image_path mask_path` on every line;
            - a COCO file (.json); zsplg_ray.coco tells how it is drawn. Brings its classes;
            - a Parquet file with `image_id` and `label_png`, a folder of those, or one with such
              a folder labels/ in it. Brings its classes if this project wrote it.
        root: what the paths in a split file are relative to; by default the folder of that file.

    Raises:
        ValueError: there is nothing of that kind, no mask in it, two for one image, or the file
            is malformed.
    """
    place = Place.parse(src)
    kind = place.kind()
    if kind == "folder":
        truth = _folder(place)
    elif kind is None:
        raise _error("something that exists", src, "check the path")
    elif place.suffix == ".txt":
        truth = _split(place, Place.parse(root) if root else place.parent)
    elif place.suffix == ".json":
        coco = CocoMasks(place)
        names = _unique(((name, name) for name in coco.file_names), src)
        truth = Truth(names, partial(_draw, coco, names), coco.classes)
    elif place.suffix in PARQUET_SUFFIXES:
        truth = _parquet([place], src)
    else:
        rule = "a folder, a split .txt, a COCO .json or a .parquet"
        raise _error(rule, src, "rename or convert it")
    if not truth.ids:
        raise _error(
            "a source with masks in it", f"{src} (none)", "check the path; masks are PNG files"
        )
    return truth


def _folder(place: Place) -> Truth:
    """The masks of a folder of any kind."""
    for base in (place.child("SegmentationClass"), place):
        if base.kind() != "folder":
            continue
        files = base.walk()
        tables = [path for path in files if path.lower().endswith(PARQUET_SUFFIXES)]
        masks = [path for path in files if path.lower().endswith(".png")]
        labels = [path for path in tables if path.startswith("labels/")]
        if labels or (tables and not masks):
            return _parquet([base.child(path) for path in labels or tables], place.uri)
        if masks:
            return _pngs(((path, base.child(path).uri) for path in masks), place.uri)
    return Truth((), _nothing, None)


def _split(place: Place, root: Place) -> Truth:
    """The masks that a split file names."""
    pairs = []
    for number, image, mask in read_split(place, "truth"):
        if mask is None:
            where = f"{image} in line {number} of {place.uri}"
            raise _error("lines of image_path mask_path", where, "add the mask's path")
        pairs.append((image, root.child(mask).uri))
    return _pngs(pairs, place.uri)


def _parquet(places: Iterable[Place], src: str) -> Truth:
    """The label maps in Parquet files, and the class list that they carry."""
    pairs: list[tuple[str, str]] = []
    classes = None
    for place in places:
        with opened(place, "truth") as file:
            names = file.schema_arrow.names
            if not {"image_id", "label_png"} <= set(names):
                fix = f"its columns are {', '.join(names)}"
                raise _error("Parquet with image_id and label_png", place.uri, fix)
            ids = texts(file, "image_id", MAX_ID_CHARS, unique=True)
            meta = metadata(file, META)
        pairs += zip(ids, cell_uris(place, "label_png", len(ids)), strict=True)
        if classes is None and "classes" in meta:
            classes = ClassList.from_dict(meta["classes"])
    return _pngs(pairs, src, classes)


def _pngs(pairs: Iterable[tuple[str, str]], src: str, classes: ClassList | None = None) -> Truth:
    """The truth that (image id, uri of a PNG) pairs make up."""
    uris = _unique(pairs, src)
    return Truth(uris, partial(_read_png, uris), classes)


def _unique(pairs: Iterable[tuple[str, str]], src: str) -> dict[str, str]:
    """Image id without suffix -> value; two for one image are an error."""
    found: dict[str, str] = {}
    for image_id, value in pairs:
        key = image_key(image_id)
        if key in found:
            shown = f"{found[key]} and {value} in {src}"
            raise _error("one mask an image", shown, "take one of them out")
        found[key] = value
    return found


def _read_png(uris: Mapping[str, str], key: str) -> np.ndarray:
    """The label map in the PNG of an image."""
    return decode_indices(read_bytes(uris[key]), name=f"mask of {key}")


def _draw(coco: CocoMasks, names: Mapping[str, str], key: str) -> np.ndarray:
    """The label map of an image of a COCO file."""
    return coco.draw(names[key])


def _nothing(key: str) -> np.ndarray:
    """What reads from a source without masks: never called."""
    raise AssertionError(key)


def _error(rule: str, value: str, fix: str) -> ValueError:
    """What every refusal here looks like."""
    return ValueError(complain("truth", rule, value, fix))
