"""Labels, or a model's predictions, against ground truth.

What enters: labels (a run, a Parquet folder, a folder of PNG masks; or a model and images) and
masks. What leaves: counts summed over all images that have both, and the scores of metrics.py. No
image is counted twice, and none is left out in silence: how many had no truth, and how many truths
had no label, is told. A model is used as `predict` uses it unless it is told otherwise, so its
scores are those of the labels that `predict` writes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zsplg_ray.config import EvaluateConfig
from zsplg_ray.images import decode_image
from zsplg_ray.masks import Truth, open_truth
from zsplg_ray.metrics import confusion, scores
from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.sources import image_key, list_images
from zsplg_ray.storage import Place, read_bytes
from zsplg_ray.vocab import ClassList, class_list

log = logging.getLogger(__name__)

MODEL_SUFFIXES = (".pt", ".pth", ".safetensors")
"""How files with a model are called."""


@dataclass(frozen=True)
class Labels:
    """Label maps by image id, read when asked for."""

    ids: list[str]
    classes: ClassList | None
    maps: Callable[[Container[str]], Iterator[tuple[str, np.ndarray]]]
    """Yields the label maps of those of `ids` that it is asked for."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Compare labels with ground truth.

    Returns: the keys of `metrics.scores`, and `images` (compared), `without_truth`,
        `without_label`, `classes`.

    Raises:
        ValueError: Nothing to compare, sizes or class lists that do not fit.
    """
    truth = open_truth(config.truth, root=config.root)
    if is_model(config.labels):
        labels = open_predictions(config, truth.classes)
    else:
        labels = open_labels(config.labels)
    given = class_list(config.classes) if config.classes else None
    classes = given or labels.classes or truth.classes
    if classes is None:
        fix = "add --classes SPEC: neither labels nor masks say what their numbers mean"
        raise ValueError(complain("classes", "given", "nothing", fix))
    for source, theirs in (("labels", labels.classes), ("truth", truth.classes)):
        check_same(classes, theirs, source)
    compared = [i for i in labels.ids if truth.has(i)]
    if not compared:
        example = f"labels such as {labels.ids[0]!r}" if labels.ids else "no labels"
        fix = f"masks are called such as {next(iter(truth.ids), 'nothing')!r}"
        raise ValueError(complain("truth", "masks of the labelled images", example, fix))
    counts = count(labels.maps(set(compared)), truth, len(classes))
    result = scores(counts, classes.names)
    result["images"] = len(compared)
    result["without_truth"] = len(labels.ids) - len(compared)
    result["without_label"] = len(set(truth.ids) - {image_key(i) for i in compared})
    result["classes"] = list(classes.names)
    return result


def check_same(classes: ClassList, theirs: ClassList | None, source: str) -> None:
    """Raise ValueError if labels or truth say that their numbers mean something else."""
    if theirs is None or theirs.names == classes.names:
        return
    pairs = itertools.zip_longest(classes.names, theirs.names, fillvalue="nothing")
    index, (ours, other) = next((k, p) for k, p in enumerate(pairs) if p[0] != p[1])
    rule = f"those of the {source}, where class {index} is {other}"
    fix = "bring both to one class list"
    raise ValueError(complain("classes", rule, ours, fix))


def count(maps: Iterable[tuple[str, np.ndarray]], truth: Truth, n_classes: int) -> np.ndarray:
    """Confusion counts int64 [K, K + 1] over label maps that all have a truth."""
    total = np.zeros((n_classes, n_classes + 1), np.int64)
    for image_id, label_HW in maps:
        try:
            total += confusion(truth.read(image_id), label_HW, n_classes)
        except ValueError as e:
            raise ValueError(f"{e} (image {image_id})") from e
    return total


def open_labels(source: str) -> Labels:
    """Labels of a run's folder, a folder of labels parts, or a folder of PNG masks.

    Raises: ValueError if there are none, or if a relabel was interrupted half-way.
    """
    folder = RunFolder(source)
    run = folder.read_run()
    if run is not None:
        if run.get("labels_state") != "complete":
            fix = f"run `zsplg relabel --run {source}` to finish it"
            raise ValueError(complain("labels", "whole", "a half relabelled run", fix))
        return parquet_labels(folder)
    if not Path(source).is_dir() and "://" not in source:
        fix = "give a run's folder or a folder of PNG masks"
        raise ValueError(complain("labels", "an existing folder", source, fix))
    if folder.parts("labels"):
        return parquet_labels(folder)
    masks = open_truth(source)
    ids = list(masks.ids)
    return Labels(
        ids, masks.classes, lambda wanted: ((i, masks.read(i)) for i in ids if i in wanted)
    )


def is_model(source: str) -> bool:
    """Whether an address is that of a model: a file called so, or a training run's folder."""
    place = Place.parse(source)
    return place.suffix in MODEL_SUFFIXES or place.child("train.json").kind() == "file"


def open_predictions(config: EvaluateConfig, classes: ClassList | None) -> Labels:
    """What a model says of the images, made when asked for.

    Args:
        config: As `evaluate` got it; `labels` is the model.
        classes: Of the truth: for models that carry no class list, if the user gives none either.

    Raises: ValueError if there is no such model, or no such images.
    """
    import torch  # these two are slow to import, and only models need them

    from zsplg_ray.student import checkpoint, predict

    uris = _image_uris(config)
    student = checkpoint.load_student(
        config.labels, classes=config.classes, otherwise=classes, name="labels"
    )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fix = "leave it out, or look at `zsplg doctor`"
        raise ValueError(complain("device", "cpu where no GPU is found", device, fix))
    predictor = predict.Predictor(student, device=device)

    def maps(wanted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
        for image_id, uri in uris.items():
            if image_id not in wanted:
                continue
            try:
                image_HWC = decode_image(read_bytes(uri))
            except ValueError as e:
                raise ValueError(f"{e} (image {image_id})") from e
            yield image_id, predictor.predict(image_HWC)[0]

    return Labels(list(uris), student.classes, maps)


def _image_uris(config: EvaluateConfig) -> dict[str, str]:
    """Image id -> uri of what a model is to be evaluated on."""
    place = Place.parse(config.truth)
    lists_images = place.suffix in (".txt", ".json") or place.child("JPEGImages").kind()
    if config.images is None and not lists_images:
        fix = f"add --images SRC: {config.truth} holds masks only"
        raise ValueError(complain("images", "given for a model", "nothing", fix))
    manifest = list_images(config.images or config.truth, root=config.root)
    return dict(zip(manifest["image_id"].to_pylist(), manifest["uri"].to_pylist(), strict=True))


def parquet_labels(folder: RunFolder) -> Labels:
    """The labels/ parts of a run, read one part at a time.

    In the folder of an interrupted run an image may stand twice: the first one counts.
    """
    names = folder.parts("labels")
    by_part = folder.map_parts(
        names, lambda n: folder.read_part("labels", n, ["image_id"])["image_id"].to_pylist()
    )
    meta = folder.part_meta("labels", names[0]) if names else {}
    classes = ClassList.from_dict(meta["classes"]) if "classes" in meta else None

    part_of: dict[str, str] = {}
    for name, ids in by_part.items():
        for image_id in ids:
            part_of.setdefault(image_id, name)

    def maps(wanted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
        for name, ids in by_part.items():
            mine = {i for i in ids if i in wanted and part_of[i] == name}
            if not mine:
                continue
            table = folder.read_part("labels", name, ["image_id", "label_png"])
            rows = zip(table["image_id"].to_pylist(), table["label_png"], strict=True)
            for image_id, png in rows:
                if image_id in mine:
                    mine.remove(image_id)
                    yield image_id, decode_png(png.as_py())

    return Labels(list(part_of), classes, maps)


def table(result: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    width = max(12, *(len(name) for name in result["iou"]))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'precision':>9}  {'recall':>6}"]
    for name, iou in result["iou"].items():
        shown = (iou, result["precision_by_class"][name], result["recall_by_class"][name])
        cells = ["-" if v is None else f"{v:.3f}" for v in shown]
        lines.append(f"{name:<{width}}  {cells[0]:>6}  {cells[1]:>9}  {cells[2]:>6}")
    last = [f"{k} {_share(result[k])}" for k in ("miou", "pixel_accuracy", "coverage")]
    told = f"{result['images']} images"
    if result["without_truth"] or result["without_label"]:
        told += f" ({result['without_truth']} without truth, {result['without_label']} unlabelled)"
    return "\n".join([*lines, "", f"{'  '.join(last)}  over {told}"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
