"""run.json: what a run's folder was made with, and whether a new run may go on in it.

What enters: the config as given and as resolved, class list, weights' SHA-256. What leaves: the
mapping that run.json holds, the metadata of every Parquet part, and a refusal where a setting that
the stored segments or labels depend on has changed.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zsplg_ray import __version__
from zsplg_ray.config import LabelConfig, PredictConfig, RelabelConfig
from zsplg_ray.rundir import COMMITS, RunFolder, made_by
from zsplg_ray.safe_text import masked, public_values
from zsplg_ray.settings import Section, complain, fingerprint, flatten
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

OF_PREDICTIONS = ("max_side_px", "precision")
"""Settings, beside the weights, that what a model says depends on."""

PREDICT_PACKAGES = ("torch", "torchvision", "timm", "ray", "pyarrow", "numpy")


def describe_run(
    config: LabelConfig, resolved: LabelConfig, classes: ClassList, weights: Mapping[str, str]
) -> dict[str, Any]:
    """The content of run.json at the start of a run of `label`."""
    return with_fingerprints(_described(config, resolved, classes, weights, PACKAGES))


def describe_prediction(
    config: PredictConfig,
    resolved: PredictConfig,
    classes: ClassList,
    weights: Mapping[str, str],
    zeroshot: Mapping[str, str] | None,
) -> dict[str, Any]:
    """The content of run.json at the start of a run of `predict`.

    `zeroshot`: `uri` and `labels_fingerprint` of the run whose labels are fused in, if any.
    """
    run: dict[str, Any] = {"verb": "predict"}
    run |= _described(config, resolved, classes, weights, PREDICT_PACKAGES)
    run["zeroshot"] = public_values(dict(zeroshot)) if zeroshot else None
    run["fingerprint"] = fingerprint(
        {k: run["resolved"][k] for k in OF_PREDICTIONS} | run["weights"]
    )
    labels: dict[str, Any] = {k: run["resolved"][k] for k in fusion_settings(run)}
    labels |= {"classes": run["classes"], "predictions": run["fingerprint"]}
    labels["zeroshot"] = zeroshot and zeroshot["labels_fingerprint"]
    run["labels_fingerprint"] = fingerprint(labels)
    return run


def _described(
    config: Section,
    resolved: Section,
    classes: ClassList,
    weights: Mapping[str, str],
    packages: Iterable[str],
) -> dict[str, Any]:
    """What run.json holds whatever the verb."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {
        "state": "running",
        "labels_state": "complete",
        "config": recorded(config),
        "resolved": recorded(resolved),
        "classes": classes.to_dict(),
        "weights": dict(weights),
        "versions": {"zsplg_ray": __version__} | versions,
    }


def recorded(config: Section) -> dict[str, Any]:
    """Every setting by its dotted name, as a record holds them: without credentials."""
    flat = flatten(config)
    uri = flat.get("mlflow.uri")
    flat = {name: public_values(value) for name, value in flat.items()}
    if isinstance(uri, str):
        flat["mlflow.uri"] = masked(uri)  # nobody opens it from here
    return flat


def user_name() -> str:
    """Who works here, for people who read it; "unknown" where a container's user has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"


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


def fusion_settings(run: Mapping[str, Any]) -> list[str]:
    """Names of the settings that a model's labels depend on beside what the model says."""
    fused = [k for k in run["resolved"] if k.startswith("fusion.") and run["zeroshot"]]
    return ["conf_thresh", *sorted(fused)]


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
    if made_by(old) != made_by(run):
        rule = f"a folder of `zsplg {made_by(run)}`"
        raise ValueError(
            complain("out", rule, f"one of `zsplg {made_by(old)}`", "give another --out")
        )
    source, now = old["config"]["images"], run["config"]["images"]
    if source != now:
        log.warning("images was %s in %s: images of the same id count as done", source, folder.uri)
    if old["labels_state"] != "complete":
        fix = f"run `zsplg relabel --run {folder.uri}` to finish it"
        raise ValueError(
            complain("out", "a folder with whole labels", "a half relabelled one", fix)
        )
    pairs = _prediction_pairs if made_by(run) == "predict" else _label_pairs
    for name, before, now, fix in pairs(old, run, folder.uri):
        if before != now:
            if name == "classes":
                part = "names" if before["names"] != now["names"] else "aliases"
                before, now = before[part], now[part]
            raise ValueError(complain(name, f"{before} as in {folder.uri}", now, fix))


Pair = tuple[str, Any, Any, str]
"""Name of a setting, its value in the folder, its value now, and what to do if they differ."""

_AGAIN = "give the same value, or another --out"


def _label_pairs(old: Mapping[str, Any], run: Mapping[str, Any], uri: str) -> list[Pair]:
    """What two runs of `label` in one folder must agree in."""
    theirs, ours = ADDED_LATER | old["resolved"], run["resolved"]
    pairs = [(k, theirs.get(k), ours[k], _AGAIN) for k in segment_settings(run)]
    weights = run["weights"].items()
    pairs += [(f"weights of {k}", old["weights"].get(k), v, _AGAIN) for k, v in weights]
    change = f"{_AGAIN}, or change all labels with `zsplg relabel --run {uri}`"
    pairs += [(k, theirs.get(k), ours[k], change) for k in label_settings(run)]
    return [*pairs, ("classes", old["classes"], run["classes"], change)]


def _prediction_pairs(old: Mapping[str, Any], run: Mapping[str, Any], uri: str) -> list[Pair]:
    """What two runs of `predict` in one folder must agree in."""
    weights = run["weights"].items()
    pairs = [(f"weights of the {k}", old["weights"].get(k), v, _AGAIN) for k, v in weights]
    before, now = ((r["zeroshot"] or {}).get("labels_fingerprint") for r in (old, run))
    pairs.append(("labels of fuse", before, now, _AGAIN))
    names = (*OF_PREDICTIONS, *fusion_settings(run))
    pairs += [(k, old["resolved"].get(k), run["resolved"][k], _AGAIN) for k in names]
    return [*pairs, ("classes", old["classes"], run["classes"], _AGAIN)]


def _refuse_other_parts(folder: RunFolder, run: Mapping[str, Any]) -> None:
    """Parts without a run.json must at least be of the same models and settings."""
    key = "labels_fingerprint" if made_by(run) == "predict" else "fingerprint"
    for kind in (COMMITS[made_by(run)], "labels"):
        names = folder.parts(kind)
        if not names or not run["weights"]:
            continue
        found = folder.part_meta(kind, names[0]).get(key)
        if found != run[key]:
            fix = "restore run.json, or use another --out"
            rule = f"a folder of {kind} with fingerprint {run[key]}"
            raise ValueError(complain("out", rule, f"{found} in {folder.uri}", fix))


def relabelled(
    run: Mapping[str, Any], given: RelabelConfig, resolved: RelabelConfig, classes: ClassList
) -> dict[str, Any]:
    """The run with labels composed by other settings; its `labels_state` is "relabelling".

    Where the labels become others, it no longer says which MLflow run made them.
    """
    changed = ("prompts.", "compose.")
    new = {**run, "labels_state": "relabelling", "classes": classes.to_dict()}
    for key, config in (("config", given), ("resolved", resolved)):
        values = {k: v for k, v in recorded(config).items() if k.startswith(changed)}
        new[key] = {**run[key], **values}
        if given.classes is not None:
            new[key]["classes"] = public_values(given.classes)
    new = with_fingerprints(new)
    if new["labels_fingerprint"] != run["labels_fingerprint"]:
        new.pop("mlflow", None)
    return new
