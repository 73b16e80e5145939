"""The command line: `zsplg VERB [--config FILE.yaml] [--section.setting VALUE ...]`.

What enters: argv. What leaves: one call into the room that does the work, its result on stdout, and
an exit code: 0 done, 1 the work failed, 2 bad input (one line on stderr, nothing written), 130
interrupted, by Ctrl-C or by SIGTERM, which is how Ray, Slurm and Kubernetes stop a job. Flags are
read by flags.py. Heavy packages are imported by the verb that needs them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from zsplg_ray import __version__, config, flags
from zsplg_ray.safe_text import MAX_CHARS, SafeFormatter, masked, one_line, shortened
from zsplg_ray.settings import Section, WorkError, complain, nearest, setting_types
from zsplg_ray.signals import Terminated, sigterm_interrupts

if TYPE_CHECKING:
    from zsplg_ray.cluster.submit.follow import Follower
    from zsplg_ray.cluster.submit.job import Command, Job

S = TypeVar("S", bound=Section)
log = logging.getLogger("zsplg_ray.cli")  # also where this file is the main module


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
    folder = masked(folder)
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
    print(json.dumps(run) if given.json else masked(summary(run, given.out)))
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
    print(json.dumps(study) if given.json else masked(room.summary(study)))
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
    print(masked(json.dumps(findings) if given.json else report(findings)))
    return int(any(f["state"] == "fail" for f in findings))


SUBMIT = "submit"
VERBS: dict[str, tuple[type[Section], Callable[..., int], str]] = {
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
    SUBMIT: (config.SubmitConfig, submit, "any verb as a job on a Ray cluster"),
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
    SUBMIT: "zsplg submit --address http://head:8265 --wait -- label --images s3://bucket/photos "
    "--classes voc --out s3://bucket/run",
}


def parse(cls: type[S], argv: Sequence[str], verb: str, *, elsewhere: bool = False) -> S:
    """The settings of a verb from its flags; see `flags.parse`.

    `elsewhere`: it will run on other machines, and only there looks for what a run has stored.
    """
    theirs = {name for other, _, _ in VERBS.values() for name in setting_types(other)}
    known = cls is config.RelabelConfig and not elsewhere
    stored = _settings_of_labels if known else _nothing_stored
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
    verb = argv[0]
    try:
        _start_log()
        verb, rest = _take_verb(argv)
        cls, run, _ = VERBS[verb]
        with sigterm_interrupts():
            if verb != SUBMIT:
                return run(parse(cls, rest, verb))
            own, inner = _split(rest)
            return run(_submit_settings(own), _command(inner))
    except ValueError as e:
        print(f"error: {_on_one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"interrupted; {e if e.args else _AFTER.get(verb, _AGAIN)}", file=sys.stderr)
        return 130
    except (WorkError, OSError) as e:  # OSError: a full disk, a folder that may not be written
        log.debug("what failed", exc_info=True)
        print(f"error: {_on_one_line(e)}", file=sys.stderr)
        return 1


_AGAIN = "what is finished is kept, the same command goes on from there"
_AFTER = {
    "tune train": "what is finished is kept, the same command with --resume goes on",
    SUBMIT: "no job was submitted",
}
"""What an interrupted verb has left, if the interruption does not tell it."""


def _take_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that a command line begins with, and the rest. Raises: ValueError."""
    words = 2 if " ".join(argv[:2]) in VERBS else 1
    verb, rest = " ".join(argv[:words]), list(argv[words:])
    if verb not in VERBS:
        near = nearest(" ".join(argv[:2]) if verb == "tune" else verb, VERBS)
        fix = f"did you mean `{near}`?" if near else "see zsplg --help"
        raise ValueError(complain("verb", f"one of {', '.join(VERBS)}", verb, fix))
    return verb, rest


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of `submit`, and what stands behind `--`. Raises: ValueError if nothing does."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, inner = list(argv[:at]), list(argv[at + 1 :])
    if not inner and not {"-h", "--help"} & set(own):
        rule, fix = "given behind --", "write zsplg submit --address URL -- VERB ..."
        raise ValueError(complain("verb", rule, " ".join(own) or "nothing", fix))
    return own, inner


def _submit_settings(argv: Sequence[str]) -> config.SubmitConfig:
    """The settings of `submit`. Raises: ValueError, which never shows what `env` holds."""
    try:
        return parse(config.SubmitConfig, argv, SUBMIT)
    except ValueError as e:
        if not str(e).startswith("env "):
            raise
    fix = "write --env NAME VALUE [NAME VALUE ...]"
    raise ValueError(complain("env", "a name and a text for each variable", "other", fix))


def _command(argv: Sequence[str]) -> Command:
    """A verb that will run in a job. Raises: ValueError if something is wrong with its settings."""
    verb, rest = _take_verb(argv)
    if verb == SUBMIT:
        fix = "name the verb that does the work"
        raise ValueError(complain("verb", "one that runs in a job", SUBMIT, fix))
    settings = parse(VERBS[verb][0], rest, verb, elsewhere=True)
    from zsplg_ray.cluster.submit.job import Command

    return Command(verb, rest, settings, flags.value_of(rest, "--config"))


def _on_one_line(error: BaseException) -> str:
    """What an error says, whatever is in the names and addresses that it tells of."""
    return one_line(masked(shortened(" ".join(str(error).splitlines()), 4 * MAX_CHARS)))


def _start_log() -> None:
    """Messages of this project to stderr, from the level in $ZSPLG_LOG on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = os.environ.get("ZSPLG_LOG", "INFO").upper()
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if level not in levels:
        rule, fix = f"one of {', '.join(levels)}", "change or unset this environment variable"
        raise ValueError(complain("ZSPLG_LOG", rule, level, fix))
    logging.getLogger("zsplg_ray").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
