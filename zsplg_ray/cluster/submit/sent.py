"""What of a working directory a job gets: small texts that settings name, never data or weights.

What enters: a folder, patterns to leave out, the most that may be sent. What leaves: a `Sent`, that
knows every file that goes and why any other stays, and a zip file of exactly those.

Why this way: Ray would pack the folder by itself, but only tells its size when it is too late. Here
the same choice serves to count, to refuse, to check the places that settings name, and to pack. The
zip of the same files has the same bytes, so a cluster that has it already is not sent it again.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import posixpath
import re
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pathspec import GitIgnoreSpec

from zsplg_ray.images import IMAGE_SUFFIXES
from zsplg_ray.settings import complain

MAX_ENTRIES = 200_000
"""Names looked at before a folder counts as too large to choose from."""

HIDDEN = "hidden or a cache"
_WEIGHTS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".onnx")
_CACHES = ("__pycache__", "node_modules")
_RECORDS = ("run.json", "train.json", "tune.json")
"""Files that make a folder one of a run."""
_PARTS = ("segments", "labels", "errors")
_PART = "part-*.parquet"
_MLFLOW = ("mlflow.db", "mlruns", "mlartifacts", "mlflow-artifacts")
_IGNORE_FILES = (".gitignore", ".rayignore")
_SHOWN = 3
_EPOCH = (1980, 1, 1, 0, 0, 0)

Rule = tuple[str, GitIgnoreSpec, str]
"""Where patterns hold (a folder ending in "/", or "" at the top), patterns, what to call them."""


@dataclass(frozen=True)
class Sent:
    """Which files of a folder are sent, and why the others are not."""

    root: Path
    files: Mapping[str, int]
    """Path below `root` -> bytes."""
    left: Mapping[str, str]
    """Path of a file or a whole folder that stays -> what it is."""

    @property
    def size(self) -> int:
        """Bytes of all files, before packing."""
        return sum(self.files.values())

    def lacks(self, relative: str) -> str | None:
        """What the job would not have of a file or a folder, and why; None: it has all of it."""
        path = posixpath.normpath(relative)
        if path.startswith("../") or path == "..":
            return f"{relative} lies outside of it"
        if path in self.files:
            return None
        above = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
        for stays in above:
            if stays in self.left:
                return f"{stays} stays here: {self.left[stays]}"
        below = "" if path == "." else f"{path}/"
        for stays, why in self.left.items():
            if stays.startswith(below) and why != HIDDEN:
                return f"{stays} stays here: {why}"
        if any(name.startswith(below) for name in self.files):
            return None
        return f"there is nothing at {relative} in it"


def choose(root: Path, exclude: Sequence[str] = (), *, package: str = "") -> Sent:
    """Look through a folder for what a job gets.

    Args:
        root: The folder.
        exclude: Further patterns of what stays, as in .gitignore.
        package: Name of a Python package that goes another way, so that no copy here hides it.

    Raises: ValueError if there is no such folder, it cannot be read, it has too many files, or a
        pattern is none.
    """
    if not root.is_dir():
        fix = "give a folder, or None for no working directory"
        raise ValueError(complain("working_dir", "a folder", str(root), fix))
    rules: list[Rule] = []
    if exclude:
        for line in exclude:
            if not _is_pattern(line):
                rule, fix = "patterns as in .gitignore", "mend it or leave it out"
                raise ValueError(complain("exclude", rule, line, fix))
        rules.append(("", GitIgnoreSpec.from_lines(exclude), "--exclude"))
    walk = _Walk(root, package)
    walk.into("", rules, ())
    return Sent(root, walk.files, walk.left)


def check_size(sent: Sent, max_mib: float) -> None:
    """Raise ValueError that names the biggest entries if `sent` is over the limit."""
    if sent.size <= max_mib * 2**20:
        return
    rule = f"a folder with at most {max_mib:g} MiB to send"
    got = f"{mib(sent.size)} in {sent.root} ({_biggest(sent.files)})"
    fix = "--exclude what the job does not read, or raise --max-working-dir-mib"
    raise ValueError(complain("working_dir", rule, got, fix))


def pack(sent: Sent, target: Path) -> int:
    """Write the files into a zip file; returns its bytes.

    Raises: ValueError if a file cannot be read.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for relative in sorted(sent.files):
            path = sent.root / relative
            info = zipfile.ZipInfo(relative, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            try:
                info.external_attr = stat.S_IMODE(path.stat().st_mode) << 16
                archive.writestr(info, path.read_bytes())
            except OSError as e:
                fix = f"make it readable or --exclude it ({e.strerror})"
                raise ValueError(complain("working_dir", "readable", str(path), fix)) from e
    return target.stat().st_size


def mib(size: int) -> str:
    """Bytes for people: `0.3 MiB`; what is not nothing is at least 0.1."""
    return f"{max(size / 2**20, 0.1 if size else 0.0):.1f} MiB"


def _biggest(sizes: Mapping[str, int]) -> str:
    """The biggest entries of the top folder, with what they hold."""
    tops: dict[str, int] = {}
    for path, size in sizes.items():
        head, below, _ = path.partition("/")
        tops[head + below] = tops.get(head + below, 0) + size
    most = sorted(tops, key=lambda top: -tops[top])[:_SHOWN]
    return "most in " + ", ".join(f"{top} {mib(tops[top])}" for top in most)


@dataclass
class _Walk:
    """A walk through a folder, and what it has found."""

    root: Path
    package: str
    files: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def into(self, base: str, rules: list[Rule], above: Iterable[tuple[int, int]]) -> None:
        """Look at one folder and those in it; `above` are the folders that it lies in."""
        try:
            self._into(base, rules, above)
        except OSError as e:  # of this folder: of those in it, it has been told
            fix = f"--exclude it or make it readable ({e.strerror})"
            raise ValueError(complain("working_dir", "readable", str(self.root / base), fix)) from e

    def _into(self, base: str, rules: list[Rule], above: Iterable[tuple[int, int]]) -> None:
        folder = self.root / base
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link that leads back
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        self._count(base, len(entries))
        rules = [*rules, *_ignored(folder, base)]
        for entry in entries:
            path = base + entry.name
            what = self._what(entry, path, rules)
            if what is not None:
                self.left[path] = what
            elif entry.is_dir():
                self.into(f"{path}/", rules, (*above, here))
            elif entry.is_file():
                if not _is_text(path):
                    fix = "rename it or --exclude it"
                    raise ValueError(complain("working_dir", "UTF-8 in names", ascii(path), fix))
                self.files[path] = entry.stat().st_size

    def _what(self, entry: os.DirEntry[str], path: str, rules: list[Rule]) -> str | None:
        """What an entry is that makes it stay, or None."""
        if entry.name.startswith(".") or entry.name in _CACHES:
            return HIDDEN
        folder = entry.is_dir()
        if entry.name in _MLFLOW:
            return "MLflow's store"
        if folder and path == self.package:
            return "the package, which is sent as it is installed"
        for where, spec, name in rules:
            below = path[len(where) :]
            if spec.match_file(below) or (folder and spec.match_file(f"{below}/")):
                return f"it is in {name}"
        if folder:
            return _what_folder(Path(entry.path))
        if entry.name in _RECORDS or fnmatch.fnmatchcase(entry.name, _PART):
            return "a file of a run"  # in whose folder we are
        suffix = posixpath.splitext(entry.name)[1].lower()
        return "an image" if suffix in IMAGE_SUFFIXES else "weights" if suffix in _WEIGHTS else None

    def _count(self, base: str, entries: int) -> None:
        self.seen[base or "."] = entries
        if sum(self.seen.values()) <= MAX_ENTRIES:
            return
        rule = f"a folder of at most {MAX_ENTRIES:,} files"
        got = f"more in {self.root} ({max(self.seen, key=lambda f: self.seen[f])} has the most)"
        fix = "--exclude the folders of data, or give another --working-dir"
        raise ValueError(complain("working_dir", rule, got, fix))


def _what_folder(folder: Path) -> str | None:
    """What a folder is that is never sent: an environment or a run."""
    with contextlib.suppress(OSError):  # told where its files are looked at
        if (folder / "pyvenv.cfg").is_file():
            return "a virtual environment"
        parts = any(next((folder / kind).glob(_PART), None) for kind in _PARTS)
        if parts or any((folder / name).is_file() for name in _RECORDS):
            return "a run's folder"
    return None


def _ignored(folder: Path, base: str) -> list[Rule]:
    """The patterns of .gitignore and .rayignore in a folder, which hold below it."""
    names = _IGNORE_FILES
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1":  # Ray's own switch
        names = _IGNORE_FILES[1:]
    found = []
    for name in names:
        file = folder / name
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            spec = GitIgnoreSpec.from_lines(filter(_is_pattern, lines))
            found.append((base, spec, f"{base}{name}"))
    return found


def _is_pattern(line: str) -> bool:
    """Whether a line is a pattern, a comment or empty; git itself passes over others."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True


def _is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8; names of files need not be."""
    return not any("\ud800" <= char <= "\udfff" for char in name)
