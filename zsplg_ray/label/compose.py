"""Similarities and masks to a label map: every threshold that can be tuned after SAM and CLIP.

What enters: segments, how similar each is to each class, the thresholds. What leaves: a label map,
a score map. `decide` is the part that looks at numbers only (which class, which score, who is
painted over whom); `compose` paints what it decided. `decide` consists of three steps, which act on
each segment by itself, so that a sweep over thresholds can take the segments of many images at once
and keep what does not change from one setting to the next:
- `score_segments` depends on the similarities, `score` and `temperature`;
- `precedence` on the scores and `order`: of two segments the same one wins, whoever else is kept;
- `kept_segments` on the scores and all thresholds.

The paper's rule is one point of this space: cosine similarity to the best class, background where
it is below one threshold. numpy only, no torch: this runs on CPU workers, many times over.

Rules, in the order in which they act:
- A segment whose similarities hold a NaN (it could not be embedded), or no number, is not painted.
- Its class is the most similar column; of equal ones the first, so background before a class.
- It is kept if area, predicted IoU, stability, margin and score reach their minimum (>=). A segment
  that is most like a background prompt needs no minimum score, unless `min_similarity` names
  "background": the minimum guards against naming a thing that is none of the classes, and
  background is what that thing would become. It does need the margin: a margin asks whether two
  answers are too close to tell, and background is one of them.
- Kept segments are painted; the last one painted wins. Background segments take part, so they cut
  into segments of classes that they beat. Of equal ones the earlier segment wins.

All comparisons are made in float32, so a score that is shown as 0.3 passes a minimum of 0.3.

Shape suffixes: R segments, H W pixels, K classes (0 is background).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from zsplg_ray.config import ComposeConfig
from zsplg_ray.label.segments import Segments
from zsplg_ray.records import IGNORE
from zsplg_ray.settings import complain
from zsplg_ray.vocab import ClassList

_EVERY_OTHER = "*"


@dataclass(frozen=True, eq=False)
class Scored:
    """What each segment is most like. The segments may be of several images, laid end to end."""

    best_R: np.ndarray
    """int64 [R], the most similar column; without meaning where there is no score."""
    score_R: np.ndarray
    """float32 [R], its score; NaN where the segment has none and must not be painted."""
    margin_R: np.ndarray
    """float32 [R], lead over the second best score; inf with one finite column, NaN without any."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of each segment, before a pixel is painted."""

    class_R: np.ndarray
    """int64 [R], class index, -1 where the segment is not painted."""
    score_R: np.ndarray
    """float32 [R], score of the most similar class, painted or not; NaN where there is none."""
    order_R: np.ndarray
    """int64 [R], all segments in painting order: those not painted first, the winner last."""


@dataclass(frozen=True, eq=False)
class Composed:
    """A label map and what is known about it."""

    label_HW: np.ndarray
    """uint8 [H, W], class indices, 255 where there is no label."""
    score_HW: np.ndarray
    """float32 [H, W] in [0, 1], score of the segment that won the pixel; 0 where there is none."""
    painted_HW: np.ndarray
    """bool [H, W], True where a segment was painted (it may have been painted as background)."""


def compose(
    segments: Segments, sim_RK: np.ndarray, config: ComposeConfig, classes: ClassList
) -> Composed:
    """Paint one image's label map.

    Args:
        segments: masks and their qualities.
        sim_RK: float32 [R, K], see `decide`.
        config: thresholds.
        classes: the K classes, background first.

    Raises:
        ValueError: as `decide`.
    """
    decision = decide(
        sim_RK, segments.area_px, segments.predicted_iou, segments.stability, config, classes
    )
    nobody = len(segments)
    winner_HW = np.full(segments.size_hw, nobody, np.int32)
    for r in decision.order_R[decision.class_R[decision.order_R] >= 0]:
        x0, y0, x1, y1 = segments.box_xyxy[r]
        winner_HW[y0:y1, x0:x1][segments.mask_HW(r)[y0:y1, x0:x1]] = r
    empty_label = IGNORE if config.unsure == "ignore" else 0
    label_of = np.append(decision.class_R, empty_label).astype(np.uint8)
    score_of = np.append(np.clip(decision.score_R, 0.0, 1.0), np.float32(0.0))
    return Composed(label_of[winner_HW], score_of[winner_HW], winner_HW != nobody)


def decide(
    sim_RK: np.ndarray,
    area_px: np.ndarray,
    predicted_iou: np.ndarray,
    stability: np.ndarray,
    config: ComposeConfig,
    classes: ClassList,
) -> Decision:
    """Decide class, score and painting order of each segment.

    Args:
        sim_RK: float32 [R, K] cosine similarities; column 0 is the best background prompt, -inf
            where there are none. With one finite column the margin counts as infinite.
        area_px: int [R].
        predicted_iou: float32 [R].
        stability: float32 [R].
        config: thresholds.
        classes: the K classes, background first.

    Raises:
        ValueError: `min_similarity` is None, names an unknown class, or leaves a class without one.
    """
    assert sim_RK.shape[1] == len(classes.names), "one column per class"
    scored = score_segments(sim_RK, config.score, config.temperature)
    min_score_K = minimum_scores(config, classes)
    kept_R = kept_segments(scored, area_px, predicted_iou, stability, config, min_score_K)
    row_R = np.arange(len(sim_RK))
    rising_R = np.where(kept_R, precedence(scored, area_px, config), 0.0)
    # The last key weighs most. -row_R: of equal segments the earlier one is painted later.
    order_R = np.lexsort((-row_R, rising_R, kept_R))
    return Decision(np.where(kept_R, scored.best_R, -1), scored.score_R, order_R)


def score_segments(
    sim_RK: np.ndarray, score: Literal["cosine", "softmax"], temperature: float
) -> Scored:
    """What each segment is most like; no threshold enters.

    Args:
        sim_RK: float32 [R, K], see `decide`; not written to.
        score: of `ComposeConfig`.
        temperature: of `ComposeConfig`; without effect on cosine.
    """
    row_R = np.arange(len(sim_RK))
    with np.errstate(invalid="ignore"):
        best_R = sim_RK.argmax(axis=1)
        highest_R = sim_RK[row_R, best_R]  # NaN where any is
        if score == "cosine":
            weight_RK, total_R = sim_RK.astype(np.float32), np.float32(1.0)
        else:
            weight_RK = _logits(sim_RK, temperature)
            weight_RK -= _logits(highest_R, temperature)[:, None]
            np.exp(weight_RK, out=weight_RK)
            total_R = weight_RK.sum(axis=1)
        # Scores are weights / total. Only two of a row are needed.
        score_R = (weight_RK[row_R, best_R] / total_R).astype(np.float32)
        score_R[~np.isfinite(highest_R)] = np.nan
        weight_RK[row_R, best_R] = -np.inf
        # Turned, because numpy is slow along rows as short as these.
        second_R = (weight_RK.T.copy().max(axis=0) / total_R).astype(np.float32)
        zero_R = np.flatnonzero(second_R == 0)  # there may be no second column, with any weight
        second_R[zero_R[(sim_RK[zero_R] > -np.inf).sum(axis=1) < 2]] = -np.inf
        return Scored(best_R, score_R, score_R - second_R)


def kept_segments(
    scored: Scored,
    area_px: np.ndarray,
    predicted_iou: np.ndarray,
    stability: np.ndarray,
    config: ComposeConfig,
    min_score_K: np.ndarray,
) -> np.ndarray:
    """Which segments reach every minimum, bool [R].

    Args:
        scored: `score_segments` of the same settings.
        area_px: int [R].
        predicted_iou: float32 [R].
        stability: float32 [R].
        config: thresholds, of which `min_similarity` is not looked at.
        min_score_K: float32 [K] instead of it, see `minimum_scores`.
    """
    return (  # a NaN reaches no minimum
        (scored.score_R >= min_score_K[scored.best_R])
        & (scored.margin_R >= np.float32(config.min_margin))
        & (area_px >= config.min_area_px)
        & (predicted_iou >= np.float32(config.min_predicted_iou))
        & (stability >= np.float32(config.min_stability))
    )


def precedence(scored: Scored, area_px: np.ndarray, config: ComposeConfig) -> np.ndarray:
    """By `order`: where kept segments overlap, the larger number wins, the earlier of equal ones.

    Args:
        scored: `score_segments` of the same settings.
        area_px: int [R].
        config: thresholds.

    Returns:
        float64 [R], finite wherever there is a score.
    """
    return (scored.score_R if config.order == "score" else -area_px).astype(np.float64)


def minimum_scores(config: ComposeConfig, classes: ClassList) -> np.ndarray:
    """`min_similarity` as one number per class, float32 [K]; -inf for background unless named.

    Raises:
        ValueError: as `minimum_by_class`.
    """
    minimum = minimum_by_class(config, classes)
    return np.array([minimum.get(name, -np.inf) for name in classes.names], np.float32)


def minimum_by_class(config: ComposeConfig, classes: ClassList) -> dict[str, float]:
    """`min_similarity` of every class by its name, as it was given; background only if named.

    Raises:
        ValueError: None, an unknown class name (the nearest one is shown), or a class left out.
    """
    name, given = "compose.min_similarity", config.min_similarity
    if given is None:
        fix = "resolve the configuration first"
        raise ValueError(complain(name, "a number or one per class", given, fix))
    by_class = given if isinstance(given, dict) else {_EVERY_OTHER: given}
    known = classes.names
    for key in by_class:
        if key != _EVERY_OTHER and key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(complain(name, "by class name", key, f"did you mean {near[0]!r}?"))
    minimum = {known[0]: by_class[known[0]]} if known[0] in by_class else {}
    for class_name in known[1:]:
        value = by_class.get(class_name, by_class.get(_EVERY_OTHER))
        if value is None:
            fix = "add '*' for every class that is not named"
            raise ValueError(complain(name, f"given for class {class_name!r}", by_class, fix))
        minimum[class_name] = value
    return minimum


def summarise(composed: Composed, n_classes: int) -> tuple[list[int], float]:
    """Pixels per class and confidence, as the `labels` schema stores them.

    Args:
        composed: a label map.
        n_classes: K.

    Returns:
        class_px, K numbers (pixels without a label count nowhere), and confidence: the mean score
        of the pixels that a segment was painted on, 0.0 if there are none.
    """
    label_HW = composed.label_HW
    class_px = np.bincount(label_HW[label_HW != IGNORE], minlength=n_classes)
    assert len(class_px) == n_classes, "labels are class indices"
    score = composed.score_HW[composed.painted_HW]
    return class_px.tolist(), float(score.mean(dtype=np.float64)) if score.size else 0.0


def _logits(sim: np.ndarray, temperature: float) -> np.ndarray:
    return sim.astype(np.float64) / temperature
