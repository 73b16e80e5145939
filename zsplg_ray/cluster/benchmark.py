"""`python -m zsplg_ray.cluster.benchmark`: what the pipeline costs beside the models.

Images a second of `label` with one actor against a plain loop over the same `Labeler` in this
process, on scenes of the embedded world. Both sides have one thread for torch, start-up is left out
on both (the pipeline's clock starts with its first written block), and the sides take turns;
medians are told.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.session import ray_session
from zsplg_ray.config import LabelConfig, RayConfig
from zsplg_ray.images import decode_image
from zsplg_ray.label.labeler import Labeler
from zsplg_ray.label.naming import prepare
from zsplg_ray.label.presets import resolve_label
from zsplg_ray.settings import from_mapping
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.sources import list_images
from zsplg_ray.storage import read_bytes
from zsplg_ray.vocab import class_list


def plain_loop(config: LabelConfig) -> float:
    """Images a second of reading, decoding and labelling one after the other."""
    resolved = resolve_label(config)
    naming, _ = prepare(resolved, class_list(config.classes))
    labeler = Labeler.load(resolved, naming)
    uris = list_images(config.images)["uri"].to_pylist()
    labeler.label(decode_image(read_bytes(uris[0])))
    began = time.perf_counter()
    for uri in uris:
        labeler.label(decode_image(read_bytes(uri)))
    return len(uris) / (time.perf_counter() - began)


def main(argv: list[str] | None = None) -> int:
    """Run both sides in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="scenes to label")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--embedder", default="gem", choices=["gem", "crop"])
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    torch.set_num_threads(1)
    loop, pipeline = [], []
    with tempfile.TemporaryDirectory() as work, ray_session(RayConfig(num_cpus=2)):
        write_voc(f"{work}/scenes", args.images, seed=0)
        for turn in range(args.rounds):
            settings = {"images": f"{work}/scenes", "classes": "shapes", "quiet": True}
            settings |= {"sam.model": "shapes", "clip.model": "shapes", "actors.max": 1}
            settings |= {"clip.embedder": args.embedder, "out": str(Path(work) / f"run{turn}")}
            config = from_mapping(LabelConfig, settings)
            loop.append(plain_loop(config))
            pipeline.append(label(config)["images_per_s"])
    result = {
        "images": args.images,
        "rounds": args.rounds,
        "loop_images_per_s": round(statistics.median(loop), 3),
        "pipeline_images_per_s": round(statistics.median(pipeline), 3),
    }
    result["ratio"] = round(result["pipeline_images_per_s"] / result["loop_images_per_s"], 3)
    lines = [f"{name:<24}{value:>10}" for name, value in result.items()]
    sys.stdout.write((json.dumps(result) if args.json else "\n".join(lines)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
