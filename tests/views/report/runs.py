"""Run folders for tests of the page, written directly: no model, no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from zsplg_ray.records import ERRORS, LABELS, encode_png, encode_score
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.sources import image_key
from zsplg_ray.vocab import ClassList, class_list

CLASSES = class_list("cat,dog")
SIZE_HW = (24, 32)
HOSTILE = "</script><script>alert(1)</script>\"'<img src=x onerror=alert(2)>\n&amp;`${1}`"
"""An image id of somebody who means ill."""


def blocks(*values: int, size_hw: tuple[int, int] = SIZE_HW) -> np.ndarray:
    """A label map of upright stripes of equal width, from left to right."""
    height, width = size_hw
    return np.repeat(np.array(values, np.uint8), width // len(values))[None].repeat(height, axis=0)


def photo(folder: Path, name: str, colour: Sequence[int] = (90, 120, 60), size_hw=SIZE_HW) -> str:
    """Put an image there; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    Image.fromarray(np.full((*size_hw, 3), colour, np.uint8)).save(path)
    return str(path)


def row(image_id: str, label_HW: np.ndarray, uri: str | None, score: float = 0.5) -> dict[str, Any]:
    """A row of labels/ in which every pixel with a class has the same score."""
    score_HW = np.where((label_HW > 0) & (label_HW < 255), score, 0.0)
    return {
        "image_id": image_id,
        "uri": uri,
        "width": label_HW.shape[1],
        "height": label_HW.shape[0],
        "label_png": encode_png(label_HW),
        "score_png": encode_score(score_HW),
        "class_px": np.bincount(label_HW.ravel(), minlength=256)[:3].tolist(),
        "source": "zeroshot",
        "confidence": score,
    }


def put_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    classes: ClassList = CLASSES,
    per_part: int = 16,
    **more: Any,
) -> str:
    """A finished run with these labels; returns its path."""
    run = RunFolder(str(folder))
    for at in range(0, len(rows), per_part):
        some = rows[at : at + per_part]
        table = pa.Table.from_pylist([dict(r) for r in some], schema=LABELS)
        name = part_name(r["image_id"] for r in some)
        run.write_part("labels", name, table, {"classes": classes.to_dict()})
    keys: dict[str, Any] = {key: {} for key in ("config", "resolved", "weights")}
    about = {"classes": classes.to_dict(), "labels_state": "complete", "state": "complete"}
    run.write_run({**keys, **about, **more})
    return str(folder)


def put_errors(folder: Path, errors: Mapping[str, str]) -> None:
    """Images that could not be done: id -> reason."""
    rows = [
        {"image_id": i, "uri": i, "stage": "read", "error": e, "detail": ""}
        for i, e in errors.items()
    ]
    table = pa.Table.from_pylist(rows, schema=ERRORS)
    RunFolder(str(folder)).write_part("errors", part_name(errors), table, {})


def put_masks(folder: Path, masks: Mapping[str, np.ndarray]) -> str:
    """PNG masks by image id; returns the folder's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, label_HW in masks.items():
        (folder / f"{image_key(image_id)}.png").write_bytes(encode_png(label_HW))
    return str(folder)
