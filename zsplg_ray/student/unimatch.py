"""UniMatch's loss, as sums over pixels divided by counts that are known beforehand; and CutMix.

What enters: logits of the labelled images, of two strong views and of the weak view with its
features perturbed, and what each pixel is trained towards. What leaves: the loss and its parts.

Every term is a sum over this micro batch divided by a count over the whole step, all workers and
micro batches. So the parts of a step add up to what one worker would have with the whole batch, and
a step in which every pixel is ignored has loss 0 and gradient 0 instead of 0 / 0.

Shapes: B batch, C channels, H W pixels, K classes.
Source: UniMatch (Yang et al., CVPR 2023, arXiv 2208.09910, equations 2 to 8; github.com/LiheYoung/
UniMatch, unimatch.py, MIT); CutMix partner from the batch as in UniMatch V2 (arXiv 2410.10777).
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zsplg_ray.config import UnimatchConfig
from zsplg_ray.records import IGNORE
from zsplg_ray.student.fusion import Targets

Pasted = TypeVar("Pasted", Tensor, Targets)


class Losses(NamedTuple):
    """The loss and its terms; float32 scalars. Summed over a step's parts: those of the step."""

    total: Tensor
    x: Tensor
    s1: Tensor
    s2: Tensor
    fp: Tensor


def pixel_counts(x_label_BHW: Tensor, *valid_BHW: Tensor) -> Tensor:
    """How many pixels each term is divided by, float64 [1 + len(valid_BHW)].

    None of it needs a forward pass: so a loop can add the counts of all micro batches and workers
    before the first one.

    Args:
        x_label_BHW: Labels of the labelled images; 255 does not count.
        valid_BHW: Of s1, s2 (both after CutMix) and fp: bool, True where there is no padding.
    """
    sums = [(x_label_BHW != IGNORE).sum(), *(valid.sum() for valid in valid_BHW)]
    return torch.stack(sums).double()


def unimatch_loss(
    logits_x: Tensor,
    logits_s1: Tensor,
    logits_s2: Tensor,
    logits_fp: Tensor,
    x_label: Tensor,
    targets_s1: Targets,
    targets_s2: Targets,
    targets_fp: Targets,
    counts: Tensor,
    config: UnimatchConfig,
) -> Losses:
    """(L_x + strong * (L_s1 + L_s2) + perturbed * L_fp) / 2 and its terms.

    The sum of these over micro batches and workers is the loss of the step. DDP takes the mean of
    the workers' gradients: there the loss has to be multiplied with the number of workers.

    Args:
        logits_x: [B, K, H, W] of any floating type; computed on in float32, under autocast too.
        logits_s1: As above, of the first strong view.
        logits_s2: Of the second.
        logits_fp: Of the weak view with its features perturbed.
        x_label: Integers [B, H, W]; 255 is ignored.
        targets_s1: Targets after CutMix.
        targets_s2: Likewise.
        targets_fp: Targets of the weak view as it is.
        counts: `pixel_counts` of the whole step, in the order x, s1, s2, fp.
        config: Weights of the terms and label smoothing.
    """
    smoothing = config.label_smoothing
    sum_x = supervised_sum(logits_x, x_label, smoothing)
    sums = torch.stack(
        [
            sum_x,
            target_sum(logits_s1, targets_s1, smoothing),
            target_sum(logits_s2, targets_s2, smoothing),
            target_sum(logits_fp, targets_fp, smoothing),
        ]
    )
    x, s1, s2, fp = (sums / counts.to(sums).clamp(min=1)).unbind()
    total = (x + config.strong * (s1 + s2) + config.perturbed * fp) / 2
    return Losses(total, x, s1, s2, fp)


def supervised_loss(logits_x: Tensor, x_label: Tensor, count: Tensor, smoothing: float) -> Losses:
    """The loss of training on labelled images alone: L_x, not halved, and nothing else.

    Args:
        logits_x: [B, K, H, W].
        x_label: Integers [B, H, W]; 255 is ignored.
        count: `pixel_counts` of the whole step; its first number is used.
        smoothing: Label smoothing.
    """
    sum_x = supervised_sum(logits_x, x_label, smoothing)
    x = sum_x / count.flatten()[0].to(sum_x).clamp(min=1)
    none = torch.zeros_like(x)
    return Losses(x, x, none, none, none)


def supervised_sum(logits_BKHW: Tensor, label_BHW: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy in float32, summed over the pixels that are not 255."""
    return F.cross_entropy(
        logits_BKHW.float(),
        label_BHW.long(),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
        reduction="sum",
    )


def target_sum(logits_BKHW: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """Cross entropy in float32, summed over the pixels that are kept."""
    if targets.soft_BKHW is None:  # dropped pixels as ignored ones: no map of losses is kept
        label_BHW = targets.class_BHW.masked_fill(~targets.keep_BHW, IGNORE)
        return supervised_sum(logits_BKHW, label_BHW, smoothing)
    loss_BHW = F.cross_entropy(
        logits_BKHW.float(), targets.soft_BKHW, label_smoothing=smoothing, reduction="none"
    )
    return (loss_BHW * targets.keep_BHW).sum()


def partner(images: int) -> Tensor:
    """Index of the image that each image's CutMix box is taken from, int64 [images].

    Neighbours swap: 0 with 1, 2 with 3. An even share of a batch then has the same pairs on every
    worker as the whole batch has on one. Of an odd number the last takes from the first, and a
    single image from itself.
    """
    index = torch.arange(images) ^ 1
    return torch.where(index < images, index, 0)


def paste(own: Pasted, other: Pasted, box_BHW: Tensor) -> Pasted:
    """CutMix: `other` inside the boxes, `own` outside.

    Args:
        own: Images [B, C, H, W], maps [B, H, W], or targets.
        other: The same of the partners.
        box_BHW: bool, True inside.
    """
    if isinstance(own, Tensor):
        assert isinstance(other, Tensor)
        box = box_BHW[:, None] if own.ndim == 4 else box_BHW
        return torch.where(box, other, own)
    assert isinstance(own, Targets) and isinstance(other, Targets)
    soft_BKHW = None
    if own.soft_BKHW is not None and other.soft_BKHW is not None:
        soft_BKHW = paste(own.soft_BKHW, other.soft_BKHW, box_BHW)
    return Targets(
        paste(own.class_BHW, other.class_BHW, box_BHW),
        paste(own.keep_BHW, other.keep_BHW, box_BHW),
        paste(own.valid_BHW, other.valid_BHW, box_BHW),
        soft_BKHW,
    )
