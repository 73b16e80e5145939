"""The command line: `zsplg VERB [--config FILE.yaml] [--section.setting VALUE ...]`.

What enters: argv. What leaves: one call into the room that does the work, its result on stdout, and
an exit code: 0 done, 1 the work failed, 2 bad input (one line on stderr, nothing written), 130
interrupted. Flags are read by flags.py. Heavy packages are imported by the verb that needs them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from zsplg_ray import __version__, config, flags
from zsplg_ray.settings import Section, WorkError, complain, nearest, setting_types

S = TypeVar("S", bound=Section)


# The verbs ---------------------------------------------------------------------------------------


def label(given: config.LabelConfig) -> int:
    """Label images; see config.LabelConfig."""
    from zsplg_ray.cluster.label import label as run_label

    run = run_label(given)
    _tell(run, given.out, given.json)
    return 0


def relabel(given: config.RelabelConfig) -> int:
    """Compose labels again from segments; see config.RelabelConfig."""
    from zsplg_ray.cluster.relabel import relabel as run_relabel

    _tell(run_relabel(given), given.run, given.json)
    return 0


def _tell(run: Mapping[str, Any], folder: str, as_json: bool) -> None:
    """What a run did, and the picture of its first images."""
    from zsplg_ray.rundir import RunFolder
    from zsplg_ray.views.pictures import write_preview

    preview = write_preview(RunFolder(folder))
    if as_json:
        print(json.dumps(run))
        return
    counts = run["counts"]
    print(f"{counts['labelled']} images labelled in {folder}")
    if counts["quarantined"]:
        print(f"{counts['quarantined']} could not be done, see {folder}/errors")
    if preview:
        print(f"first images and their labels: {folder}/{preview}")


def train(given: config.TrainConfig) -> int:
    """Train a model; see config.TrainConfig."""
    from zsplg_ray.cluster.train import summary
    from zsplg_ray.cluster.train import train as run_train

    run = run_train(given)
    print(json.dumps(run) if given.json else summary(run, given.out))
    return 0


def tune_labels(given: config.TuneLabelsConfig) -> int:
    """Search for thresholds; see config.TuneLabelsConfig."""
    from zsplg_ray.cluster.tune import labels as room

    study = room.tune_labels(given)
    print(json.dumps(study) if given.json else room.summary(study))
    return 0


def tune_train(given: config.TuneTrainConfig) -> int:
    """Search for training settings; see config.TuneTrainConfig."""
    from zsplg_ray.cluster.tune import train as room

    study = room.tune_train(given)
    print(json.dumps(study) if given.json else room.summary(study))
    return 0


def predict(given: config.PredictConfig) -> int:
    """Label images with a trained model; see config.PredictConfig."""
    from zsplg_ray.cluster.predict import predict as run_predict

    _tell(run_predict(given), given.out, given.json)
    return 0


def evaluate(given: config.EvaluateConfig) -> int:
    """Compare labels, or a model's predictions, with ground truth; see config.EvaluateConfig."""
    from zsplg_ray.views.evaluate import evaluate as run_evaluate
    from zsplg_ray.views.evaluate import table

    result = run_evaluate(given)
    print(json.dumps(result) if given.json else table(result))
    return 0


def shapes(given: config.ShapesConfig) -> int:
    """Write scenes of the embedded world; see config.ShapesConfig."""
    from zsplg_ray.shapes.scenes import write_voc

    write_voc(given.out, given.n, given.seed)
    print(given.out)
    return 0


def demo(given: config.DemoConfig) -> int:
    """The whole pipeline in small; see config.DemoConfig."""
    from zsplg_ray.demo import demo as run_demo

    print(run_demo(given))
    return 0


def doctor(given: config.DoctorConfig) -> int:
    """Look at this machine; see config.DoctorConfig."""
    from zsplg_ray.cluster.doctor import examine, report

    findings = examine(given)
    print(json.dumps(findings) if given.json else report(findings))
    return int(any(f["state"] == "fail" for f in findings))


VERBS: dict[str, tuple[type[Section], Callable[[Any], int], str]] = {
    "label": (config.LabelConfig, label, "images -> segments/ and labels/"),
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
    "shapes": (config.ShapesConfig, shapes, "scenes of the embedded world, VOC layout"),
    "demo": (config.DemoConfig, demo, "the whole pipeline on the embedded world"),
    "doctor": (config.DoctorConfig, doctor, "machine, GPUs, weights, Ray, storage"),
}

EXAMPLES = {
    "label": "zsplg label --images photos/ --classes 'dog,cat' --out run/ --sam vit_b",
    "relabel": "zsplg relabel --run run/ --compose.min-similarity 0.25",
    "tune labels": "zsplg tune labels --run run/ --truth masks/ --trials 1000",
    "train": "zsplg train --labeled VOC2012/ --unlabeled photos/ --zeroshot run/ --out model/",
    "tune train": "zsplg tune train --labeled VOC2012/ --unlabeled photos/ --zeroshot run/ "
    "--out study/ --trials 20",
    "predict": "zsplg predict --model model/ --images photos/ --out predicted/",
    "evaluate": "zsplg evaluate run/ --truth masks/",
    "shapes": "zsplg shapes --n 100 --seed 0 --out scenes/",
    "demo": "zsplg demo --out zsplg_demo/",
    "doctor": "zsplg doctor --sam vit_b",
}


def parse(cls: type[S], argv: Sequence[str], verb: str) -> S:
    """The settings of a verb from its flags; see `flags.parse`."""
    theirs = {name for other, _, _ in VERBS.values() for name in setting_types(other)}
    stored = _settings_of_labels if cls is config.RelabelConfig else _nothing_stored
    example = EXAMPLES.get(verb, "")
    return flags.parse(cls, argv, verb, example=example, theirs=theirs, stored=stored)


def _settings_of_labels(argv: Sequence[str], in_file: Mapping[str, Any]) -> dict[str, Any]:
    """`relabel` starts from the settings that the run's labels were made with."""
    run = flags.value_of(argv, "--run") or in_file.get("run")
    if not isinstance(run, str):
        return {}
    from zsplg_ray.rundir import RunFolder

    return RunFolder(run).label_settings()


def _nothing_stored(argv: Sequence[str], in_file: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def usage() -> str:
    """The text of `zsplg --help`."""
    lines = [f"  {name:<11} {about}" for name, (_, _, about) in VERBS.items()]
    return "\n".join(
        [
            f"zsplg {__version__}: unlabelled images + class names -> a segmentation model",
            "",
            "usage: zsplg VERB [--config FILE.yaml] [--section.setting VALUE ...]",
            "",
            *lines,
            "",
            "zsplg VERB --help tells every setting with unit, range and default.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Entry point of the console script `zsplg`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), argv[words:]
    try:
        _start_log()
        if verb not in VERBS:
            near = nearest(" ".join(argv[:2]) if verb == "tune" else verb, VERBS)
            fix = f"did you mean `{near}`?" if near else "see zsplg --help"
            raise ValueError(complain("verb", f"one of {', '.join(VERBS)}", verb, fix))
        cls, run, _ = VERBS[verb]
        return run(parse(cls, rest, verb))
    except ValueError as e:
        print(f"error: {' '.join(str(e).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "goes on from there" if verb != "tune train" else "with --resume goes on"
        print(f"interrupted; what is finished is kept, the same command {goes_on}", file=sys.stderr)
        return 130
    except (WorkError, OSError) as e:  # OSError: a full disk, a folder that may not be written
        logging.getLogger(__name__).debug("what failed", exc_info=True)
        print(f"error: {' '.join(str(e).splitlines())}", file=sys.stderr)
        return 1


def _start_log() -> None:
    """Messages of this project to stderr, from the level in $ZSPLG_LOG on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    level = os.environ.get("ZSPLG_LOG", "INFO").upper()
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if level not in levels:
        rule, fix = f"one of {', '.join(levels)}", "change or unset this environment variable"
        raise ValueError(complain("ZSPLG_LOG", rule, level, fix))
    logging.getLogger("zsplg_ray").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
