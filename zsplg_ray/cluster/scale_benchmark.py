"""`python -m zsplg_ray.cluster.scale_benchmark`: what a large run costs beside the models.

    nodes   simulated labellers on 1, 4, 16, ... logical GPU nodes of this machine
    memory  memory of the driver while it has many images to do
    ledger  calls a second that one ledger answers
    resume  time to find out that a run of a million images is finished
    row     bytes of an image in the run's folder, by its segments

Each prints a Markdown table. All of it runs on this machine: nodes are processes, their GPUs are
pretended, and an image takes the time that it is told to. So seconds are those of a machine that
does the work of all nodes; CPU seconds by process tell what each would have to do.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from zsplg_ray.cluster.ledger import Ledger
from zsplg_ray.cluster.meter import Meter
from zsplg_ray.cluster.pipeline import run_images
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.cluster.scale_folder import resume, row_bytes
from zsplg_ray.cluster.simulated import SimulatedTask, Work
from zsplg_ray.config import LabelConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import describe_run
from zsplg_ray.settings import from_mapping
from zsplg_ray.sources import MANIFEST
from zsplg_ray.vocab import class_list

Row = dict[str, Any]
STORE_MIB = 80
"""Object store of a logical node, the least that Ray takes."""


def manifest(images: int, folder: Path) -> pa.Table:
    """So many images, all of them the same small file."""
    picture = folder / "image.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    ids = [f"photos/{number // 1000:06d}/IMG_{number:09d}.jpg" for number in range(images)]
    return pa.table({"image_id": ids, "uri": [str(picture)] * images}, schema=MANIFEST)


def label_simulated(
    folder: Path, images: int, actors: int, latency_s: float, in_flight: int
) -> tuple[Meter, Work, float]:
    """Label that many images on Ray as it runs: what was measured and noted, and when it began."""
    values = {"images": str(folder), "out": str(folder / "run"), "classes": "voc", "quiet": True}
    values |= {"device": "cuda", "mlflow.uri": "off", "actors.gpus": 1.0, "actors.cpus": 0.0}
    values |= {"actors.min": actors, "actors.max": actors, "actors.in_flight": in_flight}
    config = from_mapping(LabelConfig, values)
    task = SimulatedTask(latency_s, str(folder / "notes"))
    run = describe_run(config, config, class_list("voc"), {"sam": "simulated"})
    todo = manifest(images, folder)
    began = time.time()
    with Meter() as meter:
        run_images(config, task, RunFolder(config.out), todo, run, Progress("label", show=False))
    counts = run["counts"]
    if counts["labelled"] != images:
        raise RuntimeError(f"{counts['labelled']} of {images} images labelled")
    return meter, Work.read(folder / "notes"), began


@contextlib.contextmanager
def session(nodes: int, cpus: int, raylets: bool) -> Iterator[None]:
    """Ray with `nodes` GPUs: each on a node with a raylet of its own, or all on one node."""
    if not raylets:
        local: dict[str, Any] = {"num_cpus": cpus, "num_gpus": nodes, "include_dashboard": False}
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **local)
        try:
            yield
        finally:
            ray.shutdown()
        return
    from ray.cluster_utils import Cluster

    store = STORE_MIB * 2**20
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "include_dashboard": False, "dashboard_port": 0},
    )
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=0, num_gpus=1, object_store_memory=store)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def study_nodes(args: argparse.Namespace) -> list[Row]:
    """Simulated labellers on more and more nodes."""
    rows = []
    for nodes in args.nodes:
        images = max(1, round(nodes * args.seconds / args.latency))
        with tempfile.TemporaryDirectory() as work, session(nodes, args.cpus, args.raylets):
            meter, seen, began = label_simulated(
                Path(work), images, nodes, args.latency, args.in_flight
            )
            ended = time.time()
        cpu_s = meter.cpu_s(*seen.steady)
        done = seen.images_per_s * (seen.steady[1] - seen.steady[0])
        ideal = nodes / args.latency
        rows.append(
            {
                "nodes": nodes,
                "images": images,
                "ideal images/s": round(ideal, 1),
                "images/s": round(seen.images_per_s, 1),
                "share of ideal": f"{seen.images_per_s / ideal:.0%}",
                "first image after, s": round(seen.first - began, 1),
                "all actors at work after, s": round(seen.steady[0] - began, 1),
                "end after the last image, s": round(ended - seen.last, 1),
                **{f"{r}, CPU ms an image": _per(cpu_s.get(r, 0.0), done) for r in _ROLES},
                "driver, MiB": round(max(meter.driver_mib)),
            }
        )
        tell(rows[-1:])
    return rows


_ROLES = ("driver", "ledger", "actors", "other workers", "raylets", "gcs", "agents")


def _per(seconds: float, images: float) -> float:
    return round(1000 * seconds / images, 2)


def study_memory(args: argparse.Namespace) -> list[Row]:
    """The driver's memory with many images that take no time."""
    rows = []
    for images in args.images:
        with tempfile.TemporaryDirectory() as work, session(args.actors, args.cpus, False):
            meter, seen, began = label_simulated(
                Path(work), images, args.actors, 0.0, args.in_flight
            )
            ended = time.time()
        mib = meter.driver_mib
        rows.append(
            {
                "images": images,
                "seconds": round(ended - began, 1),
                "images/s": round(seen.images_per_s, 1),
                "first image after, s": round(seen.first - began, 1),
                "end after the last image, s": round(ended - seen.last, 1),
                "driver at the start, MiB": round(mib[0]),
                "driver at most, MiB": round(max(mib)),
                "KiB an image": round((max(mib) - mib[0]) * 1024 / images, 2),
                "driver, CPU ms an image": _per(meter.cpu_s()["driver"], images),
            }
        )
    return rows


@ray.remote(num_cpus=0)
def _call(ledger: Ledger, calls: int) -> None:
    for number in range(calls):
        ledger.begin("label", [f"{os.getpid()}/{number}"])


def study_ledger(args: argparse.Namespace) -> list[Row]:
    """How many calls one ledger answers; each caller waits for each answer, as actors do."""
    rows = []
    with session(0, args.cpus, False):
        for callers in args.callers:
            ledger = Ledger.start()
            ray.get([_call.remote(ledger, 10) for _ in range(callers)])
            began = time.monotonic()
            with Meter(0.2) as meter:
                ray.get([_call.remote(ledger, args.calls) for _ in range(callers)])
                seconds = time.monotonic() - began
            total = callers * args.calls
            rows.append(
                {
                    "callers": callers,
                    "calls/s": round(total / seconds),
                    "ledger, CPU ms a call": _per(meter.cpu_s()["ledger"], total),
                }
            )
            ledger.close()
    return rows


def study_resume(args: argparse.Namespace) -> list[Row]:
    """A finished run, looked through without an index, then with one."""
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        return resume(RunFolder(work), args.images, args.in_flight)


def study_row(args: argparse.Namespace) -> list[Row]:
    """Bytes of an image in the folder."""
    return [row_bytes(count, args.in_flight) for count in args.segments]


def tell(rows: list[Row]) -> None:
    """Print a Markdown table."""
    lines = [list(map(str, rows[0])), ["--"] * len(rows[0])]
    lines += [list(map(str, row.values())) for row in rows]
    sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n")
    sys.stdout.flush()


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    studies = parser.add_subparsers(required=True)

    def add(name: str, study: Any) -> argparse.ArgumentParser:
        sub = studies.add_parser(name, help=study.__doc__)
        sub.set_defaults(study=study)
        sub.add_argument("--in-flight", type=int, default=16, help="images of a block")
        sub.add_argument("--cpus", type=int, default=4, help="logical CPUs")
        return sub

    sub = add("nodes", study_nodes)
    sub.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 64])
    sub.add_argument("--latency", type=float, default=1.0, help="seconds of an image")
    sub.add_argument("--seconds", type=float, default=90.0, help="of work for each node")
    sub.add_argument("--raylets", action="store_true", help="a raylet for each node")
    sub = add("memory", study_memory)
    sub.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    sub.add_argument("--actors", type=int, default=2)
    sub = add("ledger", study_ledger)
    sub.add_argument("--callers", type=int, nargs="+", default=[1, 4, 16])
    sub.add_argument("--calls", type=int, default=2000, help="of each caller")
    sub = add("resume", study_resume)
    sub.add_argument("--images", type=int, default=1_000_000)
    sub.add_argument("--folder", help="where there is room for the parts; default: /tmp")
    sub = add("row", study_row)
    sub.add_argument("--segments", type=int, nargs="+", default=[4, 20, 60])
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a study and print its table."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    args = arguments().parse_args(argv)
    tell(args.study(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
