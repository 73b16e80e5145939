"""`zsplg demo`: the whole pipeline on scenes of the embedded world, for a first look.

What enters: nothing (the scenes are made, the tiny SAM and CLIP come with the package). What
leaves: a folder with scenes, a run for each embedder, and pictures; and a table of scores.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from zsplg_ray.cluster.label import label
from zsplg_ray.cluster.session import ray_session
from zsplg_ray.config import DemoConfig, EvaluateConfig, LabelConfig
from zsplg_ray.masks import open_truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import from_mapping
from zsplg_ray.shapes.scenes import write_voc
from zsplg_ray.views.evaluate import evaluate, table
from zsplg_ray.views.pictures import run_sheet
from zsplg_ray.vocab import class_list

log = logging.getLogger(__name__)


def demo(config: DemoConfig) -> str:
    """Make scenes, label them, compare with the truth; returns what to print."""
    began = time.monotonic()
    out = Path(config.out)
    scenes = out / f"scenes_{config.n}"
    if not (scenes / "ImageSets" / "Segmentation" / "val.txt").exists():  # written last
        log.info("making %d scenes with masks in %s", config.n, scenes)
        write_voc(scenes, config.n, seed=0)
    embedders = ("crop", "gem") if config.embedder == "both" else (config.embedder,)
    lines = []
    with ray_session(config.ray):
        for embedder in embedders:
            run = out / f"{embedder}_{config.n}"
            log.info("labelling them with the tiny SAM and CLIP, embedder %s, in %s", embedder, run)
            settings = {"images": str(scenes), "classes": "shapes", "out": str(run)}
            settings |= {"sam.model": "shapes", "clip.model": "shapes", "clip.embedder": embedder}
            label(from_mapping(LabelConfig, settings))
            lines.append(_scores(run, scenes, embedder))
    lines.append(f"all in {time.monotonic() - began:.0f} s")
    return "\n\n".join(lines)


def _scores(run: Path, scenes: Path, embedder: str) -> str:
    result = evaluate(EvaluateConfig(labels=str(run), truth=str(scenes)))
    sheet = run / "pictures.png"
    picture = run_sheet(RunFolder(str(run)), class_list("shapes"), open_truth(str(scenes)))
    sheet.write_bytes(picture or b"")
    told = f"{embedder}: zero-shot labels against the truth\n\n{table(result)}"
    return f"{told}\npictures (image, labels, truth): {sheet}"
