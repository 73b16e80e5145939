"""What an unlabelled pixel is trained towards: its zero-shot label, the model's word, or both.

What enters: the prediction for the weak view, and the zero-shot label and score that moved along
with that view. What leaves: `Targets`. Each rule is a pure function of these, chosen by name, and
where a pixel has no zero-shot label every rule is UniMatch's own: the model's class where it is
confident. A target depends on nothing but its own pixel, so targets may be made first and pasted
(CutMix) afterwards.

How the published method joins the two is not public, hence several rules.

Shapes: B batch, H W pixels, K classes.
Source: UniMatch (Yang et al., CVPR 2023, arXiv 2208.09910) for the rule `unimatch`; zero-shot
labels in it after Saito et al., ICIP 2025, arXiv 2505.19846.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zsplg_ray.config import FusionConfig
from zsplg_ray.records import IGNORE


class Prediction(NamedTuple):
    """What the model says of each pixel."""

    class_BHW: Tensor
    """int64, the most probable class."""
    confidence_BHW: Tensor
    """float32, its probability."""
    probability_BKHW: Tensor | None = None
    """float32 of all classes; only where it was asked for."""


class ZeroShot(NamedTuple):
    """Zero-shot labels as the rules see them."""

    class_BHW: Tensor
    """int64; 255 where there is none."""
    known_BHW: Tensor
    """bool, whether there is a label."""
    passes_BHW: Tensor
    """bool, whether there is a label and its score suffices."""


class Targets(NamedTuple):
    """What each pixel is trained towards."""

    class_BHW: Tensor
    """int64; of no meaning where `keep_BHW` is False, but always a class."""
    keep_BHW: Tensor
    """bool, whether the pixel takes part in the loss."""
    valid_BHW: Tensor
    """bool, whether it is no padding: it counts in the divisor."""
    soft_BKHW: Tensor | None = None
    """float32, a probability for each class instead of one class; only of the rule `mix`."""

    def at(self, index_B: Tensor) -> Targets:
        """The targets of these images, in this order."""
        soft = None if self.soft_BKHW is None else self.soft_BKHW[index_B]
        return Targets(
            self.class_BHW[index_B], self.keep_BHW[index_B], self.valid_BHW[index_B], soft
        )


class Chosen(NamedTuple):
    """What a rule answers, before padding is taken out."""

    class_BHW: Tensor
    keep_BHW: Tensor
    soft_BKHW: Tensor | None = None


def predict(logits_BKHW: Tensor, *, probability: bool = False) -> Prediction:
    """Class and confidence of each pixel; nothing of it has a gradient.

    Args:
        logits_BKHW: Of any floating type; the softmax is taken in float32.
        probability: Whether the probability of every class is kept too (`needs_probability`).
    """
    probability_BKHW = logits_BKHW.detach().float().softmax(dim=1)
    confidence_BHW, class_BHW = probability_BKHW.max(dim=1)
    return Prediction(class_BHW, confidence_BHW, probability_BKHW if probability else None)


def needs_probability(config: FusionConfig) -> bool:
    """Whether the rule wants the probabilities of all classes."""
    return config.rule == "mix"


def fuse(
    config: FusionConfig,
    prediction: Prediction,
    label_BHW: Tensor,
    score_BHW: Tensor,
    padding_BHW: Tensor,
    conf_thresh: float,
    progress: float,
) -> Targets:
    """Targets by the rule that is set.

    Args:
        config: The rule and its numbers.
        prediction: For the weak view; with probabilities if `needs_probability`.
        label_BHW: Zero-shot labels, integers; 255 where there is none.
        score_BHW: Their scores, uint8 (score * 255) or floating in [0, 1].
        padding_BHW: bool, True outside the image: never kept, never valid.
        conf_thresh: Least confidence at which the model is believed.
        progress: Share of the training that is done, [0, 1].
    """
    rule = rule_at(config, progress)
    weight = config.mix_start + (config.mix_end - config.mix_start) * progress
    zeroshot = _zero_shot(label_BHW, score_BHW, config.min_score)
    chosen = RULES[rule](prediction, zeroshot, conf_thresh, weight)
    valid_BHW = ~padding_BHW
    return Targets(chosen.class_BHW, chosen.keep_BHW & valid_BHW, valid_BHW, chosen.soft_BKHW)


def rule_at(config: FusionConfig, progress: float) -> str:
    """Name of the rule at this share of the training: `zeroshot` during the warm-up, if any."""
    warming = progress < config.warmup and config.rule != "unimatch"
    return "zeroshot" if warming else config.rule


def unimatch(model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float) -> Chosen:
    """The model where it is confident; zero-shot labels are not looked at."""
    return Chosen(model.class_BHW, model.confidence_BHW >= conf_thresh)


def zeroshot(model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float) -> Chosen:
    """The zero-shot label alone: where its score is too low the pixel is ignored."""
    confident = model.confidence_BHW >= conf_thresh
    class_BHW = torch.where(zeroshot.passes_BHW, zeroshot.class_BHW, model.class_BHW)
    return Chosen(class_BHW, zeroshot.passes_BHW | (confident & ~zeroshot.known_BHW))


def model_else_zeroshot(
    model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float
) -> Chosen:
    """The model where it is confident, else the zero-shot label."""
    confident = model.confidence_BHW >= conf_thresh
    use_label = zeroshot.passes_BHW & ~confident
    class_BHW = torch.where(use_label, zeroshot.class_BHW, model.class_BHW)
    return Chosen(class_BHW, confident | use_label)


def zeroshot_else_model(
    model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float
) -> Chosen:
    """The zero-shot label where its score passes, else the model where it is confident."""
    confident = model.confidence_BHW >= conf_thresh
    class_BHW = torch.where(zeroshot.passes_BHW, zeroshot.class_BHW, model.class_BHW)
    return Chosen(class_BHW, zeroshot.passes_BHW | confident)


def agree(model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float) -> Chosen:
    """Where both say the same, however confident; where they differ the pixel is ignored."""
    confident = model.confidence_BHW >= conf_thresh
    same = zeroshot.class_BHW == model.class_BHW
    return Chosen(model.class_BHW, torch.where(zeroshot.passes_BHW, same, confident))


def mix(model: Prediction, zeroshot: ZeroShot, conf_thresh: float, weight: float) -> Chosen:
    """`weight` of the zero-shot label and the rest of the model's probabilities, as soft target."""
    assert model.probability_BKHW is not None, "ask `predict` for the probabilities"
    passes = zeroshot.passes_BHW
    hard_BHW = torch.where(passes, zeroshot.class_BHW, model.class_BHW)
    hard_share_BHW = torch.where(passes, weight, 1.0)  # without a label: the model's class alone
    soft_BKHW = model.probability_BKHW * (1 - hard_share_BHW)[:, None]
    soft_BKHW.scatter_add_(1, hard_BHW[:, None], hard_share_BHW[:, None])
    keep_BHW = passes | (model.confidence_BHW >= conf_thresh)
    return Chosen(soft_BKHW.argmax(dim=1), keep_BHW, soft_BKHW)


RULES: dict[str, Callable[[Prediction, ZeroShot, float, float], Chosen]] = {
    "unimatch": unimatch,
    "zeroshot": zeroshot,
    "model_else_zeroshot": model_else_zeroshot,
    "zeroshot_else_model": zeroshot_else_model,
    "agree": agree,
    "mix": mix,
}
"""Name -> rule (prediction, zero-shot labels, conf_thresh, weight of the label in `mix`)."""


def _zero_shot(label_BHW: Tensor, score_BHW: Tensor, min_score: float) -> ZeroShot:
    known_BHW = label_BHW != IGNORE
    if score_BHW.is_floating_point():
        enough_BHW = score_BHW >= min_score
    else:  # the rounding is for products such as 0.7 * 255, a hair above or below a whole number
        enough_BHW = score_BHW >= math.ceil(round(min_score * 255, 6))
    return ZeroShot(label_BHW.long(), known_BHW, known_BHW & enough_BHW)
