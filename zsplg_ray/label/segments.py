"""The record of one image's segments: their masks as RLE and the numbers that thresholds act on.

What enters: dense masks, their RLE, or rows of the `segments` Parquet. What leaves: one
checked `Segments`, which goes through embedding, composing, tuning and storage unchanged.

Why RLE is the form that travels: the masks of one image are tens of MiB dense and tens of KiB as
runs. Boxes and areas are read off the runs, so a record can be checked without decoding a mask.
Every record is checked when it is made: the decoder below never sees runs that do not fit.

Shape suffixes: R segments, H W pixels, D embedding, N runs. Boxes are half-open: x1 is the last
column + 1. Not to be compared with `==` (arrays inside).

Source: the RLE is COCO's compressed form (column-major runs, background first), encoded and decoded
by pycocotools (BSD).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco

from zsplg_ray.images import MOST_PX
from zsplg_ray.records import SEGMENT
from zsplg_ray.settings import complain


@dataclass(frozen=True, eq=False)
class Segments:
    """The R segments of one image; R may be 0.

    Raises: ValueError if lengths, dtypes, sizes, boxes or areas do not belong together.
    """

    size_hw: tuple[int, int]
    """Height and width of every mask, pixels."""
    rle: list[bytes]
    """COCO compressed counts, one per segment."""
    box_xyxy: np.ndarray
    """int32 [R, 4], pixels, half-open, tight around the mask; 0, 0, 0, 0 for an empty mask."""
    area_px: np.ndarray
    """int64 [R], pixels of the mask."""
    predicted_iou: np.ndarray
    """float32 [R], the quality that SAM predicts, about [0, 1]."""
    stability: np.ndarray
    """float32 [R], IoU of the mask at a higher and a lower cut-off, [0, 1]."""
    embedding_RD: np.ndarray | None = None
    """float16 [R, D], L2-normalised; NaN where a segment cannot be embedded; None: not embedded."""

    def __post_init__(self) -> None:
        if len(self.size_hw) != 2 or min(self.size_hw) < 1:
            raise ValueError(complain("size_hw", "two sizes >= 1", self.size_hw, "check the image"))
        if self.size_hw[0] * self.size_hw[1] > MOST_PX:
            rule = f"of at most {MOST_PX} pixels"
            raise ValueError(complain("size_hw", rule, self.size_hw, "check the image"))
        n = len(self.rle)
        _check_array("box_xyxy", self.box_xyxy, np.int32, (n, 4))
        _check_array("area_px", self.area_px, np.int64, (n,))
        _check_array("predicted_iou", self.predicted_iou, np.float32, (n,))
        _check_array("stability", self.stability, np.float32, (n,))
        if self.embedding_RD is not None:
            _check_array("embedding_RD", self.embedding_RD, np.float16, (n, None))
        box_xyxy, area_px = _measure_all(self.rle, self.size_hw)
        for name, given, exact in (
            ("box_xyxy", self.box_xyxy, box_xyxy),
            ("area_px", self.area_px, area_px),
        ):
            if not np.array_equal(given, exact):
                row = int(np.flatnonzero((given != exact).reshape(n, -1).any(1))[0])
                rule = f"{exact[row].tolist()} for segment {row}, as its mask says"
                raise ValueError(complain(name, rule, given[row].tolist(), "label again"))

    def __len__(self) -> int:
        return len(self.rle)

    @classmethod
    def from_masks(
        cls, masks_RHW: np.ndarray, predicted_iou: Sequence[float], stability: Sequence[float]
    ) -> Segments:
        """Build from dense masks; box and area come from the masks.

        Args:
            masks_RHW: bool [R, H, W].
            predicted_iou: R numbers.
            stability: R numbers.

        Raises:
            ValueError: not bool, not three-dimensional, or lengths that differ.
        """
        if masks_RHW.ndim != 3 or masks_RHW.dtype != np.bool_:
            got = f"{masks_RHW.dtype} {list(masks_RHW.shape)}"
            raise ValueError(complain("masks_RHW", "bool [R, H, W]", got, "cast or stack them"))
        height, width = masks_RHW.shape[1:]
        rle = [encode_mask(mask_HW) for mask_HW in masks_RHW]
        return cls.measured((height, width), rle, predicted_iou, stability)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], size_hw: tuple[int, int]) -> Segments:
        """Build from plain dicts with the keys of the `segments` schema.

        Args:
            rows: as `to_rows` makes them, or as `to_pylist` of an Arrow column gives them; the
                embedding may be missing or None, but then in all rows.
            size_hw: height and width of the image.

        Raises:
            ValueError: rows that contradict each other or their masks.
        """
        vectors = [row.get("embedding") for row in rows]
        known = [np.asarray(vector, np.float16) for vector in vectors if vector is not None]
        lengths = {len(vector) for vector in known}
        if len(known) not in (0, len(rows)) or len(lengths) > 1:
            got = f"{len(known)} of {len(rows)}, of lengths {sorted(lengths)}"
            raise ValueError(complain("embedding", "alike in all rows", got, "embed them again"))
        return cls(
            size_hw=size_hw,
            rle=[bytes(row["rle"]) for row in rows],
            box_xyxy=np.array([row["box_xyxy"] for row in rows], np.int32).reshape(-1, 4),
            area_px=np.array([row["area_px"] for row in rows], np.int64),
            predicted_iou=np.array([row["predicted_iou"] for row in rows], np.float32),
            stability=np.array([row["stability"] for row in rows], np.float32),
            embedding_RD=np.stack(known) if known else None,
        )

    @classmethod
    def from_arrow(cls, structs: pa.StructArray | None, size_hw: tuple[int, int]) -> Segments:
        """Build from one image's entry of the `segments` column, without a Python object a number.

        Args:
            structs: `column[i].values`, or any struct array of the schema's item type.
            size_hw: height and width of the image.

        Raises:
            ValueError: values of other types, or missing, or that contradict each other.
        """
        _check_structs(structs, size_hw)
        assert structs is not None
        embedding = structs.field("embedding")
        return cls(
            size_hw=size_hw,
            rle=structs.field("rle").to_pylist(),
            box_xyxy=_fixed_lists(structs.field("box_xyxy")),
            area_px=_numbers(structs.field("area_px")),
            predicted_iou=_numbers(structs.field("predicted_iou")),
            stability=_numbers(structs.field("stability")),
            embedding_RD=None
            if len(embedding) and embedding.null_count == len(embedding)
            else _fixed_lists(embedding),
        )

    @classmethod
    def measured(
        cls,
        size_hw: tuple[int, int],
        rle: list[bytes],
        predicted_iou: Sequence[float] | np.ndarray,
        stability: Sequence[float] | np.ndarray,
    ) -> Segments:
        """Build from COCO compressed counts; box and area are read off the runs.

        Raises:
            ValueError: counts that are no RLE or of another size, or lengths that differ.
        """
        box_xyxy, area_px = _measure_all(rle, size_hw)
        quality = np.array(predicted_iou, np.float32), np.array(stability, np.float32)
        return cls(size_hw, rle, box_xyxy, area_px, *quality)

    def to_rows(self) -> list[dict[str, Any]]:
        """Plain dicts, which `pa.array(rows, item_type)` takes; embeddings stay float16 arrays."""
        return [
            {
                "box_xyxy": self.box_xyxy[r].tolist(),
                "area_px": int(self.area_px[r]),
                "rle": self.rle[r],
                "predicted_iou": float(self.predicted_iou[r]),
                "stability": float(self.stability[r]),
                "embedding": None if self.embedding_RD is None else self.embedding_RD[r],
            }
            for r in range(len(self))
        ]

    def mask_HW(self, index: int) -> np.ndarray:
        """The mask of one segment, bool [H, W]."""
        return decode_mask(self.rle[index], self.size_hw)

    def masks_RHW(self) -> np.ndarray:
        """All masks, bool [R, H, W]: R bytes a pixel, so prefer `mask_HW` in a loop."""
        masks_RHW = np.empty((len(self), *self.size_hw), np.bool_)
        for r in range(len(self)):
            masks_RHW[r] = self.mask_HW(r)
        return masks_RHW

    def with_embedding(self, embedding_RD: np.ndarray) -> Segments:
        """A copy with embeddings, float [R, D], rounded to float16 as they are stored."""
        return dataclasses.replace(self, embedding_RD=np.asarray(embedding_RD).astype(np.float16))

    def select(self, index: Iterable[int] | np.ndarray) -> Segments:
        """A copy with some segments only, in the given order.

        Args:
            index: positions, or bool [R].
        """
        index_R = np.asarray(index)
        index_R = np.flatnonzero(index_R) if index_R.dtype == np.bool_ else index_R.astype(np.intp)
        return Segments(
            size_hw=self.size_hw,
            rle=[self.rle[r] for r in index_R],
            box_xyxy=self.box_xyxy[index_R],
            area_px=self.area_px[index_R],
            predicted_iou=self.predicted_iou[index_R],
            stability=self.stability[index_R],
            embedding_RD=None if self.embedding_RD is None else self.embedding_RD[index_R],
        )

    def resized(self, size_hw: tuple[int, int]) -> Segments:
        """The same segments on another pixel grid; boxes and areas are those of the new masks.

        Each new pixel takes the old one under its centre. A mask may vanish when shrunk: then its
        area is 0 and its box is 0, 0, 0, 0.

        Args:
            size_hw: new height and width.
        """
        if tuple(size_hw) == tuple(self.size_hw):
            return self
        row_H = _nearest(size_hw[0], self.size_hw[0])
        column_W = _nearest(size_hw[1], self.size_hw[1])
        # Transposed, because decoded masks are column-major.
        rle = [encode_mask(self.mask_HW(r).T[column_W][:, row_H].T) for r in range(len(self))]
        box_xyxy, area_px = _measure_all(rle, size_hw)
        return dataclasses.replace(
            self, size_hw=size_hw, rle=rle, box_xyxy=box_xyxy, area_px=area_px
        )


def rle_runs(rle: bytes, n_px: int) -> np.ndarray:
    """Read COCO's compressed counts.

    A count is written in groups of 5 bits, lowest first, a byte each, offset by 48; bit 6 says that
    more follow, the top bit of the last group is the sign. From the fourth count on, what is
    written is the difference from the count two before.

    Args:
        rle: compressed counts.
        n_px: height * width of the mask.

    Returns:
        int64 [N] run lengths in column-major order, background first; they add up to `n_px`.

    Raises:
        ValueError: bytes that are no such counts, or a mask of another size.
    """
    group = np.frombuffer(rle, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((group & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    legible = group.size > 0 and group.min() >= 0 and group.max() < 64
    if not legible or not last.size or last[-1] != group.size - 1 or (last - first).max() > 9:
        raise ValueError(complain("rle", "COCO compressed counts", rle[:24], "label again"))
    length = last - first + 1
    place = np.arange(group.size) - np.repeat(first, length)
    run_N = np.add.reduceat((group & 31) << (5 * place), first)
    run_N -= np.where(group[last] & 16, np.int64(1) << (5 * length), 0)
    run_N[1::2] = np.cumsum(run_N[1::2])
    run_N[2::2] = np.cumsum(run_N[2::2])
    # No run may exceed the image either: the sum of huge ones wraps around, and may be right.
    if run_N.min() < 0 or run_N.max() > n_px or run_N.sum() != n_px:
        got = f"counts from {run_N.min()} that add up to {run_N.sum()}"
        raise ValueError(complain("rle", f"runs of {n_px} pixels in all", got, "label again"))
    return run_N


def _measure_all(rle: Sequence[bytes], size_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes int32 [R, 4] and areas int64 [R] of masks, from their runs alone."""
    box_xyxy = np.zeros((len(rle), 4), np.int32)
    area_px = np.zeros(len(rle), np.int64)
    for r, counts in enumerate(rle):
        box_xyxy[r], area_px[r] = _measure(counts, *size_hw)
    return box_xyxy, area_px


@functools.lru_cache(4096)
def _measure(rle: bytes, height: int, width: int) -> tuple[tuple[int, int, int, int], int]:
    """Box and area of one mask; runs go down the columns.

    Remembered, because a record is checked again whenever it is copied with something added. The
    bytes decide the result, so a remembered one is as strict; some images' masks are kept.
    """
    start, end = _foreground(rle_runs(rle, height * width))
    if not end.size:
        return (0, 0, 0, 0), 0
    x0, x1 = int(start[0]) // height, (int(end[-1]) - 1) // height + 1
    top, bottom = start % height, (end - 1) % height + 1
    if (start // height != (end - 1) // height).any():  # a run that goes on in the next column
        return (x0, 0, x1, height), int((end - start).sum())
    return (x0, int(top.min()), x1, int(bottom.max())), int((end - start).sum())


def _foreground(run_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of the mask's runs in column-major order; empty ones are left out."""
    end = np.cumsum(run_N)[1::2]
    start = end - run_N[1::2]
    return start[end > start], end[end > start]


def encode_mask(mask_HW: np.ndarray) -> bytes:
    """COCO compressed counts of a mask, bool [H, W]."""
    counts = coco.encode(np.asfortranarray(mask_HW, dtype=np.uint8))["counts"]
    assert isinstance(counts, bytes), "what pycocotools makes before anyone turns it into JSON"
    return counts


def decode_mask(rle: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """The mask of COCO compressed counts, bool [H, W]; the counts must fit the size."""
    return coco.decode({"size": list(size_hw), "counts": rle}).view(np.bool_)


def _nearest(n_new: int, n_old: int) -> np.ndarray:
    """Old index under the centre of each new pixel, in whole numbers so that no rounding enters."""
    return (2 * np.arange(n_new) + 1) * n_old // (2 * n_new)


def _check_structs(structs: pa.StructArray | None, size_hw: tuple[int, int]) -> None:
    """Raise ValueError unless they are what `records.segments_schema` says, with nothing missing
    but embeddings, and those in all or none."""
    fix = "label again"
    if structs is None or None in size_hw:
        raise ValueError(complain("segments", "a list and a size", "nothing", fix))
    kind = structs.type
    theirs = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if not {field.name: field.type for field in SEGMENT}.items() <= theirs.items():
        raise ValueError(complain("segments", f"a list of {SEGMENT}", kind, fix))
    embedding = theirs.get("embedding")
    fixed = embedding if embedding and pa.types.is_fixed_size_list(embedding) else None
    if fixed is None or fixed.value_type != pa.float16():
        rule = "fixed_size_list of float16"
        raise ValueError(complain("embedding of segments", rule, embedding, fix))
    for name in theirs:
        column = structs.field(name)
        values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        missing = column.null_count or values.null_count
        if missing and not (name == "embedding" and column.null_count == len(column)):
            raise ValueError(complain(f"{name} of segments", "given", f"{missing} missing", fix))


def _check_array(name: str, array: np.ndarray, dtype: type, shape: tuple[int | None, ...]) -> None:
    fits = len(array.shape) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != dtype:
        wanted = f"{np.dtype(dtype)} [{', '.join('D' if s is None else str(s) for s in shape)}]"
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(complain(name, wanted, got, "give one entry per segment, of this dtype"))


def _numbers(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _fixed_lists(column: pa.Array) -> np.ndarray:
    """A column of lists of one length as a two-dimensional array."""
    length = column.type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, length)
