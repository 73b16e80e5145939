"""Confusion counts and the scores that follow from them.

Enters: label maps, truth and prediction. Leaves: one int64 count matrix an image (they add up over
images, workers and ranks), and at the very end a dict of scores that is plain JSON.

Why this way: counts first, divide once. A mean of per-image scores is another number than the score
of all pixels, and only counts can be summed in any order.

What an abstention costs: a pixel that the prediction leaves open (255) counts as a miss of its true
class, in IoU, recall and accuracy, but not as a false alarm of any class. So leaving pixels open
never pays by itself; `coverage` says how much was answered, and `precision_by_class` how good the
answers were. Pixels without a truth (255) are not counted at all.

Shapes: H, W pixels; K classes, background included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain


def confusion(truth_HW: np.ndarray, pred_HW: np.ndarray, n_classes: int) -> np.ndarray:
    """How many pixels of each true class were predicted as what.

    Args:
        truth_HW: integers, class indices below `n_classes`, or 255 where there is no truth.
        pred_HW: the same shape; 255 where the prediction leaves the pixel open.
        n_classes: K, in [1, 255].

    Returns:
        int64 [K, K + 1]: rows are the truth, columns the prediction, and the last column counts the
        pixels that have a truth and no prediction.

    Raises:
        ValueError: the shapes differ, or an index is neither below K nor 255.
    """
    if truth_HW.dtype == pred_HW.dtype == np.uint8 and truth_HW.shape == pred_HW.shape:
        counts = _bytes_confusion(truth_HW, pred_HW, n_classes)
        if counts is not None:
            return counts
    at, _ = _cells(truth_HW, pred_HW, n_classes)
    counts = np.bincount(at, minlength=n_classes * (n_classes + 1))
    return counts.reshape(n_classes, n_classes + 1).astype(np.int64, copy=False)


def grouped_confusion(
    truth_HW: np.ndarray, pred_HW: np.ndarray, group_HW: np.ndarray, n_classes: int, n_groups: int
) -> np.ndarray:
    """`confusion` of each group of pixels, such as those of about the same score.

    Args:
        truth_HW: as `confusion` takes it.
        pred_HW: the same.
        group_HW: integers of the same shape, in [0, `n_groups`).
        n_classes: K, in [1, 255].
        n_groups: G.

    Returns:
        int64 [G, K, K + 1]; its sum over groups is what `confusion` returns.

    Raises:
        ValueError: as `confusion` does.
    """
    if group_HW.shape != truth_HW.shape:
        fix = "give each pixel a group"
        raise ValueError(complain("group_HW", f"of shape {truth_HW.shape}", group_HW.shape, fix))
    cells = n_classes * (n_classes + 1)
    at, valid = _cells(truth_HW, pred_HW, n_classes)
    at += group_HW[valid].astype(np.int64) * cells
    counts = np.bincount(at, minlength=n_groups * cells)
    return counts.reshape(n_groups, n_classes, n_classes + 1).astype(np.int64, copy=False)


def _bytes_confusion(
    truth_HW: np.ndarray, pred_HW: np.ndarray, n_classes: int
) -> np.ndarray | None:
    """`confusion` of uint8 maps, five times as fast; None if something is wrong with them.

    All 65,536 pairs of bytes are counted, then those that mean something are taken out.
    """
    pairs = np.bincount((truth_HW.astype(np.uint16) << 8 | pred_HW).ravel(), minlength=1 << 16)
    pairs = pairs.reshape(256, 256)
    if not 1 <= n_classes <= IGNORE:
        return None
    if pairs[n_classes:IGNORE].any() or pairs[:, n_classes:IGNORE].any():
        return None
    counts = np.concatenate([pairs[:n_classes, :n_classes], pairs[:n_classes, IGNORE:]], axis=1)
    return counts.astype(np.int64, copy=False)


def _cells(
    truth_HW: np.ndarray, pred_HW: np.ndarray, n_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each pixel with a truth its cell in the flattened counts; and which pixels these are."""
    if not 1 <= n_classes <= IGNORE:
        raise ValueError(
            complain("n_classes", f"in [1, {IGNORE}]", n_classes, "count background in")
        )
    if truth_HW.shape != pred_HW.shape:
        fix = "compare label maps of the same image at the same size"
        raise ValueError(complain("pred_HW", f"of shape {truth_HW.shape}", pred_HW.shape, fix))
    _check_indices("truth_HW", truth_HW, n_classes)
    _check_indices("pred_HW", pred_HW, n_classes)
    valid = truth_HW != IGNORE
    truth = truth_HW[valid].astype(np.int64)
    pred = pred_HW[valid].astype(np.int64)
    np.minimum(pred, n_classes, out=pred)  # 255 becomes the last column
    return truth * (n_classes + 1) + pred, valid


def scores(confusion_KL: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Scores from summed confusion counts; see the module's text for what an abstention costs.

    Args:
        confusion_KL: [K, K + 1] counts as `confusion` returns them, summed over any images.
        names: the K class names.

    Returns:
        Plain values, each share in [0, 1] and None where there is nothing to divide by:

        - `miou`: the mean of IoU over the classes that occur in truth or prediction;
        - `iou`: class name -> IoU = hits / (truth + predicted - hits);
        - `precision_by_class`: hits / predicted; `recall_by_class`: hits / truth;
        - `pixel_accuracy`: all hits / all pixels that have a truth;
        - `coverage`: the share of pixels that have a truth and were given a prediction;
        - `pixels`: how many pixels have a truth; `confusion`: the counts as nested lists.

    Raises:
        ValueError: the counts are not [K, K + 1] for these names, or one is negative.
    """
    n_classes = len(names)
    if confusion_KL.shape != (n_classes, n_classes + 1) or (confusion_KL < 0).any():
        rule = f"counts >= 0 of shape {(n_classes, n_classes + 1)}"
        shown = f"shape {confusion_KL.shape}, least {confusion_KL.min(initial=0)}"
        raise ValueError(complain("confusion", rule, shown, "pass the classes it was counted with"))
    hits_K = np.diagonal(confusion_KL)
    truth_K = confusion_KL.sum(axis=1)
    pred_K = confusion_KL[:, :n_classes].sum(axis=0)
    iou = _shares(hits_K, truth_K + pred_K - hits_K)
    present = [value for value in iou if value is not None]
    pixels = int(truth_K.sum())
    return {
        "miou": sum(present) / len(present) if present else None,
        "iou": dict(zip(names, iou, strict=True)),
        "precision_by_class": dict(zip(names, _shares(hits_K, pred_K), strict=True)),
        "recall_by_class": dict(zip(names, _shares(hits_K, truth_K), strict=True)),
        "pixel_accuracy": int(hits_K.sum()) / pixels if pixels else None,
        "coverage": int(pred_K.sum()) / pixels if pixels else None,
        "pixels": pixels,
        "confusion": confusion_KL.tolist(),
    }


def _shares(part_K: np.ndarray, whole_K: np.ndarray) -> list[float | None]:
    """part / whole a class, None where whole is 0."""
    return [
        int(part) / int(whole) if whole else None
        for part, whole in zip(part_K, whole_K, strict=True)
    ]


def _check_indices(name: str, map_HW: np.ndarray, n_classes: int) -> None:
    """Raises a ValueError if a label map holds anything but class indices and 255."""
    if not np.issubdtype(map_HW.dtype, np.integer):
        raise ValueError(complain(name, "integers", str(map_HW.dtype), "pass class indices"))
    wrong = (map_HW != IGNORE) & ((map_HW < 0) | (map_HW >= n_classes))
    if wrong.any():
        rule = f"class indices below {n_classes}, or {IGNORE} to ignore"
        fix = "use the class list that the label map was made with"
        raise ValueError(complain(name, rule, int(map_HW[wrong][0]), fix))
