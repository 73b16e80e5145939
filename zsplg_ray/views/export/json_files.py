"""Large JSON files, written item by item.

Enters: values one at a time. Leaves: a file with a list of them, one a line, never as a whole in
memory; a second list may grow in a file of its own until the first one ends.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any


class JsonList:
    """A list in a JSON file: by itself, or the last entry of a mapping.

    Args:
        path: The file.
        before: Entries of the mapping that stand before the list. None: the file is the list.
        key: The list's key in the mapping.
    """

    def __init__(self, path: Path, before: dict[str, Any] | None = None, key: str = "") -> None:
        self._path = path
        self._stream = path.open("w", encoding="utf-8", newline="\n")
        self._asides: dict[str, JsonList] = {}
        self._mapping = before is not None
        self.count = 0
        """Items so far."""
        if before is not None:
            head = (f"{_text(k)}: {_text(v)},\n" for k, v in before.items())
            self._stream.write("{" + "".join(head) + f"{_text(key)}: ")
        self._stream.write("[")

    def __enter__(self) -> JsonList:
        return self

    def add(self, value: Any) -> None:
        """Write the next item."""
        self._stream.write(("," if self.count else "") + "\n" + _text(value))
        self.count += 1

    def aside(self, key: str) -> JsonList:
        """Another list of the mapping, added to at any time; it will stand behind this one."""
        assert self._mapping
        self._asides[key] = JsonList(self._path.with_name(f".{self._path.name}.{key}"))
        return self._asides[key]

    def close(self) -> None:
        """End the file."""
        self._stream.write("\n]")
        for key, other in self._asides.items():
            other.close()
            self._stream.write(f",\n{_text(key)}: ")
            with other._path.open(encoding="utf-8", newline="\n") as lines:
                shutil.copyfileobj(lines, self._stream, 2**20)
            other._path.unlink()
        self._stream.write("}\n" if self._mapping else "\n")
        self._stream.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and not self._stream.closed:
            self.close()
        for other in (*self._asides.values(), self):
            other._stream.close()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
