"""A training run's folder: train.json, its checkpoints, and whether a run may go on in it.

What enters: the settings and the data of a run, later what its workers report. What leaves:

    train.json                      settings, data, history, and which checkpoint is the last
    checkpoints/ATTEMPT/step-N/     state.pt (all that training needs), student.pt (the model)
    last.pt, best.pt                copies of a student.pt

train.json is the record: a checkpoint counts once train.json names it, and history, last and best
change in that same write. last.pt and best.pt are put in place afterwards, and again when a run
goes on, so a kill at any moment leaves nothing that does not fit together.

Every attempt (a start of the command) has a folder of checkpoints and a name of its own. Workers
of a killed driver that live on for a while can therefore not write into what their heir reads, and
are refused once they come to report.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from zsplg_ray import __version__
from zsplg_ray.config import TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import recorded
from zsplg_ray.settings import WorkError, complain, fingerprint
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)

FILE = "train.json"
CHECKPOINTS = "checkpoints"
STATE, STUDENT = "state.pt", "student.pt"

_UNFINISHED = re.compile(r"_.+\.[0-9a-f]{32}")
_CHECKPOINT = re.compile(r"[\w-]+/step-\d+", re.ASCII)
_WEIGHTS = ("student.", "augment.", "unimatch.", "fusion.", "optim.", "train.")
NOT_IN_WEIGHTS = {
    "student.init",
    "train.channels_last",
    "train.compile",
    "train.loader_workers",
    "train.validate_epochs",
}
"""Settings of these sections that the weights do not depend on, but for rounding (the file to start
from counts by its hash)."""

PACKAGES = ("torch", "torchvision", "timm", "ray", "mlflow", "pyarrow", "numpy")


def describe_training(
    config: TrainConfig,
    classes: ClassList,
    data: Mapping[str, Mapping[str, Any]],
    schedule: Mapping[str, int],
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """The content of train.json at the start of a run.

    Args:
        config: As the user gave it.
        classes: What the model tells apart.
        data: Name of a part of the data -> what identifies it, see `identify`.
        schedule: Steps and epochs, and the images of a step.
        weights: What is started from -> its SHA-256, or None.
    """
    run: dict[str, Any] = {
        "state": "running",
        "id": uuid.uuid4().hex,
        "attempt": "",
        "config": recorded(config),
        "classes": classes.to_dict(),
        "data": {name: dict(what) for name, what in data.items()},
        "schedule": dict(schedule),
        "weights": dict(weights),
        "versions": {"zsplg_ray": __version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "history": [],
        "failures": [],
        "last": None,
        "best": None,
        "seconds": 0.0,
        "images_per_s": None,
        "mlflow": None,
        "preview": None,
    }
    depends: dict[str, Any] = {k: run["config"][k] for k in weight_settings(run)}
    depends |= {k: run[k] for k in ("classes", "data", "schedule", "weights")}
    run["fingerprint"] = fingerprint(depends)
    return run


def weight_settings(run: Mapping[str, Any]) -> list[str]:
    """Names of the settings that the weights depend on."""
    return sorted({k for k in run["config"] if k.startswith(_WEIGHTS)} - NOT_IN_WEIGHTS)


def identify(image_ids: Iterable[str], **more: Any) -> dict[str, Any]:
    """How many images there are and a hash of their ids; where they lie is no matter."""
    ids = list(image_ids)
    digest = hashlib.sha256()
    for image_id in ids:
        digest.update(image_id.encode("utf-8", "surrogatepass") + b"\0")
    return {"images": len(ids), "ids": digest.hexdigest()[:16], **more}


def read_training(folder: RunFolder) -> dict[str, Any] | None:
    """The content of train.json, None if there is none.

    Raises: ValueError if it is none that a run has written.
    """
    keys = ("attempt", "config", "data", "history", "last", "schedule", "state")
    return folder.read_record(FILE, keys, "restore it, or use another --out")


def write_training(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """Replace train.json."""
    folder.write_bytes(FILE, (json.dumps(run, indent=1, ensure_ascii=False) + "\n").encode())


def refuse_other_training(folder: RunFolder, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run that the folder holds already, to go on with; None if there is none.

    Raises: ValueError that names the first setting the weights depend on which differs, with both
        values; or if the folder holds something else.
    """
    if folder.local and Path(folder.path).exists() and not Path(folder.path).is_dir():
        raise ValueError(complain("out", "a folder", folder.uri, "give another path"))
    old = read_training(folder)
    if old is None:
        if folder.read_bytes("run.json") is not None:
            fix = "give another --out"
            shown = f"{folder.uri} with run.json"
            raise ValueError(complain("out", "a folder without other runs", shown, fix))
        return None
    refuse_differences(old, run, weight_settings(run), folder.uri)
    for name in ("labeled_masks", "val_masks"):
        before, now = old["config"].get(name), run["config"][name]
        if before != now:
            log.warning("%s was %s in %s: taken to be the same masks", name, before, folder.uri)
    return old


def refuse_differences(
    old: Mapping[str, Any], run: Mapping[str, Any], settings: Iterable[str], where: str
) -> None:
    """Compare settings, data and weights of two records, as `describe_training` makes them.

    Raises: ValueError that names the first that differs, with both values; `where`: what holds
        `old`.
    """
    fix = "give the same value, or another --out"
    pairs = [(k, old["config"].get(k), run["config"][k]) for k in settings]
    pairs += [("classes", old["classes"]["names"], run["classes"]["names"])]
    for name in run["data"]:
        before, now = old["data"].get(name) or {}, run["data"][name]
        if before.get("images") != now["images"]:
            pairs += [(f"number of {name} images", before.get("images"), now["images"])]
        pairs += [(f"{k} of {name} images", before.get(k), v) for k, v in now.items()]
    pairs += [(f"weights of {k}", old["weights"].get(k), v) for k, v in run["weights"].items()]
    for name, before, now in pairs:
        if before != now:
            raise ValueError(complain(name, f"{before} as in {where}", now, fix))


def is_finished(run: Mapping[str, Any]) -> bool:
    """Whether every step has been done."""
    return bool(run["last"]) and run["last"]["step"] == run["schedule"]["steps"]


def images_per_s(run: Mapping[str, Any]) -> float | None:
    """Images a second over the whole history, validation and starts left out."""
    images, seconds = 0, 0.0
    for entry in run["history"]:
        seen = entry["step"] * run["schedule"]["images_per_step"]
        seconds += (seen - images) / entry["images_per_s"]
        images = seen
    return round(images / seconds, 3) if seconds else None


def start_of(folder: RunFolder, run: Mapping[str, Any]) -> str | None:
    """The checkpoint that a run goes on from, None if it has none yet.

    Raises: ValueError if it is not there any more.
    """
    if run["last"] is None:
        return None
    _check_name(folder, run["last"]["checkpoint"])
    path = f"{folder.path}/{CHECKPOINTS}/{run['last']['checkpoint']}"
    if folder.fs.get_file_info(f"{path}/{STATE}").type != pafs.FileType.File:
        fix = "restore it, or train anew with another --out"
        raise ValueError(complain("out", "a folder with its last checkpoint", path, fix))
    return run["last"]["checkpoint"]


def _check_name(folder: RunFolder, checkpoint: Any) -> None:
    """Raise ValueError for a checkpoint outside the folder, which no run has written."""
    if not isinstance(checkpoint, str) or not _CHECKPOINT.fullmatch(checkpoint):
        rule, fix = "named ATTEMPT/step-N", "restore train.json, or use another --out"
        shown = f"{checkpoint} in {folder.uri}"
        raise ValueError(complain("last checkpoint", rule, shown, fix))


# Attempts ----------------------------------------------------------------------------------------


def new_attempt() -> str:
    """The name of a start of the command."""
    return uuid.uuid4().hex[:12]


def check_attempt(folder: RunFolder, attempt: str) -> dict[str, Any]:
    """train.json, as long as it is still this attempt's.

    Raises:
        ValueError: This machine does not see the folder.
        WorkError: Somebody else has gone on with the run.
    """
    run = read_training(folder)
    if run is None:
        fix = "use a shared disk, or an s3://, gs:// address"
        raise ValueError(complain("out", "a folder that every worker sees", folder.uri, fix))
    if run["attempt"] != attempt:
        raise WorkError(f"another run has gone on in {folder.uri}; this one stops")
    return run


def commit(
    folder: RunFolder, attempt: str, told: Mapping[str, Any], checkpoint: str
) -> dict[str, Any]:
    """Make a checkpoint count: history, last and best, then last.pt and best.pt.

    Args:
        folder: The run's.
        attempt: Whose checkpoint it is.
        told: What the first worker reported: `entry` of the history, `best` so far.
        checkpoint: Name of its folder below checkpoints/ATTEMPT/.

    Raises: WorkError if another attempt has taken over.
    """
    run = check_attempt(folder, attempt)
    entry = dict(told["entry"])
    first = run["last"] is None or not run["last"]["checkpoint"].startswith(f"{attempt}/")
    run["history"] = [e for e in run["history"] if e["step"] < entry["step"]] + [entry]
    run["best"] = dict(told["best"])
    run["last"] = {"epoch": entry["epoch"], "step": entry["step"]}
    run["last"] |= {"val_miou": entry.get("val_miou"), "checkpoint": f"{attempt}/{checkpoint}"}
    write_training(folder, run)
    put_models(folder, run)
    if first:
        _forget_other_attempts(folder, attempt)
    return run


def note_failure(folder: RunFolder, attempt: str, worker: int, error: str) -> None:
    """Put the death of a worker, which Ray mends, into train.json for whoever watches."""
    run = read_training(folder)
    if run is None or run["attempt"] != attempt:
        return
    epoch = run["last"]["epoch"] if run["last"] is not None else 0
    note = {
        "worker": worker,
        "error": " ".join(error.split()),
        "epoch": epoch,
        "time": round(time.time(), 3),
    }
    run["failures"] = [*run.get("failures", []), note]
    write_training(folder, run)


def put_models(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """last.pt, and best.pt where the last checkpoint is the best; may be done again at any time."""
    if run["last"] is None:
        return
    _check_name(folder, run["last"]["checkpoint"])
    source = f"{CHECKPOINTS}/{run['last']['checkpoint']}/{STUDENT}"
    names = ["best.pt"] if run["best"]["step"] == run["last"]["step"] else []
    for name in (*names, "last.pt"):
        _copy(folder, source, name)


def sweep(folder: RunFolder) -> None:
    """Remove what killed writers left half done."""
    if folder.local:
        for left in Path(folder.path).glob("_*"):
            if _UNFINISHED.fullmatch(left.name):
                left.unlink(missing_ok=True)


def _copy(folder: RunFolder, source: str, target: str) -> None:
    """Copy a file within the folder; it appears whole or not at all."""
    source, path = f"{folder.path}/{source}", f"{folder.path}/{target}"
    if not folder.local:
        folder.fs.copy_file(source, path)
        return
    hidden = f"{folder.path}/_{target}.{uuid.uuid4().hex}"
    folder.fs.copy_file(source, hidden)
    Path(hidden).replace(path)


def _forget_other_attempts(folder: RunFolder, attempt: str) -> None:
    """Checkpoints of earlier attempts are of no use once there is a newer one."""
    base = f"{folder.path}/{CHECKPOINTS}"
    for info in folder.fs.get_file_info(pafs.FileSelector(base, allow_not_found=True)):
        if info.type == pafs.FileType.Directory and info.base_name != attempt:
            folder.fs.delete_dir(info.path)
