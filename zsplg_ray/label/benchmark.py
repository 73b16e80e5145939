"""`python -m zsplg_ray.label.benchmark`: the segment engine against segment_anything's own code.

Both sides have the same weights and images and take turns; medians are told, with how far their
results agree. Seconds are CPU seconds of this process on a CPU (one thread unless told), seconds on
a GPU. Nothing is downloaded: without `--checkpoint` the weights are random (biases and position
tables too, since zeros would hide errors).

Random weights give junk masks. So the rows `post-processing` and `whole image` feed both sides the
same plausible logits and predicted IoUs (`synthetic`) behind the real decoder: everything is
computed, and then replaced. The row `shapes` runs the tiny SAM, whose masks are real.

`--tuned-malloc` starts again with glibc told to keep its memory, which is worth a factor of up to
2.6 to the official code: half of some ratios is the allocator's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zsplg_ray.label.stages import STAGES, Pair, Scene, official_tflop, one_image
from zsplg_ray.measure import clock_of, peak_gib, restart_with_tuned_malloc

ALL = [*STAGES, "memory"]
"""Names of the stages."""

UNASKED = [name for name in ALL if name not in ("records", "throughput")]
"""Stages that run unless others are named: `records` checks, and `throughput` is for GPUs."""

GPU_TFLOPS = 790
"""What an H200 was seen to do in bfloat16, 1e12 operations a second."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    official: float
    ours: float
    ratio: float
    same: str
    """How far the results agree."""


def measure(pair: Pair, rounds: int, clock: Callable[[], float]) -> Row:
    """Run both sides in turn; medians."""
    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, side in (("official", pair.official), ("ours", pair.ours)):
            began = clock()
            results[name] = side()
            seconds[name].append(clock() - began)
    official = statistics.median(seconds["official"])
    ours = statistics.median(seconds["ours"]) / pair.images
    same = pair.same(results["official"], results["ours"])
    return Row(pair.stage, official, ours, official / ours, same)


def scene_of(args: argparse.Namespace) -> Scene:
    """What is measured on."""
    return Scene(
        sam=args.sam,
        checkpoint=args.checkpoint,
        device=args.device,
        points_per_side=args.points,
        size_hw=(args.height, args.width),
        image=args.image,
    )


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """The table, line by line."""
    scene, clock = scene_of(args), clock_of(args.device)
    for stage in args.stages:
        if stage == "memory":
            yield peak_row(args)
            continue
        for pair in STAGES[stage](scene):
            if stage != "records":
                pair.ours()  # compiles, fills caches
            row = measure(pair, args.rounds, clock)
            yield with_limits(row, scene) if stage == "throughput" else row


def with_limits(row: Row, scene: Scene) -> Row:
    """The row with images/s, and on a GPU how near its limit that comes."""
    told = f"{1 / row.ours:.3g} images/s"
    if torch.device(scene.device).type == "cuda":
        share = official_tflop(scene) / row.ours / GPU_TFLOPS
        told += f", {share:.0%} of an H200's bfloat16 limit by the official count of operations"
    return dataclasses.replace(row, same=f"{told}; {row.same}")


def peak_row(args: argparse.Namespace) -> Row:
    """Highest memory while one image is done, beyond the weights; each side in a new process."""
    given = {k: v for k, v in vars(args).items() if k in PEAK_SETTINGS and v is not None}
    flags = [str(text) for name, value in given.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-m", "zsplg_ray.label.benchmark", *flags, "--peak-of"]

    def gib(side: str) -> float:
        return float(subprocess.run([*command, side], capture_output=True, check=True).stdout)

    official, ours = gib("official"), gib("ours")
    return Row("peak memory of one image, GiB", official, ours, official / ours, "")


PEAK_SETTINGS = ("sam", "checkpoint", "device", "points", "image", "width", "height", "threads")


def peak_of(side: str, scene: Scene) -> float:
    """GiB that one image takes at its highest, beyond what was taken before."""
    return peak_gib(one_image(scene)[side == "ours"], scene.device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m zsplg_ray.label.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sam", default="vit_b", choices=["vit_h", "vit_l", "vit_b", "shapes"])
    parser.add_argument("--checkpoint", help="weights of --sam; default: random")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--stages", nargs="+", default=UNASKED, choices=ALL)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--points", type=int, default=32, help="points along one side")
    parser.add_argument("--image", help="a photograph; default: noise of --width x --height")
    parser.add_argument("--width", type=int, default=640, help="pixels")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--peak-of", choices=["official", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--tuned-malloc", action="store_true", help="see above")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")
    args = parser.parse_args(argv)
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu on this machine, got {args.device}; no GPU is found")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages and print a table."""
    args = parse(argv)
    if args.tuned_malloc:
        restart_with_tuned_malloc("zsplg_ray.label.benchmark", argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on both sides
    say: Callable[[str], Any] = sys.stdout.write
    if args.peak_of is not None:
        say(f"{peak_of(args.peak_of, scene_of(args))}\n")
        return 0
    unit = "s" if torch.device(args.device).type == "cuda" else "CPU s"
    malloc = "tuned" if args.tuned_malloc else "default"
    if not args.json:
        say(f"{args.sam} on {args.device}, {args.threads} threads, {malloc} malloc, ")
        say(f"medians of {args.rounds}\n")
        say(f"{'stage':<34} {'official':>10} {'ours':>10} {'ratio':>7}  same\n")
    done = []
    for row in rows(args):
        done.append(row)
        if not args.json:
            seconds = f"{row.official:>10.4g} {row.ours:>10.3g}"
            say(f"{row.stage:<34} {seconds} {row.ratio:>6.1f}x  {row.same}\n")
            sys.stdout.flush()
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        say(json.dumps({**settings, "unit": unit, "rows": [asdict(row) for row in done]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
