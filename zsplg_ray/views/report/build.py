"""`zsplg report`: count, choose, draw, and put the page together.

What enters: the settings. What leaves: one HTML file, whole or not at all, and what it holds in
numbers. First the maps of many images are counted; then those that are shown are drawn. Where all
that are counted are shown, both happen at once.
"""

from __future__ import annotations

import base64
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsplg_ray.config import ReportConfig
from zsplg_ray.images import image_size
from zsplg_ray.records import IGNORE
from zsplg_ray.rundir import RunFolder
from zsplg_ray.safe_text import masked
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place
from zsplg_ray.views.report import charts, choose, page, records, tiles
from zsplg_ray.views.report.counts import (
    Counted,
    Map,
    MapCount,
    Totals,
    count,
    is_number,
    read_maps,
)
from zsplg_ray.views.report.sources import Rows, Sources, in_batches, open_sources

log = logging.getLogger(__name__)

NAME = "report.html"
"""The page in a run's folder, where no other place is given."""
SUFFIXES = (".html", ".htm")


@dataclass
class Seen:
    """What has been found out about images, by position."""

    counted: dict[int, Counted] = field(default_factory=dict)
    drawn: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What the page's script needs to show an image."""


def report(config: ReportConfig) -> dict[str, Any]:
    """Make the page about a run.

    Returns: `path` (address of the page) and `url` (to open it by), both without credentials;
        `bytes`, `seconds`, `images` (shown), `left_out` (labelled, but not shown), `counted`
        (images behind the charts), `gone` (shown without their picture), `failed` (images in
        errors/), `miou` (None without truth).

    Raises:
        ValueError: There are no whole labels, what is compared is of other classes or images, or
            `out` is no place for a page.
        OSError: The page cannot be written.
    """
    began = time.monotonic()
    out = _place(config)
    sources = open_sources(config)
    labels, truth = sources.run.labels, sources.truth
    judged = [p for p, i in enumerate(labels.ids) if truth is not None and truth.has(i)]
    counted = choose.counted_positions(len(labels), judged, config.max_counted)
    totals = Totals(len(sources.classes), len(sources.others))
    seen = Seen()
    n_shown = min(config.max_images, len(counted))
    side_px = config.side_px or tiles.side_for(n_shown)
    camera = tiles.Photographer(side_px, 2 * tiles.PAGE_BYTES // max(100, n_shown))
    whole = len(counted) <= config.max_images
    _look(sources, counted, seen, totals, camera if whole else None)
    if totals.misfits and not totals.with_truth:
        raise ValueError(totals.misfits[0])
    doubt = {p: choose.doubt(_confidence(sources, p), c) for p, c in seen.counted.items()}
    shown = choose.shown_positions(seen.counted, doubt, config.max_images)
    if not whole:
        _look(sources, shown, seen, None, camera)
    failed = records.failures(labels.folder)
    html = page.render(_content(sources, totals, seen, shown, doubt, failed))
    RunFolder(out.parent.uri).write_bytes(out.name, html)
    made = charts.mean_iou(totals, sources.classes.names)
    return {
        "path": masked(out.uri) if out.prefix else out.uri,
        "url": masked(out.uri) if out.prefix else Path(out.path).as_uri(),
        "bytes": len(html),
        "seconds": round(time.monotonic() - began, 3),
        "images": len(shown),
        "left_out": len(labels) - len(shown),
        "counted": totals.images,
        "gone": sum(1 for p in shown if seen.drawn[p]["photo"] is None),
        "failed": failed[0],
        "miou": made,
    }


def _place(config: ReportConfig) -> Place:
    """Where the page goes. Raises: ValueError if that is no place for one."""
    if config.out is None:
        return Place.parse(config.run).child(NAME)
    place = Place.parse(config.out)
    if place.kind() == "folder" or config.out.endswith("/"):
        fix = f"give a file in it, such as {config.out.rstrip('/')}/{NAME}"
        raise ValueError(complain("out", "a file", config.out, fix))
    if place.suffix not in SUFFIXES:
        fix = "a browser knows the page by that"
        raise ValueError(complain("out", "a file that ends in .html", config.out, fix))
    if place.parent.kind() == "file":
        fix = "give another place"
        raise ValueError(complain("out", "a file in a folder", config.out, fix))
    return place


# Images ------------------------------------------------------------------------------------------


def _look(
    sources: Sources,
    positions: Sequence[int],
    seen: Seen,
    totals: Totals | None,
    camera: tiles.Photographer | None,
) -> None:
    """Count images (if there are `totals`) and draw them (if there is a `camera`)."""

    def look(rows: Rows) -> tuple[Counted, dict[str, Any] | None]:
        with tiles.one_at_a_time(_pixels(rows)):
            maps = read_maps(rows, sources.truth, len(sources.classes))
            counted = count(rows, maps, sources.classes.names, totals)
            if totals is not None and maps.misfit:
                totals.misfit(maps.misfit)
            return counted, _drawn(rows, maps.all, counted, camera) if camera else None

    # More threads than processors: they also wait for storage.
    with ThreadPoolExecutor(min(16, 2 + (os.cpu_count() or 1))) as pool:
        for batch in in_batches(sources, positions):
            for rows, (counted, drawn) in zip(batch, pool.map(look, batch), strict=True):
                seen.counted.setdefault(rows.position, counted)
                if drawn is not None:
                    seen.drawn[rows.position] = drawn
    for position in positions:
        if position not in seen.counted:  # its part is broken
            nothing = Counted(others=[None] * len(sources.others), notes=["its part is broken"])
            seen.counted[position] = nothing
        if camera is not None and position not in seen.drawn:
            seen.drawn[position] = _nothing(sources)


def _pixels(rows: Rows) -> int:
    try:
        return math.prod(image_size(rows.row.label_png or b"", max_px=10**12))
    except ValueError:
        return 0


def _drawn(
    rows: Rows, maps: Sequence[Map | None], counted: Counted, camera: tiles.Photographer
) -> dict[str, Any]:
    """What the page's script needs to show one image; bytes as text."""
    size_hw = maps[0].label_HW.shape if maps[0] is not None else None
    photo = camera.take(rows.row.uri, size_hw)
    if photo.why:
        counted.notes.append(photo.why)
    small = (m and tiles.small_map(m.label_HW, camera.side_px) for m in maps)
    pngs = [_text(png) for png in small]
    return {"photo": _text(photo.jpeg), "why": photo.why, "maps": pngs}


def _nothing(sources: Sources) -> dict[str, Any]:
    maps = [None] * (2 + len(sources.others))
    return {"photo": None, "why": "its part is broken", "maps": maps}


def _text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _confidence(sources: Sources, position: int) -> float | None:
    value = sources.run.labels.small["confidence"][position].as_py()
    return value if is_number(value) else None


# Content -----------------------------------------------------------------------------------------


def _content(
    sources: Sources,
    totals: Totals,
    seen: Seen,
    shown: Sequence[int],
    doubt: Mapping[int, float],
    failures: tuple[int, list[records.Reason]],
) -> page.Content:
    """Everything that stands on the page."""
    labels, names = sources.run.labels, sources.classes.names
    others = [other.name for other in sources.others]
    images = [0] * len(names)
    for one in seen.counted.values():
        for k in one.labels.shares if one.labels is not None else ():
            if k != IGNORE:
                images[k] += 1
    resolved = (labels.run or {}).get("resolved", {})
    words = charts.Words(
        names, sources.run.name, others, resolved.get("compose.unsure") == "ignore"
    )
    failed, reasons = failures
    layers = [(sources.run.name, sources.run.kind), *((o.name, o.kind) for o in sources.others)]
    return page.Content(
        title=sources.run.name,
        kind=sources.run.kind,
        folder=masked(labels.folder.uri),
        classes=names,
        layers=[*layers, ("Truth", "masks")],
        facts=records.facts(labels),
        settings=records.settings(labels),
        images=[_entry(sources, seen, p, doubt[p]) for p in shown],
        data=[seen.drawn[p] for p in shown],
        labelled=len(labels),
        counted=totals.images,
        with_truth=totals.with_truth,
        misfits=totals.misfits,
        failed=failed,
        reasons=reasons,
        coverage=charts.coverage(totals),
        open_share=charts.open_share(totals),
        confidence=_mean(_confidence(sources, p) for p in seen.counted),
        miou=charts.mean_iou(totals, names),
        differs=_mean(o.differs for c in seen.counted.values() for o in c.others if o is not None),
        cards=charts.cards(totals, images, words),
        tuned=records.tuned(labels.folder),
    )


def _mean(values: Iterator[float | None] | Any) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _entry(sources: Sources, seen: Seen, position: int, doubt: float) -> dict[str, Any]:
    """One image's numbers, as the page's script sorts, filters and tells them."""
    one = seen.counted[position]
    small = sources.run.labels.small
    found = one.labels
    differs = [o.differs for o in one.others if o is not None and o.differs is not None]
    measures = {
        "doubt": doubt,
        "confidence": _confidence(sources, position),
        "coverage": found.coverage if found is not None else None,
        "miou": found.miou if found is not None else None,
        "wrong": found.wrong if found is not None else None,
        "differs": max(differs, default=None),
    }
    maps = [found, *one.others, one.truth]
    size = [small[name][position].as_py() for name in ("width", "height")]
    return {
        "id": sources.run.labels.ids[position],
        "size": size,
        "source": small["source"][position].as_py(),
        "m": {name: None if v is None else round(v, 4) for name, v in measures.items()},
        "maps": [None if m is None else _map_entry(m) for m in maps],
        "notes": one.notes,
    }


def _map_entry(found: MapCount) -> dict[str, Any]:
    values = {"miou": found.miou, "wrong": found.wrong, "differs": found.differs}
    shares = sorted(found.shares.items(), key=lambda item: -item[1])
    return {
        "shares": [[k, round(share, 4)] for k, share in shares],
        **{name: None if v is None else round(v, 4) for name, v in values.items()},
    }
