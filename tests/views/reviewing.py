"""Runs made by hand, for tests of the review loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from zsplg_ray.images import IMAGE_SUFFIXES
from zsplg_ray.label.segments import Segments
from zsplg_ray.records import IGNORE, LABELS, encode_png, segments_schema
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.vocab import ClassList, class_list

CLASSES = class_list("cat,dog,red panda")


def make_run(
    folder: Path,
    labels: dict[str, Any],
    scores: dict[str, Any] | None = None,
    segments: dict[str, Segments] | None = None,
    classes: ClassList = CLASSES,
    per_part: int = 3,
    photos: str = "/photos",
) -> str:
    """A finished run of `label`: maps and scores by image id, scores in 255ths, by default 200."""
    run = RunFolder(str(folder))
    meta = {"fingerprint": "f", "labels_fingerprint": "l", "classes": classes.to_dict()}
    ids = sorted(labels)
    for start in range(0, len(ids), per_part):
        part = ids[start : start + per_part]
        rows = [_row(i, labels[i], (scores or {}).get(i), len(classes), photos) for i in part]
        table = pa.Table.from_pylist(rows, schema=LABELS)
        run.write_part("labels", part_name(part), table, meta)
        if segments is not None:
            _put_segments(run, part, rows, segments, meta)
    recorded = {"config": {}, "resolved": {}, "weights": {}, "state": "complete"}
    run.write_run({**recorded, **meta, "labels_state": "complete"})
    return str(folder)


def _row(image_id: str, label: Any, score: Any, n_classes: int, photos: str) -> dict[str, Any]:
    if isinstance(label, bytes):  # a broken one
        pngs = {"label_png": label, "score_png": label}
        return (
            {"image_id": image_id, "uri": "/x", "width": 2, "height": 2}
            | pngs
            | {
                "class_px": [0] * n_classes,
                "source": "zeroshot",
                "confidence": 0.5,
            }
        )
    label_HW = np.asarray(label, np.uint8)
    named_HW = (label_HW != IGNORE) & (label_HW != 0)
    score_HW = np.where(named_HW, 200, 0) if score is None else np.asarray(score)
    suffix = "" if image_id.lower().endswith(IMAGE_SUFFIXES) else ".jpg"
    return {
        "image_id": image_id,
        "uri": f"{photos}/{image_id}{suffix}",
        "width": label_HW.shape[1],
        "height": label_HW.shape[0],
        "label_png": encode_png(label_HW),
        "score_png": encode_png(score_HW),
        "class_px": np.bincount(label_HW[label_HW != IGNORE], minlength=n_classes).tolist(),
        "source": "zeroshot",
        "confidence": 0.5,
    }


def _put_segments(
    run: RunFolder,
    part: list[str],
    rows: list[dict[str, Any]],
    segments: dict[str, Segments],
    meta: dict[str, Any],
) -> None:
    schema = segments_schema(2)
    listed = [
        {
            **{k: row[k] for k in ("image_id", "uri", "width", "height")},
            "image_sha256": "",
            "segments": segments[row["image_id"]].to_rows(),
        }
        for row in rows
    ]
    table = pa.Table.from_pylist(listed, schema=schema)
    run.write_part("segments", part_name(part), table, meta)


def submitted(tasks_json: Path) -> list[dict[str, Any]]:
    """Tasks as Label Studio exports them after each prediction was submitted as it is."""
    tasks = json.loads(tasks_json.read_text(encoding="utf-8"))
    for number, task in enumerate(tasks, start=1):
        result = task.pop("predictions")[0]["result"]
        task |= {"id": number, "annotations": [annotation(result, number)]}
    return tasks


def annotation(result: list[Any], number: int = 1, **more: Any) -> dict[str, Any]:
    """An annotation of Label Studio's."""
    when = {"created_at": "2026-01-01T00:00:00.000000Z", "updated_at": "2026-01-01T00:00:00.0000Z"}
    return {"id": number, "result": result, "was_cancelled": False, **when, **more}
