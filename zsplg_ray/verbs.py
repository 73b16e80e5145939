"""What each verb of the command line does: one call into the room that works, its result printed.

What enters: the checked settings of a verb. What leaves: its result on stdout and an exit code.
Heavy packages are imported by the verb that needs them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from zsplg_ray import config
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import Section, WorkError
from zsplg_ray.signals import Terminated

if TYPE_CHECKING:
    from zsplg_ray.cluster.submit.follow import Follower
    from zsplg_ray.cluster.submit.job import Command, Job

log = logging.getLogger(__name__)


_LOADING = "loading Ray and the libraries"


def label(given: config.LabelConfig) -> int:
    """Label images; see config.LabelConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("label", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.label import label as run_label

        run = run_label(given, progress=progress)
        preview = _preview(given.out)
    return _tell(run, given.out, given.json, "label", preview)


def estimate(given: config.EstimateConfig) -> int:
    """Tell what `label` will take; see config.EstimateConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("estimate", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.estimate.estimate import estimate as run_estimate
        from zsplg_ray.cluster.estimate.told import told

        found = run_estimate(given, progress=progress)
    print(json.dumps(found) if given.json else masked(told(found)))
    return 0


def relabel(given: config.RelabelConfig) -> int:
    """Compose labels again from segments; see config.RelabelConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("relabel", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.relabel import relabel as run_relabel

        run = run_relabel(given, progress=progress)
        preview = _preview(given.run)
    return _tell(run, given.run, given.json, "relabel", preview)


def predict(given: config.PredictConfig) -> int:
    """Label images with a trained model; see config.PredictConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("predict", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.predict import predict as run_predict

        run = run_predict(given, progress=progress)
        preview = _preview(given.out)
    return _tell(run, given.out, given.json, "predict", preview)


def _preview(folder: str) -> str | None:
    """The picture of a run's first images."""
    from zsplg_ray.rundir import RunFolder
    from zsplg_ray.views.pictures import write_preview

    return write_preview(RunFolder(folder))


def _tell(
    run: Mapping[str, Any], folder: str, as_json: bool, verb: str, preview: str | None
) -> int:
    """What a run did."""
    from zsplg_ray.views.summaries import of_labels

    print(json.dumps(run) if as_json else of_labels(run, folder, preview, verb))
    return 0


def train(given: config.TrainConfig) -> int:
    """Train a model; see config.TrainConfig."""
    from zsplg_ray.cluster.training import Training

    with Training(not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.train import train as run_train
        from zsplg_ray.views.summaries import of_training

        run = run_train(given, progress=progress)
    print(json.dumps(run) if given.json else of_training(run, given))
    return 0


def tune_labels(given: config.TuneLabelsConfig) -> int:
    """Search for thresholds; see config.TuneLabelsConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("tune labels", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.tune import labels as room

        study = room.tune_labels(given, progress=progress)
    print(json.dumps(study) if given.json else room.summary(study))
    return 0


def tune_train(given: config.TuneTrainConfig) -> int:
    """Search for training settings; see config.TuneTrainConfig."""
    from zsplg_ray.cluster.progress import Progress

    with Progress("tune train", not given.quiet) as progress:
        progress.waits(_LOADING)
        from zsplg_ray.cluster.tune import train as room

        study = room.tune_train(given, progress=progress)
    print(json.dumps(study) if given.json else room.summary(study))
    return 0


def evaluate(given: config.EvaluateConfig) -> int:
    """Compare labels, or a model's predictions, with ground truth; see config.EvaluateConfig."""
    from zsplg_ray.views.evaluate import evaluate as run_evaluate
    from zsplg_ray.views.evaluate import table

    result = run_evaluate(given)
    print(json.dumps(result) if given.json else table(result))
    return 0


def report(given: config.ReportConfig) -> int:
    """Make a page about a run; see config.ReportConfig."""
    from zsplg_ray.views.report import report as make_report
    from zsplg_ray.views.summaries import of_page

    result = make_report(given)
    print(json.dumps(result) if given.json else of_page(result))
    return 0


def export(given: config.ExportConfig) -> int:
    """Labels in the format of another tool; see config.ExportConfig."""
    from zsplg_ray.views.export import export as run_export
    from zsplg_ray.views.summaries import of_export

    result = run_export(given)
    print(json.dumps(result) if given.json else of_export(result))
    return 0


def review_export(given: config.ReviewExportConfig) -> int:
    """Pick images to correct; see config.ReviewExportConfig."""
    from zsplg_ray.views.review import exporting as room

    record = room.export_picks(given)
    print(json.dumps(record) if given.json else room.summary(record))
    return 0


def review_import(given: config.ReviewImportConfig) -> int:
    """Take corrected masks back; see config.ReviewImportConfig."""
    from zsplg_ray.cluster.lock import only_run
    from zsplg_ray.rundir import RunFolder
    from zsplg_ray.views.review import importing as room

    folder = RunFolder(given.out)
    with only_run(folder):
        result = room.import_masks(given, folder)
    print(json.dumps(result) if given.json else room.summary(result))
    return 0


def submit(given: config.SubmitConfig, command: Command) -> int:
    """Run a verb as a job on a cluster; see config.SubmitConfig."""
    from zsplg_ray.cluster.submit import follow, job

    made = job.submit(given, command)
    if not given.wait:
        where = f"\nits result: {made.out}" if made.out else ""
        about = f"{made.job_id} is a job on {made.address}\n{made.how_to}{where}"
        print(json.dumps(made.told("SUBMITTED", None)) if given.json else about)
        return 0
    log.info("%s is a job on %s; its log:", made.job_id, made.address)
    show = functools.partial(print, end="", file=sys.stderr if given.json else None, flush=True)
    follower = follow.Follower(made.client, made.job_id, follow.JobLog(show))
    try:
        ended = follower.watch()
        code = follow.exit_code(ended)
    except KeyboardInterrupt as e:
        return _leave_or_stop(made, follower, ask=not isinstance(e, Terminated))
    if given.json:
        print(json.dumps(made.told(ended.status.value, code)))
    if why := follow.why_failed(ended):
        raise WorkError(why)
    log.info("%s ended: %s", made.job_id, ended.status.value)
    return code


def _leave_or_stop(made: Job, follower: Follower, *, ask: bool) -> int:
    """Interrupted while a job is followed: it is stopped if the user says so, else left alone."""
    told = f"{made.job_id} goes on"
    with contextlib.suppress(KeyboardInterrupt):  # a second one: no
        if ask and sys.stdin.isatty():
            print(f"\nstop {made.job_id}? [y/N] ", end="", file=sys.stderr, flush=True)
            if sys.stdin.readline().strip().lower() in ("y", "yes"):
                made.client.stop_job(made.job_id)
                told = f"{made.job_id} was asked to stop"
                told = f"{made.job_id} ended: {follower.watch().status.value}"
                print(told, file=sys.stderr)
                return 130
    print(f"{told}\n{made.how_to}", file=sys.stderr)
    return 130


def shapes(given: config.ShapesConfig) -> int:
    """Write scenes of the embedded world; see config.ShapesConfig."""
    from zsplg_ray.shapes.scenes import write_voc
    from zsplg_ray.views.summaries import of_scenes

    write_voc(given.out, given.n, given.seed)
    print(of_scenes(given))
    return 0


def demo(given: config.DemoConfig) -> int:
    """The whole pipeline in small; see config.DemoConfig."""
    from zsplg_ray.demo import demo as run_demo

    print(run_demo(given))
    return 0


def doctor(given: config.DoctorConfig) -> int:
    """Look at this machine; see config.DoctorConfig."""
    from zsplg_ray.cluster.doctor.examine import examine
    from zsplg_ray.cluster.doctor.finding import report

    findings = examine(given)
    print(masked(json.dumps(findings) if given.json else report(findings)))
    return int(any(f["state"] == "fail" for f in findings))


SUBMIT = "submit"
VERBS: dict[str, tuple[type[Section], Callable[..., int], str]] = {
    "label": (config.LabelConfig, label, "images -> segments/ and labels/"),
    "estimate": (config.EstimateConfig, estimate, "hours, storage, money that label will take"),
    "relabel": (config.RelabelConfig, relabel, "segments/ -> labels/ again, no SAM, no GPU"),
    "tune labels": (config.TuneLabelsConfig, tune_labels, "a few masks -> thresholds for labels"),
    "train": (config.TrainConfig, train, "few labelled, many unlabelled images -> a model"),
    "tune train": (
        config.TuneTrainConfig,
        tune_train,
        "many trainings -> the best settings",
    ),
    "predict": (config.PredictConfig, predict, "a model over images -> labels/"),
    "evaluate": (config.EvaluateConfig, evaluate, "labels, PNG masks or a model against truth"),
    "report": (config.ReportConfig, report, "a run -> one HTML page to look at it"),
    "export": (config.ExportConfig, export, "labels -> VOC, COCO, YOLO, Label Studio, CVAT, ..."),
    "review export": (
        config.ReviewExportConfig,
        review_export,
        "the images where correcting is worth most -> Label Studio, VOC, COCO",
    ),
    "review import": (
        config.ReviewImportConfig,
        review_import,
        "corrected masks -> labels for train --labeled",
    ),
    "shapes": (config.ShapesConfig, shapes, "scenes of the embedded world, VOC layout"),
    "demo": (config.DemoConfig, demo, "the whole pipeline on the embedded world"),
    "doctor": (config.DoctorConfig, doctor, "machine, GPUs, weights, Ray, storage"),
    SUBMIT: (config.SubmitConfig, submit, "any verb as a job on a Ray cluster"),
}

EXAMPLES = {
    "label": "zsplg label --images photos/ --classes 'dog,cat' --out run/ --sam vit_b",
    "estimate": "zsplg estimate --images photos/ --classes 'dog,cat' --sam vit_b --price 2",
    "relabel": "zsplg relabel --run run/ --compose.min-similarity 0.25",
    "tune labels": "zsplg tune labels --run run/ --truth masks/ --trials 1000",
    "train": "zsplg train --labeled VOC2012/ --unlabeled photos/ --zeroshot run/ --out model/",
    "tune train": "zsplg tune train --labeled VOC2012/ --unlabeled photos/ --zeroshot run/ "
    "--out study/ --trials 20",
    "predict": "zsplg predict --model model/ --images photos/ --out predicted/",
    "evaluate": "zsplg evaluate run/ --truth masks/",
    "report": "zsplg report run/ --truth masks/ --compare predicted/ --out report.html",
    "export": "zsplg export run/ --format coco --to coco/",
    "review export": "zsplg review export --run run/ --to review/ --budget 50 --compare predicted/",
    "review import": "zsplg review import --masks export.json --run run/ --out corrected/",
    "shapes": "zsplg shapes --n 100 --seed 0 --out scenes/",
    "demo": "zsplg demo --out zsplg_demo/",
    "doctor": "zsplg doctor --sam vit_b",
    SUBMIT: "zsplg submit --address http://head:8265 --wait -- label --images s3://bucket/photos "
    "--classes voc --out s3://bucket/run",
}
