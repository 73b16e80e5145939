"""The folder of corrected labels: rows by image, each once, whatever is imported how often.

What enters: rows of records.LABELS. What leaves: labels/ parts, errors/ of the last import and
run.json; a run's folder for all that reads one.

Why this way: an image's row stands in the one of `SHARDS` parts that its id says, and a part is
replaced whole (rundir.write_bytes). So an image can never stand twice, a killed import has replaced
some parts and not touched the others, and the same command again ends where one run would have.
A part that would stay the same is not written.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from zsplg_ray.records import ERRORS, IGNORE, LABELS, encode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain, fingerprint
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)

VERB = "review import"
"""What run.json names as the verb that made the folder."""
SHARDS = 64
CORRECTED = "corrected"
"""`source` of the rows."""


@dataclass(frozen=True)
class Change:
    """What became of the rows that were put."""

    added: int
    replaced: int
    same: int
    """Rows that stood there already, exactly so."""
    removed: int
    """Rows that stood there and are to stand there no more."""


def shard_of(image_id: str) -> str:
    """Name of the part that an image's row stands in."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    return f"part-{digest[0] % SHARDS:020x}"


def row_of(image: Mapping[str, Any], label_HW: np.ndarray, n_classes: int) -> dict[str, Any]:
    """A row of records.LABELS: score 1 where there is a label.

    Args:
        image: image_id, uri, width and height, as the run has them.
        label_HW: uint8 [H, W], class indices, 255 = none.
        n_classes: K.
    """
    named_HW = label_HW != IGNORE
    return {
        **{name: image[name] for name in ("image_id", "uri", "width", "height")},
        "label_png": encode_png(label_HW),
        "score_png": encode_png(np.where(named_HW, 255, 0)),
        "class_px": np.bincount(label_HW[named_HW], minlength=n_classes).tolist(),
        "source": CORRECTED,
        "confidence": 1.0 if named_HW.any() else float("nan"),
    }


def check_folder(folder: RunFolder, classes: ClassList) -> None:
    """Raise ValueError unless the folder is empty or one of corrections with these classes."""
    fix = "give another --out"
    run = folder.read_run()
    if run is not None and run.get("verb") != VERB:
        shown = f"one of `zsplg {run.get('verb', 'label')}`"
        raise ValueError(complain("out", f"a folder of `zsplg {VERB}`", shown, fix))
    parts = folder.parts("labels")
    shards = {f"part-{i:020x}" for i in range(SHARDS)}
    if folder.parts("segments") or not shards.issuperset(parts):
        raise ValueError(complain("out", f"a folder of `zsplg {VERB}`", "one of a run", fix))
    for theirs in (run, folder.part_meta("labels", parts[0]) if parts else None):
        if theirs is not None and theirs.get("classes", {}).get("names") != list(classes.names):
            shown = f"those of {folder.uri}, which are others"
            raise ValueError(complain("classes", "those of the run", shown, fix))


def put_rows(
    folder: RunFolder,
    image_ids: Iterable[str],
    make: Callable[[str], dict[str, Any] | Literal["none"] | None],
    meta: Mapping[str, Any],
) -> Change:
    """Write rows, part by part.

    Args:
        folder: Checked by `check_folder`.
        image_ids: Whose rows to make.
        make: The row of one of them; "none" if none is to stand there; None if it cannot be made:
            then what stands there stays.
        meta: The parts' metadata.
    """
    by_part: dict[str, list[str]] = defaultdict(list)
    for image_id in image_ids:
        by_part[shard_of(image_id)].append(image_id)
    there = set(folder.parts("labels"))
    added = replaced = same = removed = 0
    for part, ids in sorted(by_part.items()):
        made = {image_id: make(image_id) for image_id in ids}
        rows = [row for row in made.values() if isinstance(row, dict)]
        gone = {image_id for image_id, row in made.items() if row == "none"}
        if not rows and not (gone and part in there):
            continue
        before = folder.read_part("labels", part, LABELS.names) if part in there else None
        old = {row["image_id"]: row for row in before.to_pylist()} if before is not None else {}
        for row in rows:
            known = old.get(row["image_id"])
            same += known is not None and _alike(known, row)
            replaced += known is not None and not _alike(known, row)
            added += known is None
        removed += len(gone & old.keys())
        merged = {i: row for i, row in old.items() if i not in gone}
        merged |= {row["image_id"]: row for row in rows}
        if not merged:
            folder.delete_part("labels", part)
            continue
        table = pa.Table.from_pylist([merged[i] for i in sorted(merged)], schema=LABELS)
        if before is None or not _equal(before, table):
            folder.write_part("labels", part, table, meta)
    return Change(added, replaced, same, removed)


def put_errors(
    folder: RunFolder, errors: Sequence[tuple[str, str]], meta: Mapping[str, Any]
) -> None:
    """Replace what errors/ tells by the failures of this import."""
    name = f"part-{0:020x}"
    if not errors:
        folder.delete_part("errors", name)
        return
    rows = [
        {"image_id": i, "uri": None, "stage": VERB, "error": told, "detail": None}
        for i, told in errors
    ]
    folder.write_part("errors", name, pa.Table.from_pylist(rows, schema=ERRORS), meta)


def content_fingerprint(folder: RunFolder, classes: ClassList) -> str:
    """Fingerprint of all corrected masks that stand in a folder."""
    digests: dict[str, str] = {}
    for part in folder.parts("labels"):
        table = folder.read_part("labels", part, ["image_id", "label_png"])
        rows = zip(table["image_id"].to_pylist(), table["label_png"].to_pylist(), strict=True)
        digests |= {i: hashlib.sha256(png or b"").hexdigest() for i, png in rows}
    return fingerprint({"corrected": sorted(digests.items()), "classes": classes.to_dict()})


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows say the same; nan is nan."""
    return all(one[n] == other[n] for n in LABELS.names if n != "confidence")


def _equal(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables hold the same rows in the same order."""
    rows = zip(one.to_pylist(), other.to_pylist(), strict=False)
    return len(one) == len(other) and all(_alike(a, b) for a, b in rows)
