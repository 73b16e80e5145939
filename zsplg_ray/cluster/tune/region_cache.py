"""Segments and hand-made masks of a run -> what a search over thresholds needs, part by part.

What enters: the segments/ parts of a run's folder, a `Truth`, class texts. What leaves: for each
image that has a truth its regions (see label/regions.py), the qualities of its segments and their
similarities to the classes; and a cache of the regions, regions/X.parquet for segments/X.parquet.

Cutting regions is the dear part and depends on masks and truth alone, so it is kept; a row of the
cache is used only if the hashes in it are those of the truth and of the segments as they are now.
So nothing has to be cleared when masks are mended or images labelled anew, and whoever deletes
regions/ loses some seconds. Embeddings and runs of one part at a time are in memory, and in as many
Ray tasks as run at once.

Shape suffixes: R segments, K classes, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError

from zsplg_ray.cluster.session import last_line
from zsplg_ray.label.regions import REGIONS, Regions, cut, segments_sha256, truth_sha256
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.masks import Truth
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import WorkError

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Judged:
    """One image as a search sees it: some tens of KiB, without masks and embeddings."""

    image_id: str
    regions: Regions
    area_px: np.ndarray
    """int64 [R]."""
    predicted_iou: np.ndarray
    """float32 [R]."""
    stability: np.ndarray
    """float32 [R]."""
    sims: dict[str, np.ndarray]
    """Name of a template set -> sim_RK, float32 [R, K]."""

    def __len__(self) -> int:
        """R, the number of its segments."""
        return len(self.area_px)

    @property
    def classes(self) -> frozenset[int]:
        """The true classes that occur in it, background left out."""
        return frozenset(self.regions.count_class.tolist()) - {0}


def read_judged(
    folder: RunFolder,
    wanted: Mapping[str, Sequence[str]],
    truth: Truth,
    banks: Mapping[str, TextBank],
    told: Callable[[int], None] = lambda images: None,
) -> list[Judged]:
    """Read the wanted images of a run in Ray tasks, a part each, and keep the regions.

    Args:
        folder: The run's.
        wanted: Name of a segments part -> ids of its images that have a truth.
        truth: Their masks.
        banks: Name of a template set -> text embeddings, all of the same classes.
        told: Called with the number of images that are through, for the progress line.

    Returns:
        The images in the order of `wanted`.

    Raises:
        ValueError: A mask that does not fit its image or the classes; the image is named.
        WorkError: Ray failed.
    """
    for name in set(folder.parts("regions")) - set(folder.parts("segments")):
        folder.delete_part("regions", name)  # of segments that are no more
    shared = ray.put((folder, truth, dict(banks)))
    task = ray.remote(num_cpus=1)(_in_task)
    todo = [(name, list(ids)) for name, ids in wanted.items() if ids]
    at_once = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    found: dict[str, list[Judged]] = {}
    running: dict[ray.ObjectRef, str] = {}
    try:
        while todo or running:
            # One alone at first: what it compiles, if anything, the others find in numba's cache.
            while todo and len(running) < (at_once if found else 1):
                name, ids = todo.pop()
                running[task.remote(shared, name, ids)] = name
            done, _ = ray.wait(list(running))
            images = ray.get(done[0])
            if isinstance(images, str):
                raise ValueError(images)
            found[running.pop(done[0])] = images
            told(len(images))
    except RayError as e:
        raise WorkError(f"segments could not be read: {last_line(e)}") from e
    finally:
        for waiting in running:
            ray.cancel(waiting)
    return [image for name in wanted if name in found for image in found[name]]


def _in_task(
    shared: tuple[RunFolder, Truth, dict[str, TextBank]], name: str, ids: Sequence[str]
) -> list[Judged] | str:
    """`judge_part`, or what is wrong with a mask: Ray would wrap the error in a stack of lines."""
    try:
        return judge_part(*shared, name, ids)
    except (ValueError, FileNotFoundError) as e:
        return str(e)


def judge_part(
    folder: RunFolder,
    truth: Truth,
    banks: Mapping[str, TextBank],
    name: str,
    ids: Sequence[str],
) -> list[Judged]:
    """Some images of one segments part; regions that were not in the cache are put there.

    Raises: ValueError, FileNotFoundError for a mask that does not fit or cannot be read.
    """
    cached = _cached(folder, name)
    n_classes = next(iter(banks.values())).n_classes
    wanted, made, judged = set(ids), False, []
    table = folder.read_part("segments", name)
    column = table["segments"]
    for i, row in enumerate(table.drop_columns(["segments"]).to_pylist()):
        image_id = row["image_id"]
        if image_id not in wanted:
            continue
        segments = Segments.from_arrow(column[i].values, (row["height"], row["width"]))
        try:
            truth_HW = truth.read(image_id)
            regions = cached.get(image_id)
            if regions is None or not _fits(regions, segments, truth_HW, n_classes):
                regions = cached[image_id] = cut(segments, truth_HW, n_classes)
                made = True
        except ValueError as e:
            raise ValueError(f"{e} (image {image_id})") from e
        judged.append(_judged(image_id, regions, segments, banks))
    if made:
        rows = [{"image_id": i, **regions.to_row()} for i, regions in cached.items()]
        folder.write_part("regions", name, pa.Table.from_pylist(rows, schema=REGIONS), {})
    return judged


def _cached(folder: RunFolder, name: str) -> dict[str, Regions]:
    """The regions that are kept for a part; none if the file is missing, torn or of an old form."""
    try:
        rows: Iterable[dict] = folder.read_part("regions", name).to_pylist()
        return {row["image_id"]: Regions.from_row(row) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, OverflowError) as e:
        log.debug("regions/%s.parquet is of no use (%s): counted again", name, e)
        return {}


def _fits(regions: Regions, segments: Segments, truth_HW: np.ndarray, n_classes: int) -> bool:
    """Whether kept regions are what `cut` would give; compiled loops rest on the sizes."""
    return (
        regions.size_hw == segments.size_hw
        and regions.n_segments == len(segments)
        and regions.truth_sha256 == truth_sha256(truth_HW)
        and regions.segments_sha256 == segments_sha256(segments)
        and int(regions.count_class.max(initial=0)) < n_classes
    )


def _judged(
    image_id: str, regions: Regions, segments: Segments, banks: Mapping[str, TextBank]
) -> Judged:
    assert segments.embedding_RD is not None, "embedded before they are stored"
    return Judged(
        image_id,
        regions,
        segments.area_px,
        segments.predicted_iou,
        segments.stability,
        {name: bank.similarity(segments.embedding_RD) for name, bank in banks.items()},
    )
