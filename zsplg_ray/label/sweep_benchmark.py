"""`python -m zsplg_ray.label.sweep_benchmark`: scoring settings on regions against on pixels.

Both sides score the same random settings of `compose` on the same made-up images, in turns; medians
of CPU seconds of this process, one thread. Every confusion count of both sides is compared in the
same run; a difference ends it with exit status 1. The regions' side begins from nothing in each
turn, so no score is remembered from the turn before. What is compiled is compiled before: that
takes some seconds, once a machine.

Rows: `all` draws every setting anew, half of them softmax at a temperature of its own, which is
what costs most on regions; `one temperature` keeps cosine and draws the others. Each with one
image alone, where the fixed costs of a call weigh most, and with many at once, as tuning does it.

The segments are blobs: a third lies inside another one, the others are strewn; sizes are
log-uniform. Truth: some of the blobs, with a border of 255 and classes that similarities tend to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.compose import compose
from zsplg_ray.label.regions import Regions, cut
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.sweep import Sweep
from zsplg_ray.measure import clock_of
from zsplg_ray.metrics import confusion
from zsplg_ray.records import IGNORE
from zsplg_ray.vocab import ClassList, class_list


@dataclass(frozen=True)
class Image:
    """What is scored."""

    segments: Segments
    sim_RK: np.ndarray
    truth_HW: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of the table; times are CPU ms an image, medians."""

    settings: str
    images: int
    """Scored together."""
    regions: float
    """An image, on average."""
    pixels_ms: float
    """Composing and counting pixels, a setting."""
    build_ms: float
    """From segments and truth to a `Sweep`, once."""
    evaluation_ms: float
    """On regions, a setting."""
    ratio_with_build: float
    """How many times pixels take as long for all settings, building counted in."""
    ratio: float
    """The same for evaluation alone."""


def blobs(rng: np.random.Generator, n: int, size_hw: tuple[int, int]) -> np.ndarray:
    """Overlapping masks, bool [R, H, W]; every third one lies inside an earlier one."""
    height, width = size_hw
    y_H1, x_1W = np.arange(height)[:, None], np.arange(width)[None]
    masks_RHW = np.zeros((n, height, width), np.bool_)
    circles: list[tuple[float, float, float]] = []
    for r in range(n):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        radius = min(size_hw) * 0.025 * 14 ** rng.random()
        if r % 3 == 2:
            parent_y, parent_x, around = circles[rng.integers(len(circles))]
            radius = around * rng.uniform(0.25, 0.6)
            y, x = (centre + rng.uniform(-0.3, 0.3) * around for centre in (parent_y, parent_x))
        circles.append((y, x, radius))
        angle_HW = np.arctan2(y_H1 - y, x_1W - x)
        waves = [rng.uniform(0, 0.1) * np.sin(k * angle_HW + 7 * rng.random()) for k in (2, 3, 5)]
        masks_RHW[r] = np.hypot(y_H1 - y, x_1W - x) < radius * (1 + sum(waves))
    return masks_RHW


def image_of(seed: int, n: int, size_hw: tuple[int, int], n_classes: int) -> Image:
    """A made-up image with n segments."""
    rng = np.random.default_rng(seed)
    masks_RHW = blobs(rng, n, size_hw)
    class_R = rng.integers(0, n_classes, n)
    truth_HW = np.zeros(size_hw, np.uint8)
    for r in np.flatnonzero(rng.random(n) < 0.4):
        truth_HW[masks_RHW[r]] = class_R[r]
    edge_HW = np.zeros(size_hw, np.bool_)
    for axis in (0, 1):
        edge_HW |= truth_HW != np.roll(truth_HW, 2, axis)
    truth_HW[edge_HW] = IGNORE
    sim_RK = rng.normal(0.2, 0.03, (n, n_classes)).astype(np.float32)
    sim_RK[np.arange(n), class_R] += rng.uniform(0, 0.12, n).astype(np.float32)
    if seed % 2:
        sim_RK[:, 0] = -np.inf  # without prompts for background
    quality = rng.uniform(0.8, 1, n), rng.uniform(0.85, 1, n)
    return Image(Segments.from_masks(masks_RHW, *map(list, quality)), sim_RK, truth_HW)


def setting_of(
    rng: np.random.Generator, classes: ClassList, *, one_temperature: bool
) -> ComposeConfig:
    """A random setting."""
    softmax = not one_temperature and rng.random() < 0.5
    lowest, highest = (0.0, 0.8) if softmax else (0.15, 0.35)
    minimum: float | dict[str, float] = rng.uniform(lowest, highest)
    if rng.random() < 0.5:
        minimum = {name: rng.uniform(lowest, highest) for name in classes.names[1:]}
    return ComposeConfig(
        score="softmax" if softmax else "cosine",
        temperature=10 ** rng.uniform(-2.5, -1),
        min_similarity=minimum,
        min_margin=rng.choice([0.0, rng.uniform(0, 0.03)]),
        min_area_px=int(rng.integers(2000)) if rng.random() < 0.5 else 0,
        min_predicted_iou=rng.choice([0.0, rng.uniform(0.8, 0.95)]),
        min_stability=rng.choice([0.0, rng.uniform(0.85, 0.95)]),
        order="area" if rng.random() < 0.5 else "score",
        unsure="ignore" if rng.random() < 0.5 else "background",
    )


def on_pixels(image: Image, setting: ComposeConfig, classes: ClassList) -> np.ndarray:
    """Counts, as they are found without regions."""
    composed = compose(image.segments, image.sim_RK, setting, classes)
    return confusion(image.truth_HW, composed.label_HW, len(classes))


def built(images: Sequence[Image], classes: ClassList) -> tuple[Sweep, list[Regions]]:
    """All that comes before the first setting."""
    regions = [cut(image.segments, image.truth_HW, len(classes)) for image in images]
    sims = {"": [image.sim_RK for image in images]}
    return Sweep(regions, [image.segments for image in images], sims, classes), regions


def measure(
    name: str,
    images: Sequence[Image],
    settings: Sequence[ComposeConfig],
    classes: ClassList,
    rounds: int,
) -> Row:
    """Both sides in turns; raises an ArithmeticError if a count differs."""
    clock, n = clock_of("cpu"), len(images)
    seconds: dict[str, list[float]] = {"pixels": [], "build": [], "evaluation": []}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        began = clock()
        result = work()
        seconds[what].append(clock() - began)
        return result

    regions: list[Regions] = []
    for _ in range(rounds):
        pixels = timed(
            "pixels", lambda: [sum(on_pixels(i, s, classes) for i in images) for s in settings]
        )
        sweep, regions = timed("build", lambda: built(images, classes))
        counts = timed(
            "evaluation", lambda sweep=sweep: [sweep.confusion(s, "")[0] for s in settings]
        )
        if not np.array_equal(pixels, counts):
            raise ArithmeticError(f"counts on regions and on pixels differ: {name}, {n} images")
    pixels_s, build_s, evaluation_s = (statistics.median(one) / n for one in seconds.values())
    return Row(
        name,
        n,
        sum(map(len, regions)) / n,
        1e3 * pixels_s / len(settings),
        1e3 * build_s,
        1e3 * evaluation_s / len(settings),
        pixels_s / (build_s + evaluation_s),
        pixels_s / evaluation_s,
    )


def rows(args: argparse.Namespace) -> list[Row]:
    """The table."""
    classes = class_list("voc")
    size_hw = args.height, args.width
    images = [image_of(i, args.segments, size_hw, len(classes)) for i in range(args.images)]
    done = []
    for name, one_temperature in (("all", False), ("one temperature", True)):
        rng = np.random.default_rng(1)
        settings = [
            setting_of(rng, classes, one_temperature=one_temperature) for _ in range(args.settings)
        ]
        measure(name, images[:1], settings[:20], classes, 1)  # compiles
        for together in sorted({1, len(images)}):
            done.append(measure(name, images[:together], settings, classes, args.rounds))
    return done


def main(argv: list[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m zsplg_ray.label.sweep_benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=16, help="scored together")
    parser.add_argument("--segments", type=int, default=60, help="of an image")
    parser.add_argument("--settings", type=int, default=100, help="scored")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--width", type=int, default=500, help="pixels")
    parser.add_argument("--height", type=int, default=375, help="pixels")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    args = parser.parse_args(argv)
    say: Callable[[str], Any] = sys.stdout.write
    try:
        done = rows(args)
    except ArithmeticError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if args.json:
        say(json.dumps({**vars(args), "unit": "CPU ms", "rows": [asdict(row) for row in done]}))
        say("\n")
        return 0
    say(f"{args.height} x {args.width} px, {args.segments} segments, {args.settings} settings, ")
    say(f"medians of {args.rounds}, CPU ms an image; all counts equal\n")
    say(f"{'settings':<16} {'images':>6} {'regions':>7} {'pixels':>8} {'build':>7} ")
    say(f"{'evaluation':>10} {'with build':>10} {'alone':>8}\n")
    for row in done:
        say(f"{row.settings:<16} {row.images:>6} {row.regions:>7.0f} {row.pixels_ms:>8.3f} ")
        say(f"{row.build_ms:>7.3f} {row.evaluation_ms:>10.5f} {row.ratio_with_build:>9.0f}x ")
        say(f"{row.ratio:>7.0f}x\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
