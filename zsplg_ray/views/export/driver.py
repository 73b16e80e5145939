"""A run's labels out of the house: what all formats have in common.

What enters: `Labels` and options. What leaves: a folder that appears whole or not at all, with
export.json in it, and what was done. An image whose labels cannot be read, or which is to be put
beside them but is gone, is left out, counted and named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from zsplg_ray.config import ExportConfig
from zsplg_ray.labels import LabelledImage, Labels
from zsplg_ray.records import IGNORE
from zsplg_ray.safe_text import without_credentials
from zsplg_ray.settings import WorkError, complain
from zsplg_ray.sources import image_key
from zsplg_ray.views.export.checks import check_links, chosen, free_folder, listed
from zsplg_ray.views.export.formats import FORMATS
from zsplg_ray.views.export.images import fetch, put, reference
from zsplg_ray.views.export.job import Format, Item, Job, Writer
from zsplg_ray.views.export.names import file_names, in_val

log = logging.getLogger(__name__)

RECORD = "export.json"
_NAMED = 5
"""Images left out that are named in the log; all are in export.json."""
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
"""What reading a broken part raises."""


class _Left(NamedTuple):
    """An image that is left out."""

    image_id: str
    kind: str
    why: str


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a run as the settings say; see `write_export` for what it returns and raises."""
    labels = Labels(config.run, name="run")
    positions: Sequence[int] = range(len(labels))
    if config.ids is not None:
        positions = listed(labels, config.ids)
    names = ("images", "min_score", "min_area_px", "instances", "val_share", "image_prefix")
    given = {name: getattr(config, name) for name in names}
    return write_export(
        labels, config.format, config.to, positions=positions[: config.limit], **given
    )


def write_export(
    labels: Labels,
    format: str,
    to: str,
    *,
    positions: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write some images of a run, and their labels, in the format of another tool.

    Args:
        labels: The run.
        format: One of `FORMATS`.
        to: Folder to make.
        positions: Which images, by their places in `labels`, in any order. None: all.
        options: Fields of `Options`; one that is None is the format's default.

    Returns: `format`, `to`, `images` (exported), `left_out` (others, by kind: gone, broken, unfit),
        `renamed` (files that are not called like their images' ids), `turned`, `px_without_label`,
        `seconds`, `next` (how to go on), and what the format counts.

    Raises:
        ValueError: A bad option, or one that the format has no place for; `to` is not empty.
        WorkError: Not one image could be exported.
        OSError: The folder cannot be written, or the run not reached any more.
    """
    kind = FORMATS.get(format)
    if kind is None:
        raise ValueError(
            complain("format", f"one of {', '.join(FORMATS)}", format, "choose one of them")
        )
    picked = chosen(format, kind, options)
    positions = range(len(labels)) if positions is None else sorted(set(positions))
    if picked.images == "link":
        check_links(labels, positions)
    out = free_folder(to)
    hidden = out.parent / f".{out.name[:100]}.{uuid.uuid4().hex}"
    hidden.mkdir(parents=True)
    run = without_credentials(labels.folder.uri)
    job = Job(hidden, out, run, labels.classes, picked)
    try:
        result = _Export(labels, kind, job).run(positions)
        result = {"format": format, "to": str(out), **result}
        if not result["images"]:
            raise WorkError(f"none of {len(positions)} images could be exported to {out}")
        details = {"run": run, "classes": list(labels.classes.names)}
        record = {**result, **details, "options": dataclasses.asdict(picked)}
        job.write_json(RECORD, record)
        hidden.replace(out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # after the rename there is nothing there
    for entry in ("names", "omitted"):
        result.pop(entry)
    return result


class _Export:
    """One export at work."""

    def __init__(self, labels: Labels, kind: Format, job: Job) -> None:
        self.labels, self.kind, self.job = labels, kind, job
        self.writer: Writer = kind.writer(job)
        self.names = file_names(labels.ids, kind.reserved)
        self.left: list[_Left] = []
        self.counts: Counter[str] = Counter()
        self.renamed: dict[str, str] = {}

    def run(self, positions: Sequence[int]) -> dict[str, Any]:
        """Export images; the result, with `names` and `omitted` for the record."""
        began = time.monotonic()
        # Closed at once if the writer fails: threads still at work would make folders again after
        # they were removed.
        with contextlib.closing(self._entries(positions)) as entries:
            following = self.writer.finish(entries)
        if self.left:
            kinds = ", ".join(f"{n} {k}" for k, n in sorted(self._kinds().items()))
            log.warning("%d images are left out (%s):", len(self.left), kinds)
            for left in self.left[:_NAMED]:
                log.warning("  %s: %s", left.image_id, left.why)
        return {
            "images": self.counts["images"],
            "left_out": dict(self._kinds()),
            "renamed": len(self.renamed),
            "turned": self.counts["turned"],
            "px_without_label": self.counts["px_without_label"],
            **self.job.told,
            "seconds": round(time.monotonic() - began, 3),
            "next": following,
            "names": self.renamed,
            "omitted": {left.image_id: left.why for left in self.left},
        }

    def _kinds(self) -> Counter[str]:
        return Counter(left.kind for left in self.left)

    def _entries(self, positions: Sequence[int]) -> Generator[tuple[Item, Any]]:
        """Entries in the order in which the run is read, worked on by several threads."""
        threads = min(8, os.cpu_count() or 1)
        ahead: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for row in self._rows(positions):
                ahead.append(pool.submit(self._one, row))
                if len(ahead) > 4 * threads:
                    yield from self._taken(ahead.popleft())
            while ahead:
                yield from self._taken(ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _rows(self, positions: Sequence[int]) -> Iterator[LabelledImage]:
        """Rows part by part; the images of parts that cannot be read are left out.

        Raises: OSError if it is not a part that is broken, but the whole run that is gone.
        """
        waiting = list(positions)
        while waiting:
            read: set[int] = set()
            try:
                for row in self.labels.read(waiting):
                    read.add(self.labels.position(row.image_id))
                    yield row
                return
            except _UNREADABLE:
                if not self.labels.folder.parts("labels"):
                    raise
            # The first one that is missing stands in the broken part: one by one until one is read.
            waiting = [position for position in waiting if position not in read]
            for passed, position in enumerate(waiting, start=1):
                try:
                    row = self.labels[position]
                except _UNREADABLE as e:
                    why = f"its labels cannot be read ({' '.join(str(e).split())[:200]})"
                    self.left.append(_Left(self.labels.ids[position], "broken", why))
                else:
                    yield row
                    waiting = waiting[passed:]
                    break
            else:
                return

    def _taken(self, future: Future[Any]) -> Iterator[tuple[Item, Any]]:
        done = future.result()
        if isinstance(done, _Left):
            self.left.append(done)
            return
        item, entry, turned, ignored_px = done
        self.counts.update(images=1, turned=turned, px_without_label=ignored_px)
        if item.name != image_key(item.image_id):
            self.renamed[item.image_id] = item.name
        yield item, entry

    def _one(self, row: LabelledImage) -> _Left | tuple[Item, Any, bool, int]:
        """What one image needs; runs in a thread."""
        options, position = self.job.options, self.labels.position(row.image_id)
        row = dataclasses.replace(row, uri=row.uri or "")  # null in runs that others wrote
        try:
            label_HW = _label(row, len(self.labels.classes), options.min_score)
        except ValueError as e:
            return _Left(row.image_id, "broken", f"its labels cannot be read ({e})")
        name, data, image, turned = self.names[position], None, None, False
        split = "val" if in_val(row.image_id, options.val_share) else "train"
        called = reference(row.image_id, row.uri)
        if options.images != "none":
            try:
                data, suffix, turned = fetch(row)
            except FileNotFoundError as e:
                return _Left(row.image_id, "gone", f"it is not there any more ({e})")
            except (OSError, ValueError) as e:
                return _Left(row.image_id, "broken", f"the image cannot be used ({e})")
            called = name + suffix
            if self.kind.image_folder:
                image = f"{self.kind.image_folder.format(split=split)}/{called}"
                put(options.images, row, data, turned, self.job.folder / image)
        item = Item(
            position=position,
            image_id=row.image_id,
            name=name,
            image=image,
            reference=called,
            uri=row.uri,
            split=split,
            source=row.source,
            confidence=row.confidence,
            label_HW=label_HW,
            data=data,
        )
        try:
            entry = self.writer.entry(item)
        except ValueError as e:
            return _Left(row.image_id, "unfit", f"the format has no way to write it ({e})")
        ignored_px = int(np.count_nonzero(label_HW == IGNORE))
        # What waits for its turn, and what is told of it, needs no pixels.
        light = dataclasses.replace(item, label_HW=np.empty((0, 0), np.uint8), data=None)
        return light, entry, turned, ignored_px


def _label(row: LabelledImage, n_classes: int, min_score: float | None) -> np.ndarray:
    """The label map of an image. Raises: ValueError if it is broken or of another class list."""
    label_HW = row.label_HW
    if label_HW.shape != (row.height, row.width):
        shown = "x".join(map(str, label_HW.shape[::-1]))
        raise ValueError(
            complain("label_png", f"{row.width} x {row.height}", shown, "label it again")
        )
    worst = int(label_HW.max(where=label_HW != IGNORE, initial=0))
    if worst >= n_classes:
        rule = f"of {n_classes} classes"
        raise ValueError(complain("label_png", rule, f"class {worst}", "label it again"))
    if min_score is not None:
        score_HW = np.rint(row.score_HW * 255)
        if score_HW.shape != label_HW.shape:
            raise ValueError("its scores are of another size")
        # In 255ths, as scores are stored: one shown as 0.3 passes a minimum of 0.3.
        unsure_HW = score_HW < np.rint(min_score * 255)
        label_HW[unsure_HW & ((label_HW != 0) | (score_HW > 0))] = IGNORE
    return label_HW
