"""`zsplg review import`: corrected masks in, labels that training takes as truth out.

What enters: what a person's tool has written, and the run whose labels were corrected. What leaves:
the folder of corrected labels (corrected.py), and if asked for a copy of the run with them in place
(merged.py). A mask that is of no use is counted and told, and never stops the others.
"""

from __future__ import annotations

import hashlib
import logging
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from zsplg_ray import __version__
from zsplg_ray.config import ReviewImportConfig
from zsplg_ray.labels import Labels
from zsplg_ray.rundir import RunFolder
from zsplg_ray.runinfo import recorded
from zsplg_ray.safe_text import masked, one_line, shortened, without_credentials
from zsplg_ray.settings import complain, fingerprint
from zsplg_ray.storage import Place
from zsplg_ray.summary import told
from zsplg_ray.views.export import FORMATS
from zsplg_ray.views.export.names import file_names
from zsplg_ray.views.review import corrected
from zsplg_ray.views.review.merged import check_merged, write_merged
from zsplg_ray.views.review.names import ImageNames
from zsplg_ray.views.review.returned import Returned, open_returned

log = logging.getLogger(__name__)

_SHOWN = 20
"""Errors and names that the result lists one by one; errors/ has them all."""


@dataclass
class _Rows:
    """Makes rows, and counts what they are."""

    labels: Labels
    found: Returned
    keep_unchanged: bool
    digests: dict[str, str] = field(default_factory=dict)
    """Image id -> digest of the label that the run has now."""
    changed: int = 0
    unchanged: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        wanted = [p for p, i in enumerate(self.labels.ids) if i in self.found.draws]
        for row in self.labels.read(wanted):
            try:
                self.digests[row.image_id] = _digest(row.label_HW)
            except ValueError as e:
                log.debug("label of %s cannot be read: %s", row.image_id, e)

    def make(self, image_id: str) -> dict[str, Any] | Literal["none"] | None:
        """The row of an image, "none" if none is wanted, None if its mask is of no use."""
        small = self.labels.small.slice(self.labels.position(image_id), 1).to_pylist()[0]
        try:
            label_HW = self.found.draws[image_id]((small["height"], small["width"]))
        except (ValueError, OSError, MemoryError) as e:
            self.errors.append((image_id, " ".join(str(e).split())))
            return None
        if _digest(label_HW) == self.digests.get(image_id):
            self.unchanged += 1
            if not self.keep_unchanged:
                return "none"
        else:
            self.changed += 1
        return corrected.row_of(small, label_HW, len(self.labels.classes))


def import_masks(config: ReviewImportConfig, folder: RunFolder | None = None) -> dict[str, Any]:
    """Take corrected masks back.

    Args:
        config: What to do.
        folder: Of `config.out`, guarded against other runs by the caller; by default as it is.

    Returns: Counts, see `_result`.

    Raises:
        ValueError: Bad input, or no mask is of use; nothing has been written.
    """
    begun = time.monotonic()
    folder = RunFolder(config.out) if folder is None else folder
    labels = Labels(config.run, name="run")
    corrected.check_folder(folder, labels.classes)
    merged = _merged_folder(config, labels)
    found = open_returned(config.masks, labels, _names(labels))
    _refuse_nothing(found, config.masks, labels)
    rows = _Rows(labels, found, config.unchanged == "keep")
    meta = _meta(labels)
    change = corrected.put_rows(folder, sorted(found.draws), rows.make, meta)
    failed = [*found.errors, *rows.errors]
    if failed and not rows.changed + rows.unchanged:
        name, why = failed[0]
        fix = f"mend them ({shortened(name, 80)}: {shortened(why, 200)})"
        shown = f"{len(failed)} of which none is"
        raise ValueError(complain("masks", "of use", shown, fix))
    total = Labels(config.out, name="out") if folder.parts("labels") else None
    n_total = len(total) if total is not None else 0
    if n_total or folder.read_run() is not None:  # else the folder stays as empty as it was
        told = [(n, why) for n, why in failed]
        told += [(n, "no image of the run is called so") for n in found.unmatched]
        lines = [(shortened(n), one_line(shortened(masked(why)))) for n, why in told]
        corrected.put_errors(folder, lines, meta)
        _write_run(config, folder, labels, n_total, len(lines), time.monotonic() - begun)
    if merged is not None:
        corrections = Labels(config.out, name="out") if total is not None else None
        _merge(config, merged, labels, corrections)
    result = {
        **{"added": change.added, "replaced": change.replaced, "same": change.same},
        "removed": change.removed,
        **{"changed": rows.changed, "unchanged": rows.unchanged, "failed": len(failed)},
        "skipped_unchanged": 0 if config.unchanged == "keep" else rows.unchanged,
        "unmatched": len(found.unmatched),
        "not_annotated": found.not_annotated,
        "cancelled": found.cancelled,
        "errors": [{"image": shortened(n, 200), "error": why} for n, why in failed[:_SHOWN]],
        "unmatched_names": [shortened(n, 200) for n in found.unmatched[:_SHOWN]],
        "corrected": n_total,
    }
    for name in ("run", "out", "merged"):
        uri = getattr(config, name)
        result[name] = uri and without_credentials(uri)  # it is printed, and stands in commands
    return result


def summary(result: Mapping[str, Any]) -> str:
    """What was done, for a terminal, and the command to go on with."""
    out = result["out"]
    n = result["added"] + result["replaced"] + result["same"]
    parts = [(result["added"], "new"), (result["replaced"], "in place of earlier ones")]
    parts += [(result["same"], "that were there already")]
    lines = [f"{n} corrected masks{_listed(parts)}; {result['corrected']} in {out}"]
    if result["unchanged"]:
        left = result["skipped_unchanged"]
        fate = "left out" if left else "taken as found right; --unchanged skip leaves such out"
        lines.append(f"{result['unchanged']} are as the run labelled them: {fate}")
    for key, what in (
        ("removed", "earlier corrections were taken out: they are as the run labelled them again"),
        ("not_annotated", "tasks have no annotation"),
        ("cancelled", "tasks were skipped"),
        ("unmatched", "are called like no image of the run"),
        ("failed", "could not be used"),
    ):
        if result[key]:
            lines.append(f"{result[key]} {what}")
            shown = [f"{e['image']}: {e['error']}" for e in result["errors"]]
            shown = {"unmatched": result["unmatched_names"], "failed": shown}.get(key, [])
            lines += [f"  {one_line(line)}" for line in shown[:5]]
            if key in ("unmatched", "failed") and result[key] > 5:
                lines.append(f"  ... all of them in {out}/errors")
    if result["merged"]:
        lines.append(f"all labels of the run, the corrected ones in place: {result['merged']}")
    then = [("train", next_command(result))] if result["corrected"] else []
    return told(lines, then=then)


def next_command(result: Mapping[str, Any]) -> str:
    """The command line that trains on what came back."""
    out, run = shlex.quote(result["out"]), shlex.quote(result["run"])
    labels = shlex.quote(result["merged"]) if result["merged"] else run
    return f"zsplg train --labeled {out} --unlabeled {run} --zeroshot {labels} --out model/"


def _listed(parts: Iterable[tuple[int, str]]) -> str:
    told = ", ".join(f"{n} {what}" for n, what in parts if n)
    return f" ({told})" if told else ""


def _names(labels: Labels) -> ImageNames:
    """The images by their ids, and by what their files are called in exports."""
    reserved = {kind.reserved for kind in FORMATS.values()}
    return ImageNames(labels.ids, [file_names(labels.ids, names) for names in reserved])


def _digest(label_HW: np.ndarray) -> str:
    return hashlib.sha256(repr(label_HW.shape).encode() + label_HW.tobytes()).hexdigest()


def _meta(labels: Labels) -> dict[str, Any]:
    """Metadata of the parts: what was corrected, and the classes."""
    of = labels.run or labels.folder.part_meta("labels", labels.folder.parts("labels")[0])
    theirs = str(of.get("labels_fingerprint"))
    return {
        "fingerprint": of.get("fingerprint"),
        "labels_fingerprint": f"{corrected.CORRECTED}-{theirs}",
        "classes": labels.classes.to_dict(),
    }


def _refuse_nothing(found: Returned, source: str, labels: Labels) -> None:
    """Raise ValueError if there is no mask of an image of the run at all."""
    if found.draws:
        return
    if found.errors:
        name, why = found.errors[0]
        fix = f"mend them ({shortened(name, 80)}: {shortened(why, 200)})"
        raise ValueError(complain("masks", "of use", f"{len(found.errors)}, none of which is", fix))
    if found.unmatched:
        shown = f"{len(found.unmatched)} others, such as {found.unmatched[0]!r}"
        fix = f"images there are called such as {labels.ids[0]!r}: check --run"
        raise ValueError(complain("masks", "of images of the run", shown, fix))
    shown = f"{source} ({found.not_annotated} tasks without, {found.cancelled} skipped)"
    fix = "submit annotations in Label Studio, and export again"
    raise ValueError(complain("masks", "a source with annotations", shown, fix))


def _merged_folder(config: ReviewImportConfig, labels: Labels) -> RunFolder | None:
    if config.merged is None:
        return None
    place = Place.parse(config.merged).uri.rstrip("/")
    for name, other in (("out", config.out), ("run", config.run)):
        if place == Place.parse(other).uri.rstrip("/"):
            fix = "give a folder of its own"
            raise ValueError(complain("merged", f"another folder than {name}", other, fix))
    folder = RunFolder(config.merged)
    check_merged(folder, labels)
    return folder


def _write_run(
    config: ReviewImportConfig,
    folder: RunFolder,
    labels: Labels,
    total: int,
    failed: int,
    seconds: float,
) -> None:
    counts = {"images": total + failed, "labelled": total, "quarantined": failed}
    made = corrected.content_fingerprint(folder, labels.classes)
    folder.write_run(_run(config, labels, made, counts, seconds))


def _merge(
    config: ReviewImportConfig, folder: RunFolder, labels: Labels, total: Labels | None
) -> None:
    theirs = total.run and total.run["labels_fingerprint"] if total is not None else None
    made = fingerprint({"merged": theirs, "of": _meta(labels)})
    begun = time.monotonic()
    meta = _meta(labels) | {"labels_fingerprint": made}
    images, fixed = write_merged(folder, labels, total, meta)
    counts = {"images": images, "labelled": images, "quarantined": 0, "corrected": fixed}
    run = _run(config, labels, made, counts, time.monotonic() - begun)
    folder.write_run(run | {"merged": True})


def _run(
    config: ReviewImportConfig,
    labels: Labels,
    made: str,
    counts: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """The content of run.json."""
    of = labels.run or {}
    return {
        "verb": corrected.VERB,
        "state": "complete",
        "labels_state": "complete",
        "config": recorded(config),
        "resolved": {},
        "classes": labels.classes.to_dict(),
        "weights": of.get("weights", {}),
        "versions": {"zsplg_ray": __version__},
        "fingerprint": _meta(labels)["fingerprint"],
        "labels_fingerprint": made,
        "corrected": {
            "uri": without_credentials(Place.parse(config.run).uri),
            "labels_fingerprint": of.get("labels_fingerprint"),
        },
        "seconds": round(seconds, 3),
        "counts": dict(counts),
    }
