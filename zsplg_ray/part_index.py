"""Which ids stand in which part, as known from an earlier look, so that only new parts are read.

What enters: listings of a run's parts (size, time of the last change), and the ids of parts that
were read or written. What leaves: the ids of the parts that are still as they were. They are kept
in `_index.parquet`, a name that readers of Parquet skip.

It is a shortcut and never a record: the parts alone say what is done. An entry holds for a part of
the very size and time that it was noted with; without one, the part is read. A part is named after
its ids, so each entry is checked against its name, and of a part that was mended, whose rows are no
longer those of its name, nothing is kept. So an index may be deleted, torn, old or of another
folder at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from zsplg_ray.rundir import Kind, RunFolder, Stamp, part_name

log = logging.getLogger(__name__)

NAME = "_index.parquet"
KINDS: tuple[Kind, ...] = ("segments", "labels", "errors")
"""Kinds of parts that ids are read from."""
WORTH = 200
"""Parts that were noted or lost since the index was written, to write it again."""
SETTLED_NS = 3 * 10**9
"""Parts that changed less than this before the newest one are not saved: storage tells time
coarsely (an object store in seconds), so a later change might bear the same time."""

_STAMPS = [(f"{kind}_{what}", pa.int64()) for kind in KINDS for what in ("size", "mtime_ns")]
SCHEMA = pa.schema([("name", pa.string()), ("image_ids", pa.list_(pa.string())), *_STAMPS])
"""One row a name: its ids, and size and time of the part of each kind that there is."""


class Written(NamedTuple):
    """A part as whoever wrote it tells of it."""

    kind: Kind
    name: str
    size: int
    """Bytes of the file."""
    image_ids: list[str]


class PartIndex:
    """What is known of a folder's parts; it grows as parts are read and written."""

    def __init__(self) -> None:
        self._ids: dict[str, list[str]] = {}
        self._stamps: dict[Kind, dict[str, Stamp]] = {kind: {} for kind in KINDS}
        self._changes = 0
        self._newest = 0  # time of the last change that a listing told of

    @classmethod
    def load(cls, folder: RunFolder) -> PartIndex:
        """The index of a folder; one that cannot be understood is as good as none."""
        index = cls()
        try:
            data = folder.read_bytes(NAME)
            if data is not None:
                index._fill(pq.read_table(pa.BufferReader(data)))
        except (OSError, pa.ArrowException, UnicodeDecodeError) as e:
            log.info("%s of %s is not readable (%s): parts are read", NAME, folder.uri, e)
            return cls()
        return index

    def match(self, kind: Kind, listing: Mapping[str, Stamp]) -> dict[str, list[str]]:
        """Part name -> ids, for the parts of a listing that are known; others are forgotten."""
        times = (stamp.mtime_ns or 0 for stamp in listing.values())
        self._newest = max(self._newest, *times, 0)
        known = self._stamps[kind]
        for name in known.keys() - listing.keys():
            self.forget(kind, name)
        found = {}
        for name, stamp in listing.items():
            noted = known.get(name)
            if noted is None or stamp.mtime_ns is None or stamp.size != noted.size:
                continue
            if noted.mtime_ns is None:  # told by its writer: now its time is seen
                known[name] = stamp
            elif noted != stamp:
                continue
            found[name] = self._ids[name]
        return found

    def note(self, kind: Kind, name: str, stamp: Stamp, image_ids: list[str]) -> None:
        """A part of that size and time holds these ids."""
        if not _whole(name, image_ids):
            self.forget(kind, name)
            return
        self._ids.setdefault(name, image_ids)
        self._stamps[kind][name] = stamp
        self._changes += 1

    def tell(self, written: Iterable[Written]) -> None:
        """Parts were written; each counts as known as soon as a listing shows it in that size."""
        for part in written:
            self.note(part.kind, part.name, Stamp(part.size, None), part.image_ids)

    def forget(self, kind: Kind, name: str) -> None:
        """A part is gone or has changed."""
        if self._stamps[kind].pop(name, None) is not None:
            self._changes += 1

    def save(self, folder: RunFolder, *, look: bool = False) -> None:
        """Write the index where it is worth it; a storage that fails costs no more than time.

        `look`: whether to look first which of the parts that were told of are there.
        """
        if self._changes < WORTH:
            return
        sink = pa.BufferOutputStream()
        try:
            for kind in KINDS if look else ():
                self.match(kind, folder.listing(kind))
            pq.write_table(self._table(), sink, compression="zstd", use_dictionary=False)
            folder.write_bytes(NAME, sink.getvalue())
        except (OSError, pa.ArrowException) as e:
            log.info("%s of %s was not written: %s", NAME, folder.uri, e)
            return
        self._changes = 0

    def _table(self) -> pa.Table:
        """Rows of `SCHEMA`, of the parts whose time is known and that have settled."""
        settled = self._newest - SETTLED_NS
        lasting = {
            kind: {
                n: s for n, s in known.items() if s.mtime_ns is not None and s.mtime_ns < settled
            }
            for kind, known in self._stamps.items()
        }
        names = sorted(set().union(*lasting.values()))
        columns: dict[str, list[Any]] = {"name": names, "image_ids": [self._ids[n] for n in names]}
        for kind, stamps in lasting.items():
            found = [stamps.get(name) for name in names]
            columns[f"{kind}_size"] = [stamp and stamp.size for stamp in found]
            columns[f"{kind}_mtime_ns"] = [stamp and stamp.mtime_ns for stamp in found]
        return pa.table(columns, schema=SCHEMA)

    def _fill(self, table: pa.Table) -> None:
        """Take over the rows that hold what their name says."""
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowInvalid("another schema")
        names = table["name"].to_pylist()
        for name, ids in zip(names, table["image_ids"].to_pylist(), strict=True):
            if ids is not None and _whole(name, ids):
                self._ids[name] = ids
        for kind in KINDS:
            stamps = (table[f"{kind}_{what}"].to_pylist() for what in ("size", "mtime_ns"))
            for name, size, mtime_ns in zip(names, *stamps, strict=True):
                if name in self._ids and size is not None and mtime_ns is not None:
                    self._stamps[kind][name] = Stamp(size, mtime_ns)


def _whole(name: str, image_ids: list[str]) -> bool:
    """Whether these are the ids that a part of that name was made of, all of them."""
    return None not in image_ids and part_name(image_ids) == name
