"""`zsplg relabel`: segments/ -> labels/ with other thresholds, class names or templates. No SAM.

What enters: a finished (or still incomplete) run's folder and new settings. What leaves: the same
folder, each labels part replaced in one go by one composed anew. A part that already carries the
new fingerprint is left alone, so an interrupted relabel goes on where it stopped; until then
run.json says `labels_state: relabelling`, and readers of labels refuse the mixture.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.parts import relabel_part
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.session import last_line, quiet_ray_data, ray_session
from zsplg_ray.cluster.track.run import RunTracker
from zsplg_ray.config import ClipConfig, RelabelConfig
from zsplg_ray.exactly_once import repair
from zsplg_ray.label.clip import ClipEncoder
from zsplg_ray.label.compose import minimum_scores
from zsplg_ray.label.naming import Naming
from zsplg_ray.label.presets import resolve_text
from zsplg_ray.label.weights import load_clip, state_sha256
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import part_meta, relabelled
from zsplg_ray.settings import WorkError, complain, from_mapping
from zsplg_ray.vocab import ClassList, class_list

log = logging.getLogger(__name__)

UNITS = ("parts", "images")


def relabel(config: RelabelConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Compose the labels of a run anew.

    Args:
        config: Every prompts and compose setting as it is to be. To start from those that the
            labels were made with, as the command line does:
            `from_mapping(RelabelConfig, {"run": run, **RunFolder(run).label_settings(), ...})`.
        progress: What shows how far it is; None: one of its own.

    Returns:
        The new content of run.json.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: The work failed; run it again to go on.
    """
    with progress or Progress("relabel", show=not config.quiet) as progress:
        return _relabel(config, progress)


def _relabel(config: RelabelConfig, progress: Progress) -> dict[str, Any]:
    """`relabel`, under way."""
    folder = RunFolder(config.run)
    folder.label_settings()  # says so if there is no run
    progress.waits("reading CLIP, for the class names")
    with only_run(folder):
        run, naming = _prepare(folder, config)
        found = repair(folder)
        counts = {"images": len(found.done) + len(found.failed), **run.get("counts", {})}
        counts |= {"labelled": len(found.done), "quarantined": len(found.failed)}
        run["counts"] = counts
        run.setdefault("id", uuid.uuid4().hex)  # the first runs had none
        tracker = RunTracker(config.mlflow, folder, "relabel")
        with tracker.ending(run):
            run["relabel_seconds"] = _relabel_parts(folder, naming, run, config, tracker, progress)
            run["labels_state"] = "complete"
            folder.write_run(run)
        if tracker.started:
            folder.write_run(run)
    return run


def _prepare(folder: RunFolder, config: RelabelConfig) -> tuple[dict[str, Any], Naming]:
    """run.json as it is to become, and what names the segments. Raises: ValueError, bad input."""
    run = folder.read_run() or {}
    classes = class_list(config.classes) if config.classes else ClassList.from_dict(run["classes"])
    clip = clip_config(run)
    resolved = resolve_text(config, clip.model, clip.embedder)
    minimum_scores(resolved.compose, classes)  # says so if a threshold names no class
    bank = text_encoder(run).encode_classes(classes, resolved.prompts)
    return relabelled(run, config, resolved, classes), Naming(classes, bank, resolved.compose)


def clip_config(run: Mapping[str, Any]) -> ClipConfig:
    """The CLIP that a run's segments were embedded with, by its run.json."""
    clip = {k[len("clip.") :]: v for k, v in run["resolved"].items() if k.startswith("clip.")}
    return from_mapping(ClipConfig, clip)


def text_encoder(run: Mapping[str, Any]) -> ClipEncoder:
    """That CLIP, loaded, for new class names or templates.

    Raises: ValueError if its weights cannot be had, or are others than the segments were embedded
        with.
    """
    clip = clip_config(run)
    model, tokenizer = load_clip(clip)
    if (sha256 := state_sha256(model)) != run["weights"]["clip"]:
        fix = "use the CLIP weights that the segments were embedded with, or label again"
        rule = f"of SHA-256 {run['weights']['clip']}"
        raise ValueError(complain("weights of clip", rule, sha256, fix))
    return ClipEncoder(model, tokenizer, clip)


def _relabel_parts(
    folder: RunFolder,
    naming: Naming,
    run: dict[str, Any],
    config: RelabelConfig,
    tracker: RunTracker,
    progress: Progress,
) -> float:
    """Replace every labels part that does not carry the new fingerprint; returns seconds."""
    began = time.monotonic()
    made_with = folder.map_parts(folder.parts("labels"), lambda n: folder.part_meta("labels", n))
    new = run["labels_fingerprint"]
    parts = folder.parts("segments")
    names = [name for name in parts if made_with.get(name, {}).get("labels_fingerprint") != new]
    meta = part_meta(run)
    progress.waits("starting Ray")

    def one_part(row: dict[str, Any]) -> dict[str, Any]:
        return {"images": relabel_part(folder, row["item"], naming, meta)}

    if names:
        with ray_session(config.ray):
            folder.write_run(run)  # from here on labels are mixed, and readers are told so
            tracker.start(run)
            quiet_ray_data()
            whole = len(names) == len(parts)  # how many images are in some parts nobody knows
            progress.plan(run["counts"]["labelled"] if whole else len(names), 0, UNITS[whole])
            progress.start()
            try:
                for row in ray.data.from_items(names).map(one_part).iter_rows():
                    progress.add(row["images"] if whole else 1)
            except RayError as e:
                told = f"relabelling stopped ({last_line(e)}); run it again to go on"
                raise WorkError(told) from e
    return round(time.monotonic() - began, 3)
