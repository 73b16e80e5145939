"""What is checked before an export begins: its options, where it goes, which images it takes.

What enters: what a user gave. What leaves: checked values, or a ValueError of one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zsplg_ray.labels import Labels
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place, is_address
from zsplg_ray.views.export.formats import FORMATS
from zsplg_ray.views.export.job import Format, Options


def chosen(format: str, kind: Format, given: dict[str, Any]) -> Options:
    """The options of an export, or a ValueError for one that the format has no place for."""
    known = {f.name for f in dataclasses.fields(Options)}
    if unknown := set(given) - known:
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}")
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in {"images", "min_score", *kind.options}:
            takers = [f for f, k in FORMATS.items() if name in k.options]
            rule = f"left out for {format}"
            fix = f"it is for {', '.join(takers)}"
            raise ValueError(complain(name, rule, values[name], fix))
    if values.get("images", kind.images[0]) not in kind.images:
        rule = f"one of {', '.join(kind.images)} for {format}"
        raise ValueError(complain("images", rule, values["images"], f"choose {kind.images[0]}"))
    defaults = {"images": kind.images[0], "instances": kind.instances}
    return Options(**{**defaults, **values})


def free_folder(to: str) -> Path:
    """The folder to make. Raises: ValueError if something stands there, or it is elsewhere."""
    place = Place.parse(to)
    if place.prefix:
        fix = "export to a folder here and copy it there"
        raise ValueError(complain("to", "a folder on this machine", to, fix))
    out = Path(place.path).resolve()
    fix = "choose another folder, or remove it"
    if out.exists() and not out.is_dir():
        raise ValueError(complain("to", "a folder", to, fix))
    if out.is_dir() and next(out.iterdir(), None) is not None:
        raise ValueError(complain("to", "a folder that is empty or not there yet", to, fix))
    return out


def check_links(labels: Labels, positions: Sequence[int]) -> None:
    """Raise ValueError unless the images are files on this machine."""
    uris = labels.small["uri"]
    far = next((str(uris[p]) for p in positions if is_address(str(uris[p]))), None)
    if far is not None:
        rule = "copy or none, where images are no files on this machine"
        raise ValueError(complain("images", rule, f"link, and an image at {far}", "choose copy"))


def listed(labels: Labels, file: str) -> list[int]:
    """The positions of the images that a text file lists."""
    try:
        text = Place.parse(file).read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        fix = f"check the path ({' '.join(str(e).split())[:200]})"
        raise ValueError(complain("ids", "a text file of image ids, one a line", file, fix)) from e
    wanted = [line.strip("\r") for line in text.split("\n") if line.strip()]
    unknown = next((image_id for image_id in wanted if image_id not in labels), None)
    if unknown is not None:
        example = labels.ids[0] if labels.ids else "none"
        fix = f"the run has ids such as {example}"
        raise ValueError(complain("ids", "images of the run", unknown, fix))
    if not wanted:
        raise ValueError(complain("ids", "a file with ids in it", file, "write one a line"))
    return sorted({labels.position(image_id) for image_id in wanted})
