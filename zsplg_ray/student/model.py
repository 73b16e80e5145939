"""DeepLabV3+ over any convolutional timm backbone, with UniMatch's feature perturbation.

What enters: normalised images. What leaves: logits at the images' size. Modules are named as in
UniMatch's own model (`backbone`, `head.b0`..`b4`, `head.project`, `reduce`, `fuse`, `classifier`),
so the state dict of a checkpoint that UniMatch released fits as it is: timm's `resnet50s` and
`resnet101s` have the parameters and the outputs of its ResNets with a deep stem.

Feature perturbation drops whole channels of the low- and the high-level features, and runs through
the decoder in one pass with what is not perturbed. Which channels fall is an argument, not a draw
from torch's generator: so a step is the same however images are spread over workers.

Shapes: B batch, C channels, H W pixels, K classes.
Source: DeepLabV3+ (Chen et al., ECCV 2018, arXiv 1802.02611); UniMatch (Yang et al., CVPR 2023,
arXiv 2208.09910; github.com/LiheYoung/UniMatch, model/semseg/deeplabv3plus.py, MIT).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsplg_ray.config import StudentConfig
from zsplg_ray.settings import complain

ATROUS_RATES = (6, 12, 18)
LOW_LEVEL_REDUCTION = 4


class Channels(NamedTuple):
    """How many channels the low- and the high-level features have."""

    low: int
    high: int


class Perturbation(NamedTuple):
    """What each channel of some images' features is multiplied with: 0, or 1 / (1 - p).

    `low_BC` and `high_BC` are float32 for the last B images of the batch.
    """

    low_BC: Tensor
    high_BC: Tensor
    wanted: int
    """For how many of the last images logits are wanted. The others only take part in the
    decoder's batch statistics."""


class DeepLabV3Plus(nn.Module):
    """Images float32 [B, 3, H, W] -> logits [B, K, H, W].

    Args:
        config: The backbone and the widths.
        n_classes: K, background included.
        pretrained: Whether timm loads the backbone's weights (a download, or its cache).

    Raises:
        ValueError: timm has no such backbone, or it gives no feature maps of the strides needed.
    """

    backbone: nn.Module
    head: nn.Module
    classifier: nn.Conv2d

    def __init__(self, config: StudentConfig, n_classes: int, *, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone, self.channels = _backbone(config, pretrained)
        low, high = self.channels
        width = config.decoder_channels
        aspp = config.aspp_channels or high // 8
        self.head = ASPP(high, aspp)
        self.reduce = nn.Sequential(
            nn.Conv2d(low, config.low_level_channels, 1, bias=False),
            nn.BatchNorm2d(config.low_level_channels),
            nn.ReLU(True),
        )
        self.fuse = nn.Sequential(
            nn.Conv2d(aspp + config.low_level_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        )
        self.classifier = nn.Conv2d(width, n_classes, 1, bias=True)
        self.frozen_bn = config.frozen_bn

    def forward(
        self, image_BCHW: Tensor, perturbation: Perturbation | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the logits of the last images again with their features perturbed.

        Args:
            image_BCHW: Normalised images, any size.
            perturbation: For how many of the last images, and how; None for none.

        Returns:
            Logits [B, K, H, W], and [B', K, H, W] of the B' = `wanted` last images, perturbed
            (None without a perturbation).
        """
        low, high = self.backbone(image_BCHW)
        size_hw = image_BCHW.shape[-2:]
        if perturbation is None:
            return self._logits(self._features(low, high), size_hw), None
        last, images = len(perturbation.low_BC), len(image_BCHW)
        low = torch.cat([low, low[-last:] * perturbation.low_BC[:, :, None, None]])
        high = torch.cat([high, high[-last:] * perturbation.high_BC[:, :, None, None]])
        features = self._features(low, high)
        perturbed = features[len(features) - perturbation.wanted :]
        return self._logits(features[:images], size_hw), self._logits(perturbed, size_hw)

    def small_logits(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B, K, h, w] at the size of the low-level features, before they are enlarged."""
        return self.classifier(self._features(*self.backbone(image_BCHW)))

    def _features(self, low: Tensor, high: Tensor) -> Tensor:
        high = self.head(high)
        high = F.interpolate(high, size=low.shape[-2:], mode="bilinear", align_corners=True)
        return self.fuse(torch.cat([self.reduce(low), high], dim=1))

    def _logits(self, features: Tensor, size_hw: torch.Size) -> Tensor:
        small = self.classifier(features)
        return F.interpolate(small, size=size_hw, mode="bilinear", align_corners=True)

    def train(self, mode: bool = True) -> DeepLabV3Plus:
        """As any module; with `frozen_bn` batch normalisation stays in evaluation mode."""
        super().train(mode)
        if self.frozen_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: five views of the high-level features, then one projection.

    Args:
        channels: Of what enters.
        out: Of what leaves, and of each branch.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.b0 = _conv(channels, out, 1)
        self.b1, self.b2, self.b3 = (_conv(channels, out, 3, rate) for rate in ATROUS_RATES)
        self.b4 = ImagePooling(channels, out)
        self.project = _conv(5 * out, out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features [B, channels, H, W] -> [B, out, H, W]."""
        branches = (self.b0, self.b1, self.b2, self.b3, self.b4)
        return self.project(torch.cat([branch(x_BCHW) for branch in branches], dim=1))


class ImagePooling(nn.Module):
    """The mean of the whole map, at every place."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.gap = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(channels, out, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features [B, channels, H, W] -> [B, out, H, W]."""
        return self.gap(x_BCHW).expand(-1, -1, *x_BCHW.shape[-2:])


def _conv(channels: int, out: int, kernel: int, rate: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, padding=rate * (kernel // 2), dilation=rate, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(True),
    )


def _backbone(config: StudentConfig, pretrained: bool) -> tuple[nn.Module, Channels]:
    """timm's feature extractor for the low- and the high-level map."""
    name = config.backbone
    wanted: dict[str, Any] = {"features_only": True, "output_stride": config.output_stride}
    try:
        info: Any = timm.create_model(name, **wanted).feature_info
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as e:
        told = " ".join(str(e).split())[:200] or type(e).__name__
        fix = f"choose another of `timm.list_models()`, such as resnet50s ({told})"
        rule = "a convolutional timm model that can dilate its last stages"
        raise ValueError(complain("student.backbone", rule, name, fix)) from e
    strides = info.reduction()
    if LOW_LEVEL_REDUCTION not in strides:
        fix = "choose a convolutional one, such as resnet50s"
        rule = f"a timm model with features of stride {LOW_LEVEL_REDUCTION}"
        raise ValueError(complain("student.backbone", rule, f"{name}: {strides}", fix))
    at = (strides.index(LOW_LEVEL_REDUCTION), len(strides) - 1)
    model: Any = timm.create_model(name, pretrained=pretrained, out_indices=at, **wanted)
    return model, Channels(*model.feature_info.channels())
