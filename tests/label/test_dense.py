"""Dense CLIP features: the official GEM's numbers, formulas, invariants, refusals, side effects."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from zsplg_ray.label import dense_attention
from zsplg_ray.label.dense import DENSE_METHODS, dense_features, embed_patches, gem_tokens
from zsplg_ray.label.dense_attention import (
    LAST_BLOCKS,
    neighbourhood_bias,
    ordinary_attention,
    run_blocks,
)

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


def busy(**vision) -> open_clip.CLIP:
    """Random biases, norms and large weights too: zeros would hide errors."""
    model = tiny(**vision)
    for parameter in model.visual.parameters():
        parameter.data.normal_(std=0.4, generator=torch.Generator().manual_seed(len(parameter)))
    return model


def weights_as_published(method: str, query, key, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Attention weights of one head, written out in full, from the papers' formulas."""
    scale = query.shape[-1] ** -0.5
    if method == "maskclip":
        return torch.eye(len(query))
    if method == "sclip":
        return (query @ query.T * scale).softmax(1) + (key @ key.T * scale).softmax(1)
    score_NN = key @ key.T * scale
    places = [(y, x) for y in range(grid_hw[0]) for x in range(grid_hw[1])]
    for i, (y, x) in enumerate(places, start=1):
        for j, (v, u) in enumerate(places, start=1):
            score_NN[i, j] += math.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * 5.0**2))
    return score_NN.softmax(1)


@torch.no_grad()
@pytest.mark.parametrize("method", LAST_BLOCKS)
@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
def test_last_blocks_are_the_published_formulas(method, size):
    """Official order: norm, weights @ values, projection, then residual and MLP if any."""
    model, image = busy(), random_image(*size)
    visual: Any = model.visual
    block = visual.transformer.resblocks[-1]
    token_BNE = embed_patches(visual, image)
    for ordinary in visual.transformer.resblocks[:-1]:
        token_BNE = ordinary(token_BNE)
    q, k, v = (block.ln_1(token_BNE) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(
        3, dim=2
    )
    grid_hw = (size[0] // 8, size[1] // 8)
    mixed_BNE = torch.empty_like(v)
    for b in range(len(image)):
        for head in (slice(0, 16), slice(16, 32)):
            weight_NN = weights_as_published(method, q[b, :, head], k[b, :, head], grid_hw)
            mixed_BNE[b, :, head] = weight_NN @ v[b, :, head]
    expected = block.attn.out_proj(mixed_BNE)
    if method != "naclip":
        expected = token_BNE + expected
        expected = expected + block.mlp(block.ln_2(expected))
    expected = visual.ln_post(expected) @ visual.proj
    found = dense_features(model, image, method=method)
    assert found.shape == (2, 16, *grid_hw)
    assert relative(found.flatten(2).mT, expected[:, 1:]) < 1e-5
    others = [m for m in ("plain", *DENSE_METHODS) if m != method]
    for other in others:  # or this test could not tell them apart
        assert relative(dense_features(model, image, method=other, gem_depth=2), found) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("method", LAST_BLOCKS)
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (72, 64)])
@pytest.mark.parametrize("vision", [{}, {"ls_init_value": 0.1}, {"final_ln_after_pool": True}])
def test_a_last_block_with_its_change_switched_off_is_the_tower(method, size, vision):
    model, image = busy(**vision), random_image(*size)
    switched_off = dataclasses.replace(
        LAST_BLOCKS[method], attend=ordinary_attention, residual=True, mlp=True
    )
    visual: Any = model.visual
    grid_hw = (size[0] // 8, size[1] // 8)
    token_BNE = run_blocks(visual, embed_patches(visual, image), grid_hw, switched_off)
    found = (visual.ln_post(token_BNE) @ visual.proj)[:, 1:].mT.unflatten(2, grid_hw)
    assert torch.equal(found, dense_features(model, image, method="plain"))


@torch.no_grad()
def test_attention_of_equal_queries_and_keys_is_ordinary_but_for_what_is_added(monkeypatch):
    """Where q = k the self-similarities ARE the ordinary ones: naclip keeps its bias, sclip two."""
    model, image = busy(), random_image(24, 56)
    visual: Any = model.visual
    attention = visual.transformer.resblocks[-1].attn
    attention.in_proj_weight[32:64] = attention.in_proj_weight[:32]
    attention.in_proj_bias[32:64] = attention.in_proj_bias[:32]
    plain = dense_features(model, image, method="plain")
    halved = dataclasses.replace(
        LAST_BLOCKS["sclip"], attend=lambda *qkv: dense_attention.correlative_attention(*qkv) / 2
    )
    unbiased = dataclasses.replace(LAST_BLOCKS["naclip"], residual=True, mlp=True)
    monkeypatch.setattr(
        dense_attention, "neighbourhood_bias", lambda grid_hw, *rest: torch.zeros(22, 22)
    )
    for last in (halved, unbiased):
        token_BNE = run_blocks(visual, embed_patches(visual, image), (3, 7), last)
        found = (visual.ln_post(token_BNE) @ visual.proj)[:, 1:]
        assert relative(found, plain.flatten(2).mT) < 1e-5


def test_the_neighbourhood_is_a_gaussian_around_each_patch_and_leaves_the_class_token_alone():
    bias_NN = neighbourhood_bias((3, 7), 5.0)
    assert bias_NN.shape == (22, 22)
    assert not bias_NN[0].any()
    assert not bias_NN[:, 0].any()
    assert_close(bias_NN[1:, 1:].diagonal(), torch.ones(21))
    assert_close(bias_NN, bias_NN.T)
    here, two_down_three_right = 1 + 0 * 7 + 2, 1 + 2 * 7 + 5
    assert bias_NN[here, two_down_three_right].item() == pytest.approx(math.exp(-13 / 50))


@torch.no_grad()
@pytest.mark.parametrize("method", ["plain", *DENSE_METHODS])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (24, 56), (72, 64)])
def test_every_method_answers_for_every_patch_of_every_size(method, size):
    model, image = busy(), random_image(*size, count=3)
    found = dense_features(model, image, method=method, gem_depth=2)
    assert found.shape == (3, 16, size[0] // 8, size[1] // 8)
    assert found.isfinite().all()
    alone = dense_features(model, image[1:2], method=method, gem_depth=2)
    assert relative(found[1:2], alone) < 1e-4, "images of a batch do not see each other"
    assert relative(found[1:2], found[2:]) > 0.01


@pytest.mark.parametrize("method", LAST_BLOCKS)
def test_last_blocks_leave_the_model_as_it_is_and_let_gradients_through(method):
    model, image = tiny(), random_image(24, 56)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense_features(model, image, method=method).square().mean().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    visual: Any = model.visual
    assert visual.conv1.weight.grad.any()


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
@pytest.mark.parametrize("method", ["plain", *DENSE_METHODS])
def test_other_dtypes(method, dtype):
    model, image = tiny(), random_image(32, 40)
    expected = dense_features(model, image, method=method, gem_depth=2)
    got = dense_features(model.to(dtype), image.to(dtype), method=method, gem_depth=2)
    assert got.dtype == dtype
    assert relative(got.float(), expected) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, r"method must be one of \['gem', .*'plain', .*\], got 'magic'; "),
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
