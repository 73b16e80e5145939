"""Atomic regions: the pixels of an image that the same segments cover, counted by true class.

Enters: one image's segments and its true label map. Leaves: `Regions`, some hundred numbers from
which every setting of `compose` can be scored against this truth exactly (`sweep` does it), because
all pixels that the same segments cover get the same label, whatever the setting. They depend on
masks and truth alone: not on prompts, embeddings, classes' names or thresholds.

They are found from the runs of the masks' RLE (`region_kernels`), so no mask is ever made.

Shape suffixes: N regions, R segments, H W pixels, P pixels in column-major order.
The arrays of a list of lists: entry n is values[start[n] : start[n + 1]].
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from zsplg_ray.label.region_kernels import cut_runs
from zsplg_ray.label.segments import Segments
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain

REGIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("truth_sha256", pa.string()),
        ("segments_sha256", pa.string()),
        ("n_segments", pa.int32()),
        ("cover_start", pa.list_(pa.int32())),
        ("cover", pa.list_(pa.int32())),
        ("count_start", pa.list_(pa.int32())),
        ("count_class", pa.list_(pa.uint8())),
        ("count_px", pa.list_(pa.int32())),
    ]
)
"""One row an image: `image_id` and what `Regions.to_row` gives. The two hashes say what was
counted: a row is of use as long as they are those of the truth and of the segments."""

_LISTS = {name: REGIONS.field(name).type.value_type.to_pandas_dtype() for name in REGIONS.names[6:]}
_MOST_PX = 2**31 - 1
"""Pixels are numbered in int32."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The N regions of one image that have pixels of known truth; N may be 0.

    Raises: ValueError if the lists do not belong together.
    """

    size_hw: tuple[int, int]
    """Height and width of the image, pixels."""
    n_segments: int
    """R, segments of the image, also those that cover nothing."""
    truth_sha256: str
    """`truth_sha256` of the label map that was counted."""
    segments_sha256: str
    """`segments_sha256` of the segments that cut."""
    cover_start: np.ndarray
    """int32 [N + 1]."""
    cover: np.ndarray
    """int32, the segments that cover region n, rising; none for what no segment covers."""
    count_start: np.ndarray
    """int32 [N + 1]."""
    count_class: np.ndarray
    """uint8, the true classes that occur in region n, rising."""
    count_px: np.ndarray
    """int32, and how many pixels each of them has there, >= 1."""

    def __post_init__(self) -> None:
        for name, dtype in _LISTS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                got = f"{array.dtype} {list(array.shape)}"
                raise _broken(f"{np.dtype(dtype)} of one dimension", f"{name} {got}")
        for start, values in (
            (self.cover_start, self.cover),
            (self.count_start, self.count_class),
            (self.count_start, self.count_px),
        ):
            if not len(start) or start[0] or start[-1] != len(values) or (np.diff(start) < 0).any():
                raise _broken("lists that rise from 0 to their end", start[:8].tolist())
        if len(self.cover_start) != len(self.count_start):
            got = (len(self.cover_start), len(self.count_start))
            raise _broken("as many covers as counts", got)
        _check_rising(self.cover, self.cover_start, self.n_segments)
        _check_rising(self.count_class, self.count_start, IGNORE)
        if (np.diff(self.count_start) < 1).any() or (self.count_px < 1).any():
            raise _broken("pixels in every region", self.count_px.min(initial=0))
        if self.count_px.sum(dtype=np.int64) > self.size_hw[0] * self.size_hw[1]:
            raise _broken("no more pixels than the image", self.count_px.sum(dtype=np.int64))

    def __len__(self) -> int:
        """The number of regions."""
        return len(self.cover_start) - 1

    def to_row(self) -> dict[str, Any]:
        """A row of `REGIONS` without its `image_id`."""
        height, width = self.size_hw
        return {
            "width": width,
            "height": height,
            "truth_sha256": self.truth_sha256,
            "segments_sha256": self.segments_sha256,
            "n_segments": self.n_segments,
            **{name: getattr(self, name) for name in _LISTS},
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Regions:
        """The inverse of `to_row`, also from plain lists, as Arrow's `to_pylist` gives them.

        Raises:
            ValueError: lists that do not belong together.
        """
        return cls(
            size_hw=(row["height"], row["width"]),
            n_segments=row["n_segments"],
            truth_sha256=row["truth_sha256"],
            segments_sha256=row["segments_sha256"],
            **{name: np.asarray(row[name], dtype) for name, dtype in _LISTS.items()},
        )


def cut(segments: Segments, truth_HW: np.ndarray, n_classes: int) -> Regions:
    """Cut an image into its regions and count their pixels of each true class.

    Args:
        segments: R masks, any number.
        truth_HW: uint8 [H, W], class indices below `n_classes`, or 255 where there is no truth.
        n_classes: K, background included.

    Raises:
        ValueError: the truth is not uint8 [H, W] of the segments' size, or holds an index that is
            neither below K nor 255.
    """
    _check_truth(truth_HW, segments.size_hw, n_classes)
    ends = np.cumsum([0, *map(len, segments.rle)], dtype=np.int64)
    code = np.frombuffer(b"".join(segments.rle), np.uint8)
    truth_P = truth_HW.flatten(order="F")  # down the columns, as runs go
    cover_start, cover, count_start, count_class, count_px = cut_runs(code, ends, truth_P)
    return Regions(
        segments.size_hw,
        len(segments),
        truth_sha256(truth_HW),
        segments_sha256(segments),
        cover_start,
        cover,
        count_start,
        count_class,
        count_px,
    )


def truth_sha256(truth_HW: np.ndarray) -> str:
    """What names a label map, uint8 [H, W]: a hash of its shape and, row by row, its indices."""
    digest = hashlib.sha256(np.array(truth_HW.shape, "<i8").tobytes())
    digest.update(np.ascontiguousarray(truth_HW).data)
    return digest.hexdigest()


def segments_sha256(segments: Segments) -> str:
    """What names the masks of an image: a hash of their size and, in order, their runs."""
    sizes = [*segments.size_hw, *map(len, segments.rle)]
    digest = hashlib.sha256(np.array(sizes, "<i8").tobytes())
    digest.update(b"".join(segments.rle))
    return digest.hexdigest()


def _broken(rule: str, got: object) -> ValueError:
    return ValueError(complain("regions", rule, got, "have them counted again"))


def _check_rising(values: np.ndarray, start: np.ndarray, end: int) -> None:
    """Raises a ValueError if a list is not strictly rising within [0, end)."""
    step = np.diff(values.astype(np.int64))
    inner = np.ones(len(step), np.bool_)
    inside = start[(start > 0) & (start < len(values))]
    inner[inside - 1] = False  # from one list to the next
    if len(values) and (values.min() < 0 or values.max() >= end or (step[inner] < 1).any()):
        raise _broken(f"rising numbers below {end} in each list", values[:8].tolist())


def _check_truth(truth_HW: np.ndarray, size_hw: tuple[int, int], n_classes: int) -> None:
    if truth_HW.shape != tuple(size_hw):
        fix = "compare masks of the same image at the same size"
        raise ValueError(complain("truth_HW", f"of shape {tuple(size_hw)}", truth_HW.shape, fix))
    if truth_HW.dtype != np.uint8:
        raise ValueError(complain("truth_HW", "uint8", str(truth_HW.dtype), "pass class indices"))
    if truth_HW.size > _MOST_PX:
        rule = f"of at most {_MOST_PX} pixels"
        raise ValueError(complain("truth_HW", rule, truth_HW.size, "cut the image into tiles"))
    wrong = (truth_HW >= n_classes) & (truth_HW != IGNORE)
    if wrong.any():
        rule = f"class indices below {n_classes}, or {IGNORE} to ignore"
        fix = "use the class list that the masks were made with"
        raise ValueError(complain("truth_HW", rule, int(truth_HW[wrong][0]), fix))
