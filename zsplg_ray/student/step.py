"""One training step: batches in, gradients and one move of the weights out.

What enters: the micro batches of a step, as the loader gives them. What leaves: the model one step
on, and sums for the log that stay on the device, so that no step waits for its numbers.

How many pixels each term of the loss is divided by follows from padding and CutMix boxes alone, so
it is known before the first forward pass. It is summed over micro batches and workers once: the
gradient is that of the whole batch, however it is spread.

Shapes: B batch, C channels, H W pixels, K classes.
Source: UniMatch (arXiv 2208.09910; github.com/LiheYoung/UniMatch, unimatch.py, MIT).
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from zsplg_ray.config import TrainConfig
from zsplg_ray.records import IGNORE
from zsplg_ray.student.augment import channel_keep, cutmix_boxes, normalise, strong_view
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.draws import image_seed
from zsplg_ray.student.fusion import Prediction, Targets, fuse, needs_probability, predict
from zsplg_ray.student.model import Perturbation
from zsplg_ray.student.state import Ranks, TrainState
from zsplg_ray.student.unimatch import (
    Losses,
    partner,
    paste,
    pixel_counts,
    supervised_loss,
    unimatch_loss,
)

SUMS = ("loss", "loss_x", "loss_s1", "loss_s2", "loss_fp", "steps")
PIXELS = ("confident", "valid", "agreeing", "zeroshot", "kept")
"""What is summed over the steps of an epoch: losses, then pixels of the weak views."""


class Views(NamedTuple):
    """A micro batch on the device, ready for the model; `strong` and what follows None without
    unlabelled images."""

    x_BCHW: Tensor
    x_label_BHW: Tensor
    weak_BCHW: Tensor
    strong: tuple[Tensor, Tensor] | None
    boxes: tuple[Tensor, Tensor]
    batch: Batch
    """The batch itself, on the device."""

    def valid(self) -> tuple[Tensor, Tensor, Tensor]:
        """bool [B, H, W] of the two strong views and the weak one: False on padding."""
        own = ~self.batch.u_padding_BHW
        if self.batch.mix_padding_BHW is not None:
            other = ~self.batch.mix_padding_BHW
        else:
            other = own[partner(len(own))]
        return paste(own, other, self.boxes[0]), paste(own, other, self.boxes[1]), own


def make_views(batch: Batch, config: TrainConfig, device: torch.device) -> Views:
    """Strong views with their CutMix boxes filled, normalised; colours are moved on the device."""
    on = batch.to(device)
    x, weak = normalise(on.x_image_BCHW), normalise(on.u_image_BCHW)
    if not len(weak):
        none = on.u_padding_BHW
        return Views(x, on.x_label_BHW, weak, None, (none, none), on)
    strong, boxes = [], []
    for which in (0, 1):
        box = cutmix_boxes(batch.u_seed_B, config.augment.crop_px, config.augment, which)
        box = box.to(device, non_blocking=True)
        own = strong_view(on.u_image_BCHW, batch.u_seed_B, config.augment, which)
        if on.mix_image_BCHW is not None and batch.mix_seed_B is not None:
            other = strong_view(on.mix_image_BCHW, batch.mix_seed_B, config.augment, which)
        else:
            other = own[partner(len(own))]
        strong.append(normalise(paste(own, other, box)))
        boxes.append(box)
    return Views(x, on.x_label_BHW, weak, (strong[0], strong[1]), (boxes[0], boxes[1]), on)


def train_step(
    state: TrainState, batches: list[Batch], config: TrainConfig, ranks: Ranks
) -> Tensor:
    """Move the weights one step.

    Args:
        state: Model, optimiser, step; moved on by one step.
        batches: This rank's micro batches.
        config: The run's settings.
        ranks: Which rank of how many this is.

    Returns:
        float64 [11] on the device, this rank's share of `SUMS` and `PIXELS`.
    """
    # Whatever a backbone may draw by itself (stochastic depth) is a matter of the step, not of the
    # process's past: a resumed run draws the same.
    torch.manual_seed(image_seed(config.train.seed, "step", state.step, ranks.rank))
    state.set_learning_rate()
    state.model.train()
    views = [make_views(batch, config, ranks.device) for batch in batches]
    counts = ranks.sum(torch.stack([pixel_counts(v.x_label_BHW, *v.valid()) for v in views]).sum(0))
    sums = torch.zeros(len(SUMS) + len(PIXELS), dtype=torch.float64, device=ranks.device)
    for i, view in enumerate(views):
        last = i == len(views) - 1
        with contextlib.nullcontext() if last else state.no_sync():
            losses, pixels = _losses(state, view, config, counts)
            # DDP takes the mean over ranks; the counts have been divided by already.
            (losses.total * ranks.world).backward()
        told = torch.stack([part.detach() for part in losses])
        sums[: len(told)] += told
        sums[len(SUMS) :] += pixels
    sums[len(SUMS) - 1] = 1 / ranks.world
    state.apply()
    return sums


def _losses(
    state: TrainState, views: Views, config: TrainConfig, counts: Tensor
) -> tuple[Losses, Tensor]:
    """The loss of a micro batch and its `PIXELS`."""
    n_labelled, batch = len(views.x_BCHW), views.batch
    none = torch.zeros(len(PIXELS), dtype=torch.float64, device=counts.device)
    if views.strong is None:
        with state.autocast():
            logits, _ = state.net(state.laid_out(views.x_BCHW))
        smoothing = config.unimatch.label_smoothing
        return supervised_loss(logits, views.x_label_BHW, counts[0], smoothing), none
    # Before the passes below move the running statistics, as the released code has it.
    mix_logits = _partner_logits(state, views)
    with state.autocast():
        perturbation = _perturbation(state, batch, config)
        together = state.laid_out(torch.cat([views.x_BCHW, views.weak_BCHW]))
        logits, logits_fp = state.net(together, perturbation)
        logits_s, _ = state.net(state.laid_out(torch.cat(views.strong)))
    with torch.no_grad():
        weak_logits = logits[n_labelled:].detach()
        if state.teacher is not state.model:
            weak_logits = state.teach(views.weak_BCHW)
        prediction = predict(weak_logits, probability=needs_probability(config.fusion))
        zeroshot = (batch.u_label_BHW, batch.u_score_BHW, batch.u_padding_BHW)
        own = _fused(state, config, prediction, zeroshot)
        other = _partner_targets(state, config, batch, mix_logits, own)
        first, second = (paste(own, other, box) for box in views.boxes)
        pixels = _pixels(prediction, own, batch, config.unimatch.conf_thresh)
    logits_s1, logits_s2 = logits_s.chunk(2)
    losses = unimatch_loss(
        logits[:n_labelled],
        logits_s1,
        logits_s2,
        logits_fp,
        views.x_label_BHW,
        first,
        second,
        own,
        counts,
        config.unimatch,
    )
    return losses, pixels


def _perturbation(state: TrainState, batch: Batch, config: TrainConfig) -> Perturbation:
    """Which channels of the unlabelled images fall; of the labelled ones too where batch
    statistics are to be those of UniMatch's released code.
    """
    dropout, device = config.unimatch.feature_dropout, batch.u_image_BCHW.device
    low, high = state.model.channels
    seed_B = batch.u_seed_B
    if batch.x_seed_B is not None:
        seed_B = torch.cat([batch.x_seed_B, seed_B])
    return Perturbation(
        channel_keep(seed_B, low, dropout, 0).to(device),
        channel_keep(seed_B, high, dropout, 1).to(device),
        wanted=len(batch.u_seed_B),
    )


def _partner_logits(state: TrainState, views: Views) -> Tensor | None:
    """Logits of another view of the same images, where CutMix pastes from those."""
    if views.batch.mix_image_BCHW is None:
        return None
    boxed_B = (views.boxes[0] | views.boxes[1]).flatten(1).any(1)
    return state.teach(normalise(views.batch.mix_image_BCHW), only=boxed_B)


def _partner_targets(
    state: TrainState, config: TrainConfig, batch: Batch, mix_logits: Tensor | None, own: Targets
) -> Targets:
    """The targets of what CutMix pastes from."""
    if (
        mix_logits is None
        or batch.mix_label_BHW is None
        or batch.mix_score_BHW is None
        or batch.mix_padding_BHW is None
    ):
        return own.at(partner(len(own.class_BHW)).to(own.class_BHW.device))
    return _fused(
        state,
        config,
        predict(mix_logits, probability=needs_probability(config.fusion)),
        (batch.mix_label_BHW, batch.mix_score_BHW, batch.mix_padding_BHW),
    )


def _fused(
    state: TrainState,
    config: TrainConfig,
    prediction: Prediction,
    zeroshot: tuple[Tensor, Tensor, Tensor],
) -> Targets:
    """Targets from a prediction and (label, score, padding)."""
    thresh = config.unimatch.conf_thresh
    return fuse(config.fusion, prediction, *zeroshot, thresh, state.progress)


def _pixels(prediction: Prediction, own: Targets, batch: Batch, conf_thresh: float) -> Tensor:
    """Counts of `PIXELS` over the weak views."""
    valid = own.valid_BHW
    labelled = valid & (batch.u_label_BHW != IGNORE)
    parts = (
        valid & (prediction.confidence_BHW >= conf_thresh),
        valid,
        labelled & (prediction.class_BHW == batch.u_label_BHW),
        labelled,
        own.keep_BHW,
    )
    return torch.stack([part.sum() for part in parts]).double()
