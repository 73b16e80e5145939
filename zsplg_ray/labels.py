"""The labels of a run for whoever reads them: one image at a time, all in turn, or as a table.

What enters: the folder of `zsplg label` or `predict`, on this machine or in an object store. What
leaves: `Labels`, a read-only sequence of `LabelledImage`, in the order of their ids. Only ids and
small columns are read at once; maps are decoded, and images read, when asked for.

Shapes: H, W pixels; C = 3 channels (RGB).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from zsplg_ray.images import decode_image
from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key
from zsplg_ray.storage import read_bytes
from zsplg_ray.vocab import ClassList

if TYPE_CHECKING:
    import pandas as pd

    from zsplg_ray.labels_torch import LabelDataset

MOST_KEPT = 256 * 2**20
"""Bytes of maps, still PNGs, that a `Labels` keeps of the parts that it read last."""

SMALL = ["image_id", "uri", "width", "height", "class_px", "source", "confidence"]
"""Columns of labels/ without the maps."""


@dataclass(frozen=True)
class LabelledImage:
    """One row of labels/."""

    image_id: str
    uri: str
    width: int
    height: int
    class_px: list[int]
    """Pixels of each class, background first."""
    source: str
    """zeroshot, model, enhanced, or corrected (by a person)."""
    confidence: float
    """Mean score of the pixels that have a label, [0, 1]; nan where none has."""
    label_png: bytes
    score_png: bytes

    @property
    def label_HW(self) -> np.ndarray:
        """Class indices, uint8 [H, W], 255 = ignore. Raises: ValueError if the PNG is broken."""
        return decode_png(self.label_png)

    @property
    def score_HW(self) -> np.ndarray:
        """Scores in [0, 1], float32 [H, W]. Raises: ValueError if the PNG is broken."""
        return decode_png(self.score_png).astype(np.float32) / 255

    @property
    def image_HWC(self) -> np.ndarray:
        """The image itself, RGB, uint8 [H, W, 3], read from `uri`.

        Raises: OSError if it is not there any more; ValueError if it is no image, or not of the
            label's size any more.
        """
        image_HWC = decode_image(read_bytes(self.uri))
        height, width = image_HWC.shape[:2]
        if (height, width) != (self.height, self.width):
            rule, shown = f"{self.width} x {self.height}", f"{width} x {height}"
            raise ValueError(complain(f"image {self.image_id}", rule, shown, "label it again"))
        return image_HWC


class Labels(Sequence[LabelledImage]):
    """The labels in a run's folder, by position (in the order of ids) or by image id.

    An id is taken with or without its image suffix. In the folder of an interrupted run an image
    may stand twice: the first one counts.

    Args:
        uri: The run's folder, a path or address.
        name: The setting that it was given for, for errors.

    Raises:
        ValueError: No labels are there, they are half relabelled, or do not tell their classes.
    """

    def __init__(self, uri: str, *, name: str = "labels") -> None:
        self.folder = RunFolder(uri)
        self.run: dict[str, Any] | None = self.folder.read_run()
        """run.json, None if the folder has only parts."""
        if self.run is not None and self.run["labels_state"] != "complete":
            fix = f"run `zsplg relabel --run {uri}` to finish it"
            raise ValueError(complain(name, "whole", "a half relabelled run", fix))
        parts = self.folder.parts("labels")
        if not parts:
            fix = "give the folder of a `zsplg label` or `zsplg predict` run with finished images"
            raise ValueError(complain(name, "a run's folder with labels/ in it", uri, fix))
        try:
            meta = self.folder.part_meta("labels", parts[0])
            tables = self.folder.map_parts(
                parts, lambda part: self.folder.read_part("labels", part, SMALL)
            )
        except (OSError, pa.ArrowException) as e:
            fix = f"mend the run ({' '.join(str(e).split())[:200]})"
            raise ValueError(complain(name, "a run whose parts can be read", uri, fix)) from e
        classes = (self.run or meta).get("classes")
        if not isinstance(classes, dict):
            fix = "take labels that `zsplg label` or `zsplg predict` wrote"
            raise ValueError(complain(name, "labels that tell their classes", uri, fix))
        self.classes: ClassList = ClassList.from_dict(classes)
        found: dict[str, tuple[str, int]] = {}
        for part, table in tables.items():
            for row, image_id in enumerate(table["image_id"].to_pylist()):
                found.setdefault(image_id, (part, row))
        self.ids: list[str] = sorted(found)
        """Image ids, sorted."""
        self._kept: OrderedDict[str, pa.Table] = OrderedDict()
        self._places = [found[image_id] for image_id in self.ids]
        keys = [image_key(image_id) for image_id in self.ids]
        times = Counter(keys)
        self._index = {key: i for i, key in enumerate(keys) if times[key] == 1}
        self._index |= {image_id: i for i, image_id in enumerate(self.ids)}
        starts = dict(zip(tables, np.cumsum([0, *map(len, tables.values())]), strict=False))
        rows = [int(starts[part]) + row for part, row in self._places]
        self.small: pa.Table = pa.concat_tables(tables.values()).take(pa.array(rows, pa.int64()))
        """The small columns of labels/, a row an image in the order of `ids`."""

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image: object) -> bool:
        return isinstance(image, str) and self.find(image) is not None

    def position(self, image_id: str) -> int:
        """Where an image stands, by its id with any image suffix or none.

        Raises: KeyError if it is nowhere, or if without their suffix several are called so.
        """
        if (found := self.find(image_id)) is None:
            raise KeyError(image_id)
        return found

    def find(self, image_id: str) -> int | None:
        """As `position`; None where that raises."""
        found = self._index.get(image_id)
        return self._index.get(image_key(image_id)) if found is None else found

    @overload
    def __getitem__(self, which: int | str) -> LabelledImage: ...
    @overload
    def __getitem__(self, which: slice) -> list[LabelledImage]: ...
    def __getitem__(self, which: int | str | slice) -> LabelledImage | list[LabelledImage]:
        """One image by position or id, or some by positions. Raises: IndexError, KeyError."""
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        position = self.position(which) if isinstance(which, str) else range(len(self))[which]
        part, row = self._places[position]
        return self._row(position, self._kept_maps(part), row)

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self[i] for i in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}  # another process reads its own

    def read(self, positions: Iterable[int]) -> Iterator[LabelledImage]:
        """Some images, part by part, so that each part is opened once: not in the order asked."""
        by_part: dict[str, list[int]] = {}
        for position in positions:
            by_part.setdefault(self._places[position][0], []).append(position)
        for part, wanted in by_part.items():
            maps = self._maps(part)
            for position in wanted:
                yield self._row(position, maps, self._places[position][1])

    def _kept_maps(self, part: str) -> pa.Table:
        """The maps of a part; the last ones are kept, for images need not come part by part."""
        if part in self._kept:
            self._kept.move_to_end(part)
            return self._kept[part]
        self._kept[part] = maps = self._maps(part)
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > MOST_KEPT:
            self._kept.popitem(last=False)
        return maps

    def _maps(self, part: str) -> pa.Table:
        return self.folder.read_part("labels", part, ["label_png", "score_png"])

    def _row(self, position: int, maps: pa.Table, row: int) -> LabelledImage:
        small = self.small.slice(position, 1).to_pylist()[0]
        pngs = maps.slice(row, 1).to_pylist()[0]
        return LabelledImage(**small, **pngs)

    def to_pandas(self) -> pd.DataFrame:
        """A row an image, without the maps; of each class its share of the image's pixels."""
        frame = self.small.drop_columns(["class_px"]).to_pandas()
        px = np.array(self.small["class_px"].to_pylist(), np.float64).reshape(
            len(self), len(self.classes)
        )
        area = frame["width"] * frame["height"]
        for name, column in zip(self.classes.names, px.T, strict=True):
            frame[f"share of {name}"] = column / area
        return frame.set_index("image_id")

    def to_torch(self, transform: Callable[[dict[str, Any]], Any] | None = None) -> LabelDataset:
        """A torch data set of images and labels; see `labels_torch.LabelDataset`."""
        from zsplg_ray.labels_torch import LabelDataset

        return LabelDataset(self, transform)
