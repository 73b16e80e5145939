"""What each way of using zero-shot labels is worth, on the embedded world.

`python -m zsplg_ray.cluster.ablation --out DIR` makes scenes, labels them with the real `zsplg
label`, trains one student for each arm and seed, and prints the table: mean and standard deviation
of the mIoU on held-out scenes, of the last weights and of those that the hold-out chose.

What makes it fair: every arm starts from the same weights, has the same batches in the same order
and the same seconds of CPU (steps differ: their cost is measured first); the labelled scenes hold
every class at least twice; the scenes that judge are seen by nobody before the end. What is done
stands in DIR/results.jsonl and is not done again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zsplg_ray.cluster.label import label
from zsplg_ray.config import EvaluateConfig, LabelConfig, TrainConfig
from zsplg_ray.masks import Truth, open_truth
from zsplg_ray.records import IGNORE, decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import fingerprint, from_mapping, override
from zsplg_ray.shapes.recipe import TRAIN_SETTINGS, with_weights
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.shapes.splits import few_labelled, write_splits
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.loader import batches
from zsplg_ray.student.loop import Report, fit, validator
from zsplg_ray.student.state import Ranks, Schedule, TrainState
from zsplg_ray.student.step import train_step
from zsplg_ray.views.evaluate import evaluate

log = logging.getLogger(__name__)

POOL_SEED = 10_000
WANTED_PRECISION = 0.85
"""With --trust `fusion.min_score` is the least score from which on so many of the pixels that the
zero-shot labels name are right, on the labelled scenes."""

FUSING = ("model_else_zeroshot", "zeroshot_else_model", "agree", "mix")
"""Rules that use both the label and the prediction; without a least score the second is the same as
`zeroshot`."""

ARMS: dict[str, dict[str, Any]] = {
    "supervised": {"unlabeled": None, "zeroshot": None},
    "unimatch": {"fusion.rule": "unimatch", "zeroshot": None},
    "zeroshot": {"fusion.rule": "zeroshot"},
    **{rule: {"fusion.rule": rule} for rule in FUSING},
    "ceiling": {"unlabeled": None, "zeroshot": None},
}
"""Arm -> what it changes. `ceiling` is supervised training on the true masks of all scenes."""


@dataclass(frozen=True)
class World:
    """Where the scenes are, and what all arms have in common."""

    out: Path
    embedder: str = "gem"
    precision: str = "float32"
    labelled: int = 24
    unlabelled: int = 240
    held_out: int = 100
    seconds: float = 90.0
    trust: bool = False
    """Whether `fusion.min_score` is chosen on the labelled scenes; else it is 0."""

    @property
    def pool(self) -> Path:
        """Scenes to train on."""
        return self.out / f"pool_{self.labelled + self.unlabelled}"

    @property
    def test(self) -> Path:
        """Scenes that judge."""
        return self.out / f"test_{self.held_out}"

    @property
    def labels(self) -> Path:
        """The zero-shot labels of the pool."""
        return self.out / f"{self.embedder}_{self.labelled + self.unlabelled}"

    def settings(self) -> dict[str, Any]:
        """What a result depends on beside its arm and seed."""
        values = asdict(self)
        del values["out"]
        return values


def make_world(world: World) -> None:
    """Scenes to train on, scenes to judge by, and zero-shot labels of the former."""
    pool = world.labelled + world.unlabelled
    for folder, n, seed in ((world.pool, pool, POOL_SEED), (world.test, world.held_out, 0)):
        if not (folder / "ImageSets" / "Segmentation" / "val.txt").exists():
            write_voc(folder, n, seed)
    given = {"images": str(world.pool), "classes": "shapes", "out": str(world.labels)}
    models = {"sam.model": "shapes", "clip.model": "shapes", "clip.embedder": world.embedder}
    label(from_mapping(LabelConfig, {**given, **models}))


def arm_config(world: World, arm: str, seed: int) -> TrainConfig:
    """The settings of one arm; writes the split files that they name."""
    truth = open_truth(str(world.pool))
    chosen = truth.ids if arm == "ceiling" else few_labelled(truth, world.labelled, seed)
    splits = write_splits(world.out / "splits" / f"{len(chosen)}_{seed}", chosen, truth.ids)
    values = {**TRAIN_SETTINGS, **splits, "root": str(world.pool)}
    values |= {"zeroshot": str(world.labels), "train.precision": world.precision}
    values |= {"classes": "shapes", "out": "-", "train.seed": seed, **ARMS[arm]}
    if world.trust and arm in FUSING:
        values["fusion.min_score"] = trusted_score(world.labels, truth, chosen)
    return with_weights(from_mapping(TrainConfig, values))


def trusted_score(labels: Path, truth: Truth, ids: Sequence[str]) -> float:
    """The least score, in steps of 0.01, from which on `WANTED_PRECISION` of the named pixels of
    some scenes are right; the highest score there is if none is so good.
    """
    rows = RunFolder(str(labels)).read("labels", ["image_id", "label_png", "score_png"])
    assert rows is not None
    right, score = [], []
    for row in rows.to_pylist():
        if row["image_id"] in ids:
            label_HW = decode_png(row["label_png"])
            named = (label_HW != 0) & (label_HW != IGNORE)
            right.append((label_HW == truth.read(row["image_id"]))[named])
            score.append(decode_png(row["score_png"])[named] / 255)
    right_P, score_P = np.concatenate(right), np.concatenate(score)
    for least in np.arange(0, score_P.max(), 0.01):
        if right_P[score_P >= least].mean() >= WANTED_PRECISION:
            return round(float(least), 2)
    return round(float(score_P.max()), 2)


def seconds_a_step(configs: Sequence[TrainConfig], steps: int = 8) -> list[float]:
    """CPU seconds of a step of each, loading included: medians, the arms in turn."""
    torch.set_num_threads(1)
    ranks, schedule = Ranks(), Schedule(steps + 2, 1)
    arms = []
    for config in configs:
        data = TrainingData.open(config)
        state = TrainState(config, len(data.classes), schedule, ranks)
        source = batches(data, config, first_step=0, steps=schedule.steps)
        arms.append((config, state, source))
    took: list[list[float]] = [[] for _ in arms]
    for _ in range(schedule.steps):
        for times, (config, state, source) in zip(took, arms, strict=True):
            began = time.process_time()
            train_step(state, next(source), config, ranks)
            times.append(time.process_time() - began)
    return [statistics.median(times[2:]) for times in took]


def run_arm(world: World, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm for about `steps` steps (whole epochs) and judge it: a row of results."""
    torch.set_num_threads(1)
    config = arm_config(world, arm, seed)
    data = TrainingData.open(config)
    per_epoch = Schedule.of(config, len(data.labelled), len(data.unlabelled)).steps_per_epoch
    epochs = max(1, round(steps / per_epoch))
    config = override(
        config, {"train.epochs": epochs, "train.validate_epochs": max(1, epochs // 10)}
    )
    ranks, schedule = Ranks(), Schedule(per_epoch, epochs)
    state = TrainState(config, len(data.classes), schedule, ranks)
    best: dict[str, torch.Tensor] = {}

    def keep(report: Report, now: TrainState) -> None:
        if report.best:
            best.update(now.weights())

    began = time.process_time()
    source = batches(data, config, first_step=0, steps=schedule.steps)
    fit(config, state, source, ranks=ranks, validate=validator(data, config, ranks), report=keep)
    took = time.process_time() - began
    judge = judged(world, config)
    row: dict[str, Any] = {"arm": arm, "seed": seed, "world": world.settings()}
    row |= {"steps": schedule.steps, "min_score": config.fusion.min_score}
    row |= {"cpu_s": round(took, 1), "last": judge(state.model)}
    state.model.load_state_dict(best)
    return row | {"best": judge(state.model), "best_epoch": (state.best or {}).get("epoch")}


def judged(world: World, config: TrainConfig) -> Any:
    """What scores a model on the held-out scenes: mIoU in [0, 1]."""
    given = {"labeled": str(world.test), "out": "-", "classes": "shapes", "train.holdout": 0.0}
    test = TrainingData.open(from_mapping(TrainConfig, given))
    test = replace(test, validation=test.labelled, validation_truth=test.truth)
    validate = validator(test, config, Ranks())
    return lambda model: validate(model)["miou"]  # type: ignore[index]


def table(rows: Iterable[dict[str, Any]], of_labels: float | None) -> str:
    """The rows as a table: mean and standard deviation over seeds."""
    rows = list(rows)
    lines = [f"{'arm':<20}  {'last':>13}  {'best':>13}  seeds  steps  CPU s"]
    for arm in ARMS:
        mine = [r for r in rows if r["arm"] == arm]
        if not mine:
            continue
        cells = [_spread([r[which] for r in mine]) for which in ("last", "best")]
        steps = round(statistics.mean(r["steps"] for r in mine))
        cpu = round(statistics.mean(r["cpu_s"] for r in mine))
        lines.append(
            f"{arm:<20}  {cells[0]:>13}  {cells[1]:>13}  {len(mine):>5}  {steps:>5}  {cpu:>5}"
        )
    if of_labels is not None:
        lines.append(f"\nmIoU of the zero-shot labels themselves: {of_labels:.3f}")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {sd:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("zsplg_ablation"))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=90.0, help="CPU seconds of each training")
    parser.add_argument("--embedder", default="gem", choices=["gem", "crop"])
    parser.add_argument("--labelled", type=int, default=24, help="scenes with masks")
    parser.add_argument("--unlabelled", type=int, default=240, help="scenes without")
    parser.add_argument("--held-out", type=int, default=100, help="scenes that judge")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--trust", action="store_true", help="choose fusion.min_score")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = (args.labelled, args.unlabelled, args.held_out)
    world = World(args.out, args.embedder, args.precision, *sizes, args.seconds, args.trust)
    make_world(world)
    file = args.out / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = [row for row in done if row["world"] == world.settings()]
    have = {(row["arm"], row["seed"]) for row in done}
    steps = _steps(world)
    jobs = [
        (world, arm, seed, steps[arm])
        for seed in range(args.seeds)
        for arm in args.arms
        if (arm, seed) not in have
    ]
    with multiprocessing.get_context("spawn").Pool(args.processes, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(_star, jobs, chunksize=1):
            done.append(row)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            sys.stderr.write(f"{row}\n")
    of_labels = evaluate(EvaluateConfig(labels=str(world.labels), truth=str(world.pool)))
    sys.stdout.write(table(done, of_labels["miou"]) + "\n")
    return 0


def _steps(world: World) -> dict[str, int]:
    """Arm -> steps that take so many CPU seconds; measured once a folder."""
    file = world.out / f"steps_{fingerprint(world.settings())}.json"
    if not file.exists():
        each = seconds_a_step([arm_config(world, arm, 0) for arm in ARMS])
        found = {arm: round(world.seconds / one) for arm, one in zip(ARMS, each, strict=True)}
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _star(job: tuple[World, str, int, int]) -> dict[str, Any]:
    return run_arm(*job)


if __name__ == "__main__":
    sys.exit(main())
