"""`zsplg review export`: the images where a person's minute is worth most, ready to be corrected.

What enters: a run, another one to compare with, earlier corrections, a budget, weights. What
leaves: a folder in the format of the tool, and beside what `export` writes: review.json and
picks.csv, which tell of every pick how much each part was and added (signs.py, choose.py).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from zsplg_ray.config import ReviewExportConfig
from zsplg_ray.labels import Labels
from zsplg_ray.rundir import RunFolder
from zsplg_ray.safe_text import one_line, shortened, without_credentials
from zsplg_ray.settings import WorkError, complain, flatten
from zsplg_ray.sources import image_key
from zsplg_ray.summary import told
from zsplg_ray.views.evaluate import check_same
from zsplg_ray.views.export import FORMATS, write_export
from zsplg_ray.views.export.checks import check_links, chosen, free_folder
from zsplg_ray.views.review.choose import COLUMNS, Pick, choose
from zsplg_ray.views.review.signs import Signs, Source, measure

log = logging.getLogger(__name__)

RECORD, TABLE = "review.json", "picks.csv"
_CORRECTED = {"voc": "SegmentationClass", "coco": "annotations/instances_train.json"}
"""What is corrected in place, by format; Label Studio exports a file of its own."""


def export_picks(config: ReviewExportConfig) -> dict[str, Any]:
    """Pick images and write them for correcting.

    Returns: What review.json holds, and `next`: how to go on, a line a step.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: No image can be looked at, or none written.
    """
    begun = time.monotonic()
    labels = Labels(config.run, name="run")
    other = _other(config, labels)
    known = _known(config, labels)
    if len(known) == len(labels):
        fix = "label more images, or leave out --corrected"
        raise ValueError(complain("corrected", "of some images", f"all {len(labels)}", fix))
    options = _options(config, labels, known)
    source = Source(labels)
    signs = measure(source, list(range(len(labels))), other)
    if not signs.positions:
        raise WorkError(f"none of the {len(labels)} labels in {config.run} can be read")
    picks = choose(signs, config.budget, config.weights, known)
    if not picks:
        raise WorkError(f"all labels in {config.run} that can be read are corrected already")
    record = _record(config, labels, signs, picks, known)
    record["not_compared"] = _not_compared(labels, other)
    record["broken"] = {labels.ids[p]: one_line(why) for p, why in sorted(source.broken.items())}
    written = write_export(
        labels,
        config.format,
        config.to,
        positions=[pick.position for pick in picks],
        **options,
    )
    record["exported"] = {k: written[k] for k in ("images", "left_out", "renamed")}
    record["seconds"] = round(time.monotonic() - begun, 3)
    folder = RunFolder(config.to)
    folder.write_bytes(TABLE, table(record["picks"]).encode())
    folder.write_bytes(RECORD, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())
    return record | {"next": _next(config, str(written["next"]))}


def table(picks: Sequence[Mapping[str, Any]]) -> str:
    """Picks as CSV: rank, image, total, why, then of each part its value and what it added."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [name for part in COLUMNS for name in (part, f"{part} added")]
    writer.writerow(["rank", "image_id", "total", "why", *parts])
    for pick in picks:
        numbers = [pick[kind][p] for p in COLUMNS for kind in ("values", "added")]
        writer.writerow(
            [pick["rank"], _cell(pick["image_id"]), pick["total"], pick["why"], *numbers]
        )
    return out.getvalue()


def summary(record: Mapping[str, Any]) -> str:
    """What was picked and why, for a terminal, and how to go on."""
    picks = record["picks"]
    n = record["exported"]["images"]
    lines = [f"{n} of {record['candidates']} images picked, in {record['to']}"]
    for pick in picks[:10]:
        name = one_line(shortened(pick["image_id"], 60))
        lines.append(f"  {pick['rank']:>3}  {pick['total']:5.2f}  {name}  ({pick['why']})")
    if len(picks) > 10:
        lines.append(f"  ... all of them, and why: {record['to']}/{TABLE}")
    for key, what in (
        ("skipped_corrected", "are corrected already and were passed over"),
        ("not_compared", "are not in the run to compare with, or cannot be read there"),
    ):
        if record[key]:
            lines.append(f"{record[key]} images {what}")
    if record["broken"]:
        first = next(iter(record["broken"].items()))
        example = shortened(f"{first[0]}: {first[1]}", 200)
        lines.append(f"{len(record['broken'])} labels could not be read, such as {example}")
    return told(lines, then=[(f"{i}", step) for i, step in enumerate(record["next"], start=1)])


def _other(config: ReviewExportConfig, labels: Labels) -> Source | None:
    """The run to compare with. Raises: ValueError if it is of other images or classes."""
    if config.compare is None:
        return None
    other = Labels(config.compare, name="compare")
    check_same(labels.classes, other.classes, f"labels in {without_credentials(config.compare)}")
    if not any(image_id in other for image_id in labels.ids):
        fix = "run `zsplg predict` over the same images"
        shown = f"images such as {other.ids[0]!r}" if other.ids else "none"
        rule = f"a run over the same images, such as {labels.ids[0]!r}"
        raise ValueError(complain("compare", rule, shown, fix))
    return Source(other)


def _options(config: ReviewExportConfig, labels: Labels, known: set[int]) -> dict[str, str]:
    """What the export is told, checked before the run is measured, which may take long.

    Raises: ValueError for what `write_export` would refuse, whichever images are picked.
    """
    images = config.images or ("copy" if config.image_prefix is None else "none")
    options = {"images": images}
    if config.image_prefix is not None:
        options["image_prefix"] = config.image_prefix
    chosen(config.format, FORMATS[config.format], options)
    if images == "link":
        check_links(labels, [p for p in range(len(labels)) if p not in known])
    free_folder(config.to)
    return options


def _not_compared(labels: Labels, other: Source | None) -> int:
    """How many images the other run has no labels of that can be read."""
    if other is None:
        return 0
    theirs = [other.labels.find(image_id) for image_id in labels.ids]
    return sum(p is None or p in other.broken for p in theirs)


def _known(config: ReviewExportConfig, labels: Labels) -> set[int]:
    """Positions of the images that stand in earlier corrections."""
    known = set()
    for folder in config.corrected:
        earlier = {image_key(image_id) for image_id in Labels(folder, name="corrected").ids}
        known |= {p for p, image_id in enumerate(labels.ids) if image_key(image_id) in earlier}
    return known


def _record(
    config: ReviewExportConfig, labels: Labels, signs: Signs, picks: list[Pick], known: set[int]
) -> dict[str, Any]:
    return {
        "verb": "review export",
        "run": without_credentials(config.run),
        "labels_fingerprint": labels.run and labels.run.get("labels_fingerprint"),
        "compare": config.compare and without_credentials(config.compare),
        "format": config.format,
        "to": config.to,
        "budget": config.budget,
        "weights": flatten(config.weights),
        "parts": list(signs.used),
        "candidates": len(signs.positions) - len(known & set(signs.positions)),
        "skipped_corrected": len(known),
        "picks": [
            {
                "rank": rank,
                "image_id": labels.ids[pick.position],
                "uri": labels.small["uri"][pick.position].as_py(),
                "total": round(pick.total, 4),
                "why": pick.why,
                "values": {k: round(v, 5) for k, v in pick.values.items()},
                "added": {k: round(v, 5) for k, v in pick.weighed.items()},
            }
            for rank, pick in enumerate(picks, start=1)
        ],
    }


def _next(config: ReviewExportConfig, how: str) -> list[str]:
    """What to do with the export, and the command that follows."""
    if config.format == "labelstudio":
        masks = "export.json"
        how += f"; correct and submit each, and export the project as JSON ({masks})"
    else:
        place = _CORRECTED[config.format]
        masks = config.to if config.format == "voc" else f"{config.to.rstrip('/')}/{place}"
        how = f"correct {config.to.rstrip('/')}/{place}"
    run = shlex.quote(without_credentials(config.run))
    return [how, f"zsplg review import --masks {shlex.quote(masks)} --run {run} --out corrected/"]


def _cell(text: str) -> str:
    """A text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
