"""Files and folders by address, on this machine or in an object store.

Enters: what a user writes (a path, `file:///...`, `s3://bucket/key?endpoint_override=...`, `gs://...`).
Leaves: a `Place`, which can be walked and read; its `uri`, by which any process reads it again with
`read_bytes`; and addresses of single cells of a Parquet file.

Why this way: a local file's uri is its absolute path as it is, so names with blanks, '#', '%' or a
newline need no care. Only addresses with a scheme are percent-encoded, and they keep their options
after the '?', so that a worker elsewhere needs nothing but the uri. Credentials written into an
address stay in it while a command runs, but not in what it writes: whoever follows a stored address
uses those of the environment, where they are better kept anyway. Images that lie inside a Parquet
file are addressed by row (`parquet+file:///data/a.parquet#row=12`, and `&column=NAME` if the column
is not `bytes`), so that a list of a million images stays small.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from zsplg_ray.filesystems import Store, open_store
from zsplg_ray.safe_text import is_slashed, masked
from zsplg_ray.settings import complain

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PARQUET = "parquet+"
_ROW = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Place:
    """A file or a folder.

    `path` is an absolute local path; or, if `prefix` (such as `s3://bucket`) is there, what comes
    after it, decoded and without a leading slash. `query` holds the options of the store.
    """

    path: str
    prefix: str = ""
    query: str = ""

    @classmethod
    def parse(cls, src: str) -> Place:
        """The place that a path or an address names; nothing is opened.

        Raises: ValueError if its credentials are written so that the host cannot be found.
        """
        if not is_address(src):
            path = Path(src).expanduser() if src.startswith("~/") else Path(src)
            return cls(str(path.absolute()))
        if is_slashed(src) and not src.lower().startswith("file:"):
            # Now, for once its parts are quoted and apart, no message would know the secret.
            fix = "write it so, or give the credentials in the environment"
            rule = "one whose secret has each / written as %2F"
            raise ValueError(complain("address", rule, masked(src), fix))
        # A blank or a bracket in an address is meant as such; '%', '?' and '#' have their meaning.
        parts = urlsplit(quote(src, safe="/%:?#=&@+,;*[]!$'()~"))
        if parts.scheme == "file":
            return cls(unquote(parts.path))
        path = unquote(parts.path).strip("/")
        return cls(path, f"{parts.scheme}://{parts.netloc}", parts.query)

    @property
    def uri(self) -> str:
        """The address that `parse` turns into this place again."""
        if not self.prefix:
            return self.path
        return f"{self.prefix}/{quote(self.path)}" + (f"?{self.query}" if self.query else "")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        """The ending of the name, in lower case, with its dot."""
        return PurePosixPath(self.path).suffix.lower()

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        parent = str(PurePosixPath(self.path).parent)
        return replace(self, path="" if self.prefix and parent == "." else parent)

    def child(self, relative: str) -> Place:
        """What `relative` names from here: a path below, an absolute local path or an address."""
        if is_address(relative) or relative.startswith("/"):
            return Place.parse(relative)
        base = self.path.rstrip("/")
        return replace(self, path=f"{base}/{relative}" if base or not self.prefix else relative)

    def kind(self) -> str | None:
        """ "file", "folder", or None if there is nothing."""
        if not self.prefix:
            try:
                mode = Path(self.path).stat().st_mode
            except (OSError, ValueError):
                return None
            return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else None
        fs, path = self.opened()
        kinds = {pafs.FileType.File: "file", pafs.FileType.Directory: "folder"}
        return kinds.get(fs.get_file_info([path])[0].type)

    def walk(self) -> list[str]:
        """The paths, relative to this folder, of all files below it that are not hidden; sorted.

        Links are followed, but never into a folder that they lie in themselves.
        """
        if not self.prefix:
            return sorted(_walk_local(Path(self.path), "", frozenset()))
        fs, path = self.opened()
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True))
        below = (i.path[len(path) :].strip("/") for i in infos if i.type == pafs.FileType.File)
        return sorted(p for p in below if not any(part.startswith(".") for part in p.split("/")))

    def read(self) -> bytes:
        """The content. Raises: FileNotFoundError if it has vanished."""
        if not self.prefix:
            mode = Path(self.path).stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a device may have no end
                raise OSError(errno.EINVAL, "neither a file nor a folder", self.path)
            return Path(self.path).read_bytes()
        with self.open() as file:
            return file.read()

    def open(self) -> pa.NativeFile:
        """The file, for reading at any position."""
        if not self.prefix:
            return pa.OSFile(self.path, "rb")
        fs, path = self.opened()
        return fs.open_input_file(path)

    def stamp(self) -> tuple[int, int]:
        """Size and time of the last change: another pair means another content."""
        if not self.prefix:
            status = Path(self.path).stat()
            return status.st_size, status.st_mtime_ns
        fs, path = self.opened()
        info = fs.get_file_info([path])[0]
        return info.size or 0, info.mtime_ns or 0

    def opened(self) -> tuple[pafs.LocalFileSystem | Store, str]:
        """The file system that it lies in, and its path there.

        Raises: filesystems.BadAddress, a ValueError, if there is no such store.
        """
        if not self.prefix:
            return pafs.LocalFileSystem(), self.path
        store = open_store(self.prefix, self.query)
        return store, f"{store.root}/{self.path}".rstrip("/") if store.root else self.path


def is_address(text: str) -> bool:
    """Whether it starts with a scheme (`s3://`), so is no path."""
    return _SCHEME.match(text) is not None


def cache_dir() -> Path:
    """Where downloads are kept: $ZSPLG_CACHE, else $XDG_CACHE_HOME/zsplg_ray, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("ZSPLG_CACHE") or f"{base}/zsplg_ray")


def read_bytes(uri: str) -> bytes:
    """The bytes behind a uri: of a file, or of one cell of a Parquet file.

    Reading cells in the order of their rows is fast, for the last row groups are kept.

    Raises:
        FileNotFoundError: the file has vanished.
        ValueError: the address cannot be understood, or the cell is not there or empty.
    """
    if not uri.startswith(_PARQUET):
        return Place.parse(uri).read()
    address, _, fragment = uri.removeprefix(_PARQUET).partition("#")
    place, options = Place.parse(address), parse_qs(fragment)
    row = options.get("row", [""])[0]
    column = options.get("column", ["bytes"])[0]
    try:
        cell = _cell(place, column, int(row)) if _ROW.fullmatch(row) else None
    except (pa.ArrowException, KeyError, IndexError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or place.prefix):
            raise  # the storage failed, not the file
        fix = f"list the source again ({' '.join(str(error).split())})"
        raise ValueError(complain("uri", "that of a cell that can be read", uri, fix)) from error
    if not isinstance(cell, bytes):
        fix = "list the source again"
        raise ValueError(complain("uri", "that of a cell that holds bytes", uri, fix))
    return cell


def cell_uris(place: Place, column: str, rows: int) -> list[str]:
    """The uris of the first `rows` cells of a column of a Parquet file, for `read_bytes`."""
    head, tail = _around_row(place, column)
    return [f"{head}{row}{tail}" for row in range(rows)]


def cell_uri(place: Place, column: str, row: int) -> str:
    """The uri of one cell of a column of a Parquet file, for `read_bytes`."""
    head, tail = _around_row(place, column)
    return f"{head}{row}{tail}"


def _around_row(place: Place, column: str) -> tuple[str, str]:
    """What stands before and behind the row's number in a cell's uri."""
    address = place.uri if place.prefix else f"file://{quote(place.path)}"
    field = "" if column == "bytes" else "&" + urlencode({"column": column})
    return f"{_PARQUET}{address}#row=", field


def _cell(place: Place, column: str, row: int) -> Any:
    """One value of a Parquet file, None if it has no such row."""
    stamp = place.stamp()
    starts = _group_starts(place, stamp)
    group = bisect_right(starts, row) - 1
    if row >= starts[-1]:
        return None
    return _cells(place, stamp, column, group)[row - starts[group]].as_py()


@lru_cache(maxsize=64)
def _group_starts(place: Place, stamp: tuple[int, int]) -> tuple[int, ...]:
    """The number of the first row of each row group, and at the end the number of all rows."""
    with place.open() as source, pq.ParquetFile(source) as file:
        meta = file.metadata
        lengths = (meta.row_group(group).num_rows for group in range(meta.num_row_groups))
        return tuple(accumulate(lengths, initial=0))


@lru_cache(maxsize=2)
def _cells(place: Place, stamp: tuple[int, int], column: str, group: int) -> pa.ChunkedArray:
    """One column of one row group."""
    with place.open() as source, pq.ParquetFile(source) as file:
        return file.read_row_group(group, columns=[column]).column(column)


def _walk_local(folder: Path, relative: str, above: frozenset[tuple[int, int]]) -> list[str]:
    """Files below a folder; `above` are the folders that it lies in, as (device, inode)."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _walk_local(Path(entry.path), f"{relative}{entry.name}/", above | {here})
            elif entry.is_file():
                found.append(relative + entry.name)
    return found
