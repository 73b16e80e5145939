"""A training step as UniMatch's released code takes it: for measuring and testing, nothing else.

What enters: a model, an optimiser, the views of one step. What leaves: the step is taken, and its
losses are told. Nothing of the product runs through here: it is what our step is compared with.

The order of things is the original's, slow parts too: three forward passes one after the other, the
first of them in evaluation mode for the CutMix partners; the features of the labelled half are
perturbed as well, though its perturbed logits enter no loss; softmax and argmax apart; masks that
multiply a full map of losses; numbers read back from the device after each step. Left out is what
one process does not do (the barrier before each step). A batch of nothing but padding is 0 / 0, as
there.

Shapes: B batch, C channels, H W pixels, K classes.
Source: UniMatch (Yang et al., CVPR 2023; github.com/LiheYoung/UniMatch, unimatch.py and
model/semseg/deeplabv3plus.py, MIT), told in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from zsplg_ray.config import AugmentConfig, OptimConfig, UnimatchConfig
from zsplg_ray.records import IGNORE
from zsplg_ray.student.augment import cutmix_boxes, normalise, strong_view
from zsplg_ray.student.batch import Batch
from zsplg_ray.student.model import DeepLabV3Plus, Perturbation


@dataclass
class Views:
    """What the released loaders give for one step; images float32, normalised."""

    x_BCHW: Tensor
    """Labelled images."""
    x_label_BHW: Tensor
    """int64, 255 = ignore."""
    weak_BCHW: Tensor
    """Weak view of the unlabelled images."""
    s1_BCHW: Tensor
    """First strong view, before CutMix."""
    s2_BCHW: Tensor
    """Second strong view, before CutMix."""
    ignore_BHW: Tensor
    """int64, 255 on padding, else 0."""
    box1_BHW: Tensor
    """float32, 1 inside the CutMix box of the first strong view."""
    box2_BHW: Tensor
    """Likewise of the second."""
    mix_weak_BCHW: Tensor
    """Weak view of the CutMix partners."""
    mix_s1_BCHW: Tensor
    """First strong view of the partners."""
    mix_s2_BCHW: Tensor
    """Second strong view of the partners."""
    mix_ignore_BHW: Tensor
    """int64, 255 on the partners' padding."""

    def clone(self) -> Views:
        """A copy: `step` writes into the strong views."""
        return Views(**{field.name: getattr(self, field.name).clone() for field in fields(self)})


def views_of(batch: Batch, config: AugmentConfig) -> Views:
    """The views that our own step makes of a batch, as the released loaders would give them."""
    assert batch.mix_image_BCHW is not None and batch.mix_padding_BHW is not None
    assert batch.mix_seed_B is not None

    def strong(image_BCHW: Tensor, seed_B: Tensor, which: int) -> Tensor:
        return normalise(strong_view(image_BCHW, seed_B, config, which))

    def box(which: int) -> Tensor:
        boxes = cutmix_boxes(batch.u_seed_B, batch.u_image_BCHW.shape[-1], config, which)
        return boxes.float().to(batch.u_image_BCHW.device)

    def ignore(padding_BHW: Tensor) -> Tensor:
        return torch.where(padding_BHW, IGNORE, 0)

    own, mix = batch.u_image_BCHW, batch.mix_image_BCHW
    return Views(
        x_BCHW=normalise(batch.x_image_BCHW),
        x_label_BHW=batch.x_label_BHW.long(),
        weak_BCHW=normalise(own),
        s1_BCHW=strong(own, batch.u_seed_B, 0),
        s2_BCHW=strong(own, batch.u_seed_B, 1),
        ignore_BHW=ignore(batch.u_padding_BHW),
        box1_BHW=box(0),
        box2_BHW=box(1),
        mix_weak_BCHW=normalise(mix),
        mix_s1_BCHW=strong(mix, batch.mix_seed_B, 0),
        mix_s2_BCHW=strong(mix, batch.mix_seed_B, 1),
        mix_ignore_BHW=ignore(batch.mix_padding_BHW),
    )


class Told(NamedTuple):
    """What the released code adds up for its log."""

    loss: float
    x: float
    s: float
    """Mean of the two strong views' terms."""
    fp: float
    kept: float
    """Share of the pixels that are not padding whose prediction was confident."""


class Weak(NamedTuple):
    """What the weak view says of each pixel, and where it is padding."""

    class_BHW: Tensor
    confidence_BHW: Tensor
    ignore_BHW: Tensor

    def pasted(self, other: Weak, box_BHW: Tensor) -> Weak:
        """A copy with the partner's inside the box."""
        copy = Weak(*(part.clone() for part in self))
        for mine, theirs in zip(copy, other, strict=True):
            mine[box_BHW == 1] = theirs[box_BHW == 1]
        return copy


class GivenDropout(nn.Module):
    """In the place of `Dropout2d`: drops what it is told to, so that two steps can be compared."""

    def __init__(self, perturbation: Perturbation) -> None:
        super().__init__()
        self.factors = [perturbation.low_BC, perturbation.high_BC]

    def forward(self, level_BCHW: Tensor) -> Tensor:
        """The low-level features are asked for first, then the high-level ones, and so on."""
        factor_BC = self.factors.pop(0)
        self.factors.append(factor_BC)
        return level_BCHW * factor_BC[:, :, None, None]


class OfficialModel(DeepLabV3Plus):
    """The same model and parameter names with the released forward pass."""

    def __init__(self, *args, feature_dropout: float = 0.5, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.dropout: nn.Module = nn.Dropout2d(feature_dropout)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image_BCHW: Tensor, need_fp: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits; with `need_fp` also those of the whole batch with its features perturbed."""
        low, high = self.backbone(image_BCHW)
        if need_fp:
            low = torch.cat([low, self.dropout(low)])
            high = torch.cat([high, self.dropout(high)])
        logits = self.classifier(self._features(low, high))
        size_hw = image_BCHW.shape[-2:]
        logits = F.interpolate(logits, size=size_hw, mode="bilinear", align_corners=True)
        if need_fp:
            clean, perturbed = logits.chunk(2)
            return clean, perturbed
        return logits


def optimiser(model: nn.Module, config: OptimConfig) -> SGD:
    """SGD with a group for the backbone and one for the rest, which learns faster."""
    rest = [weight for name, weight in model.named_parameters() if "backbone" not in name]
    groups = [
        {"params": model.get_submodule("backbone").parameters(), "lr": config.lr},
        {"params": rest, "lr": config.lr * config.head_lr},
    ]
    return SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def step(
    model: OfficialModel,
    optimizer: SGD,
    views: Views,
    config: UnimatchConfig,
    optim: OptimConfig,
    done: float = 0.0,
) -> Told:
    """One training step; the strong views are pasted into in place.

    Args:
        model: In any mode; left in training mode.
        optimizer: Of `optimiser`; its learning rates are set for the next step.
        views: Of this step.
        config: Weights of the terms and the least confidence.
        optim: Learning rates.
        done: Share of the steps that are done before this one, [0, 1].
    """
    optimizer.zero_grad()
    losses, kept = forward(model, views, config)
    losses[0].backward()
    optimizer.step()
    loss, x, s1, s2, fp = (term.item() for term in losses)
    lr = optim.lr * (1 - done) ** optim.poly_power
    for group, factor in zip(optimizer.param_groups, (1, optim.head_lr), strict=True):
        group["lr"] = lr * factor
    return Told(loss, x, (s1 + s2) / 2, fp, kept)


def forward(
    model: OfficialModel, views: Views, config: UnimatchConfig
) -> tuple[tuple[Tensor, ...], float]:
    """The loss, its terms x, s1, s2, fp, and the share of pixels kept."""
    with torch.no_grad():
        model.eval()
        mix_logits = _logits(model(views.mix_weak_BCHW)).detach()
        mix_confidence = mix_logits.softmax(dim=1).max(dim=1)[0]
        mix_class = mix_logits.argmax(dim=1)
    for strong, other, box in (
        (views.s1_BCHW, views.mix_s1_BCHW, views.box1_BHW),
        (views.s2_BCHW, views.mix_s2_BCHW, views.box2_BHW),
    ):
        inside = box.unsqueeze(1).expand(strong.shape) == 1
        strong[inside] = other[inside]

    model.train()
    labeled, unlabeled = len(views.x_BCHW), len(views.weak_BCHW)
    logits, logits_fp = model(torch.cat((views.x_BCHW, views.weak_BCHW)), True)
    logits_x, logits_weak = logits.split([labeled, unlabeled])
    logits_fp = logits_fp[labeled:]
    logits_s1, logits_s2 = _logits(model(torch.cat((views.s1_BCHW, views.s2_BCHW)))).chunk(2)

    logits_weak = logits_weak.detach()
    confidence = logits_weak.softmax(dim=1).max(dim=1)[0]
    weak = Weak(logits_weak.argmax(dim=1), confidence, views.ignore_BHW)
    mix = Weak(mix_class, mix_confidence, views.mix_ignore_BHW)
    x = F.cross_entropy(logits_x, views.x_label_BHW, ignore_index=IGNORE)
    s1 = _term(logits_s1, weak.pasted(mix, views.box1_BHW), config.conf_thresh)
    s2 = _term(logits_s2, weak.pasted(mix, views.box2_BHW), config.conf_thresh)
    fp = _term(logits_fp, weak, config.conf_thresh)
    loss = (x + s1 * config.strong + s2 * config.strong + fp * config.perturbed) / 2.0
    valid = views.ignore_BHW != IGNORE
    kept = ((confidence >= config.conf_thresh) & valid).sum().item() / valid.sum().item()
    return (loss, x, s1, s2, fp), kept


def _logits(answer: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(answer, Tensor)
    return answer


def _term(logits_BKHW: Tensor, weak: Weak, conf_thresh: float) -> Tensor:
    loss = F.cross_entropy(logits_BKHW, weak.class_BHW, reduction="none")
    loss = loss * ((weak.confidence_BHW >= conf_thresh) & (weak.ignore_BHW != IGNORE))
    return torch.sum(loss) / torch.sum(weak.ignore_BHW != IGNORE).item()
