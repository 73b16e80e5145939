"""An estimate in words.

What enters: what `estimate` returns. What leaves: lines for a terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsplg_ray.safe_text import one_line

STAGE_NAMES = {
    "read_decode": "read, decode",
    "sam": "SAM",
    "clip": "CLIP",
    "compose_encode": "compose, encode",
    "all": "all",
}
_SHOWN = 3
"""Failed images that are named."""


def told(found: Mapping[str, Any]) -> str:
    """The estimate as lines."""
    rows = [("source", _source(found))]
    if not found["todo"]:
        return "\n".join([*_lines(rows), f"nothing is left to do; next: {found['command']}"])
    sample, device = found["sample"], found["device"]
    sizes = "{median_wh[0]:,} x {median_wh[1]:,} median, {largest_wh[0]:,} x {largest_wh[1]:,}"
    rows.append(("sizes", f"{sizes.format(**sample)} largest of the sample"))
    rows.append(("measured", f"on {_device(device)}; models ready in {device['start_s']:.1f} s"))
    lines = [*_lines(rows), "", *_table(found["seconds"]), ""]
    rows = [("speed", _speed(found)), ("reading", _reading(found)), ("takes", _hours(found))]
    size = found["bytes"]
    share = f"{size['embedding_share']:.0%} of it embeddings"
    each = " and ".join(f"{_storage(size[f'{k}_an_image']['mid'])} in {k}/" for k in _KINDS)
    rows.append(("storage", f"{_span(size['total'], _storage)}, {share}"))
    rows.append(("", f"an image {each}, with {sample['segments']:.0f} segments"))
    if found["cost"] is not None:
        unit = "GPU" if "gpu" in found["hours"] else "CPU"
        price = f"{found['price']:g} an hour of a {unit}"
        rows.append(("cost", f"{_span(found['cost'], _dollars)} at ${price}"))
    rows += [("failed", text) for text in _failed(found)]
    rows += [("note", text) for text in found["notes"]]
    rows.append(("next", found["command"]))
    return "\n".join([*lines, *_lines(rows)])


_KINDS = ("segments", "labels")


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<9} {one_line(text)}" for name, text in rows]


def _source(found: Mapping[str, Any]) -> str:
    done = f", {found['done']:,} of them done in {found['out']}" if found["done"] else ""
    sampled = f"; {found['sample']['images']} sampled, evenly spread" if found["todo"] else ""
    return f"{found['images']:,} images in {found['source']}{done}{sampled}"


def _device(device: Mapping[str, Any]) -> str:
    at_once = f", {device['images_at_once']} images at once"
    if device["name"] != "cpu":
        return device["name"] + at_once
    threads = f"{device['threads']} thread" + "s" * (device["threads"] > 1)
    return f"a CPU, {threads}{at_once if device['images_at_once'] > 1 else ''}"


def _table(seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    head = f"{'seconds an image':<18}{'median':>9}{'p10':>9}{'p90':>9}{'mean':>9}{'CPU s':>9}"
    rows = [
        f"{STAGE_NAMES[stage]:<18}"
        + "".join(f"{_short(row[k]):>9}" for k in ("median", "p10", "p90", "mean", "cpu"))
        for stage, row in seconds.items()
    ]
    return [head, *rows]


def _speed(found: Mapping[str, Any]) -> str:
    pool = found["pool"]
    actors = f"{pool['actors']} actor" + "s" * (pool["actors"] > 1)
    rate = _span(found["images_per_s"], _short)
    if not pool["gpus"]:
        return f"{rate} images/s with {actors} on {pool['cpus']:g} CPUs"
    alone = f" ({_short(found['images_per_s']['mid'] / pool['gpus'])} a GPU)"
    return f"{rate} images/s{alone} with {actors} on {pool['gpus']:g} GPUs"


def _reading(found: Mapping[str, Any]) -> str:
    reading, pool = found["reading"], found["pool"]
    wanted, there = _span(reading["cpus_wanted"], _short), f"{reading['cpus_there']:g}"
    whom = "each GPU" if pool["gpus"] else "the actors"
    told = f"{wanted} CPUs of reading keep {whom} busy, {there} there"
    return told if reading["keep_up"] else f"{told}: reading is the bottleneck, add CPUs"


def _hours(found: Mapping[str, Any]) -> str:
    hours, pool = found["hours"], found["pool"]
    wall = f"{_span(hours['wall'], _time)} by the clock"
    if "gpu" in hours:
        return f"{wall}; {_held(hours['gpu'], 'GPU')} ({pool['gpus']:g} GPUs)"
    work = _held(found["cpu_hours_of_work"], "core")
    return f"{wall}; {_held(hours['cpu'], 'core')} are held for {work} of work"


def _held(hours: Mapping[str, float], what: str) -> str:
    """`12.3 (11.0 to 13.9) GPU-hours`, or so many seconds."""
    if hours["mid"] >= 0.1:
        return f"{_span(hours, _short)} {what}-hours"
    return f"{_span(hours, lambda x: f'{x * 3600:.0f}')} {what}-seconds"


def _failed(found: Mapping[str, Any]) -> list[str]:
    failed = found["sample"]["failed"]
    if not failed:
        return []
    expected = _span(found["failures"], lambda x: f"{x:,.0f}")
    lines = [f"{len(failed)} of {found['sample']['images']} sampled: of all about {expected}"]
    lines += [f"{f['image_id']}: {f['stage']}: {f['error']}" for f in failed[:_SHOWN]]
    return lines + [f"and {len(failed) - _SHOWN} more"] * (len(failed) > _SHOWN)


def _span(guess: Mapping[str, float], show: Any) -> str:
    """`3.2 (2.9 to 3.5)`, or without the interval where it is none."""
    mid, low, high = (show(guess[k]) for k in ("mid", "low", "high"))
    return mid if low == mid == high else f"{mid} ({low} to {high})"


def _short(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 123, 12,345."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _time(hours: float) -> str:
    seconds = hours * 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{_short(hours)} h"


def _storage(size: float) -> str:
    """Bytes for people, in powers of ten, as disks are sold."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{_short(size / 10**power)} {unit}"
    return f"{size:.0f} B"


def _dollars(value: float) -> str:
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"
