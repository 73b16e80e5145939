"""The fast image encoder against the official one: every layout, both precisions, no side effects.

Weights are random in every parameter: the zeros that biases and positions start from would hide
what is left out.
"""

import copy
from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

from zsplg_ray.label import encoder, products
from zsplg_ray.label.encoder import ImageEncoder
from zsplg_ray.shapes.sam import WEIGHTS, build_sam_shapes


def random_vit(**change) -> ImageEncoderViT:
    settings = {
        "img_size": 80,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "out_chans": 16,
        "use_rel_pos": True,
        "window_size": 4,
        "global_attn_indexes": (1,),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    }
    torch.manual_seed(0)
    vit = ImageEncoderViT(**(settings | change)).eval()
    randomise(vit)
    return vit


@torch.no_grad()
def randomise(vit: nn.Module) -> None:
    for name, parameter in vit.named_parameters():
        if "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
            parameter.normal_(0, 0.3)
        elif parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def random_image(vit: ImageEncoderViT, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, vit.img_size, vit.img_size, generator=generator)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def official(vit: ImageEncoderViT, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vit(image)


LAYOUTS = {
    "windows padded": {},
    "windows without padding": {"window_size": 5},
    "window larger than the image": {"window_size": 12},
    "all global": {"window_size": 0},
    "all windows": {"global_attn_indexes": ()},
    "no relative positions": {"use_rel_pos": False},
    "no absolute positions": {"use_abs_pos": False},
    "no qkv bias": {"qkv_bias": False},
    "nothing optional": {"use_rel_pos": False, "use_abs_pos": False, "qkv_bias": False},
    "one head": {"num_heads": 1},
    "image not a multiple of the patch": {"img_size": 83},
    "another activation": {"act_layer": nn.ReLU},
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_the_official_encoder(change):
    vit = random_vit(**change)
    image = random_image(vit)
    got = ImageEncoder(vit)(image)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert relative(got, official(vit, image)) < 2e-6


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_it_by_what_other_devices_use(monkeypatch, change):
    """Without oneDNN, and by torch's fused attention as on GPUs."""
    vit = random_vit(**change)
    image = random_image(vit, 2)
    monkeypatch.setattr(products, "has_onednn", lambda device, dtype: False)
    assert relative(ImageEncoder(vit)(image), official(vit, image)) < 2e-6
    monkeypatch.setattr(encoder, "_weighted", encoder._weighted_fused)
    assert relative(ImageEncoder(vit)(image), official(vit, image)) < 2e-6


@pytest.mark.parametrize("length", [5, 7, 33])
def test_position_tables_of_another_length_are_stretched(length):
    vit = random_vit()
    for block in vit.blocks:
        for name in ("rel_pos_h", "rel_pos_w"):
            setattr(block.attn, name, nn.Parameter(torch.randn(length, 16)))
    image = random_image(vit)
    assert relative(ImageEncoder(vit)(image), official(vit, image)) < 2e-6


@pytest.mark.parametrize("attention_bytes", [1, 3000, 10000, 50000])
@pytest.mark.parametrize("mlp_tokens", [7, None])
def test_chunks_of_any_size_give_the_same(attention_bytes, mlp_tokens):
    """From one row of one head at a time to several heads."""
    vit = random_vit()
    image = random_image(vit)
    fast = ImageEncoder(vit)
    for block in fast.blocks:
        block.attention_bytes, block.mlp_tokens = attention_bytes, mlp_tokens
    assert relative(fast(image), official(vit, image)) < 2e-6


def test_attention_mib_bounds_the_scores(monkeypatch):
    """Global attention over 32 x 32 tokens takes 4 MiB a head: 1 MiB is a quarter of one."""
    vit = random_vit(img_size=256, depth=1, window_size=0)
    sizes = []
    weighted = encoder._weighted
    monkeypatch.setattr(
        encoder,
        "_weighted",
        lambda q, k, v, bias: sizes.append(bias.shape) or weighted(q, k, v, bias),
    )
    ImageEncoder(vit, attention_mib=1)(random_image(vit))
    assert set(sizes) == {(1, 8 * 32, 32 * 32)}
    sizes.clear()
    ImageEncoder(vit, attention_mib=8)(random_image(vit))
    assert [s[0] for s in sizes] == [2, 1]


@pytest.mark.parametrize("together", [1, 250, 4096])
def test_images_of_a_batch_do_not_touch_each_other(monkeypatch, together):
    monkeypatch.setattr(encoder, "CPU_TOKENS", together)
    vit = random_vit()
    image, fast = random_image(vit, 3), ImageEncoder(vit)
    got = fast(image)
    assert relative(got, official(vit, image)) < 2e-6
    for i in range(3):
        assert relative(got[i : i + 1], fast(image[i : i + 1])) < 1e-6


def test_trained_tiny_sam():
    vit = build_sam_shapes(str(WEIGHTS)).image_encoder
    image = random_image(vit, 2)
    assert relative(ImageEncoder(vit)(image), official(vit, image)) < 2e-6


def test_bfloat16_is_near_and_returns_float32():
    vit = build_sam_shapes(str(WEIGHTS)).image_encoder
    image = random_image(vit, 2)
    got, expected = ImageEncoder(vit, "bfloat16")(image), official(vit, image)
    assert got.dtype == torch.float32
    assert 1e-5 < relative(got, expected) < 0.03


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_bfloat16_in_every_layout(change):
    vit = random_vit(**change)
    image = random_image(vit)
    assert relative(ImageEncoder(vit, "bfloat16")(image), official(vit, image)) < 0.03


def test_bfloat16_attention_as_on_gpus(monkeypatch):
    vit = random_vit()
    image, fast = random_image(vit), ImageEncoder(vit, "bfloat16")
    for block in fast.blocks:
        block.attention_dtype = torch.bfloat16
        assert block.table_LD is not None
        block.table_LD = block.table_LD.bfloat16()
    assert relative(fast(image), official(vit, image)) < 0.03
    monkeypatch.setattr(encoder, "_weighted", encoder._weighted_fused)
    assert relative(fast(image), official(vit, image)) < 0.03


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_image_and_parameters_stay(precision):
    vit = random_vit()
    image = random_image(vit)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    image_before = image.clone()
    fast = ImageEncoder(vit, precision)
    first, second = fast(image), fast(image)
    assert torch.equal(first, second)
    assert torch.equal(image, image_before)
    assert before.keys() == vit.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in vit.parameters())


def test_float32_copies_no_matrix():
    vit = random_vit()
    own = {p.untyped_storage().data_ptr() for p in vit.parameters()}
    for block in ImageEncoder(vit).blocks:
        pairs = [*block.qkv, block.proj, block.mlp_in, block.mlp_out]
        assert all(t.untyped_storage().data_ptr() in own for p in pairs for t in p if t is not None)


def two_blocks_of_vit_b(img_size: int):
    """The real width and window."""
    return random_vit(
        img_size=img_size,
        patch_size=16,
        embed_dim=768,
        depth=2,
        num_heads=12,
        mlp_ratio=4.0,
        out_chans=256,
        window_size=14,
    )


def test_two_blocks_of_vit_b():
    """The real width, grid and window: sums are long and rounding adds up."""
    vit = two_blocks_of_vit_b(448)
    image = random_image(vit)
    assert relative(ImageEncoder(vit)(image), official(vit, image)) < 1e-6


@pytest.mark.slow
def test_full_grid_of_vit_b():
    """64 x 64 tokens, padded windows of 14, and scores too large for one chunk."""
    vit = two_blocks_of_vit_b(1024)
    image = random_image(vit)
    expected = official(vit, image)
    ours = ImageEncoder(vit)(image)
    # Each rounds in an order of its own, and by processor and threads the two lie up to 1.2e-6
    # apart; what counts is how far ours is from float64 (the official one is off by 7e-7).
    exact = official(copy.deepcopy(vit).double(), image.double())
    assert relative(ours.double(), exact) < 1e-6
    assert relative(ours, expected) < 2e-6
    assert relative(ImageEncoder(vit, "bfloat16")(image), expected) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"precision": "float16"},
            r"sam.precision must be one of float32, bfloat16, got float16; ",
        ),
        ({"attention_mib": 0}, r"attention_mib must be >= 1, got 0; "),
    ],
)
def test_settings_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(random_vit(), **change)


@pytest.mark.parametrize("shape", [(3, 80, 80), (1, 1, 80, 80), (1, 3, 80, 72), (1, 3, 64, 64)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"image_BCHW must be B x 3 x 80 x 80, got .*; "):
        ImageEncoder(random_vit())(torch.zeros(shape))
