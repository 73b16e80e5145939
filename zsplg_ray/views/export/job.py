"""What the driver and the formats tell each other.

What enters: options as a caller gives them. What leaves: `Job` (the export as a whole) and `Item`
(one image), which a format's `Writer` turns into files; `Format`, what a format can do.

Why this way: all that an image needs by itself (decoding, encoding, its own files) is done by
`Writer.entry`, in several threads at once; what lists the images is written by `Writer.finish` from
a stream of their entries. What grows with the number of images is at most a name, an address or a
line each, which some lists need to be sorted; maps, regions and records of images go to disk.

Shapes: H, W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zsplg_ray.config.export import ImagesMode, Instances
from zsplg_ray.records import IGNORE
from zsplg_ray.vocab import BACKGROUND, ClassList, palette


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is exported and how; config.ExportConfig tells what each means."""

    images: ImagesMode = "none"
    min_score: float | None = None
    min_area_px: int | None = None
    instances: Instances = "components"
    val_share: float | None = None
    image_prefix: str | None = None


@dataclass(frozen=True)
class Item:
    """One image on its way out."""

    position: int
    """Its place in the run, from 0: the same whatever part of the run is exported."""
    image_id: str
    name: str
    """A relative path without suffix that is safe, and unique in the run."""
    image: str | None
    """Path of the image in the export; None: it is not put there."""
    reference: str
    """What the image is called: `name` and suffix if it is put, else as in its source."""
    uri: str
    split: str
    """train or val."""
    source: str
    confidence: float
    label_HW: np.ndarray
    """uint8 [H, W], 255 = ignore."""
    data: bytes | None
    """The image's file, if images are copied."""

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.label_HW.shape
        return height, width


@dataclass(frozen=True)
class Job:
    """An export."""

    folder: Path
    """Where files go for now."""
    out: Path
    """Where they will be in the end, absolute."""
    run: str
    """The run's address."""
    classes: ClassList
    options: Options
    told: dict[str, Any] = field(default_factory=dict)
    """Figures that a writer adds to the result."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that images may be in."""
        return ("train",) if self.options.val_share is None else ("train", "val")

    def path(self, relative: str) -> Path:
        """A file in the export, with the folders above it made."""
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, relative: str, content: str | bytes) -> None:
        """Write a file of the export; texts as UTF-8, line ends as they are."""
        data = content.encode() if isinstance(content, str) else content
        self.path(relative).write_bytes(data)

    def write_json(self, relative: str, value: Any) -> None:
        """Write a small JSON file."""
        self.write(relative, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    @property
    def ignore_name(self) -> str:
        """A name for the pixels without label where a format needs one; no class has it."""
        taken = {name.casefold() for name in self.classes.names}
        names = ("ignore", "no label", "zsplg ignore", *(f"ignore {i}" for i in range(IGNORE)))
        return next(name for name in names if name not in taken)

    def name_of(self, index: int) -> str:
        """The name of a class, or that of the pixels without label."""
        return self.ignore_name if index == IGNORE else self.classes.names[index]


class Writer(Protocol):
    """What writes one format."""

    def __init__(self, job: Job) -> None: ...

    def entry(self, item: Item) -> Any:
        """Write the files of one image, in any order, several at once; what `finish` needs.

        Raises: ValueError if the format has no way to write it.
        """
        ...

    def finish(self, entries: Iterable[tuple[Item, Any]]) -> str:
        """Write what lists the images; how to go on, in one line. The items have no pixels."""
        ...


@dataclass(frozen=True)
class Format:
    """What a format can do."""

    writer: Callable[[Job], Writer]
    image_folder: str = "images"
    """Where images are put; {split} is replaced. "": nowhere, the writer takes `Item.data`."""
    images: tuple[ImagesMode, ...] = ("copy", "link", "none")
    """What may become of the images, the default first."""
    options: frozenset[str] = frozenset()
    """Names of the options that it honours beside images and min_score."""
    instances: Instances = "components"
    """What a region is if the user does not say."""
    reserved: frozenset[str] = frozenset()
    """Names that no folder of images may have."""


def colour_hex(index: int) -> str:
    """The colour of a class, or of pixels without label (255), as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*palette()[3 * index : 3 * index + 3])


def things(classes: ClassList) -> Iterator[tuple[int, str]]:
    """Index and name of all classes but background."""
    assert classes.names[0] == BACKGROUND
    yield from enumerate(classes.names[1:], start=1)
