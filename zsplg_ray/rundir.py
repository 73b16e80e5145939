"""A run's folder: Parquet parts and run.json, on a disk or an object store.

What enters: Arrow tables of one schema of records.py each. What leaves: parts, and what stands in
them. What makes labelling exactly-once (see exactly_once) rests on this:

- a part appears whole or not at all (written under a hidden name and renamed, or put in one go in
  an object store), and names starting with `_` or `.` are skipped by every Parquet reader;
- a part is named after its ids, so that a task run twice writes the same file twice.

No step needs a rename of something that others read, so all of it holds on s3:// and gs:// too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from zsplg_ray.filesystems import Store
from zsplg_ray.part_check import check_columns
from zsplg_ray.safe_text import without_credentials
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key
from zsplg_ray.storage import Place

log = logging.getLogger(__name__)

Kind = Literal["segments", "labels", "errors", "regions"]
KINDS: tuple[Kind, ...] = ("segments", "labels", "errors", "regions")
"""What parts hold; `regions` are a cache beside segments of the same names, and may be deleted."""
Verb = Literal["label", "predict"]
COMMITS: dict[Verb, Kind] = {"label": "segments", "predict": "labels"}
"""Which kind of part says that an image is done, by the verb that makes the run."""
META = b"zsplg_ray"
_PART = re.compile(r"(part-[0-9a-f]{20})\.parquet")
_RECORDED: dict[str, type] = {
    **dict.fromkeys(("config", "resolved", "classes", "weights", "data", "schedule"), dict),
    **dict.fromkeys(("history", "trials"), list),
    "verb": str,
}
"""Of what kind entries of records are, as far as all that read them rest on it."""
T = TypeVar("T")


def part_name(image_ids: Iterable[str]) -> str:
    """Name of the part that holds these images; the same ids in the same order give the same."""
    digest = hashlib.sha256()
    for image_id in image_ids:
        digest.update(image_id.encode("utf-8", "surrogatepass") + b"\0")
    return f"part-{digest.hexdigest()[:20]}"


def encode_part(table: pa.Table, meta: Mapping[str, Any]) -> pa.Buffer:
    """The bytes of a part; `meta` (fingerprints, class list) goes into its schema metadata."""
    text = json.dumps(meta, ensure_ascii=False).encode()
    sink = pa.BufferOutputStream()
    # Of a PNG the least and the largest would stand in the file once more, whole.
    plain = [f for f in table.schema if not (f.type == pa.binary() or pa.types.is_nested(f.type))]
    statistics: Any = [f.name for f in plain]  # its type stub knows of True and False only
    pq.write_table(
        table.replace_schema_metadata({META: text}),
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=statistics,
    )
    return sink.getvalue()


class Guard(Protocol):
    """What stands before a folder that several runs may want."""

    def check(self) -> None:
        """Return if the folder is still ours. Raises: WorkError if it is not."""
        ...


class RunFolder:
    """One run's folder on a local disk or any pyarrow file system; cheap to make and to pickle.

    Args:
        uri: Its path or address.
        guard: Asked before anything is written or removed, here and in copies in other processes.
    """

    def __init__(self, uri: str, guard: Guard | None = None) -> None:
        self.uri, self.guard = uri, guard
        self.fs, path = Place.parse(uri).opened()
        self.path = path.rstrip("/") or "/"
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def plain_fs(self) -> pafs.FileSystem:
        """The same as a file system of pyarrow's own, which tries for 6 s at most."""
        return self.fs.plain if isinstance(self.fs, Store) else self.fs

    def __reduce__(self) -> tuple[Any, ...]:
        # Absolute: another process may have another working directory.
        return RunFolder, (self.path if "://" not in self.uri else self.uri, self.guard)

    # One file --------------------------------------------------------------------------------

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Put a file into the folder; it appears whole or not at all.

        Raises: WorkError if the folder is another run's by now.
        """
        if self.guard is not None:
            self.guard.check()
        target = f"{self.path}/{name}"
        parent, _, base = target.rpartition("/")
        if isinstance(self.fs, Store):
            self.fs.put(target, data)
            return
        hidden = f"{parent}/_{base}.{uuid.uuid4().hex}"
        self.fs.create_dir(parent, recursive=True)
        try:
            with Path(hidden).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # else a power cut may leave a whole name and no content
            Path(hidden).replace(target)
        except BaseException as e:
            Path(hidden).unlink(missing_ok=True)
            if isinstance(e, OSError) and e.filename is None:
                e.filename = target  # a full disk does not say what it had no room for
            raise

    def read_bytes(self, name: str) -> bytes | None:
        """The file's bytes, or None if there is no such file."""
        try:
            with self.fs.open_input_file(f"{self.path}/{name}") as stream:
                return stream.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_run(self) -> dict[str, Any] | None:
        """The content of run.json, or None if the folder holds no run yet.

        Raises: ValueError if there is a run.json that no run has written.
        """
        keys = ("config", "resolved", "classes", "weights", "labels_state")
        return self.read_record("run.json", keys, "restore it, or use another folder")

    def read_record(self, name: str, keys: tuple[str, ...], fix: str) -> dict[str, Any] | None:
        """The mapping in a JSON file that a run has written, or None if there is no such file.

        Raises: ValueError, ending in `fix`, if it is no JSON or lacks one of `keys`.
        """
        data = self.read_bytes(name)
        if data is None:
            return None
        where = f"{self.uri}/{name}"
        try:
            run = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise ValueError(complain(name, "valid JSON", where, fix)) from e
        if not isinstance(run, dict) or not all(key in run for key in keys):
            raise ValueError(complain(name, f"a run's, with {', '.join(keys)}", where, fix))
        for key, kind in _RECORDED.items():
            if not isinstance(run.get(key, kind()), kind):
                shown = f"{type(run[key]).__name__} in {where}"
                raise ValueError(complain(f"{key} in {name}", f"a {kind.__name__}", shown, fix))
        return run

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace run.json."""
        self.write_bytes(
            "run.json", (json.dumps(run, indent=1, ensure_ascii=False) + "\n").encode()
        )

    def label_settings(self) -> dict[str, Any]:
        """Dotted prompts.* and compose.* settings that the labels here were asked for with.

        Raises: ValueError if the folder holds no run, or one without segments.
        """
        run = self.read_run()
        fix = "give the folder of a `zsplg label --out` run"
        if run is None:
            raise ValueError(complain("run", "a run's folder (with run.json)", self.uri, fix))
        if (verb := made_by(run)) != "label":
            rule = "a run with segments, which labels can be composed from"
            raise ValueError(complain("run", rule, f"{self.uri} of `zsplg {verb}`", fix))
        return {k: v for k, v in run["config"].items() if k.startswith(("prompts.", "compose."))}

    # Parts -----------------------------------------------------------------------------------

    def parts(self, kind: Kind) -> list[str]:
        """Names of the parts of one kind, sorted; other files in the folder are left alone."""
        return sorted(self.listing(kind))

    def listing(self, kind: Kind) -> dict[str, Stamp]:
        """Name -> stamp of the parts of one kind; no part is opened for it."""
        selector = pafs.FileSelector(f"{self.path}/{kind}", allow_not_found=True)
        files = (i for i in self.fs.get_file_info(selector) if i.is_file)
        named = ((_PART.fullmatch(i.base_name), i) for i in files)
        return {name.group(1): Stamp(i.size, i.mtime_ns) for name, i in named if name}

    def write_part(self, kind: Kind, name: str, table: pa.Table, meta: Mapping[str, Any]) -> int:
        """Write one part; `meta` (fingerprints, class list) goes into its schema metadata.

        Returns the file's bytes.
        """
        data = encode_part(table, meta)
        self.write_bytes(f"{kind}/{name}.parquet", data)
        return data.size

    def read_part(self, kind: Kind, name: str, columns: list[str] | None = None) -> pa.Table:
        """One part as a table.

        Raises: OSError, pa.ArrowException if it cannot be read; ValueError if no run wrote it.
        """
        where = f"{self.uri}/{kind}/{name}.parquet"
        with self.fs.open_input_file(f"{self.path}/{kind}/{name}.parquet") as stream:
            try:
                table = pq.read_table(stream, columns=columns)
            except pa.ArrowInvalid:  # torn, or whole but without such columns
                check_columns(pq.read_schema(stream).empty_table(), columns, where)
                raise
        check_columns(table, columns, where)
        return table

    def read(self, kind: Kind, columns: list[str] | None = None) -> pa.Table | None:
        """All parts of one kind as one table, or None if there are none."""
        tables = self.map_parts(self.parts(kind), lambda name: self.read_part(kind, name, columns))
        return pa.concat_tables(tables.values()) if tables else None

    def find_labels(self, parts: list[str]) -> LabelPlaces:
        """Where each image's label stands in some parts of labels/; of several the first.

        Raises: OSError, pa.ArrowException if a part cannot be read.
        """
        found = LabelPlaces({}, {})
        columns = ["image_id", "uri"]
        rows = self.map_parts(parts, lambda n: self.read_part("labels", n, columns).to_pydict())
        for name, part in rows.items():
            for row, (image_id, uri) in enumerate(zip(*(part[c] for c in columns), strict=True)):
                if uri is not None:
                    found.by_uri.setdefault(without_credentials(uri), (name, row))
                found.by_key.setdefault(image_key(image_id), (name, row))
        return found

    def part_meta(self, kind: Kind, name: str) -> dict[str, Any]:
        """The metadata that `write_part` was given."""
        with self.fs.open_input_file(f"{self.path}/{kind}/{name}.parquet") as stream:
            metadata = pq.read_schema(stream).metadata or {}
        try:
            meta = json.loads(metadata.get(META, b"{}"))
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            where, fix = (
                f"{self.uri}/{kind}/{name}.parquet",
                "no run has written that: take it away",
            )
            raise ValueError(complain("metadata of a part", "a JSON mapping", where, fix))
        return meta

    def delete_part(self, kind: Kind, name: str) -> None:
        """Remove one part; no error if it is gone already."""
        if self.guard is not None:
            self.guard.check()
        try:
            self.fs.delete_file(f"{self.path}/{kind}/{name}.parquet")
        except FileNotFoundError:
            log.debug("%s/%s was gone already", kind, name)

    def map_parts(self, names: list[str], read: Callable[[str], T]) -> dict[str, T]:
        """`read` of every part, 16 at a time (object stores answer slowly, but many at once)."""
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(names, pool.map(read, names), strict=True))


def made_by(run: Mapping[str, Any]) -> Verb:
    """The verb that made a run, by its run.json; the first runs, all of `label`, do not say it."""
    return run.get("verb", "label")


class Stamp(NamedTuple):
    """What a listing tells of a file: another stamp means another content."""

    size: int
    """Bytes."""
    mtime_ns: int | None
    """Time of the last change, by the storage's clock; None where it tells none."""


class LabelPlaces(NamedTuple):
    """Part and row of labels, by the image's address and by its id without suffix."""

    by_uri: dict[str, tuple[str, int]]
    by_key: dict[str, tuple[str, int]]

    def of(self, image_id: str, uri: str | None) -> tuple[str, int] | None:
        """Where an image's label is: by its address, else by its id, for sources are listed in
        more than one way.
        """
        address = without_credentials(uri or "")  # as it is stored
        return self.by_uri.get(address) or self.by_key.get(image_key(image_id))
