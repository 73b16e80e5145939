"""The maps and segments of a run's images, one image at a time.

What enters: a run's labels. What leaves: checked uint8 maps, and segments where the run has any;
an image whose row, or whose part, is broken is noted and passed over.

Shapes: H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from zsplg_ray.label.segments import Segments
from zsplg_ray.labels import LabelledImage, Labels
from zsplg_ray.records import IGNORE, decode_png

log = logging.getLogger(__name__)

_UNREADABLE = (OSError, ValueError, TypeError, pa.ArrowException)
"""What a torn part or a broken row raises."""


@dataclass(frozen=True, eq=False)
class Maps:
    """One image's maps, and its segments where there are any."""

    position: int
    """In the run's labels."""
    label_HW: np.ndarray
    """uint8 [H, W], 255 = no label."""
    score_HW: np.ndarray
    """uint8 [H, W], 255 * score."""
    segments: Segments | None


@dataclass(eq=False)
class Source:
    """A run's labels with its segments, opened part by part."""

    labels: Labels
    broken: dict[int, str] = field(default_factory=dict)
    """Position -> why an image cannot be looked at."""
    _places: dict[str, tuple[str, int]] = field(init=False)
    _kept: tuple[str, pa.Table] | None = None
    _torn: dict[str, str] = field(default_factory=dict)
    """Part of segments/ -> why its segments cannot be read."""
    _lost: str = ""
    """Why not even the ids in some part of segments/ can be read."""

    def __post_init__(self) -> None:
        folder = self.labels.folder
        self._places = {}
        for name, ids in folder.map_parts(folder.parts("segments"), self._ids).items():
            for row, image_id in enumerate(ids):
                self._places.setdefault(image_id, (name, row))

    def _ids(self, part: str) -> list[str]:
        """The images of a part of segments/, none if it is torn."""
        try:
            table = self.labels.folder.read_part("segments", part, ["image_id"])
        except _UNREADABLE as e:
            self._lost = _told(e)
            log.warning("segments of %s cannot be read: %s", self.labels.folder.uri, _told(e))
            return []
        return table["image_id"].to_pylist()

    def read(self, positions: list[int]) -> Iterator[Maps]:
        """The maps of some images, part by part; one that cannot be read goes to `broken`."""
        for position, row in self._rows(positions):
            try:
                maps = self._maps(position, row)
            except _UNREADABLE as e:
                self.broken[position] = _told(e)
                continue
            yield maps

    def _rows(self, positions: list[int]) -> Iterator[tuple[int, LabelledImage]]:
        """Rows, part by part; where a part of labels/ is torn, its images go to `broken`."""
        left = dict.fromkeys(p for p in positions if p not in self.broken)
        while left:
            try:
                for row in self.labels.read(list(left)):
                    position = self.labels.position(row.image_id)
                    del left[position]
                    yield position, row
            except _UNREADABLE as e:
                # Parts are read in the order of their first images: the first left is of that one.
                position = next(iter(left))
                self.broken[position] = _told(e)
                del left[position]

    def beside(self, image_id: str, shape: tuple[int, ...]) -> Maps | None:
        """This run's maps of an image of another run, None if it has none that can be compared."""
        position = self.labels.find(image_id)
        if position is None or position in self.broken:
            return None
        try:
            maps = self._maps(position, self.labels[position])
        except _UNREADABLE as e:
            self.broken[position] = _told(e)
            return None
        return maps if maps.label_HW.shape == shape else None

    def _maps(self, position: int, row: LabelledImage) -> Maps:
        label_HW, score_HW = decode_png(row.label_png), decode_png(row.score_png)
        if label_HW.shape != score_HW.shape or label_HW.shape != (row.height, row.width):
            raise ValueError("label and score are not of the image's size")
        if int(np.max(label_HW, where=label_HW != IGNORE, initial=0)) >= len(self.labels.classes):
            raise ValueError("the label has a number that is no class")
        return Maps(position, label_HW, score_HW, self._segments(row))

    def _segments(self, row: LabelledImage) -> Segments | None:
        if row.image_id not in self._places:
            if self._lost:  # which images stand in that nobody knows
                raise ValueError(f"its segments cannot be read: {self._lost}")
            return None
        part, at = self._places[row.image_id]
        if part in self._torn:
            raise ValueError(f"its segments cannot be read: {self._torn[part]}")
        if self._kept is None or self._kept[0] != part:
            try:
                table = self.labels.folder.read_part("segments", part, ["segments"])
            except _UNREADABLE as e:
                self._torn[part] = _told(e)
                raise
            self._kept = part, table
        return Segments.from_arrow(self._kept[1]["segments"][at].values, (row.height, row.width))


def _told(error: Exception) -> str:
    return " ".join(str(error).split())
