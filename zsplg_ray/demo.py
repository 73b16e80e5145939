"""`zsplg demo`: the whole pipeline on scenes of the embedded world, for a first look.

What enters: nothing (the scenes are made; the tiny SAM, the tiny CLIP and a small pretrained
backbone come with the package). What leaves: a folder with scenes, runs, models, pictures and a
page to look at; and tables of scores: of the zero-shot labels, then of two students on scenes that
neither has seen.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from pathlib import Path
from typing import Any

from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.predict import predict
from zsplg_ray.cluster.session import ray_session
from zsplg_ray.cluster.train import train
from zsplg_ray.config import (
    DemoConfig,
    EvaluateConfig,
    LabelConfig,
    PredictConfig,
    ReportConfig,
    TrainConfig,
)
from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import from_mapping
from zsplg_ray.shapes.recipe import TRAIN_SETTINGS
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.shapes.splits import few_labelled, write_splits
from zsplg_ray.views.evaluate import evaluate, table
from zsplg_ray.views.pictures import run_sheet
from zsplg_ray.views.report import report
from zsplg_ray.vocab import class_list

log = logging.getLogger(__name__)

UNSEEN_SEED = 5_000
"""First of the scenes by which the students are judged."""

STUDENTS = {
    "unimatch": "UniMatch, which knows nothing of the zero-shot labels",
    "fused": "UniMatch with the zero-shot labels in its targets",
}


def demo(config: DemoConfig) -> str:
    """Make scenes, label them, train two students, compare; returns what to print."""
    began = time.monotonic()
    out = Path(config.out)
    scenes = _scenes(out / f"scenes_{config.n}", config.n, 0)
    embedders = ("crop", "gem") if config.embedder == "both" else (config.embedder,)
    runs = [out / f"{embedder}_{config.n}" for embedder in embedders]
    lines, store = [], _store(out)
    with ray_session(config.ray):
        for embedder, run in zip(embedders, runs, strict=True):
            log.info("labelling them with the tiny SAM and CLIP, embedder %s, in %s", embedder, run)
            settings = {"images": str(scenes), "classes": "shapes", "out": str(run)}
            settings |= {"mlflow.uri": store} if store else {}
            settings |= {"sam.model": "shapes", "clip.model": "shapes", "clip.embedder": embedder}
            label(from_mapping(LabelConfig, settings))
            lines.append(_scores(run, scenes, embedder))
        if config.epochs:
            lines.append(_students(out, scenes, runs[0], config))
            runs.append(_enhanced(out, scenes, runs[0], config))
            lines.append(_scores(runs[-1], scenes, "enhanced"))
    page = report(
        ReportConfig(
            run=str(runs[0]),
            compare=tuple(map(str, runs[1:])),
            truth=str(scenes),
            out=str(out / "report.html"),
        )
    )
    if store:
        lines.append(f"every run, in a browser: mlflow ui --backend-store-uri {shlex.quote(store)}")
    lines.append(f"all in {time.monotonic() - began:.0f} s")
    lines.append(f"look at it all: {page['url']}")
    return "\n\n".join(lines)


def _store(out: Path) -> str | None:
    """One MLflow store for all runs, unless the environment names another."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        return None
    return f"sqlite:///{out.absolute()}/mlflow.db"


def _scenes(folder: Path, n: int, seed: int) -> Path:
    if not (folder / "ImageSets" / "Segmentation" / "val.txt").exists():  # written last
        log.info("making %d scenes with masks in %s", n, folder)
        write_voc(folder, n, seed)
    return folder


_ABOUT = {
    "crop": "crop: zero-shot labels",
    "gem": "gem: zero-shot labels",
    "enhanced": "enhanced: the second student and the zero-shot labels, fused, on scenes of which "
    "some were its labelled ones,",
}


def _scores(run: Path, scenes: Path, kind: str) -> str:
    result = evaluate(EvaluateConfig(labels=str(run), truth=str(scenes)))
    sheet = run / "pictures.png"
    picture = run_sheet(RunFolder(str(run)), class_list("shapes"), open_truth(str(scenes)))
    sheet.write_bytes(picture or b"")
    told = f"{_ABOUT[kind]} against the truth\n\n{table(result)}"
    return f"{told}\npictures (image, labels, truth): {sheet}"


def _enhanced(out: Path, scenes: Path, labels: Path, config: DemoConfig) -> Path:
    """Predictions of the student that knows the zero-shot labels, fused with these."""
    run = out / f"enhanced_{config.n}_{config.epochs}"
    log.info("predicting with that student, fused with the zero-shot labels, in %s", run)
    values = {"model": str(_model(out, "fused", config)), "images": str(scenes), "out": str(run)}
    values["fuse"] = str(labels)
    values |= {"mlflow.uri": store} if (store := _store(out)) else {}
    predict(from_mapping(PredictConfig, values))
    return run


def _model(out: Path, student: str, config: DemoConfig) -> Path:
    return out / f"{student}_{config.n}_{config.epochs}"


def _students(out: Path, scenes: Path, labels: Path, config: DemoConfig) -> str:
    """Train with and without the zero-shot labels; a quarter of the masks may be looked at."""
    unseen = _scenes(out / "unseen_100", 100, UNSEEN_SEED)
    truth = open_truth(str(scenes))
    labelled = few_labelled(truth, max(1, config.n // 4), seed=0)
    splits = write_splits(out / f"splits_{config.n}", labelled, truth.ids)
    lines = [f"two students, {len(labelled)} scenes with masks and {config.n - len(labelled)} more"]
    for name, about in STUDENTS.items():
        model = _model(out, name, config)
        log.info("training a student in %s: %s", model, about)
        values: dict[str, Any] = {**TRAIN_SETTINGS, **splits, "root": str(scenes)}
        values |= {"classes": "shapes", "out": str(model), "train.epochs": config.epochs}
        values |= {"train.validate_epochs": max(1, config.epochs // 4)}
        values |= {"mlflow.uri": store} if (store := _store(out)) else {}
        if name == "unimatch":
            values |= {"fusion.rule": "unimatch"}
        else:
            values |= {"zeroshot": str(labels)}
        train(from_mapping(TrainConfig, values))
        result = evaluate(EvaluateConfig(labels=str(model), truth=str(unseen)))
        lines.append(f"{name:<9} mIoU {result['miou']:.4f} on 100 unseen scenes: {about} ({model})")
    return "\n".join(lines)
