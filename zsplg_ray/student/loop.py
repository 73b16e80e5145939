"""The training loop: batches in, a trained state out. Plain torch, with or without other ranks.

What enters: a `TrainState` and the batches from its step on. What leaves: the same state at the end
of the run, and a `Report` after every validation. Who calls it decides what a report means: a line
on a terminal, a checkpoint on Ray Train, a row of a benchmark.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from zsplg_ray.config import TrainConfig
from zsplg_ray.images import decode_image
from zsplg_ray.metrics import scores
from zsplg_ray.settings import WorkError
from zsplg_ray.storage import read_bytes
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.data import TrainingData
from zsplg_ray.student.predict import Predictor, evaluate_model
from zsplg_ray.student.state import Ranks, TrainState
from zsplg_ray.student.step import PIXELS, SUMS, train_step

log = logging.getLogger(__name__)

Validate = Callable[[nn.Module], dict[str, Any] | None]
"""A model in evaluation mode -> `metrics.scores` of the validation images, None if there are none.
Called on every rank at the same time."""


Pulse = Callable[[int, Callable[[], float], bool], None]
"""Steps done; the mean loss of this rank since the last validation, read off the device when called
(which waits for it); whether a validation is next."""


@dataclass(frozen=True)
class Report:
    """What a validation has to say."""

    epoch: int
    """Epochs done."""
    step: int
    """Steps done."""
    metrics: dict[str, float]
    """Means since the last report: losses, shares of pixels, lr, images_per_s; and val_miou."""
    best: bool
    """Whether this is the best so far (the last one, if nothing is validated)."""
    last: bool
    """Whether the run ends here."""
    scores: dict[str, Any] | None = field(default=None, repr=False)
    """`metrics.scores` of the validation images."""


def fit(
    config: TrainConfig,
    state: TrainState,
    batches: Iterable[list[Batch]],
    *,
    ranks: Ranks,
    validate: Validate,
    report: Callable[[Report, TrainState], None],
    pulse: Pulse | None = None,
) -> TrainState:
    """Train from the state's step to the end of its schedule.

    Args:
        config: The run's settings.
        state: As it starts or as it was saved; changed in place.
        batches: From `state.step` on, a list of this rank's micro batches for every step.
        ranks: Which rank this is.
        validate: Scores a model.
        report: Told every `train.validate_epochs` epochs and at the end, on every rank.
        pulse: Told of every step, and before each validation.

    Raises:
        WorkError: The loss is not finite.
    """
    schedule = state.schedule
    meter = Meter(ranks)
    source = iter(batches)
    while state.step < schedule.steps:
        step = next(source)
        meter.add(train_step(state, step, config, ranks), step)
        if pulse is not None:
            pulse(state.step, meter.loss, False)
        last = state.step == schedule.steps
        whole = state.step % schedule.steps_per_epoch == 0
        if last or (whole and state.epoch % config.train.validate_epochs == 0):
            if pulse is not None:
                pulse(state.step, meter.loss, True)
            report(_judge(state, meter, validate, last), state)
            meter = Meter(ranks)
    return state


def _judge(state: TrainState, meter: Meter, validate: Validate, last: bool) -> Report:
    """Read the meters, validate, and note both in the state's history."""
    metrics = meter.read()
    metrics["lr"] = state.learning_rate
    state.settle()
    state.teacher.eval()
    result = validate(state.teacher)
    state.model.train()
    miou = None if result is None else result["miou"]
    if miou is not None:
        metrics["val_miou"] = miou
    if result is not None and result["unreadable"]:
        metrics["val_unreadable_images"] = result["unreadable"]
    old = state.best["val_miou"] if state.best is not None else None
    # Where nothing has been scored yet, the latest is taken to be the best.
    best = old is None or (miou is not None and miou > old)
    entry = {"epoch": state.epoch, "step": state.step, **metrics}
    if result is not None:
        entry["iou"] = result["iou"]
    state.history.append(entry)
    if best:
        state.best = {"epoch": state.epoch, "step": state.step, "val_miou": miou}
    return Report(state.epoch, state.step, metrics, best, last, result)


class Meter:
    """Sums over steps, on the device until they are read."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sums = torch.zeros(len(SUMS) + len(PIXELS), dtype=torch.float64, device=ranks.device)
        self.images = 0
        self.bad = 0
        self.began = time.monotonic()

    def add(self, sums: torch.Tensor, step: list[Batch]) -> None:
        """One step more."""
        self.sums += sums
        self.images += sum(len(b.x_image_BCHW) + len(b.u_image_BCHW) for b in step)
        self.bad += sum(b.bad for b in step)

    def loss(self) -> float:
        """Mean loss of this rank's steps so far; waits for the device."""
        total, steps = self.sums[[SUMS.index("loss"), SUMS.index("steps")]].tolist()
        return total / steps if steps else 0.0

    def read(self) -> dict[str, float]:
        """Means over steps and ranks. Raises: WorkError if the loss is no number."""
        more = torch.tensor([self.images, self.bad], dtype=torch.float64, device=self.sums.device)
        values = self.ranks.sum(torch.cat([self.sums, more])).tolist()
        names: list[str] = [*SUMS, *PIXELS, "images", "bad"]
        total = dict(zip(names, values, strict=True))
        steps = total["steps"]
        metrics = {name: total[name] / steps for name in SUMS if name != "steps"}
        for name, part, whole in (
            ("confident", "confident", "valid"),
            ("used", "kept", "valid"),
            ("agreement", "agreeing", "zeroshot"),
        ):
            if total[whole]:
                metrics[name] = total[part] / total[whole]
        metrics["images_per_s"] = total["images"] / (time.monotonic() - self.began)
        metrics["unreadable_images"] = total["bad"]
        if not all(abs(metrics[name]) < float("inf") for name in metrics):
            told = f"the loss is {metrics['loss']}; lower optim.lr or use --train.precision float32"
            raise WorkError(told)
        return metrics


def validator(data: TrainingData, config: TrainConfig, ranks: Ranks) -> Validate:
    """Scores over the validation images at their own size: each on one rank, counts summed.

    An image that cannot be read is left out, with a warning; `unreadable` in the scores says how
    many they are.
    """
    mine = data.validation.to_pylist()[ranks.rank :: ranks.world]
    names = data.classes.names

    def examples(left_out: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row in mine:
            try:
                image_HWC = decode_image(read_bytes(row["uri"]))
                truth_HW = data.validation_truth.read(row["image_id"])
                if truth_HW.shape != image_HWC.shape[:2]:
                    told = f"mask of {truth_HW.shape}, image of {image_HWC.shape[:2]}"
                    raise ValueError(told)
            except (OSError, ValueError, pa.ArrowException) as e:
                log.warning("validation image %s is left out: %s", row["image_id"], e)
                left_out.append(row["image_id"])
                continue
            yield image_HWC, truth_HW

    def validate(model: nn.Module) -> dict[str, Any] | None:
        if not len(data.validation):
            return None
        predictor = Predictor(model, precision=config.train.precision)
        left_out: list[str] = []
        counts = evaluate_model(predictor, examples(left_out), len(names))
        summed = ranks.sum(torch.from_numpy(np.append(counts.ravel(), len(left_out)))).cpu().numpy()
        result = scores(summed[:-1].reshape(counts.shape), names)
        return result | {"unreadable": int(summed[-1])}

    return validate
