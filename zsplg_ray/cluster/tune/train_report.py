"""What a study of training settings hands on to people and to other verbs.

What enters: the content of tune.json. What leaves: the settings of tuned.yaml, a summary, the
metrics of MLflow's parent run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from zsplg_ray.cluster.trainrun import weight_settings
from zsplg_ray.cluster.tune.train_space import Params
from zsplg_ray.cluster.tune.tuned import NAME, tuned_file
from zsplg_ray.config import TrainConfig
from zsplg_ray.settings import flatten, from_mapping
from zsplg_ray.summary import command, counted, duration, told

SHOWN = 10
"""Trials in a summary."""

_DATA = ("labeled", "labeled_masks", "unlabeled", "zeroshot", "val", "val_masks", "root", "classes")
"""Settings of a study that tuned.yaml leaves out."""

_ALSO = ("student.init", "train.validate_epochs")


def tuned_values(study: Mapping[str, Any]) -> dict[str, Any]:
    """What `train --config` needs to do again what the best trial did, but for the data: the
    settings that were searched, and of the others those that are not the defaults.
    """
    defaults = flatten(from_mapping(TrainConfig, {"labeled": "-", "out": "-"}))
    names = sorted({*weight_settings(study), *_ALSO})
    given = {k: study["config"][k] for k in names if study["config"][k] != defaults[k]}
    return given | study["best"]["params"]


def tuned_header(study: Mapping[str, Any]) -> list[str]:
    """What stands above them."""
    best, images = study["best"], study["data"]["validation"]["images"]
    day = time.strftime("%Y-%m-%d %H:%M")
    return [
        f"zsplg tune train, {day}: the best of {sum(counts(study).values())} trials",
        f"val mIoU {given_miou(study)} with the settings given, {best['val_miou']:.4f} with these,"
        f" on the {images} images that chose them",
        f"searched: {', '.join(best['params'])}",
    ]


def counts(study: Mapping[str, Any]) -> dict[str, int]:
    """How many trials ended, by how."""
    states = [trial["state"] for trial in study["trials"]]
    return {state: states.count(state) for state in ("complete", "stopped", "failed")}


def given_miou(study: Mapping[str, Any]) -> str:
    """The val mIoU of trial 0, which has the settings as they were given."""
    value = study["trials"][0]["val_miou"] if study["trials"] else None
    return "unknown" if value is None else f"{value:.4f}"


def study_metrics(study: Mapping[str, Any]) -> dict[str, float]:
    """Of MLflow's parent run."""
    metrics = {f"trials_{state}": float(n) for state, n in counts(study).items()}
    if (best := study["best"]) is not None:
        metrics |= {"best_trial": float(best["number"]), "val_miou": best["val_miou"]}
    return metrics | {"seconds": study["seconds"]}


def summary(study: Mapping[str, Any]) -> str:
    """What a person wants to know of a study: the best trials, and what to do next."""
    ranked = [t for t in study["trials"] if t["val_miou"] is not None and t["state"] != "failed"]
    ranked.sort(key=lambda t: -t["val_miou"])
    lines = [f"{'trial':>5}  {'val mIoU':>8}  {'epochs':>6}  {'':<8}  settings"]
    for t in ranked[:SHOWN]:
        head = f"{t['number']:>5}  {t['val_miou']:>8.4f}  {t['epochs']:>6}  {t['state']:<8}"
        lines.append(f"{head}  {in_short(t['params'])}")
    ended = counts(study)
    gist = f"{counted(sum(ended.values()), 'trial')} in {duration(study['seconds'])}"
    gist += f": {ended['complete']} complete"
    gist += f", {ended['stopped']} stopped early" if ended["stopped"] else ""
    gist += f", {ended['failed']} failed" if ended["failed"] else ""
    best = study["best"]
    if best is None:
        return told([gist])
    out = study["config"]["out"]
    model, settings = (tuned_file(out, name) for name in ("best.pt", NAME))
    done = [
        *lines,
        gist,
        f"val mIoU {given_miou(study)} with the settings given (trial 0), "
        f"{best['val_miou']:.4f} with those of trial {best['number']}",
        f"the choice rests on {study['data']['validation']['images']} images and flatters "
        "itself: judge on others",
    ]
    then = [
        ("judge", f"{command('evaluate', model)} --truth MASKS"),
        ("train", _training(study, settings)),
    ]
    return told(done, {"model": model, "settings": settings}, then)


def _training(study: Mapping[str, Any], settings: str) -> str:
    """`zsplg train` with what was found and the data of the study."""
    words = ["train", "--config", settings]
    for name in _DATA:
        if (value := study["config"].get(name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return f"{command(*words)} --out MODEL"


def trial_line(
    trial: Mapping[str, Any], seconds: float, best: bool, config: Mapping[str, Any]
) -> str:
    """What a person sees of a trial that ended.

    Args:
        trial: Of tune.json.
        seconds: How long it ran this time.
        best: Whether it is the best so far.
        config: The study's flat settings.
    """
    if trial["state"] == "failed":
        told = trial["error"]
    elif trial["val_miou"] is None:
        told = "no validation"
    else:
        epochs = f"{trial['epochs']} of {config['train.epochs']} epochs"
        told = f"val mIoU {trial['val_miou']:.4f}{' (best)' if best else ''}, {epochs}"
    head = f"trial {trial['number']} of {config['trials']} {trial['state']}"
    return f"{head}: {told}, {duration(seconds)}; {in_short(trial['params'])}"


def in_short(params: Params) -> str:
    """Settings in few words."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in params.items()
    )
