"""`zsplg label` on Ray: images -> segments/, labels/, errors/, each image exactly once.

What enters: a `LabelConfig`. What leaves: a run's folder (see rundir) and a summary. Which images
go where, and what happens when somebody is killed, is the same for every verb: see pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from zsplg_ray.cluster.actor import Row
from zsplg_ray.cluster.lock import only_run
from zsplg_ray.cluster.parts import labels_row, relabel_part, segments_row
from zsplg_ray.cluster.pipeline import run_images
from zsplg_ray.cluster.progress import Progress
from zsplg_ray.config import LabelConfig
from zsplg_ray.label.compose import minimum_scores
from zsplg_ray.label.naming import Naming, prepare
from zsplg_ray.label.presets import resolve_label
from zsplg_ray.records import LABELS, segments_schema
from zsplg_ray.rundir import Kind, RunFolder, Verb
from zsplg_ray.runinfo import describe_run, refuse_other_run
from zsplg_ray.sources import list_images
from zsplg_ray.vocab import class_list

if TYPE_CHECKING:  # SAM and CLIP take seconds to import: only who loads them does
    from zsplg_ray.label.labeler import Labeler, Labelled, LabelsImages

log = logging.getLogger(__name__)

Load = Callable[[LabelConfig, Naming, str], "LabelsImages"]
"""What an actor loads: (resolved config, naming, device) -> something that labels."""


def load_labeler(config: LabelConfig, naming: Naming, device: str) -> Labeler:
    """SAM and CLIP as a resolved config names them."""
    from zsplg_ray.label.labeler import Labeler

    return Labeler.load(config, naming, device)


def label(
    config: LabelConfig, *, load: Load = load_labeler, progress: Progress | None = None
) -> dict[str, Any]:
    """Label every image of the source that is not labelled yet.

    Args:
        config: As the user gave it.
        load: What each actor loads; the default is SAM and CLIP as `config` names them.
        progress: What shows how far it is; None: one of its own.

    Returns:
        The content of run.json.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: The work failed; what is finished is kept.
    """
    with progress or Progress("label", show=not config.quiet) as progress:
        return _label(config, load, progress)


def _label(config: LabelConfig, load: Load, progress: Progress) -> dict[str, Any]:
    """`label`, under way."""
    from zsplg_ray.label.weights import absolute_paths

    folder = RunFolder(config.out)
    classes = class_list(config.classes)
    progress.waits("listing the images")
    manifest = list_images(config.images, root=config.root)
    resolved = resolve_label(config)
    minimum_scores(resolved.compose, classes)  # says so if a threshold names no class
    refuse_other_run(folder, describe_run(config, resolved, classes, {}))  # before any download
    progress.waits("reading the models' weights")
    naming, weights = prepare(resolved, classes)
    run = describe_run(config, resolved, classes, weights)
    refuse_other_run(folder, run)
    with only_run(folder):
        here = absolute_paths(resolved)
        run_images(here, LabelTask(here, naming, load), folder, manifest, run, progress)
    return run


@dataclass(frozen=True)
class LabelTask:
    """Segments and zero-shot labels of images."""

    config: LabelConfig
    naming: Naming
    loader: Load
    verb: Verb = "label"

    @property
    def schemas(self) -> dict[Kind, pa.Schema]:
        """Labels, then segments: these say that an image is done."""
        return {
            "labels": LABELS,
            "segments": segments_schema(self.naming.bank.embedding_AD.shape[1]),
        }

    def load(self, device: str) -> LabelWorker:
        """Load SAM and CLIP."""
        return LabelWorker(self.loader(self.config, self.naming, device))

    def rows(self, image: Row, result: Labelled) -> dict[Kind, Row]:
        """Rows of labels/ and segments/."""
        segments, composed = result
        labels = labels_row(image, composed, len(self.naming.classes))
        return {"labels": labels, "segments": segments_row(image, segments)}

    def mend(self, folder: RunFolder, name: str, meta: Mapping[str, Any]) -> None:
        """Labels follow from segments, without SAM."""
        relabel_part(folder, name, self.naming, meta)


class LabelWorker:
    """Whatever labels images, as an actor wants it."""

    def __init__(self, labeler: LabelsImages) -> None:
        self.labeler = labeler

    @property
    def images_at_once(self) -> int:
        """How many images go through SAM together."""
        return self.labeler.images_at_once

    @property
    def weights(self) -> dict[str, str] | None:
        """SHA-256 of SAM and CLIP, where they come from files."""
        return getattr(self.labeler, "weights", None)

    def process(
        self, images: Sequence[Row], pixels: Sequence[np.ndarray]
    ) -> list[Labelled | Exception]:
        """Segments and labels of each image."""
        return self.labeler.label_many(pixels)
