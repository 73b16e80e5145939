"""From what a sample took to what all images will take.

What enters: `Measured` of the sample, how many images there are to do, the plan of actors. What
leaves: a mapping of plain numbers; each that is a guess has `mid`, `low` and `high`.

The sample is spread evenly over the source, so its mean stands for the source's, whatever the sizes
of the images: nothing is scaled by megapixels, for that would want the size of every image, and so
the reading of every file. Where images differ a lot, the interval is wide and says so. It is the
95 % interval of a bootstrap over the images of the sample (images drawn again with repetition),
narrower the more of the source was sampled. It covers the choice of images, not another machine,
a slower store, or neighbours that come and go.

Reading is done by tasks beside the actors, so the slower of the two decides; Ray's own work, some
hundredths of a second of CPU an image, and the time that storage takes to write are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from zsplg_ray.cluster.estimate.sample import KINDS, STAGES, Measured
from zsplg_ray.cluster.session import Plan

DRAWS = 2000
"""Samples drawn by the bootstrap."""
LOW, HIGH = 2.5, 97.5
"""Ends of the interval, per cent."""

Guess = dict[str, float]
"""mid, low, high."""


@dataclass(frozen=True)
class Work:
    """What is to be done, and on what."""

    images: int
    """That are left to do."""
    plan: Plan
    cpus: float
    """Of the cluster."""
    gpus_asked: int | None
    """GPUs that it will have; None: those that its actors take."""
    in_flight: int
    flush_s: float
    price: float | None
    """Dollars an hour of a GPU, or of a CPU."""

    @property
    def actors(self) -> int:
        """How many will be at work."""
        return self.plan.pool(math.ceil(self.images / self.in_flight))[1]

    @property
    def gpus(self) -> float:
        """GPUs that are held as long as it works; 0: actors work on CPUs."""
        if not self.plan.gpus:
            return 0.0
        return float(self.gpus_asked or math.ceil(self.actors * self.plan.gpus))

    @property
    def devices(self) -> float:
        """How many work at the pace that was measured: of actors that share a GPU, one."""
        share = self.plan.gpus
        return self.actors if share in (0, 1) or share > 1 else math.ceil(self.actors * share)

    @property
    def readers(self) -> int:
        """Tasks that read images at a time."""
        free = self.cpus - self.actors * self.plan.cpus
        return max(1, math.floor(free / self.plan.decode_cpus + 1e-9))


def forecast(measured: Measured, work: Work) -> dict[str, Any]:
    """What `work` will take.

    Returns:
        seconds (by stage and in all: mean, median, p10, p90, cpu, of an image), images_per_s,
        reading (readers, keep_up, cpus_a_gpu), hours (wall, and gpu or cpu), bytes (by kind, total,
        embedding_share), cost, failures.
    """
    drawn = _Drawn(measured, work.images)
    rate, reading_rate = _rates(drawn, work)
    pace = np.minimum(rate, reading_rate)
    hours = work.images / pace / 3600 + measured.start_s / 3600
    held = work.gpus or work.cpus
    paid = hours * held
    total = _bytes(drawn, measured, work)
    return {
        "seconds": _seconds(measured),
        "images_per_s": guess(pace),
        "reading": _reading(drawn, work, rate, reading_rate),
        "hours": {"wall": guess(hours), "gpu" if work.gpus else "cpu": guess(paid)},
        "cpu_hours_of_work": guess(work.images * drawn.mean(drawn.cpu_s) / 3600),
        "bytes": total,
        "cost": None if work.price is None else guess(paid * work.price),
        "failures": guess(work.images * drawn.mean(drawn.failed)),
        "slowed": _slowed(measured),
    }


def guess(drawn: np.ndarray) -> Guess:
    """Of a number for the sample itself and for each that was drawn from it: mid, low, high."""
    low, high = np.percentile(drawn[1:], (LOW, HIGH))
    return {"mid": float(drawn[0]), "low": float(low), "high": float(high)}


class _Drawn:
    """The sample, and samples drawn from it: weights float64 [1 + DRAWS, images]."""

    def __init__(self, measured: Measured, images: int) -> None:
        count = len(measured.wall_s["sam"])
        drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, DRAWS)
        # Of a source that was sampled wholly, the choice of images leaves no doubt.
        doubt = np.sqrt(max(0.0, 1 - count / images))
        weights = np.concatenate([np.ones((1, count)), 1 + doubt * (drawn - 1)])
        self.weights = weights / count
        self.read_s = np.array(measured.wall_s["read_decode"])
        self.actor_s = _of(measured.wall_s)
        self.cpu_s = _of(measured.cpu_s, STAGES)
        self.failed = np.array([float(size is None) for size in measured.row_bytes["labels"]])
        self.bytes = {
            kind: np.array([size or 0.0 for size in measured.row_bytes[kind]]) for kind in KINDS
        }

    def mean(self, value: np.ndarray) -> np.ndarray:
        """Mean of something [images] in the sample and in each drawn one, float64 [1 + DRAWS]."""
        return self.weights @ value


def _of(by_stage: Mapping[str, list[float]], stages: tuple[str, ...] = STAGES[1:]) -> np.ndarray:
    """Seconds of each image in some stages together; by default those of the actor."""
    return np.sum([by_stage[stage] for stage in stages], axis=0)


def _rates(drawn: _Drawn, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Images a second that the actors label, and that the readers read."""
    tiny = 1e-9  # of a source of nothing but bad images, actors take none
    label = work.devices / np.maximum(drawn.mean(drawn.actor_s), tiny)
    return label, work.readers / np.maximum(drawn.mean(drawn.read_s), tiny)


def _seconds(measured: Measured) -> dict[str, dict[str, float]]:
    """An image's seconds by stage, of those that were labelled or at least tried there."""
    walls = {stage: np.array(measured.wall_s[stage]) for stage in STAGES}
    cpus = {stage: np.array(measured.cpu_s[stage]) for stage in STAGES}
    walls["all"], cpus["all"] = _of(measured.wall_s, STAGES), _of(measured.cpu_s, STAGES)
    done = np.array([size is not None for size in measured.row_bytes["labels"]])
    told = {}
    for stage, wall in walls.items():
        good = wall[done]
        p10, median, p90 = np.percentile(good, (10, 50, 90))
        told[stage] = {
            "mean": float(good.mean()),
            "median": float(median),
            "p10": float(p10),
            "p90": float(p90),
            "cpu": float(cpus[stage][done].mean()),
        }
    return told


def _reading(
    drawn: _Drawn, work: Work, rate: np.ndarray, reading_rate: np.ndarray
) -> dict[str, Any]:
    """Whether those who read keep up with those who label."""
    wanted = rate * drawn.mean(drawn.read_s) * work.plan.decode_cpus
    return {
        "readers": work.readers,
        "keep_up": bool(reading_rate[0] >= rate[0]),
        "cpus_wanted": guess(wanted / (work.gpus or 1)),
        "cpus_there": work.readers * work.plan.decode_cpus / (work.gpus or 1),
    }


def _bytes(drawn: _Drawn, measured: Measured, work: Work) -> dict[str, Any]:
    """Storage. A part holds a block's images, or those done when it is time to write."""
    pace_s = max(float(drawn.mean(drawn.actor_s)[0]), 1e-9)
    in_time = max(measured.images_at_once, math.ceil(work.flush_s / pace_s))
    images_a_part = max(1, min(work.in_flight, in_time, work.images))
    done = 1 - drawn.mean(drawn.failed)
    told: dict[str, Any] = {"images_a_part": images_a_part}
    total = np.zeros(1 + DRAWS)
    for kind in KINDS:
        image = drawn.mean(drawn.bytes[kind]) + done * measured.part_bytes[kind] / images_a_part
        told[kind] = guess(image * work.images)
        told[f"{kind}_an_image"] = guess(image / np.maximum(done, 1e-9))
        total += image * work.images
    share = measured.embedding_share * told["segments"]["mid"] / max(float(total[0]), 1e-9)
    return {**told, "total": guess(total), "embedding_share": float(share)}


def _slowed(measured: Measured) -> float:
    """How many times longer one thread on a CPU took than its own work: other programs' doing."""
    wall, cpu = (float(_of(by_stage).sum()) for by_stage in (measured.wall_s, measured.cpu_s))
    return wall / cpu if measured.device == "cpu" and measured.threads == 1 and cpu else 1.0
