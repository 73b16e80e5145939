"""What `zsplg tune labels` found, for programs and for people.

What enters: searches and verdicts of a run (see judgement.py). What leaves: tune.json, tuned.yaml,
figures and a table of trials in the run's folder, the same in MLflow, and the lines on stdout.

tuned.yaml holds what `relabel` and `label` need to make labels like these: all compose settings,
the templates, and the CLIP that they were tuned for. If nothing was better on held-out images than
the settings that the labels were made with, it holds those.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsplg_ray.cluster.track.study import StudyTracker
from zsplg_ray.cluster.tune.candidates import Candidate
from zsplg_ray.cluster.tune.judgement import (
    Subject,
    Verdict,
    choose,
    compared,
    marks,
    pooled_held_out,
)
from zsplg_ray.cluster.tune.search import Search
from zsplg_ray.cluster.tune.tuned import NAME, tuned_file, write_tuned
from zsplg_ray.label.space import TEMPLATES
from zsplg_ray.label.sweep import miou
from zsplg_ray.label.templates import template_set
from zsplg_ray.summary import command, counted, duration, told
from zsplg_ray.views import figures

TITLES = {"default": "as labelled", "tuned": "tuned", "per_class": "per class"}
"""How variants are called where people read."""

_CURVE_POINTS = 41
_MOST_SHOWN = 10
"""Classes whose thresholds are shown on a line; tuned.yaml has them all."""
_THRESHOLD = "compose.min_similarity"


@dataclass(frozen=True, eq=False)
class Found:
    """Everything that was found for one run."""

    subject: Subject
    searches: Sequence[Search]
    """One for each fold, and last the one whose settings are written (with one fold: the same)."""
    verdicts: Sequence[Verdict]
    """One for each search."""
    seconds: float
    """That searching and judging took, for all runs."""

    @property
    def folds(self) -> list[Verdict]:
        """Verdicts of the searches that held something out."""
        return [v for v in self.verdicts if v.held_out is not None]


def describe(known: Mapping[str, Any], found: Found) -> dict[str, Any]:
    """The content of tune.json.

    Args:
        known: What was known before the search; kept as it is.
        found: What came of it.

    Returns:
        `known`, and `chosen`: default, tuned or per_class; `settings`: those that were chosen;
        `miou_on_all`: mIoU of labels made with these, on all labelled images, seen or held out;
        `result`: what each variant is worth, see judgement.compared; `default`: the settings that
        the labels were made with; `variants`: those of each variant; `search`: how many settings
        were tried, in which seconds.
    """
    folds, final = found.folds, found.verdicts[-1]
    chosen = choose(folds)
    tried = sum(len(search.tried) for search in found.searches)
    study = dict(known)
    study["chosen"] = chosen
    study["settings"] = dict(final.settings[chosen])
    study["miou_on_all"] = miou(final.confusion[chosen].sum(axis=0))
    study["result"] = compared(folds, found.subject.classes.names)
    study["default"] = dict(final.settings["default"])
    study["variants"] = {name: dict(values) for name, values in final.settings.items()}
    study["search"] = {
        "folds": len(folds),
        "trials": found.searches[-1].trials,
        "tried": tried,
        "seconds": round(found.seconds, 3),
        "over": list(dict.fromkeys(d.setting for d in found.searches[-1].space.dimensions)),
    }
    return study


def write_study(
    candidate: Candidate, study: dict[str, Any], found: Found, tracker: StudyTracker
) -> None:
    """Write all files of a study and end its MLflow run; `study` gets its `mlflow`."""
    folder = candidate.folder
    write_tuned(folder, yaml_values(candidate, study), header(study))
    study["mlflow"] = None
    folder.write_bytes("tune.json", _json(study))  # figures and MLflow may take their time
    files = {"tuned/trials.csv": trials_table(found.searches[-1])}
    files |= {f"tuned/{name}.png": data for name, data in pictures(study, found).items()}
    for name, data in files.items():
        folder.write_bytes(name, data)
    files[NAME] = folder.read_bytes(NAME) or b""
    artefacts = {**files, "tune.json": _json(study)}
    study["mlflow"] = tracker.finish(study, metrics(study), artefacts)
    if study["mlflow"] is not None:
        folder.write_bytes("tune.json", _json(study))


def _json(study: Mapping[str, Any]) -> bytes:
    return (json.dumps(study, indent=1, ensure_ascii=False) + "\n").encode()


def metrics(study: Mapping[str, Any]) -> dict[str, float]:
    """Figures of the study for MLflow: `held_out_miou/tuned` and the like."""
    found = {}
    for name, result in study["result"].items():
        for part in ("tuning", "held_out"):
            found[f"{part}_miou/{name}"] = result[part]["miou"]
        found[f"held_out_gain/{name}"] = result["held_out"]["gain"]["miou"]
    return found | {"seconds": study["search"]["seconds"]}


def yaml_values(candidate: Candidate, study: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into tuned.yaml, by dotted name."""
    run = candidate.run
    given = {k: v for k, v in run["config"].items() if k in ("clip.gem_depth", "clip.dense_px")}
    values: dict[str, Any] = {k: run["resolved"][k] for k in ("clip.model", "clip.embedder")}
    values |= {k: v for k, v in given.items() if v is not None}
    of_the_run = run["resolved"][TEMPLATES]
    values[TEMPLATES] = list(template_set(study["settings"][TEMPLATES], of_the_run))
    values["prompts.background"] = list(run["resolved"]["prompts.background"])
    values |= {k: v for k, v in study["settings"].items() if k != TEMPLATES}
    return values


def header(study: Mapping[str, Any]) -> list[str]:
    """The comment above tuned.yaml."""
    result, chosen = study["result"], study["chosen"]
    images, folds = study["images"]["labelled"], study["search"]["folds"]
    now = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    lines = [
        f"zsplg tune labels, {now}: {study['folder']}",
        f"{images} labelled images of {study['truth']}, {_folds(folds)}",
        f"mIoU on held-out images: {_value(result['default'])} as labelled",
    ]
    if chosen == "default":
        return [*lines, "nothing better was found: these are the settings of the labels"]
    lines[-1] += f" -> {_value(result[chosen])} with these settings"
    return [*lines, relabel_command(study["folder"])]


def relabel_command(folder: str) -> str:
    """What makes the labels of a run anew with what was found."""
    return command("relabel", "--run", folder, "--config", tuned_file(folder))


def trials_table(search: Search) -> bytes:
    """CSV: a row for each setting of a search, as it was tried."""
    text = io.StringIO()
    first = search.tried[0]
    names = ["number", *first.settings, *first.metrics, "seconds"]
    rows = csv.DictWriter(text, names)
    rows.writeheader()
    for tried in sorted(search.tried, key=lambda t: t.number):
        seconds = round(tried.ended_s - tried.began_s, 4)
        rows.writerow(
            {"number": tried.number, **tried.settings, **tried.metrics, "seconds": seconds}
        )
    return text.getvalue().encode()


# Figures -----------------------------------------------------------------------------------------


def pictures(study: Mapping[str, Any], found: Found) -> dict[str, bytes]:
    """Name -> PNG."""
    final = found.verdicts[-1]
    chosen = study["chosen"] if study["chosen"] != "default" else "tuned"
    result, names = study["result"], study["classes"]
    iou = {TITLES[v]: result[v]["held_out"]["iou"] for v in dict.fromkeys(("default", chosen))}
    curves = {
        TITLES[v]: threshold_curve(found.subject, final.settings[v], final.held_out)
        for v in ("default", "tuned")
    }
    points = {}
    for v, counts_GKL in final.confusion.items():  # of the images that the curves are of
        seen = counts_GKL.sum(axis=0) if final.held_out is None else counts_GKL[final.held_out]
        told = marks(seen)
        points[TITLES[v]] = (told["coverage"], told["precision"] if told["coverage"] else math.nan)
    xs, scores = curves[TITLES["tuned"]]
    tuned_score = final.settings["tuned"]["compose.score"]
    marked = {
        TITLES[v]: final.settings[v][_THRESHOLD]
        for v in ("default", "tuned")
        if isinstance(final.settings[v][_THRESHOLD], float)
        and final.settings[v]["compose.score"] == tuned_score
    }
    label = f"compose.min_similarity ({tuned_score}), all else as tuned"
    return {
        "thresholds": figures.threshold_curves(xs, scores, chosen=marked, xlabel=label),
        "iou": figures.iou_bars(iou),
        "confusion": figures.confusion_matrix(pooled_held_out(found.folds, study["chosen"]), names),
        "coverage": figures.coverage_precision(
            {
                name: list(zip(ys["coverage"], ys["precision"], strict=True))
                for name, (_, ys) in curves.items()
            },
            points,
        ),
    }


def threshold_curve(
    subject: Subject, settings: Mapping[str, Any], held_out: int | None
) -> tuple[list[float], dict[str, list[float]]]:
    """Scores against `compose.min_similarity`, all else as in `settings`.

    Args:
        subject: The run.
        settings: Of a variant; one threshold for all classes takes the place of theirs.
        held_out: The group that is looked at; None: all images.

    Returns: thresholds, rising, and mIoU, coverage and precision at each (nan without labels).
    """
    low, high = subject.score_ends(settings)
    given = settings[_THRESHOLD]
    xs = {*np.linspace(low, high, _CURVE_POINTS).tolist()}
    xs |= {given} if isinstance(given, float) and low <= given <= high else set()
    scores: dict[str, list[float]] = {"mIoU": [], "coverage": [], "precision": []}
    for x in sorted(xs):
        confusion_GKL = subject.confusion({**settings, _THRESHOLD: float(x)})
        found = marks(confusion_GKL.sum(axis=0) if held_out is None else confusion_GKL[held_out])
        scores["mIoU"].append(found["miou"])
        scores["coverage"].append(found["coverage"])
        scores["precision"].append(found["precision"] if found["coverage"] else math.nan)
    return sorted(xs), scores


# Lines -------------------------------------------------------------------------------------------


def summary(result: Mapping[str, Any]) -> str:
    """What `tune_labels` returned, as lines for a terminal."""
    blocks = [_of_run(study) for study in result["runs"]]
    if len(blocks) > 1:
        blocks.append(_best_run(result))
    return "\n\n".join(blocks)


def _doubt(result: Mapping[str, Any]) -> list[str]:
    """A word of caution where a gain may be chance: it is less than twice its standard error."""
    gain, folds = result["held_out"]["gain"], len(result["held_out"]["folds"])
    if gain["sd"] is None or gain["miou"] > 2 * gain["sd"] / math.sqrt(folds):
        return []
    return ["the gain is within what folds differ by: more masks would make it sure"]


def _of_run(study: Mapping[str, Any]) -> str:
    images, search = study["images"], study["search"]
    gist = f"{search['tried']:,} settings tried in {duration(search['seconds'])}, "
    gist += f"on {counted(images['labelled'], 'labelled image')}, {_folds(search['folds'])}"
    if images["without_truth"]:
        gist += f"; {counted(images['without_truth'], 'image')} without a mask"
    lines = [gist]
    lines.append(f"{'mIoU':<12}  {'tuning':>15}  {'held out':>15}  {'gain':>16}")
    for name, result in study["result"].items():
        cells = [_value(result["tuning"]), _value(result["held_out"])]
        gain = "" if name == "default" else _gain(result["held_out"]["gain"])
        mark = "  <- chosen" if name == study["chosen"] else ""
        lines.append(f"{TITLES[name]:<12}  {cells[0]:>15}  {cells[1]:>15}  {gain:>16}{mark}")
    folder = study["folder"]
    places = {
        "run": folder,
        "settings": tuned_file(folder),
        "figures": tuned_file(folder, "tuned"),
    }
    if study["chosen"] == "default":
        lines.append("the labels as they are could not be beaten on held-out images, so the")
        lines.append("settings that were written are those that they were made with")
        return told(lines, places)
    lines += _doubt(study["result"][study["chosen"]])
    lines += changes(study["default"], study["settings"])
    return told(lines, places, [("apply", relabel_command(folder))])


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs, and that means something."""
    unused = {"compose.temperature"} if after["compose.score"] == "cosine" else set()
    return [
        f"{name}: {_shown(before[name])} -> {_shown(after[name])}"
        for name in after
        if after[name] != before[name] and name not in unused
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        told = [f"{name} {_shown(number)}" for name, number in value.items()]
        more = [f"and {len(told) - _MOST_SHOWN} more"] if len(told) > _MOST_SHOWN else []
        return ", ".join(told[:_MOST_SHOWN] + more)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best_run(result: Mapping[str, Any]) -> str:
    """Runs side by side, and which is best."""
    lines = [f"{'run':<30}  {'as labelled':>15}  {'chosen':>15}"]
    for study in result["runs"]:
        cells = [_value(study["result"][v]) for v in ("default", study["chosen"])]
        lines.append(f"{study['folder']:<30}  {cells[0]:>15}  {cells[1]:>15}")
    return "\n".join([*lines, "", f"best on held-out images: {result['best']}"])


def _folds(folds: int) -> str:
    return "a part of them held out" if folds == 1 else f"{folds} folds, each held out once"


def _value(result: Mapping[str, Any]) -> str:
    """Mean, and sd where there are folds; of a variant, that of held-out images."""
    part = result.get("held_out", result)
    return f"{part['miou']:.4f}" + ("" if part["sd"] is None else f" ± {part['sd']:.4f}")


def _gain(gain: Mapping[str, Any]) -> str:
    return f"{gain['miou']:+.4f}" + ("" if gain["sd"] is None else f" ± {gain['sd']:.4f}")
