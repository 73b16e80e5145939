"""The maps and segments of a run's images, one image at a time.

What enters: a run's labels. What leaves: checked uint8 maps, and segments where the run has any;
an image whose row is broken is noted and passed over.

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

    def __post_init__(self) -> None:
        folder = self.labels.folder
        names = folder.parts("segments")
        ids = folder.map_parts(names, lambda n: folder.read_part("segments", n, ["image_id"]))
        self._places = {}
        for name, table in ids.items():
            for row, image_id in enumerate(table["image_id"].to_pylist()):
                self._places.setdefault(image_id, (name, row))

    def read(self, positions: list[int]) -> Iterator[Maps]:
        """The maps of some images, part by part; one that cannot be read goes to `broken`."""
        for row in self.labels.read(positions):
            position = self.labels.position(row.image_id)
            try:
                yield self._maps(position, row)
            except (ValueError, TypeError) as e:
                self.broken[position] = " ".join(str(e).split())

    def beside(self, image_id: str, shape: tuple[int, ...]) -> Maps | None:
        """This run's maps of an image of another run, None if it has none that can be compared."""
        if image_id not in self.labels:
            return None
        try:
            maps = self._maps(-1, self.labels[image_id])
        except (ValueError, TypeError) as e:
            log.debug("%s cannot be compared: %s", image_id, e)
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
            return None
        part, at = self._places[row.image_id]
        if self._kept is None or self._kept[0] != part:
            self._kept = part, self.labels.folder.read_part("segments", part, ["segments"])
        return Segments.from_arrow(self._kept[1]["segments"][at].values, (row.height, row.width))
