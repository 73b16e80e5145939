"""tuned.yaml: settings that a search found, as a file that other verbs take with --config.

What enters: dotted names and values, and what a reader should know of them. What leaves: YAML,
nested by section, under a header of comments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import nest
from zsplg_ray.summary import within

NAME = "tuned.yaml"
"""The file's name, in the folder of a run or of a study."""


def tuned_file(folder: str, name: str = NAME) -> str:
    """Where it, or another file, is in a folder, as a user writes it."""
    return within(folder, name)


def write_tuned(folder: RunFolder, values: Mapping[str, Any], header: Sequence[str]) -> None:
    """Write `tuned.yaml` into a folder, in place of an older one.

    Args:
        folder: Of the run or the study.
        values: Dotted name -> plain value: {"compose.min_similarity": 0.3, ...}.
        header: Lines that become comments above the settings.
    """
    folder.write_bytes(NAME, tuned_text(values, header).encode())


def tuned_text(values: Mapping[str, Any], header: Sequence[str]) -> str:
    """The content of `tuned.yaml`; see `write_tuned`."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    # One line of a header stays one comment, whatever is in a path.
    comments = "".join(f"# {' '.join(line.split())}".rstrip() + "\n" for line in header)
    return comments + yaml.safe_dump(nest(plain), sort_keys=False, allow_unicode=True)
