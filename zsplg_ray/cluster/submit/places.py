"""Which settings of a verb name places, and whether a job on the cluster will find them there.

What enters: the checked settings of a verb, and what is sent along. What leaves: the places that
are taken for shared storage, or a ValueError for one that the job would not find, or whose result
would be lost with the job's working directory.

Why this way: every text in the settings is a place unless it is named here as something else, so a
new verb is checked without a line of its own.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zsplg_ray.cluster.submit.sent import Sent
from zsplg_ray.config import DoctorConfig
from zsplg_ray.settings import Section, complain, is_section, setting_types
from zsplg_ray.storage import is_address
from zsplg_ray.vocab import SPECS

NO_PLACES = frozenset(
    {
        *("backbone", "student.backbone", "search.over", "ray.address", "address"),
        *("prompts.templates", "prompts.background", "image_prefix"),
        *("mlflow.experiment", "mlflow.run_name", "mlflow.register", "mlflow.alias"),
    }
)
"""Texts that are names or sentences."""

WRITTEN = frozenset({"out", "to", "merged", "mlflow.uri"})
"""Places that are made if they are missing. Others are read, even where they are written too."""

_LIST = re.compile(r"[*?[]")
_RELATIVE_STORE = re.compile(r"sqlite(\+\w+)?:///(?!/)")
"""How a database in a relative file begins: sqlite:///mlflow.db."""
_NAMED_STORE = re.compile(r"databricks(-uc)?|uc(:.+)?|arn:.+")
"""MLflow's stores that have a name instead of an address."""


def check_places(settings: Section, config_file: str | None, sent: Sent | None) -> list[str]:
    """Check that the job finds what its settings name.

    Args:
        settings: Of the verb that will run.
        config_file: What `--config` names, if it is given.
        sent: The working directory; None: none is sent.

    Returns:
        `name path` of everything that must be on storage which all nodes see.

    Raises: ValueError for a place that the job would not find or would write in vain.
    """
    shared = []
    files = [("config", config_file)] if config_file is not None else []
    for name, text in (*files, *texts(settings)):
        if name in WRITTEN:
            if not (name == "out" and isinstance(settings, DoctorConfig)):  # it tidies up itself
                _check_written(name, text)
            place = text
        else:
            place = _place(name, text, sent)
            if place is None:
                continue
            if not _everywhere(place):
                _check_read(name, place, sent)
        if place.startswith(("/", "~/", "file://")):
            shared.append(f"{name} {place}")
    return shared


def texts(settings: Section, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of every free text in the settings; of a list, each."""
    for name, hint in setting_types(type(settings)).items():
        value = getattr(settings, name)
        if is_section(hint):
            yield from texts(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in NO_PLACES and holds_text(hint):
            for text in value if isinstance(value, tuple) else (value,):
                if text is not None:
                    yield f"{prefix}{name}", text


def holds_text(hint: Any) -> bool:
    """Whether a setting is a text or a list of texts, none of a few choices."""
    base = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    union = isinstance(base, types.UnionType) or typing.get_origin(base) is typing.Union
    options = typing.get_args(base) if union else (base,)
    return str in options or tuple[str, ...] in options


def _everywhere(place: str) -> bool:
    """Whether a place means the same on every machine, if storage is shared."""
    return is_address(place) or place.startswith(("/", "~/"))


def _check_written(name: str, place: str) -> None:
    """A result must not be written into the job's own copy of the working directory."""
    if name == "mlflow.uri" and (place in ("", "off") or _NAMED_STORE.fullmatch(place)):
        return
    if not _everywhere(place) or _RELATIVE_STORE.match(place):
        rule = "an address or an absolute path in a job, whose working directory goes with it"
        fix = f"give --{name} on storage that all nodes share"
        raise ValueError(complain(name, rule, place, fix))


def _check_read(name: str, place: str, sent: Sent | None) -> None:
    """What is read by a relative path must be in what is sent."""
    fixed = place
    if name != "config" and (magic := _LIST.search(place)):
        fixed = place[: magic.start()].rpartition("/")[0] or "."
    why = sent.lacks(fixed) if sent is not None else "no working directory is sent"
    if (
        why is None
        and sent is not None
        and name == "config"
        and not _same(sent.root / place, place)
    ):
        why = f"the one that was read here is not the one in {sent.root}"
    if why is not None:
        rule = "an address, an absolute path, or in the working directory that is sent"
        fix = "put it on s3://... or on storage that all nodes share, and give that"
        raise ValueError(complain(name, rule, f"{place} ({why})", fix))


def _place(name: str, text: str, sent: Sent | None) -> str | None:
    """The place that a text names, or None where it is the name of something built in."""
    here = sent.root if sent is not None else Path()
    if name == "classes":
        if text.strip().lower() in SPECS:
            return None
        named = "," not in text and ("/" in text or Path(text).suffix == ".txt")
        return text if named or _is_file(here / text) else None
    if name == "student.init":
        return text if text != "shapes" else None
    if name == "clip.model":
        if text.startswith("local-dir:"):
            return text.removeprefix("local-dir:")
        if text.startswith("hf-hub:"):
            return None
        file = text.partition("/")[2]
        return file if file.startswith(("/", "~/")) or _is_file(here / file) else None
    return text


def _same(path: Path, other: str) -> bool:
    """Whether both are the same file."""
    return _is_file(Path(other)) and path.samefile(other)


def _is_file(path: Path) -> bool:
    """`Path.is_file`, False also for what cannot be a path at all."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
