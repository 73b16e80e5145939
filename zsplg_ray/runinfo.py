"""run.json: what a run's folder was made with, and whether a new run may go on in it.

What enters: the config as given and as resolved, class list, weights' SHA-256. What leaves: the
mapping that run.json holds, the metadata of every Parquet part, and a refusal where a setting that
the stored segments depend on has changed.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsplg_ray import __version__
from zsplg_ray.config import LabelConfig, RelabelConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain, fingerprint, flatten
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)

NOT_IN_SEGMENTS = {
    "sam.checkpoint",
    "sam.points_per_batch",
    "sam.memory_gib",
    "clip.crop_batch",
}
"""Settings of sam and clip that do not change the segments (the checkpoint counts by its hash)."""

ADDED_LATER: dict[str, Any] = {
    "sam.precision": "float32",
    "sam.crop_nms_thresh": 0.7,
    "sam.crop_overlap_ratio": 512 / 1500,
    "sam.crop_n_points_downscale_factor": 1,
}
"""Settings of segments or labels that the first runs did not know -> the value they worked by.

At that value a setting is left out of the fingerprints, so that parts of older and newer versions
in one folder carry the same. An entry stays as it is when the setting's default changes."""

PACKAGES = (
    "torch",
    "torchvision",
    "ray",
    "segment-anything",
    "open_clip_torch",
    "pyarrow",
    "numpy",
)


def describe_run(
    config: LabelConfig, resolved: LabelConfig, classes: ClassList, weights: Mapping[str, str]
) -> dict[str, Any]:
    """The content of run.json at the start of a run."""
    run: dict[str, Any] = {
        "state": "running",
        "labels_state": "complete",
        "config": flatten(config),
        "resolved": flatten(resolved),
        "classes": classes.to_dict(),
        "weights": dict(weights),
        "versions": {"zsplg_ray": __version__}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    return with_fingerprints(run)


def with_fingerprints(run: dict[str, Any]) -> dict[str, Any]:
    """Set `fingerprint` (segments) and `labels_fingerprint` from the rest."""
    known = {k: v for k, v in run["resolved"].items() if (k, v) not in ADDED_LATER.items()}
    segments = {k: known[k] for k in segment_settings(run) if k in known} | run["weights"]
    run["fingerprint"] = fingerprint(segments)
    labels = {k: known[k] for k in label_settings(run) if k in known}
    labels |= {"classes": run["classes"], "segments": run["fingerprint"]}
    run["labels_fingerprint"] = fingerprint(labels)
    return run


def segment_settings(run: Mapping[str, Any]) -> list[str]:
    """Names of the settings that the segments and their embeddings depend on."""
    names = (k for k in run["resolved"] if k.startswith(("sam.", "clip.")))
    return sorted(set(names) - NOT_IN_SEGMENTS)


def label_settings(run: Mapping[str, Any]) -> list[str]:
    """Names of the settings that the labels depend on beside the segments."""
    return sorted(k for k in run["resolved"] if k.startswith(("prompts.", "compose.")))


def part_meta(run: Mapping[str, Any]) -> dict[str, Any]:
    """What every Parquet part of the run carries in its schema metadata."""
    return {k: run[k] for k in ("fingerprint", "labels_fingerprint", "classes")}


def refuse_other_run(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """Raise ValueError if `folder` holds a run that was made with other settings.

    The first differing setting is named with both values. For a setting that the folder's run did
    not know yet, its value is the one that run worked by.
    """
    if folder.local and Path(folder.path).exists() and not Path(folder.path).is_dir():
        raise ValueError(complain("out", "a folder", folder.uri, "give another path"))
    old = folder.read_run()
    if old is None:
        _refuse_other_parts(folder, run)
        return
    source, now = old["config"]["images"], run["config"]["images"]
    if source != now:
        log.warning("images was %s in %s: images of the same id count as done", source, folder.uri)
    again = "give the same value, or another --out"
    if old["labels_state"] != "complete":
        fix = f"run `zsplg relabel --run {folder.uri}` to finish it"
        raise ValueError(
            complain("out", "a folder with whole labels", "a half relabelled one", fix)
        )
    theirs, ours = ADDED_LATER | old["resolved"], run["resolved"]
    pairs = [(k, theirs.get(k), ours[k], again) for k in segment_settings(run)]
    weights = run["weights"].items()
    pairs += [(f"weights of {k}", old["weights"].get(k), v, again) for k, v in weights]
    change = f"{again}, or change all labels with `zsplg relabel --run {folder.uri}`"
    pairs += [(k, theirs.get(k), ours[k], change) for k in label_settings(run)]
    pairs += [("classes", old["classes"], run["classes"], change)]
    for name, before, now, fix in pairs:
        if before != now:
            if name == "classes":
                part = "names" if before["names"] != now["names"] else "aliases"
                before, now = before[part], now[part]
            raise ValueError(complain(name, f"{before} as in {folder.uri}", now, fix))


def _refuse_other_parts(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """Parts without a run.json must at least be of the same models and settings."""
    names = folder.parts("segments")
    if not names or not run["weights"]:
        return
    found = folder.part_meta("segments", names[0]).get("fingerprint")
    if found != run["fingerprint"]:
        fix = "restore run.json, or use another --out"
        rule = f"a folder of segments with fingerprint {run['fingerprint']}"
        raise ValueError(complain("out", rule, f"{found} in {folder.uri}", fix))


def relabelled(
    run: Mapping[str, Any], given: RelabelConfig, resolved: RelabelConfig, classes: ClassList
) -> dict[str, Any]:
    """The run with labels composed by other settings; its `labels_state` is "relabelling"."""
    changed = ("prompts.", "compose.")
    new = {**run, "labels_state": "relabelling", "classes": classes.to_dict()}
    for key, config in (("config", given), ("resolved", resolved)):
        values = {k: v for k, v in flatten(config).items() if k.startswith(changed)}
        new[key] = {**run[key], **values}
        if given.classes is not None:
            new[key]["classes"] = given.classes
    return with_fingerprints(new)
