"""Where images come from: any SRC of the command line -> a table of ids and uris.

Enters: a folder, a glob, a Pascal VOC folder, a UniMatch split file, a COCO JSON, a Parquet file or
folder, each on this machine or in an object store. Leaves: a table of `image_id` and `uri`, sorted;
`read_bytes` turns a uri into bytes, on any machine that reaches the store.

Why this way: listing is cheap and reading is spread over workers, so the table holds no bytes.
Images that lie in a Parquet column get a uri by row instead. An id is what stays the same when the
data moves: the path relative to the source, or the id that the data set gives.

What lists images (a split file, COCO JSON, Parquet) may name any file that its reader may read,
absolute paths and addresses too: it is as good as the list of paths that somebody types. An id
never becomes the name of a file that is written.
"""

from __future__ import annotations

import fnmatch
import re
from itertools import pairwise

import pyarrow as pa

from zsplg_ray.coco import load_coco
from zsplg_ray.images import IMAGE_SUFFIXES
from zsplg_ray.parquet_texts import MAX_ID_CHARS, MAX_URI_CHARS, opened, texts
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place, cell_uris, is_address, read_bytes

__all__ = ["MANIFEST", "image_key", "list_images", "read_bytes", "read_split"]

MANIFEST = pa.schema([("image_id", pa.string()), ("uri", pa.string())])
"""One row an image, sorted by `image_id`, which is unique."""

PARQUET_SUFFIXES = (".parquet", ".pq")

_MAGIC = re.compile(r"[*?[]")
_LABELS = re.compile(r"labels/part-[0-9a-f]{20}\.parquet")
_PROBED = 5


def list_images(src: str, *, root: str | None = None) -> pa.Table:
    """The images of a source, as a table of `MANIFEST`; none of them is read.

    Args:
        src: where they are. By kind, with what becomes the id:

            - a folder: every file below it that ends in one of `IMAGE_SUFFIXES` and is not hidden;
              the path below the folder. Links are followed.
            - a run's folder (run.json, labels/): the images that have a row in labels/, by its
              `image_id` and `uri`; so corrected labels bring their images along.
            - a folder with JPEGImages/ in it (Pascal VOC): the images there; the name, no suffix.
            - a glob such as `imgs/**/*.jpg`, `**` being any number of folders: as for a folder,
              namely the part before the first wildcard.
            - one image file: its name.
            - a split file (.txt), `image_path` or `image_path mask_path` a line: the path there.
            - a COCO file (.json): `file_name`.
            - a Parquet file, or a folder of nothing but those: `image_id`. Beside it there is a
              column `bytes` or `uri`; `bytes` wins. Row groups are read whole: keep them small.
        root: what the paths in a split file, a COCO file or a uri column are relative to; by
            default the folder of that file. Other sources do not use it.

    Raises:
        ValueError: there is nothing of that kind, no image in it, two with the same id, or a file
            that lists images is malformed.
    """
    place = Place.parse(src)
    kind = place.kind()
    base = Place.parse(root) if root else None
    try:
        if kind == "folder":
            pairs = _voc(place) or _folder(place, place.walk(), base or place)
        elif kind == "file":
            pairs = _file(place, base or place.parent)
        elif _MAGIC.search(place.path):
            pairs = _glob(place, base)
        else:
            raise _error("something that exists", src, "check the path")
    except PermissionError as error:
        raise _error("readable", str(error.filename or src), "change its permissions") from error
    if not pairs:
        fix = f"files that count end in {' '.join((*IMAGE_SUFFIXES, *PARQUET_SUFFIXES))}"
        raise _error("a source with images in it", f"{src} (none)", fix)
    return _table(pairs, src)


def image_key(image_id: str) -> str:
    """The id without its image suffix: what an image and its mask have in common."""
    stem, dot, suffix = image_id.rpartition(".")
    return stem if stem and f"{dot}{suffix}".lower() in IMAGE_SUFFIXES else image_id


def read_split(place: Place, name: str) -> list[tuple[int, str, str | None]]:
    """The lines of a split file: (line number, image path, mask path or None), as written.

    The two paths stand apart by blanks; if there are blanks in them, by a tab. Empty lines are
    skipped.

    Raises:
        ValueError: the file is no text, or a line is not one or two paths of images.
    """
    try:
        lines = place.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8"
        raise ValueError(complain(name, "a text file", place.uri, fix)) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        paths = [part.strip() for part in line.split("\t")] if "\t" in line else line.split()
        if not paths:
            continue
        if len(paths) > 2 or any(image_key(path) == path for path in paths):
            where = f"{line[:100]!r} in line {number} of {place.uri}"
            fix = "write the suffixes, and a tab between paths that have blanks in them"
            raise ValueError(
                complain(name, "lines of image_path or image_path mask_path", where, fix)
            )
        rows.append((number, paths[0], paths[1] if len(paths) == 2 else None))
    return rows


def _voc(place: Place) -> list[tuple[str, str]]:
    """(id, uri) of the images of a Pascal VOC folder; empty if it is none."""
    images = place.child("JPEGImages")
    if images.kind() != "folder":
        return []
    found = (path for path in images.walk() if image_key(path) != path)
    return [(image_key(path), images.child(path).uri) for path in found]


def _folder(place: Place, files: list[str], root: Place) -> list[tuple[str, str]]:
    """(id, uri) of the images among files below a folder, or else of the rows of Parquet files."""
    if "run.json" in files and (labels := [path for path in files if _LABELS.fullmatch(path)]):
        return [pair for path in labels for pair in _parquet(place.child(path), root)]
    images = [path for path in files if image_key(path) != path]
    if images:
        return [(path, place.child(path).uri) for path in images]
    tables = [path for path in files if path.lower().endswith(PARQUET_SUFFIXES)]
    return [pair for path in tables for pair in _parquet(place.child(path), root)]


def _glob(place: Place, root: Place | None) -> list[tuple[str, str]]:
    """(id, uri) of what matches a pattern, the ids relative to the part before it."""
    parts = place.path.split("/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    path = "/".join(parts[:fixed]) or ("" if place.prefix else "/")
    base = Place(path, place.prefix, place.query)
    if base.kind() != "folder":
        raise _error("a glob in a folder that exists", place.uri, f"there is no {base.uri}")
    found = [path for path in base.walk() if _matches(path.split("/"), parts[fixed:])]
    return _folder(base, found, root or base)


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a glob, both in parts; only ** stands for more than one part, or none."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and _matches(parts, pattern[1:]):
        return True
    if not parts:
        return False
    if pattern[0] == "**":
        return _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _file(place: Place, root: Place) -> list[tuple[str, str]]:
    """(id, uri) of the images that one file holds or lists."""
    if place.suffix in IMAGE_SUFFIXES:
        return [(place.name, place.uri)]
    if place.suffix in PARQUET_SUFFIXES:
        return _parquet(place, root)
    if place.suffix == ".txt":
        names = [image for _, image, _ in read_split(place, "images")]
    elif place.suffix == ".json":
        names = [image["file_name"] for image in load_coco(place, "images")["images"]]
    else:
        rule = "a folder, a glob, an image, a split .txt, a COCO .json or a .parquet"
        raise _error(rule, place.uri, "rename or convert it")
    places = [root.child(name) for name in names]
    # A few may have vanished since; if the first ones have all, the root is wrong.
    if places and not any(p.kind() for p in places[:_PROBED]):
        fix = "set root to the folder that its paths are relative to"
        raise _error("files that exist", f"{places[0].uri}, listed in {place.uri}", fix)
    return [(name, p.uri) for name, p in zip(names, places, strict=True)]


def _parquet(place: Place, root: Place) -> list[tuple[str, str]]:
    """(id, uri) of the rows of a Parquet file; a column of bytes is not read."""
    with opened(place, "images") as file:
        names = file.schema_arrow.names
        column = next((name for name in ("bytes", "uri") if name in names), None)
        if "image_id" not in names or column is None:
            fix = f"its columns are {', '.join(names)}"
            raise _error("a Parquet file with image_id and uri or bytes", place.uri, fix)
        ids = texts(file, "image_id", MAX_ID_CHARS, unique=True)
        if column == "bytes":
            return list(zip(ids, cell_uris(place, "bytes", len(ids)), strict=True))
        uris = texts(file, "uri", MAX_URI_CHARS)
    addresses = (uri if is_address(uri) else root.child(uri).uri for uri in uris)
    return list(zip(ids, addresses, strict=True))


def _table(pairs: list[tuple[str, str]], src: str) -> pa.Table:
    """The sorted table; ids have to be unique and text."""
    pairs.sort()
    twice = [a for (a, _), (b, _) in pairwise(pairs) if a == b]
    if twice:
        shown = ", ".join(dict.fromkeys(twice[:3])) + (", ..." if len(twice) > 3 else "")
        raise _error("images with unique ids", f"{shown} more than once in {src}", "rename them")
    for pair in pairs:
        if len(pair[0]) > MAX_ID_CHARS:
            rule = f"images with ids of at most {MAX_ID_CHARS} characters"
            raise _error(rule, pair[0], f"rename it in {src}")
        if not all(_is_text(text) for text in pair):
            raise _error("files whose names are UTF-8", ascii(pair[1]), "rename it")
    ids, uris = zip(*pairs, strict=True)
    return pa.table([pa.array(ids, pa.string()), pa.array(uris, pa.string())], schema=MANIFEST)


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8; names of files need not be."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _error(rule: str, value: str, fix: str) -> ValueError:
    """What every refusal here looks like."""
    return ValueError(complain("images", rule, value, fix))
