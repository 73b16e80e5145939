"""What a page is about: a run's labels, other runs' labels of the same images, masks.

What enters: the settings. What leaves: all of these opened and found to speak of the same classes
and images; then image by image what there is of each. Maps are read a few dozen images at a time,
part by part, so memory is bounded whatever the run's size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from zsplg_ray.config import ReportConfig
from zsplg_ray.labels import LabelledImage, Labels
from zsplg_ray.masks import Truth, open_truth
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place
from zsplg_ray.views.evaluate import check_same
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)

AT_A_TIME = 32
"""Images whose maps are in memory together, as PNGs."""

KINDS = {
    "zeroshot": "zero-shot labels",
    "model": "the model's labels",
    "enhanced": "enhanced labels",
    "corrected": "corrected labels",
}
"""What `source` in labels/ means, in words."""


@dataclass(frozen=True, eq=False)
class Run:
    """Labels that are shown, and what they are called on the page."""

    labels: Labels
    name: str
    """Name of the folder, told apart from others by a number where needed."""
    kind: str
    """Zero-shot labels and the like."""


@dataclass(frozen=True, eq=False)
class Sources:
    """All that a page shows."""

    run: Run
    others: tuple[Run, ...]
    truth: Truth | None

    @property
    def classes(self) -> ClassList:
        """The classes of all of them."""
        return self.run.labels.classes


@dataclass(frozen=True)
class Rows:
    """One image: its row in labels/ of the run, and of the other runs where they have it."""

    position: int
    row: LabelledImage
    others: tuple[LabelledImage | None, ...]


def open_sources(config: ReportConfig) -> Sources:
    """Open everything that the settings name.

    Raises: ValueError if something is not there, is of other classes, or has no image in common.
    """
    folders = [config.run, *config.compare]
    opened = [Labels(folder, name="compare" if i else "run") for i, folder in enumerate(folders)]
    mine = opened[0]
    for folder, labels in zip(folders[1:], opened[1:], strict=True):
        check_same(mine.classes, labels.classes, f"labels in {folder}")
        if all(labels.find(image_id) is None for image_id in mine.ids):
            fix = f"{folder} has images such as {labels.ids[0]!r}"
            raise ValueError(complain("compare", "a run over the same images", folder, fix))
    truth = open_truth(config.truth, root=config.root) if config.truth is not None else None
    if truth is not None:
        check_same(mine.classes, truth.classes, "truth")
        if not any(truth.has(image_id) for image_id in mine.ids):
            fix = f"masks are called such as {truth.ids[0]!r}"
            shown = f"labels such as {mine.ids[0]!r}"
            raise ValueError(complain("truth", "masks of the labelled images", shown, fix))
    names = _names(folders)
    run, *others = (Run(o, n, _kind(o)) for o, n in zip(opened, names, strict=True))
    return Sources(run, tuple(others), truth)


def _names(folders: Sequence[str]) -> list[str]:
    """A short name for each folder; of two the same the later one gets a number.

    A bucket itself has its address for a name, without credentials and options.
    """
    names: list[str] = []
    for folder in folders:
        place = Place.parse(folder)
        name = PurePosixPath(place.path.rstrip("/")).name or masked(place.prefix or place.path)
        same = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names


def _kind(labels: Labels) -> str:
    """What a run's labels are, by what most rows say."""
    counts = labels.small["source"].value_counts().to_pylist()
    most = max(counts, key=lambda c: c["counts"], default={"values": None})["values"]
    return KINDS.get(most or "", "labels")


def in_batches(sources: Sources, positions: Sequence[int]) -> Iterator[list[Rows]]:
    """Rows of some images with their maps, at most AT_A_TIME together, in the order of positions.

    An image whose maps cannot be read is left out; in another run it is taken as missing.
    """
    mine = sources.run.labels
    for start in range(0, len(positions), AT_A_TIME):
        some = positions[start : start + AT_A_TIME]
        rows = _read(sources.run, some)
        others = []
        for other in sources.others:
            at = {p: other.labels.find(mine.ids[p]) for p in some}
            theirs = _read(other, sorted({q for q in at.values() if q is not None}))
            others.append({p: theirs.get(q) for p, q in at.items() if q is not None})
        yield [Rows(p, rows[p], tuple(o.get(p) for o in others)) for p in some if p in rows]


def _read(run: Run, positions: Sequence[int]) -> dict[int, LabelledImage]:
    """Rows by position. Where a part is broken, those that can be read one by one."""
    try:
        found = list(run.labels.read(positions))
        return {p: row for row in found if (p := run.labels.find(row.image_id)) is not None}
    except (OSError, ValueError, pa.ArrowException) as e:
        log.warning("some labels of %s cannot be read: %s", run.name, e)
    rows = {}
    for position in positions:
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            rows[position] = run.labels[position]
    return rows
