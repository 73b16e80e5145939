"""What there is to train on: images, their masks and zero-shot labels, and what is held out.

What enters: the sources that the settings name. What leaves: `TrainingData`, lists of addresses
that any process can read, and the class list that all sources agree on. No image is read here;
loader.py does that while training.

Why this way: what can be wrong with sources is found before a model is made or a worker is started.
An image that decides which epoch is best (of --val, or held out) is trained on in no form, also
not as an unlabelled one; else the choice would favour a model that knows it.

Shapes: H W pixels.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from zsplg_ray.config import LoopConfig, TrainConfig
from zsplg_ray.masks import Truth, open_truth
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key, list_images
from zsplg_ray.student.draws import permutation
from zsplg_ray.student.zeroshot import ZeroShot, find_labels
from zsplg_ray.vocab import ClassList, class_list

log = logging.getLogger(__name__)

_PROBED = 5
"""Masks that are tried before training: if none of them is one, none will be."""


@dataclass(frozen=True)
class TrainingData:
    """Images by address, and where their labels are. Can be sent to other processes.

    The tables are pyarrow's, not lists: a million addresses stay small, and processes that were
    forked share them.
    """

    classes: ClassList
    labelled: pa.Table
    """image_id and uri; those that are held out are not among them."""
    truth: Truth
    """Their masks."""
    unlabelled: pa.Table
    """image_id, uri, label_uri and score_uri (these two null without a zero-shot label)."""
    validation: pa.Table
    """image_id and uri of what decides which epoch is best; empty for none."""
    validation_truth: Truth
    """Their masks."""
    zeroshot_fingerprint: str | None
    """Of the run that made the zero-shot labels, None without; other labels, other fingerprint."""

    @classmethod
    def open(cls, config: TrainConfig) -> TrainingData:
        """Find everything that a run's settings name.

        Raises:
            ValueError: a source is not there or malformed; labelled images have no mask; zero-shot
                labels are of other images; class lists do not agree or there is none.
        """
        labelled, truth = _with_masks("labeled", config.labeled, config.labeled_masks, config.root)
        if config.val is None:
            labelled, validation = split_holdout(labelled, config.train)
            validation_truth = truth
        else:
            validation, validation_truth = _with_masks(
                "val", config.val, config.val_masks, config.root
            )
            _warn_of_known(labelled, validation)
        unlabelled, zeroshot = _unlabeled(config, validation)
        classes = agreed_classes(
            {
                "classes setting": class_list(config.classes) if config.classes else None,
                "zero-shot labels": zeroshot.classes if zeroshot else None,
                "labelled masks": truth.classes,
                "validation masks": validation_truth.classes,
            }
        )
        data = cls(
            classes,
            labelled,
            truth,
            unlabelled,
            validation,
            validation_truth,
            zeroshot.fingerprint if zeroshot else None,
        )
        _probe(data)
        log.info(
            "%d labelled images, %d unlabelled (%d with zero-shot labels), %d for validation",
            len(labelled),
            len(unlabelled),
            len(unlabelled) - unlabelled["label_uri"].null_count,
            len(validation),
        )
        return data


def split_holdout(labelled: pa.Table, config: LoopConfig) -> tuple[pa.Table, pa.Table]:
    """Labelled images to train on, and those put aside: both in their order.

    The share `train.holdout`, drawn by `train.seed`: at least one image, and at least one stays.
    None is put aside where there is only one, or where the share is 0.
    """
    n = len(labelled)
    if config.holdout and n == 1:
        log.warning("one labelled image: none can be put aside, so the last epoch is the best")
    aside = min(max(1, round(config.holdout * n)), n - 1) if config.holdout else 0
    held = np.zeros(n, bool)
    held[permutation(config.seed, "holdout", 0, n)[:aside]] = True
    return labelled.filter(pa.array(~held)), labelled.filter(pa.array(held))


def agreed_classes(given: dict[str, ClassList | None]) -> ClassList:
    """The class list of several sources, by what they are called.

    Raises:
        ValueError: none of them tells, or two tell different names.
    """
    told = {source: classes for source, classes in given.items() if classes is not None}
    if not told:
        fix = "add --classes SPEC: neither masks nor zero-shot labels say what their numbers mean"
        raise ValueError(complain("classes", "given", "nothing", fix))
    first, *others = told.items()
    for source, classes in others:
        if classes.names == first[1].names:
            continue
        pairs = itertools.zip_longest(first[1].names, classes.names, fillvalue="nothing")
        index, (one, other) = next((k, p) for k, p in enumerate(pairs) if p[0] != p[1])
        rule = f"those of the {first[0]}, where class {index} is {one}"
        fix = "bring all sources to one class list"
        raise ValueError(complain("classes", rule, f"{other} in the {source}", fix))
    return first[1]


def check_indices(map_HW: np.ndarray, n_classes: int, what: str) -> None:
    """Raise ValueError if a map holds a number that is neither a class nor 255."""
    highest = int(np.max(map_HW, where=map_HW != IGNORE, initial=0))
    if highest >= n_classes:
        fix = "check that --classes is the list that the numbers were made with"
        rule = f"of class indices 0 to {n_classes - 1}, or {IGNORE}"
        raise WrongClass(complain(what, rule, highest, fix))


class WrongClass(ValueError):
    """A map was made with another class list: no matter of one image, so training must stop."""


def _with_masks(
    name: str, images: str, masks: str | None, root: str | None
) -> tuple[pa.Table, Truth]:
    """The images of a source and their masks, which all must have."""
    table = _list_named(name, images, root)
    try:
        truth = open_truth(masks or images, root=root)
    except ValueError as e:
        raise ValueError(_renamed(e, "truth", f"{name}_masks" if masks else name)) from e
    ids = table["image_id"].to_pylist()
    without = [image_id for image_id in ids if not truth.has(image_id)]
    if without:
        value = f"{len(without)} of {len(ids)} without, such as {without[0]!r}"
        fix = (
            f"name the masks' folder with --{name}-masks (masks there are called such as "
            f"{truth.ids[0]!r}), or list only images with masks in a split file"
        )
        raise ValueError(complain(name, "images that all have masks", value, fix))
    return table, truth


def _list_named(name: str, source: str, root: str | None) -> pa.Table:
    """`list_images`, whose errors name the setting that the source was given by."""
    try:
        return list_images(source, root=root)
    except ValueError as e:
        raise ValueError(_renamed(e, "images", name)) from e


def _renamed(error: ValueError, before: str, name: str) -> str:
    told = str(error)
    return f"{name}{told[len(before) :]}" if told.startswith(f"{before} must ") else told


def _unlabeled(config: TrainConfig, validation: pa.Table) -> tuple[pa.Table, ZeroShot | None]:
    """The unlabelled images that may be trained on, with their zero-shot labels."""
    if config.unlabeled is None:
        if config.zeroshot is not None:
            fix = "add --unlabeled SRC, the images that were labelled"
            raise ValueError(complain("unlabeled", "given with zeroshot", "nothing", fix))
        empty = pa.table({name: pa.array([], pa.string()) for name in ("image_id", "uri")})
        return _with_uris(empty, None), None
    table = _list_named("unlabeled", config.unlabeled, config.root)
    known = _known(table, validation)
    if all(known):
        fix = "give others; if they are others that only have the same names, rename them"
        shown = f"all {len(table)} among those that are held out for validation"
        raise ValueError(complain("unlabeled", "images that may be trained on", shown, fix))
    if any(known):
        # Of our own hold-out that is as it should be; with --val it may be a matter of mere names.
        log.log(
            logging.INFO if config.val is None else logging.WARNING,
            "%d of %d unlabelled images are held out for validation (such as %s): not trained on",
            sum(known),
            len(table),
            table["image_id"][known.index(True)].as_py(),
        )
        table = table.filter(pa.array([not k for k in known]))
    if config.zeroshot is None:
        return _with_uris(table, None), None
    zeroshot = find_labels(config.zeroshot, table["image_id"].to_pylist(), table["uri"].to_pylist())
    missing = zeroshot.label_uris.count(None)
    if missing:
        log.warning(
            "%d of %d unlabelled images have no zero-shot label, such as %s: UniMatch alone makes "
            "their targets",
            missing,
            len(table),
            table["image_id"][zeroshot.label_uris.index(None)].as_py(),
        )
    return _with_uris(table, zeroshot), zeroshot


def _with_uris(table: pa.Table, zeroshot: ZeroShot | None) -> pa.Table:
    """The table with the columns label_uri and score_uri."""
    none: list[str | None] = [None] * len(table)
    labels, scores = (zeroshot.label_uris, zeroshot.score_uris) if zeroshot else (none, none)
    for name, uris in (("label_uri", labels), ("score_uri", scores)):
        table = table.append_column(name, pa.array(uris, pa.string()))
    return table.combine_chunks()


def _known(table: pa.Table, others: pa.Table) -> list[bool]:
    """Of each image whether it is also among others: by its id without suffix, or its address."""
    keys = {image_key(image_id) for image_id in others["image_id"].to_pylist()}
    uris = set(others["uri"].to_pylist())
    rows = zip(table["image_id"].to_pylist(), table["uri"].to_pylist(), strict=True)
    return [image_key(image_id) in keys or uri in uris for image_id, uri in rows]


def _warn_of_known(labelled: pa.Table, validation: pa.Table) -> None:
    known = sum(_known(labelled, validation))
    if known:
        log.warning(
            "%d of %d labelled images are also in --val: its scores will be too good",
            known,
            len(labelled),
        )


def _probe(data: TrainingData) -> None:
    """Read the first masks: a folder of pictures, or another class list, is told before training.

    Single ones that cannot be read are left to the loader, which goes on without them.
    """
    for images, truth, name in (
        (data.labelled, data.truth, "labeled"),
        (data.validation, data.validation_truth, "val"),
    ):
        _probe_masks(images["image_id"][:_PROBED].to_pylist(), truth, len(data.classes), name)


def _probe_masks(image_ids: Iterable[str], truth: Truth, n_classes: int, name: str) -> None:
    failed: list[Exception] = []
    read = 0
    for image_id in image_ids:
        try:
            map_HW = truth.read(image_id)
        except (OSError, ValueError) as e:
            failed.append(e)
            continue
        read += 1
        check_indices(map_HW, n_classes, f"mask of {image_id}")
    if failed and not read:
        fix = f"if they lie elsewhere, name their folder with --{name}-masks"
        reason = " ".join(str(failed[-1]).split())[:300]
        rule = "a source whose masks can be read"
        raise ValueError(complain(name, rule, f"none of the first {len(failed)} ({reason})", fix))
