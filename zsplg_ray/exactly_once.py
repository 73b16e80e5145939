"""What is done in a run's folder, and the mending of what a crash has left there.

What enters: a run's folder (rundir). What leaves: the ids that are done, the ids that failed, and a
folder in which every image stands once. The valid Parquet parts are the only record of it:

- the last kind of part that a run writes for an image is its commit: of `label` that is
  `segments/X.parquet`, written after `labels/X.parquet`; of `predict`, which finds no segments, it
  is `labels/X.parquet` itself. `repair` removes a labels part without its commit, rows that stand
  twice, and errors of images done since;
- only ids are read for it, never segments or labels, and those of a part only as long as no index
  (part_index) knows them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from zsplg_ray.part_index import PartIndex
from zsplg_ray.rundir import COMMITS, KINDS, Kind, RunFolder, Verb
from zsplg_ray.safe_text import one_line

log = logging.getLogger(__name__)

_UNFINISHED = re.compile(r"_.+\.[0-9a-f]{32}")


@dataclass(frozen=True)
class Repaired:
    """What `repair` found."""

    done: set[str]
    """Ids of the images that are done."""
    failed: set[str]
    """Ids of the images that stand in errors/."""
    unlabelled: list[str]
    """Parts of segments/ whose labels are to be made."""


def repair(folder: RunFolder, verb: Verb = "label", index: PartIndex | None = None) -> Repaired:
    """Bring the folder to the state where every image stands once, and tell what is there.

    Args:
        folder: Which nobody else writes to.
        verb: Whose run it is.
        index: What is known of its parts, brought up to date here; by default the folder's own.
    """
    commit = COMMITS[verb]
    index = PartIndex.load(folder) if index is None else index
    _remove_unfinished(folder)
    parts = part_ids(folder, commit, index)
    labels = part_ids(folder, "labels", index) if commit != "labels" else {}
    for name in labels.keys() - parts.keys():
        folder.delete_part("labels", name)
    done: set[str] = set()
    for name in sorted(parts):
        ids = parts[name]
        fresh = _first_time(ids, done)
        if not all(fresh):
            log.warning("%s holds %d images twice: mended", name, fresh.count(False))
            if labels.get(name) == ids:
                _keep_rows(folder, "labels", name, labels, fresh, index)
            _keep_rows(folder, commit, name, parts, fresh, index)
        if name in labels and labels[name] != parts[name]:
            folder.delete_part("labels", name)  # half mended before: composed anew from segments
            del labels[name]
    failed = _repair_errors(folder, done.__contains__, index)
    index.save(folder)
    lost = (name for name in parts if name not in labels and parts[name])
    return Repaired(done, failed, sorted(lost) if commit != "labels" else [])


def forget_errors(
    folder: RunFolder, image_ids: Container[str], index: PartIndex | None = None
) -> None:
    """Drop the errors rows of images that are about to be tried again."""
    index = PartIndex.load(folder) if index is None else index
    _repair_errors(folder, image_ids.__contains__, index)


def anti_join(manifest: pa.Table, done: set[str]) -> pa.Table:
    """The rows of a manifest whose image_id is not in `done`."""
    if not done:
        return manifest
    missing = [image_id not in done for image_id in manifest["image_id"].to_pylist()]
    return manifest.filter(pa.array(missing, pa.bool_()))


def done_ids(folder: RunFolder, verb: Verb = "label") -> set[str]:
    """Ids of the images that are done in a run's folder; nothing is mended there."""
    parts = part_ids(folder, COMMITS[verb], PartIndex.load(folder), mend=False)
    return {image_id for ids in parts.values() for image_id in ids}


def part_ids(
    folder: RunFolder, kind: Kind, index: PartIndex | None = None, *, mend: bool = True
) -> dict[str, list[str]]:
    """Part name -> image ids, reading the id column only; unreadable parts are removed.

    Parts that `index` knows are not read; it is told of the others. `mend`: whether unreadable
    parts are removed rather than passed over.
    """

    def ids(name: str) -> list[str] | None:
        try:
            return folder.read_part(kind, name, ["image_id"])["image_id"].to_pylist()
        except (OSError, pa.ArrowInvalid) as e:
            torn = isinstance(e, pa.ArrowInvalid) or (folder.local and e.errno is None)
            if not torn:
                raise  # the storage failed, not the file
            if not mend:
                return None
            log.warning("%s/%s.parquet is not readable (%s): removed", kind, name, one_line(str(e)))
            folder.delete_part(kind, name)
            return None

    stamps = folder.listing(kind)
    known = index.match(kind, stamps) if index is not None else {}
    read = folder.map_parts(sorted(stamps.keys() - known.keys()), ids)
    found = {name: ids for name, ids in read.items() if ids is not None}
    if index is not None:
        for name, image_ids in found.items():
            index.note(kind, name, stamps[name], image_ids)
    return dict(sorted((known | found).items()))


def _remove_unfinished(folder: RunFolder) -> None:
    """Remove what a killed writer left on a disk; an object store has nothing unfinished."""
    if not folder.local:
        return
    for kind in (".", *KINDS):
        for left in Path(folder.path, kind).glob("_*"):
            if _UNFINISHED.fullmatch(left.name):
                left.unlink(missing_ok=True)


def _keep_rows(
    folder: RunFolder,
    kind: Kind,
    name: str,
    ids: dict[str, list[str]],
    keep: list[bool],
    index: PartIndex,
) -> None:
    """Drop rows of a part, in the file and in `ids`."""
    index.forget(kind, name)
    if any(keep):
        table = folder.read_part(kind, name).filter(pa.array(keep))
        folder.write_part(kind, name, table, folder.part_meta(kind, name))
    else:
        folder.delete_part(kind, name)
    ids[name] = [i for i, kept in zip(ids[name], keep, strict=True) if kept]


def _repair_errors(folder: RunFolder, drop: Callable[[str], bool], index: PartIndex) -> set[str]:
    """Drop errors rows that `drop` names or that stand twice; the ids that are left."""
    parts = part_ids(folder, "errors", index)
    kept: set[str] = set()
    changed: dict[str, list[bool]] = {}
    for name, ids in parts.items():
        wanted = [i for i in ids if not drop(i)]
        first = iter(_first_time(wanted, kept))
        keep = [not drop(i) and next(first) for i in ids]
        if not all(keep):
            changed[name] = keep

    def mend(name: str) -> None:
        _keep_rows(folder, "errors", name, parts, changed[name], index)

    folder.map_parts(list(changed), mend)  # there may be one for each image that has failed
    return kept


def _first_time(ids: Iterable[str], seen: set[str]) -> list[bool]:
    """Of each id whether it was not in `seen` yet; all are put there."""
    fresh = []
    for image_id in ids:
        fresh.append(image_id not in seen)
        seen.add(image_id)
    return fresh
