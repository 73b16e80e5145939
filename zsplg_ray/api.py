"""The verbs as Python functions, for notebooks and scripts.

What enters: the settings that the command line takes, by the same names: `sam="vit_b"`,
`compose={"min_similarity": 0.25}`, or dotted in a mapping, `**{"compose.min_similarity": 0.25}`.
What leaves: `Labels`, which pandas, numpy and torch read, or a mapping of numbers. Nothing is
printed; progress goes to stderr, unless `quiet=True`.

    from zsplg_ray import api

    labels = api.label("photos/", "dog,cat", "run/", sam="vit_b")
    labels[0].label_HW                              # numpy, uint8 [H, W]
    labels.to_pandas().sort_values("confidence")    # a row an image
    loader = DataLoader(labels.to_torch(), batch_size=None)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zsplg_ray import config
from zsplg_ray.labels import LabelledImage, Labels
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain, from_mapping, override

if TYPE_CHECKING:
    from zsplg_ray.label.labeler import Labeler

__all__ = [
    "LabelledImage",
    "Labels",
    "evaluate",
    "label",
    "load_labeler",
    "predict",
    "relabel",
    "train",
]

OF_A_LABELER = ("sam", "clip", "prompts", "compose")
"""Sections of settings that matter where an array is labelled."""


def label(images: str, classes: str, out: str, **settings: Any) -> Labels:
    """Label images with SAM and CLIP; only what is missing in `out` is done.

    Args:
        images: SRC: a folder, a glob, a data set's file, or an address of these.
        classes: SPEC: `voc`, `coco`, ..., a text file, or `dog,cat`.
        out: The run's folder.
        **settings: As of `zsplg label`.

    Raises:
        ValueError: Bad input; nothing has been written.
        WorkError: The work failed; what is finished is kept.
    """
    from zsplg_ray.cluster.label import label as run

    run(
        from_mapping(
            config.LabelConfig, {"images": images, "classes": classes, "out": out} | settings
        )
    )
    return Labels(out)


def relabel(run: str, **settings: Any) -> Labels:
    """Compose a run's labels anew, from its segments; what is not given stays as it was.

    Args:
        run: The run's folder.
        **settings: As of `zsplg relabel`.

    Raises: ValueError, WorkError as `label`.
    """
    from zsplg_ray.cluster.relabel import relabel as compose_anew

    stored = from_mapping(config.RelabelConfig, {"run": run, **RunFolder(run).label_settings()})
    compose_anew(override(stored, settings))
    return Labels(run)


def train(labeled: str, out: str, **settings: Any) -> dict[str, Any]:
    """Train a model; goes on from the last checkpoint in `out`.

    Args:
        labeled: SRC of labelled images.
        out: The training run's folder.
        **settings: As of `zsplg train`, such as `unlabeled`, `zeroshot`.

    Returns: What train.json holds: history, best and last epoch.

    Raises: ValueError, WorkError as `label`.
    """
    from zsplg_ray.cluster.train import train as run

    return run(from_mapping(config.TrainConfig, {"labeled": labeled, "out": out} | settings))


def predict(model: str, images: str, out: str, **settings: Any) -> Labels:
    """Label images with a trained model; only what is missing in `out` is done.

    Args:
        model: best.pt of a training, or its folder.
        images: SRC.
        out: The run's folder.
        **settings: As of `zsplg predict`.

    Raises: ValueError, WorkError as `label`.
    """
    from zsplg_ray.cluster.predict import predict as run

    run(
        from_mapping(
            config.PredictConfig, {"model": model, "images": images, "out": out} | settings
        )
    )
    return Labels(out)


def evaluate(labels: str, truth: str, **settings: Any) -> dict[str, Any]:
    """Compare labels, or a model's predictions, with ground truth.

    Args:
        labels: A run's folder, a folder of PNG masks, or a model.
        truth: Masks.
        **settings: As of `zsplg evaluate`.

    Returns: `miou`, `iou` by class, `pixel_accuracy`, `coverage`, `images` and more.

    Raises: ValueError as `label`.
    """
    from zsplg_ray.views.evaluate import evaluate as run

    return run(from_mapping(config.EvaluateConfig, {"labels": labels, "truth": truth} | settings))


def load_labeler(classes: str, *, device: str = "cpu", **settings: Any) -> Labeler:
    """SAM and CLIP in this process, without Ray: to label arrays.

    `labeler.label(image_HWC)` gives the segments and, in `.label_HW` and `.score_HW` of the second,
    the labels of a uint8 RGB array.

    Args:
        classes: SPEC.
        device: As torch names it: cpu, cuda, cuda:1.
        **settings: `sam`, `clip`, `prompts`, `compose` as of `zsplg label`, and no others.

    Raises: ValueError: Bad input, or weights that cannot be had.
    """
    from zsplg_ray.label.labeler import Labeler
    from zsplg_ray.label.naming import prepare
    from zsplg_ray.label.presets import resolve_label
    from zsplg_ray.vocab import class_list

    for name in settings:
        if name.partition(".")[0] not in OF_A_LABELER:
            rule, fix = f"one of {', '.join(OF_A_LABELER)}", "leave it out"
            raise ValueError(complain("setting of a labeler", rule, name, fix))
    given = {"images": ".", "classes": classes, "out": "."} | settings  # places are not looked at
    resolved = resolve_label(from_mapping(config.LabelConfig, given))
    naming, _ = prepare(resolved, class_list(classes))
    return Labeler.load(resolved, naming, device)
