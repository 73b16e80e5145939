"""Embedding segments and class names with a small CLIP of random weights."""

import copy
import typing
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import convert_weights_to_lp
from PIL import Image

from zsplg_ray.config import ClipConfig, PromptsConfig
from zsplg_ray.label import clip as clip_module
from zsplg_ray.label.clip import ClipEncoder, square_box
from zsplg_ray.label.dense import DENSE_METHODS, dense_features
from zsplg_ray.label.segments import Segments
from zsplg_ray.vocab import ClassList

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
EMBEDDERS = typing.get_args(typing.get_type_hints(ClipConfig)["embedder"])
TEMPLATES = ("a {class}", "one {class} {of} many")


def tokenizer(texts):
    """Letters as tokens: different texts, different ids."""
    ids = torch.zeros(len(texts), 40, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        codes = [ord(c) % 62 + 1 for c in text][:39]
        row[: len(codes) + 1] = torch.tensor([*codes, 63])
    return ids


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(
            image_size=32, patch_size=8, width=32, layers=3, head_width=16
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=40, vocab_size=64, width=32, heads=2, layers=2
        ),
    )
    with torch.no_grad():
        for parameter in made.parameters():  # zero biases and tiny weights would hide errors
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    cfg = {"size": 32, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(made, {**cfg, "resize_mode": "shortest", "fill_color": 0})
    return made.eval()


def encoder_of(model, embedder="gem", **changes):
    settings = {"gem_depth": 2, "dense_px": 48, "embedder": embedder, **changes}
    return ClipEncoder(model, tokenizer, ClipConfig(**settings))


@pytest.fixture(scope="module")
def image_HWC():
    return np.random.default_rng(0).integers(0, 256, (50, 75, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def segments():
    rng = np.random.default_rng(1)
    masks = np.zeros((5, 50, 75), bool)
    masks[0] = rng.random((50, 75)) > 0.7
    masks[1, 10:20, 30:70] = True
    masks[2, 49, 74] = True
    masks[3] = True
    masks[4, 0:50, 3:5] = True
    return Segments.from_masks(masks, [1] * 5, [1] * 5)


def unit(vector):
    return vector / vector.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("embedder", DENSE_METHODS)
def test_dense_methods_embed_as_the_papers_equation(model, image_HWC, segments, embedder):
    squashed = Image.fromarray(image_HWC).resize((48, 48), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255
    normal = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        feature = dense_features(model, normal[None], method=embedder, gem_depth=2)
    upsampled = F.interpolate(feature, size=(50, 75), mode="bilinear", align_corners=False)[0]
    mask_R1HW = torch.from_numpy(segments.masks_RHW())[:, None]
    expected = unit((upsampled * mask_R1HW).sum((2, 3)) / mask_R1HW.sum((2, 3)))
    depth = 2 if embedder == "gem" else None
    found = encoder_of(model, embedder, gem_depth=depth).embed(image_HWC, segments)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)


def test_crop_embeds_the_square_around_the_box_through_clips_own_preprocessing(
    model, image_HWC, segments
):
    preprocess: Any = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD)
    found = encoder_of(model, "crop", crop_batch=2, dense_px=None).embed(image_HWC, segments)
    squares = {1: (30, 0, 70, 40), 2: (74, 49, 75, 50), 4: (0, 0, 50, 50)}
    for r, (x0, y0, x1, y1) in squares.items():
        crop = torch.stack([preprocess(Image.fromarray(image_HWC[y0:y1, x0:x1]))])
        with torch.no_grad():
            expected = unit(model.encode_image(crop))[0].numpy()
        np.testing.assert_allclose(found[r], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_what_lies_outside_the_image_is_the_mean_colour(model, image_HWC):
    encoder = encoder_of(model, "crop")
    crop_CHW = encoder.square_crop(image_HWC, (0, 0, 75, 50))
    # The square is rows -13 to 62, so at 32 px the first and last 5 rows lie outside; bicubic
    # resizing mixes the image into two of them. 8-bit rounding of the colour is worth 0.01.
    assert crop_CHW.shape == (3, 32, 32)
    assert crop_CHW[:, :3].abs().max() < 0.02
    assert crop_CHW[:, -3:].abs().max() < 0.02
    assert crop_CHW[:, 8:24].abs().mean() > 0.2


@pytest.mark.parametrize(
    ("box", "size_hw", "square"),
    [
        ((30, 10, 70, 20), (50, 75), (30, 0, 70, 40)),
        ((3, 0, 5, 50), (50, 75), (0, 0, 50, 50)),
        ((70, 20, 75, 45), (50, 75), (50, 20, 75, 45)),
        ((10, 10, 14, 14), (50, 75), (10, 10, 14, 14)),
        ((10, 10, 13, 14), (50, 75), (9, 10, 13, 14)),
        ((0, 0, 75, 50), (50, 75), (0, -13, 75, 62)),
    ],
)
def test_square_boxes(box, size_hw, square):
    assert square_box(box, size_hw) == square


def test_every_choice_of_the_setting_is_there():
    assert set(EMBEDDERS) == {*DENSE_METHODS, "crop"}


def test_embedders_differ(model, image_HWC, segments):
    found = [encoder_of(model, e).embed(image_HWC, segments) for e in EMBEDDERS]
    for i, first in enumerate(found):
        for second in found[:i]:
            assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_no_segments_and_segments_without_pixels(model, image_HWC, segments, embedder):
    encoder = encoder_of(model, embedder)
    assert encoder.embedding_dim == 24
    nothing = encoder.embed(image_HWC, Segments.measured((50, 75), [], [], []))
    assert nothing.shape == (0, 24)
    assert nothing.dtype == np.float32
    masks = segments.masks_RHW()[:3]
    masks[1] = False
    found = encoder.embed(image_HWC, Segments.from_masks(masks, [1] * 3, [1] * 3))
    assert np.isnan(found[1]).all()
    alone = encoder.embed(image_HWC, segments.select([0, 2]))
    np.testing.assert_allclose(found[[0, 2]], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_the_same_bytes_twice(model, image_HWC, segments, embedder):
    first, second = (encoder_of(model, embedder).embed(image_HWC, segments) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("embedder", EMBEDDERS)
def test_a_model_of_reduced_precision_embeds_about_alike(model, image_HWC, segments, embedder):
    classes = ClassList(("background", "cat"), ((), ("cat",)))
    reduced = copy.deepcopy(model)
    convert_weights_to_lp(reduced, torch.bfloat16)
    found, expected = (encoder_of(m, embedder) for m in (reduced, model))
    prompts = PromptsConfig(templates=TEMPLATES)
    pairs = [
        (found.embed(image_HWC, segments), expected.embed(image_HWC, segments)),
        tuple(e.encode_classes(classes, prompts).embedding_AD for e in (found, expected)),
    ]
    for low, full in pairs:
        assert low.dtype == np.float32
        assert ((low * full).sum(axis=1) > 0.98).all()
        assert (low != full).any()


def test_crops_are_halved_when_memory_runs_out(model, image_HWC, segments, monkeypatch):
    expected = encoder_of(model, "crop").embed(image_HWC, segments)
    encoder = encoder_of(model, "crop", crop_batch=32)
    whole = encoder.encode_image
    sizes = []

    def scarce(image_BCHW):
        sizes.append(len(image_BCHW))
        if len(image_BCHW) > 2:
            raise torch.OutOfMemoryError("no more")
        return whole(image_BCHW)

    monkeypatch.setattr(encoder, "encode_image", scarce)
    found = encoder.embed(image_HWC, segments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert sizes == [5, 2, 2, 1]
    monkeypatch.setattr(encoder, "encode_image", lambda image_BCHW: scarce([0] * 3))
    with pytest.raises(torch.OutOfMemoryError):
        encoder.embed(image_HWC, segments)


def test_class_names_fill_templates_and_aliases_stay_apart(model, monkeypatch):
    classes = ClassList(("background", "cat", "dog"), ((), ("cat", "kitten"), ("dog",)))
    encoder = encoder_of(model)
    monkeypatch.setattr(clip_module, "_TEXT_BATCH", 3)
    bank = encoder.encode_classes(
        classes, PromptsConfig(templates=TEMPLATES, background=("wall", "sky"))
    )
    assert bank.class_index_A.tolist() == [0, 0, 1, 1, 2]
    assert bank.n_classes == 3
    assert bank.embedding_AD.dtype == np.float32
    for row, word in zip(bank.embedding_AD, ("wall", "sky", "cat", "kitten", "dog"), strict=True):
        with torch.no_grad():
            text = unit(model.encode_text(tokenizer([f"a {word}", f"one {word} {{of}} many"])))
        np.testing.assert_allclose(row, unit(text.mean(0)).numpy(), rtol=0, atol=1e-5)


def test_without_background_words_there_is_no_background_column(model):
    classes = ClassList(("background", "cat"), ((), ("cat",)))
    for background in (None, ()):
        prompts = PromptsConfig(templates=("a {class}",), background=background)
        bank = encoder_of(model).encode_classes(classes, prompts)
        assert bank.class_index_A.tolist() == [1]
        assert np.isneginf(bank.similarity(bank.embedding_AD)[0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_px": 50}, "clip.dense_px must be a multiple of the model's patch, 8, got 50; use"),
        ({"dense_px": None}, "clip.dense_px must be given for clip.embedder gem, got None"),
        ({"gem_depth": None}, "clip.gem_depth must be given"),
        ({"gem_depth": 9}, "gem_depth must be 1 to 3"),
        (
            {"embedder": "naclip", "dense_px": None},
            "clip.dense_px must be given for .* naclip, got",
        ),
        ({"embedder": "sclip", "dense_px": 50}, "clip.dense_px must be a multiple of the model's"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_the_first_image(
    model, changes, message
):
    with pytest.raises(ValueError, match=message):
        encoder_of(model, **changes)


def test_inputs_are_checked(model, image_HWC, segments):
    encoder = encoder_of(model)
    with pytest.raises(ValueError, match=r"image_HWC must be uint8 \[50, 75, 3\]"):
        encoder.embed(image_HWC[:40], segments)
    with pytest.raises(ValueError, match=r"image_HWC must be uint8 .*, got float64"):
        encoder.embed(image_HWC / 255, segments)
    classes = ClassList(("background", "cat"), ((), ("cat",)))
    with pytest.raises(ValueError, match=r"prompts\.templates must be given"):
        encoder.encode_classes(classes, PromptsConfig())
