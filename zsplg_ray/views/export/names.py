"""Image ids -> names of files: safe on every system, unique, and as like the id as can be.

Enters: ids of any text. Leaves: relative paths without suffix. An id that is a harmless path keeps
its folders and its name; of any other, what is not harmless is replaced and a digest of the id
added. Of two ids whose files would have one name (suffixes and case do not count, for masks have
other suffixes and some disks know no case) the later one gets a digest.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from zsplg_ray.images import IMAGE_SUFFIXES
from zsplg_ray.sources import image_key

MAX_PART_BYTES = 120
"""Of a folder's or file's name; systems allow 255, and suffixes come on top."""
MAX_PARTS = 8
_BAD = set('<>:"|?*\\')
_DEVICES = {"con", "prn", "aux", "nul", *(f"{n}{i}" for n in ("com", "lpt") for i in range(1, 10))}
_SUFFIXES = (*IMAGE_SUFFIXES, ".txt", ".json", ".xml", ".parquet")


def file_names(ids: Sequence[str], reserved: Iterable[str] = ()) -> list[str]:
    """A name without suffix for each id, in their order.

    Args:
        ids: Image ids, all different.
        reserved: Names that no folder may have.
    """
    names, taken, never = [], set(), frozenset(reserved)
    for image_id in ids:
        name = _safe(image_id, never)
        if _folded(name) in taken:
            name = f"{name}-{_digest(image_id)}"
        while _folded(name) in taken:
            name += "_"
        taken.add(_folded(name))
        names.append(name)
    return names


def in_val(image_id: str, share: float | None) -> bool:
    """Whether an image belongs to the validation split, by its id alone."""
    digest = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    return share is not None and int.from_bytes(digest[:8], "big") < share * 2**64


def _safe(image_id: str, reserved: frozenset[str]) -> str:
    key = image_key(image_id)
    parts = key.split("/")
    made = [_part(part, reserved if i < len(parts) - 1 else None) for i, part in enumerate(parts)]
    if len(made) > MAX_PARTS:
        made = [*made[: MAX_PARTS - 1], made[-1]]
    if made == parts:
        return key
    return "/".join([*made[:-1], f"{made[-1]}-{_digest(image_id)}"])


def _part(part: str, reserved: frozenset[str] | None) -> str:
    """One part of a path; `reserved` is None for the last one, which is no folder."""
    text = "".join(c if c.isprintable() and c not in _BAD else "_" for c in part)
    while len(text.encode()) > MAX_PART_BYTES:
        text = text[:-1] if len(text) <= MAX_PART_BYTES else text[:MAX_PART_BYTES]
    if not text or text[0] in ". " or text[-1] in ". ":
        text = f"_{text.strip(' .')}_"
    if text.partition(".")[0].lower() in _DEVICES:
        text = f"_{text}"
    if reserved is not None and (text in reserved or text.lower().endswith(_SUFFIXES)):
        text = f"{text}_"
    return text


def _digest(image_id: str) -> str:
    return hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()
