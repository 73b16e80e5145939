"""Dense CLIP features: the official GEM's numbers, invariants, refusals, no side effects."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors import safe_open

from zsplg_ray.label.dense import dense_features, gem_tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "gem.safetensors"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
}


def tiny(**vision) -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**(TINY | {"vision_cfg": TINY["vision_cfg"] | vision})).eval()


def random_image(height: int = 32, width: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def golden_model(golden) -> open_clip.CLIP:
    with safe_open(GOLDEN, "pt") as file:
        model = open_clip.CLIP(**json.loads(file.metadata()["config"]))
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    model.load_state_dict(weights)
    return model.eval()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("depth", [4, 7])
@pytest.mark.parametrize("size", ["square", "larger"])
def test_both_streams_equal_the_official_ones(golden, golden_model, size, depth):
    tokens = gem_tokens(golden_model, golden[f"{size}.image"], gem_depth=depth)
    assert relative(tokens.gem_BND, golden[f"{size}.depth{depth}.gem"]) < 1e-4
    assert relative(tokens.plain_BND, golden[f"{size}.depth{depth}.orig"]) < 1e-4
    assert (
        relative(tokens.gem_BND, tokens.plain_BND) > 0.1
    )  # or this test could not tell them apart


@torch.no_grad()
def test_map_lies_on_the_patch_grid_row_by_row(golden, golden_model):
    image = golden["larger.image"]
    feature_BDHW = dense_features(golden_model, image, gem_depth=4)
    assert feature_BDHW.shape == (2, 32, 12, 16)
    expected = golden["larger.depth4.gem"][1, 1 + 5 * 16 + 3]
    assert relative(feature_BDHW[1, :, 5, 3], expected) < 1e-4


VISION = [
    {},
    {"pool_type": "avg"},
    {"no_ln_pre": True},
    {"ls_init_value": 0.1},
    {"final_ln_after_pool": True},
    {"pos_embed_type": "sin_cos_2d"},
    {"patch_dropout": 0.5},
    {"output_tokens": True},
    {"pool_type": "none"},
]


@torch.no_grad()
@pytest.mark.parametrize("vision", VISION, ids=str)
def test_plain_stream_pooled_is_encode_image(vision):
    model, image = tiny(**vision), random_image()
    tokens = gem_tokens(model, image, gem_depth=2).plain_BND
    expected = model.encode_image(image)
    expected = expected[0] if vision.get("output_tokens") else expected
    pool = {"avg": tokens[:, 1:].mean(1), "none": tokens}.get(vision.get("pool_type"), tokens[:, 0])
    torch.testing.assert_close(pool, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_plain_method_and_depth_one_are_the_towers_own_tokens():
    model, image = tiny(output_tokens=True), random_image()
    own = model.visual(image)[1] @ model.visual.proj
    for feature_BDHW in (
        dense_features(model, image, method="plain"),
        dense_features(model, image, gem_depth=1),
    ):
        torch.testing.assert_close(feature_BDHW.flatten(2).mT, own, rtol=1e-4, atol=1e-5)


def test_model_is_unchanged_and_gradients_flow():
    model, image = tiny(), random_image(48, 24)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    dense_features(model, image, gem_depth=3).square().mean().backward()
    assert modules == [(name, id(module)) for name, module in model.named_modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    silent = [n for n, p in model.visual.named_parameters() if p.grad is None or not p.grad.any()]
    # GEM leaves out the last block's MLP, and with it whatever only the class token's output needs.
    assert all(name.startswith("transformer.resblocks.2.") for name in silent), silent


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    model, image = tiny(), random_image(32, 40)
    expected = dense_features(model, image, gem_depth=2)
    got = dense_features(model.to(dtype), image.to(dtype), gem_depth=2)
    assert got.dtype == dtype
    assert relative(got.float(), expected) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, r"method must be one of \['gem', 'plain'\], got 'magic'; "),
        ({"gem_depth": 0}, r"gem_depth must be 1 to 3, .*, got 0; "),
        ({"gem_depth": 4}, r"gem_depth must be 1 to 3, .*, got 4; "),
        (
            {"image_BCHW": random_image(32, 36)},
            r"multiples of the patch 8 x 8, got 2 x 3 x 32 x 36; ",
        ),
        (
            {"image_BCHW": random_image()[0]},
            r"image_BCHW must be B x 3 x H x W .*, got 3 x 32 x 32; ",
        ),
    ],
)
def test_refusals(change, message):
    arguments = {"image_BCHW": random_image(), "gem_depth": 2} | change
    image = arguments.pop("image_BCHW")
    with pytest.raises(ValueError, match=message):
        dense_features(tiny(), image, **arguments)


@pytest.mark.parametrize(
    "vision",
    [{"layers": [1, 1, 1, 1], "head_width": 64}, {"attentional_pool": True}, {"qk_norm": True}],
)
def test_other_towers_are_refused(vision):
    with pytest.raises(ValueError, match=r"model.visual must be .*, got .*; use a ViT CLIP"):
        dense_features(tiny(**vision), random_image(), gem_depth=2)
