"""The model: sizes, strides, backbones, feature perturbation, and UniMatch's own arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.student.models import TINY
from zsplg_ray.config import StudentConfig
from zsplg_ray.settings import override
from zsplg_ray.student.checkpoint import build
from zsplg_ray.student.model import DeepLabV3Plus, ImagePooling, Perturbation


def random_model(config, n_classes=3) -> DeepLabV3Plus:
    """Random weights and running statistics, of a size that keeps activations near 1."""
    model = build(config, n_classes)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var") or tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return model.eval()


def images(*size) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size_hw", [(1, 1), (3, 70), (33, 32), (64, 47)])
def test_logits_have_the_images_size(size_hw):
    model = random_model(TINY)
    with torch.no_grad():
        logits, perturbed = model(images(2, 3, *size_hw))
    assert logits.shape == (2, 3, *size_hw) and perturbed is None and logits.isfinite().all()


@pytest.mark.parametrize(
    "name", ["test_byobnet", "test_resnet", "resnet18", "mobilenetv3_small_050", "xception41p"]
)
@pytest.mark.parametrize("stride", [8, 16])
def test_any_convolutional_backbone_at_either_stride(name, stride):
    config = override(TINY, {"backbone": name, "output_stride": stride})
    with torch.device("meta"):
        model = build(config, 4).eval()
        low, high = model.backbone(torch.zeros(1, 3, 64, 96))
        logits, _ = model(torch.zeros(1, 3, 64, 96))
    assert low.shape == (1, model.channels.low, 16, 24)
    assert high.shape == (1, model.channels.high, 64 // stride, 96 // stride)
    assert logits.shape == (1, 4, 64, 96)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet5O", "student.backbone must be a convolutional timm model"),
        ("vit_tiny_patch16_224", "student.backbone must be a convolutional timm model"),
        ("resnet50s.no_such_tag", "student.backbone must be a convolutional timm model"),
    ],
)
def test_other_backbones_are_refused_in_one_line(name, told):
    with pytest.raises(ValueError) as caught:
        build(override(TINY, {"backbone": name}), 3)
    assert str(caught.value).startswith(told) and len(str(caught.value).splitlines()) == 1
    assert name in str(caught.value)


def test_widths_follow_the_settings():
    model = build(override(TINY, {"aspp_channels": 12, "low_level_channels": 7}), 5)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["head.project.0.weight"] == (12, 60, 1, 1)
    assert shapes["reduce.0.weight"][0] == 7 and shapes["fuse.0.weight"] == (16, 19, 3, 3)
    assert shapes["classifier.weight"] == (5, 16, 1, 1)


def test_image_pooling_gives_every_place_the_mean():
    pooling = ImagePooling(6, 4).eval()
    x = images(2, 6, 5, 7)
    with torch.no_grad():
        out = pooling(x)
        expected = pooling.gap[1:](x.mean(dim=(2, 3), keepdim=True))
    assert out.shape == (2, 4, 5, 7)
    assert torch.allclose(out, expected.expand(-1, -1, 5, 7), atol=1e-6)


def test_a_perturbation_touches_the_perturbed_copies_only():
    model = random_model(TINY)
    x, (low, high) = images(3, 3, 48, 48), model.channels
    drop = Perturbation(torch.ones(2, low), torch.ones(2, high), wanted=2)
    with torch.no_grad():
        clean, _ = model(x)
        same, untouched = model(x, drop)
        drop.high_BC[1, ::2] = 0
        again, perturbed = model(x, drop)
    assert torch.allclose(same, clean, atol=1e-5) and torch.allclose(again, clean, atol=1e-5)
    assert torch.allclose(untouched, clean[1:], atol=1e-5), "the last images, in their order"
    assert torch.allclose(perturbed[0], clean[1], atol=1e-5)
    assert not torch.allclose(perturbed[1], clean[2], atol=1e-3)
    with torch.no_grad():
        _, last = model(x, drop._replace(wanted=1))
    assert torch.allclose(last, perturbed[1:], atol=1e-5)


def test_frozen_batch_normalisation_keeps_its_statistics():
    for frozen in (True, False):
        model = random_model(override(TINY, {"frozen_bn": frozen})).train()
        before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
        model(images(2, 3, 32, 32))
        same = [torch.equal(model.state_dict()[k], v) for k, v in before.items()]
        assert all(same) if frozen else not any(same)
        assert model.training


def unimatch_forward(state: dict[str, Tensor], x: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """UniMatch's DeepLabV3+ over its ResNet (output stride 16), written down from its state dict.

    Source: github.com/LiheYoung/UniMatch, model/, MIT.
    """

    def norm(x: Tensor, at: str) -> Tensor:
        mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{at}.weight"], state[f"{at}.bias"])

    def conv(x: Tensor, at: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{at}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, None, stride, padding, dilation)

    x = F.relu(norm(conv(x, "backbone.conv1.0", stride=2), "backbone.conv1.1"))
    x = F.relu(norm(conv(x, "backbone.conv1.3"), "backbone.conv1.4"))
    x = F.relu(norm(conv(x, "backbone.conv1.6"), "backbone.bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for layer, (depth, stride, dilation) in enumerate(
        zip(blocks, (1, 2, 2, 1), (1, 1, 1, 2), strict=True), start=1
    ):
        for i in range(depth):
            at = f"backbone.layer{layer}.{i}"
            first = stride if i == 0 else 1
            rate = 1 if i == 0 else dilation  # a dilated layer starts with the dilation before it
            y = F.relu(norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
            y = F.relu(norm(conv(y, f"{at}.conv2", first, rate), f"{at}.bn2"))
            y = norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            if i == 0:
                x = norm(conv(x, f"{at}.downsample.0", first), f"{at}.downsample.1")
            x = F.relu(x + y)
        features.append(x)
    low, high = features[0], features[-1]
    places = [F.relu(norm(conv(high, "head.b0.0"), "head.b0.1"))]
    for branch, rate in (("b1", 6), ("b2", 12), ("b3", 18)):
        y = conv(high, f"head.{branch}.0", dilation=rate)
        places.append(F.relu(norm(y, f"head.{branch}.1")))
    pooled = conv(high.mean(dim=(2, 3), keepdim=True), "head.b4.gap.1")
    places.append(F.relu(norm(pooled, "head.b4.gap.2")).expand_as(places[0]))
    high = F.relu(norm(conv(torch.cat(places, 1), "head.project.0"), "head.project.1"))
    high = F.interpolate(high, low.shape[-2:], mode="bilinear", align_corners=True)
    y = torch.cat([F.relu(norm(conv(low, "reduce.0"), "reduce.1")), high], 1)
    for i in (0, 3):
        y = F.relu(norm(conv(y, f"fuse.{i}"), f"fuse.{i + 1}"))
    return F.conv2d(y, state["classifier.weight"], state["classifier.bias"])


def test_the_outputs_are_those_of_unimatch_s_model():
    model = random_model(StudentConfig(backbone="resnet50s"), 21)
    x = images(1, 3, 65, 49)
    with torch.no_grad():
        expected = unimatch_forward(model.state_dict(), x, (3, 4, 6, 3))
        expected = F.interpolate(expected, (65, 49), mode="bilinear", align_corners=True)
        logits, _ = model(x)
    assert logits.std() > 0.1
    assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
