"""A run's folder: Parquet parts and run.json, on a disk or an object store.

What enters: Arrow tables of one schema of records.py each. What leaves: parts, and what stands in
them. What makes labelling exactly-once (see exactly_once) rests on this:

- a part appears whole or not at all (written under a hidden name and renamed, or put in one go on
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
from typing import Any, Literal, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key

log = logging.getLogger(__name__)

Kind = Literal["segments", "labels", "errors", "regions"]
KINDS: tuple[Kind, ...] = ("segments", "labels", "errors", "regions")
"""What parts hold; `regions` are a cache beside segments of the same names, and may be deleted."""
Verb = Literal["label", "predict"]
COMMITS: dict[Verb, Kind] = {"label": "segments", "predict": "labels"}
"""Which kind of part says that an image is done, by the verb that makes the run."""
META = b"zsplg_ray"
_PART = re.compile(r"(part-[0-9a-f]{20})\.parquet")
T = TypeVar("T")


def part_name(image_ids: Iterable[str]) -> str:
    """Name of the part that holds these images; the same ids in the same order give the same."""
    digest = hashlib.sha256()
    for image_id in image_ids:
        digest.update(image_id.encode("utf-8", "surrogatepass") + b"\0")
    return f"part-{digest.hexdigest()[:20]}"


class RunFolder:
    """One run's folder on a local disk or any pyarrow file system; cheap to make and to pickle."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        if "://" in uri:
            try:
                self.fs, self.path = pafs.FileSystem.from_uri(uri)
            except (ValueError, pa.ArrowException) as e:
                fix = f"use a folder or an s3://, gs:// address ({e})"
                raise ValueError(complain("out", "a folder or URI", uri, fix)) from e
        else:
            path = Path(uri).expanduser() if uri.startswith("~/") else Path(uri)
            self.fs, self.path = pafs.LocalFileSystem(), str(path.absolute())
        self.path = self.path.rstrip("/") or "/"
        self.local = isinstance(self.fs, pafs.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        # Absolute: another process may have another working directory.
        return RunFolder, (self.path if "://" not in self.uri else self.uri,)

    # One file --------------------------------------------------------------------------------

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Put a file into the folder; it appears whole or not at all."""
        target = f"{self.path}/{name}"
        parent, _, base = target.rpartition("/")
        if not self.local:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
            return
        hidden = f"{parent}/_{base}.{uuid.uuid4().hex}"
        self.fs.create_dir(parent, recursive=True)
        try:
            with Path(hidden).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # else a power cut may leave a whole name and no content
            Path(hidden).replace(target)
        except BaseException:
            Path(hidden).unlink(missing_ok=True)
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
        except ValueError as e:
            raise ValueError(complain(name, "valid JSON", where, fix)) from e
        if not isinstance(run, dict) or not all(key in run for key in keys):
            raise ValueError(complain(name, f"a run's, with {', '.join(keys)}", where, fix))
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
        selector = pafs.FileSelector(f"{self.path}/{kind}", allow_not_found=True)
        names = (_PART.fullmatch(i.base_name) for i in self.fs.get_file_info(selector) if i.is_file)
        return sorted(name.group(1) for name in names if name)

    def write_part(self, kind: Kind, name: str, table: pa.Table, meta: Mapping[str, Any]) -> None:
        """Write one part; `meta` (fingerprints, class list) goes into its schema metadata."""
        text = json.dumps(meta, ensure_ascii=False).encode()
        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({META: text}),
            sink,
            compression="zstd",
            use_dictionary=False,
        )
        self.write_bytes(f"{kind}/{name}.parquet", sink.getvalue())

    def read_part(self, kind: Kind, name: str, columns: list[str] | None = None) -> pa.Table:
        """One part as a table. Raises: OSError, pa.ArrowException if it cannot be read."""
        with self.fs.open_input_file(f"{self.path}/{kind}/{name}.parquet") as stream:
            return pq.read_table(stream, columns=columns)

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
                found.by_uri.setdefault(uri, (name, row))
                found.by_key.setdefault(image_key(image_id), (name, row))
        return found

    def part_meta(self, kind: Kind, name: str) -> dict[str, Any]:
        """The metadata that `write_part` was given."""
        with self.fs.open_input_file(f"{self.path}/{kind}/{name}.parquet") as stream:
            metadata = pq.read_schema(stream).metadata or {}
        return json.loads(metadata.get(META, b"{}"))

    def delete_part(self, kind: Kind, name: str) -> None:
        """Remove one part; no error if it is gone already."""
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


class LabelPlaces(NamedTuple):
    """Part and row of labels, by the image's address and by its id without suffix."""

    by_uri: dict[str, tuple[str, int]]
    by_key: dict[str, tuple[str, int]]

    def of(self, image_id: str, uri: str | None) -> tuple[str, int] | None:
        """Where an image's label is: by its address, else by its id, for sources are listed in
        more than one way.
        """
        return self.by_uri.get(uri or "") or self.by_key.get(image_key(image_id))
