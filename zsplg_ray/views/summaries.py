"""What verbs say on stdout when they are done: counts, places, the command that may come next.

What enters: run.json, train.json, and where they are. What leaves: text in the one form of
summary.py. Studies have tables of their own, made where they are known (cluster/tune/).

A word in capitals in a command (MASKS) stands for what only the user knows.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from zsplg_ray.config import ShapesConfig, TrainConfig
from zsplg_ray.rundir import RunFolder
from zsplg_ray.safe_text import one_line, shortened
from zsplg_ray.storage import is_address
from zsplg_ray.summary import Next, command, counted, duration, told, within

log = logging.getLogger(__name__)

_MOST_OF_A_REASON = 160
"""Characters of an error in a summary."""
_MOST_COMPARED = 500
"""Characters of an error that are compared with others'; a run keeps no more."""


def of_labels(run: Mapping[str, Any], folder: str, preview: str | None, verb: str) -> str:
    """A run's summary.

    Args:
        run: Content of run.json.
        folder: The run's, as the user wrote it.
        preview: The file of pictures in it, if there is one.
        verb: That was run: label, relabel or predict.
    """
    counts = run["counts"]
    done = [_images(run, verb)]
    if counts["quarantined"]:
        done.append(_errors(RunFolder(folder), counts["quarantined"]))
    places = {
        "labels": within(folder, "labels"),
        "pictures": preview and within(folder, preview),
        "errors": within(folder, "errors") if counts["quarantined"] else None,
    }
    return told(done, places, _after(folder, verb))


def of_training(run: Mapping[str, Any], given: TrainConfig) -> str:
    """A training's summary.

    Args:
        run: Content of train.json.
        given: The settings as the user gave them.
    """
    last, best, out = run["last"], run["best"], given.out
    line = f"{counted(last['epoch'], 'epoch')} in {duration(run['seconds'])}"
    if run["images_per_s"] is not None:
        line += f", {_rate(run['images_per_s'])}"
    done = [line]
    if best["val_miou"] is not None:
        done.append(f"val mIoU {best['val_miou']:.4f} at epoch {best['epoch']}, the best")
        if last["val_miou"] is not None:
            done[-1] += f", and {last['val_miou']:.4f} at the end"
    places = {
        "model": within(out, "best.pt"),
        "pictures": run["preview"] and within(out, run["preview"]),
    }
    root = ["--root", given.root] if given.root is not None else []
    evaluate = ["evaluate", out, "--truth", given.val, *root] if given.val else None
    if evaluate is None:
        judge = f"{command('evaluate', out)} --truth MASKS"
    else:
        judge = command(*map(str, evaluate))
    images = [given.unlabeled, *root] if given.unlabeled is not None else None
    where = shlex.join(map(str, images)) if images is not None else "IMAGES"
    use = f"{command('predict', '--model', out, '--images')} {where} "
    use += shlex.join(["--out", _beside(out, "predicted")])
    return told(done, places, [("judge", judge), ("use", use)])


def of_page(result: Mapping[str, Any]) -> str:
    """The summary of what `report` returned."""
    images = counted(result["images"], "image")
    if result["left_out"]:
        images += f" of {result['images'] + result['left_out']:,}"
    if result["gone"]:
        images += f" ({result['gone']:,} without their picture, which cannot be read)"
    line = f"{images} on one page, {result['bytes'] / 1e6:.1f} MB in {result['seconds']:.1f} s"
    return told([line], {"page": result["path"], "open": result["url"]})


def of_export(result: Mapping[str, Any]) -> str:
    """The summary of what `export` returned."""
    left = [f"{n:,} {kind}" for kind, n in sorted(result["left_out"].items())]
    line = f"{counted(result['images'], 'image')} as {result['format']}"
    line += f", {' and '.join(left)} left out" if left else ""
    return told([line], {"labels": result["to"]}, [("import", result["next"])])


def of_scenes(given: ShapesConfig) -> str:
    """The summary of scenes that were made."""
    tiny = ("--sam", "shapes", "--clip", "shapes", "--out", _beside(given.out, "labels"))
    label = command("label", "--images", given.out, "--classes", "shapes", *tiny)
    places = {"scenes": given.out}
    return told([f"{counted(given.n, 'scene')} with masks"], places, [("label", label)])


def _images(run: Mapping[str, Any], verb: str) -> str:
    counts = run["counts"]
    images = counted(counts["labelled"], "image")
    if verb == "relabel":
        return f"{images} labelled again in {duration(run['relabel_seconds'])}"
    now = counts["labelled_now"]
    if now == counts["labelled"]:
        line = f"{images} labelled"
    elif now:
        line = f"{images} labelled, {now:,} of them"
    else:
        return f"{images} labelled, all of them before"
    return f"{line} in {duration(run['seconds'])}, {_rate(run['images_per_s'])}"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.{1 if images_per_s >= 10 else 2}f} images/s"


def _errors(folder: RunFolder, number: int) -> str:
    """How many images could not be done, and the commonest reason."""
    line = f"{counted(number, 'image')} could not be done"
    try:
        alike = failed_alike(folder)
    except (OSError, pa.ArrowException, ValueError) as e:
        log.debug("errors cannot be read: %s", e)
        return line
    if not alike:
        return line
    often = f"{len(alike[0]):,} of them: " if len(alike) > 1 else ""
    reason = f"{alike[0][0].stage}: {alike[0][0].error}"
    return f"{line} ({often}{one_line(shortened(reason, _MOST_OF_A_REASON))})"


class Failure(NamedTuple):
    """An image that could not be done."""

    image_id: str
    stage: str
    error: str


def failed_alike(folder: RunFolder) -> list[list[Failure]]:
    """The images in errors/ by what was the matter, the commonest first, each by id.

    Reasons are alike if they differ in numbers, addresses and quoted names alone. Of an image that
    was tried more than once the last row counts.

    Raises: OSError, ValueError, pa.ArrowException if errors/ cannot be read.
    """
    table = folder.read("errors", list(Failure._fields))
    rows = table.to_pylist() if table is not None else []
    told = (Failure(*(str(row[key] or "") for key in Failure._fields)) for row in rows)
    alike: dict[tuple[str, str], list[Failure]] = {}
    for _, one in sorted({one.image_id: one for one in told}.items()):
        alike.setdefault((one.stage, _kind(one.error)), []).append(one)
    return sorted(alike.values(), key=len, reverse=True)


def _kind(error: str) -> str:
    """An error without what differs from image to image: numbers, addresses, quoted names."""
    return re.sub(r"\d+|'[^']*'|\"[^\"]*\"|\S*/\S*", "_", error[:_MOST_COMPARED])


def _after(folder: str, verb: str) -> list[Next]:
    page = "report.html" if is_address(folder) else within(folder, "report.html")
    report = ("look", command("report", folder, "--out", page))
    evaluate = ("judge", f"{command('evaluate', folder)} --truth MASKS")
    if verb == "predict":
        voc = _beside(folder, "voc")
        export = command("export", folder, "--format", "voc", "--to", voc)
        return [report, evaluate, ("hand on", export)]
    tune = f"{command('tune', 'labels', '--run', folder)} --truth MASKS"
    tuned = [("improve", tune)] if verb == "label" else []
    return [report, evaluate, *tuned]


def _beside(folder: str, what: str) -> str:
    """A name beside a folder, for what is made of it; of a store's, in the working directory."""
    stripped = folder.rstrip("/")
    if is_address(folder) or stripped.rsplit("/", 1)[-1] in ("", ".", ".."):
        return what
    return f"{stripped}_{what}"
