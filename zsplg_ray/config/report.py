"""Settings of the page about a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from zsplg_ray.settings import Range, Section


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Section):
    """One HTML page about a run of `label` or `predict`, whole in itself: images under their labels
    to sort, filter and compare, and charts. Opens from disk, needs no network."""

    run: Positional[str]
    """The run's folder."""
    out: str | None = None
    """The page, a file ending in .html; written over if it is there. None: report.html in the run's
    folder."""
    compare: tuple[str, ...] = ()
    """Folders of other runs over the same images, with the same classes, to show beside."""
    truth: str | None = None
    """Masks to show beside and to judge by: a folder of PNGs, VOC root, split file, COCO json; of
    some of the images at least. None: there are none."""
    root: str | None = None
    """Folder that the paths of a split file start from."""
    max_images: Annotated[int, Range(1, 5000)] = 200
    """Most images on the page, [1, 5000]. Of more: some of every class, the most doubtful, and a
    spread of the rest."""
    max_counted: Annotated[int, Range(1, 10_000_000)] = 2000
    """Most images whose maps are counted for the charts, [1, 1e+07]. Of more: every so many-th, and
    as many again of those with a mask."""
    side_px: Annotated[int | None, Range(64, 2048)] = None
    """Longer side of the images on the page, px in [64, 2048]. None: such that all together take
    some 15 MB, 1024 at most."""
    json: bool = False
    """One JSON object on stdout instead of lines."""
