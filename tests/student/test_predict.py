"""Prediction of one image: sizes, strips, fusion, counts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.student.models import TINY
from zsplg_ray.config import FusionConfig
from zsplg_ray.metrics import confusion
from zsplg_ray.settings import WorkError, from_mapping
from zsplg_ray.student import predict as predict_module
from zsplg_ray.student.augment import normalise
from zsplg_ray.student.checkpoint import Student, build, weights_sha256
from zsplg_ray.student.fusion import RULES
from zsplg_ray.student.predict import Predictor, enlarged, evaluate_model
from zsplg_ray.vocab import class_list

K = 5


@pytest.fixture(scope="module")
def student() -> Student:
    """Random, with a classifier strong enough to give every confidence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(TINY, K).eval()
        torch.nn.init.normal_(model.classifier.weight, 0, 30.0)
    return Student(model, TINY, class_list("a,b,c,d"), weights_sha256(model))


def picture(height=50, width=70, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def reference(student, image_HWC) -> torch.Tensor:
    """Logits [K, H, W] the plain way."""
    x = normalise(torch.from_numpy(image_HWC).permute(2, 0, 1)[None])
    with torch.inference_mode():
        return student.model(x)[0][0]


# One image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 40), (40, 1), (50, 70), (97, 33)])
@pytest.mark.parametrize("strip", [1, 777, 10**9])
def test_labels_are_those_of_the_whole_softmax(student, monkeypatch, size_hw, strip):
    monkeypatch.setattr(predict_module, "CPU_STRIP_VALUES", strip)
    image = picture(*size_hw)
    expected = reference(student, image).softmax(0).numpy()
    predictor = Predictor(student)
    label_HW, confidence_HW = predictor.predict(image)
    assert label_HW.dtype == np.uint8 and confidence_HW.dtype == np.float32
    assert label_HW.shape == confidence_HW.shape == size_hw
    np.testing.assert_allclose(confidence_HW, expected.max(0), atol=1e-4)
    sure = np.sort(expected, axis=0)[-1] - np.sort(expected, axis=0)[-2] > 1e-3
    assert (label_HW == expected.argmax(0))[sure].all() and sure.mean() > 0.5
    np.testing.assert_allclose(predictor.probabilities(image), expected, atol=1e-4)


def test_strips_change_nothing(student, monkeypatch):
    image = picture()
    whole = Predictor(student).predict(image)
    monkeypatch.setattr(predict_module, "CPU_STRIP_VALUES", 1000)
    strips = Predictor(student).predict(image)
    np.testing.assert_array_equal(strips[0], whole[0])
    np.testing.assert_allclose(strips[1], whole[1], atol=1e-6)


@given(st.tuples(*[st.integers(1, 30)] * 4), st.data())
@settings(max_examples=50, deadline=None)
def test_rows_of_enlarged_logits_are_those_of_interpolate(sizes, data):
    h, w, height, width = sizes
    small = torch.randn((1, 3, h, w), generator=torch.Generator().manual_seed(h * w))
    whole = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=True)
    top = data.draw(st.integers(0, height - 1))
    rows = slice(top, data.draw(st.integers(top + 1, height)))
    found = enlarged(small, rows, (height, width))
    assert torch.allclose(found, whole[:, :, rows], atol=1e-5)


def test_long_images_are_seen_smaller_and_labelled_at_full_size(student):
    image = np.repeat(np.repeat(picture(12, 20), 8, axis=0), 8, axis=1)
    seen = []
    student.model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    label_HW, _ = Predictor(student, max_side_px=40).predict(image)
    Predictor(student, max_side_px=160).predict(image)
    student.model.backbone._forward_pre_hooks.clear()
    assert [tuple(shape) for shape in seen] == [(1, 3, 24, 40), (1, 3, 96, 160)]
    assert label_HW.shape == (96, 160)
    thin = np.zeros((1, 200, 3), np.uint8)
    assert Predictor(student, max_side_px=32).predict(thin)[0].shape == (1, 200)


def test_bfloat16_says_nearly_the_same(student):
    image = picture(64, 64)
    exact = Predictor(student).probabilities(image)
    rough = Predictor(student, precision="bfloat16").probabilities(image)
    assert rough.dtype == np.float32 and not np.array_equal(exact, rough)
    assert (exact.argmax(0) == rough.argmax(0)).mean() > 0.9


def test_a_bare_model_is_used_as_it_is(student):
    image = picture()
    expected = Predictor(student).predict(image)[0]
    np.testing.assert_array_equal(Predictor(student.model).predict(image)[0], expected)


def test_a_broken_model_is_told(student):
    with torch.random.fork_rng(devices=[]):
        model = build(TINY, K).eval()
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    with pytest.raises(WorkError, match="gives no numbers"):
        Predictor(model).predict(picture())


# With a zero-shot label --------------------------------------------------------------------------


def fused_by_hand(rule, model, conf, label, score, thresh, min_score):
    """(class or 255, confidence) of one pixel, from the rules as they are told to users."""
    has = label != 255
    passes = has and score / 255 >= min_score - 1e-9
    sure = conf >= thresh
    alone = model if sure else 255
    if not has or rule == "unimatch":
        chosen = alone
    elif rule == "zeroshot":
        chosen = label if passes else 255
    elif rule == "model_else_zeroshot":
        chosen = model if sure else (label if passes else 255)
    elif rule == "zeroshot_else_model":
        chosen = label if passes else alone
    elif rule == "agree":
        chosen = (label if label == model else 255) if passes else alone
    else:
        # Half of the label's weight: it wins unless the model is surer of its own class than 1/2
        # plus what it gives the label; for a model this sure of one class that never happens.
        chosen = label if passes else alone
    backers = [conf] * (chosen == model) + [score / 255] * (chosen == label)
    return chosen, max(backers, default=0.0) if chosen != 255 else 0.0


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_what_it_says_at_every_pixel(student, monkeypatch, rule):
    monkeypatch.setattr(predict_module, "CPU_STRIP_VALUES", 2000)
    image, rng = picture(30, 41), np.random.default_rng(1)
    predictor = Predictor(student)
    model_HW, conf_HW = predictor.predict(image)
    label_HW = rng.choice(np.array([0, 1, 2, 3, 4, 255], np.uint8), model_HW.shape)
    score_HW = rng.integers(0, 256, model_HW.shape, np.uint8)
    thresh = float(np.median(conf_HW))
    config = from_mapping(FusionConfig, {"rule": rule, "min_score": 0.25, "warmup": 1.0})
    out_HW, confidence_HW = predictor.enhance(image, label_HW, score_HW, config, thresh)
    assert out_HW.dtype == np.uint8 and confidence_HW.dtype == np.float32
    compared = 0
    for at in np.ndindex(*model_HW.shape):
        if rule == "mix" and label_HW[at] not in (255, model_HW[at]) and score_HW[at] >= 64:
            assert out_HW[at] in (label_HW[at], model_HW[at])
            continue
        pixel = (int(model_HW[at]), float(conf_HW[at]), int(label_HW[at]), int(score_HW[at]))
        chosen, confidence = fused_by_hand(rule, *pixel, thresh, 0.25)
        assert (out_HW[at], chosen) == (chosen, chosen), (at, pixel)
        assert confidence_HW[at] == pytest.approx(confidence, abs=1e-6)
        compared += 1
    assert compared > 400


def test_without_zero_shot_labels_every_rule_is_the_model_where_it_is_sure(student):
    image = picture(30, 41)
    predictor = Predictor(student)
    model_HW, conf_HW = predictor.predict(image)
    thresh = float(np.median(conf_HW))
    expected = np.where(conf_HW >= thresh, model_HW, 255)
    nothing = np.full(model_HW.shape, 255, np.uint8)
    for rule in RULES:
        config = from_mapping(FusionConfig, {"rule": rule})
        out_HW, confidence_HW = predictor.enhance(image, nothing, nothing, config, thresh)
        np.testing.assert_array_equal(out_HW, expected)
        np.testing.assert_array_equal(confidence_HW, np.where(expected != 255, conf_HW, 0))


def test_mix_stands_half_way(student):
    image = picture(30, 41)
    predictor = Predictor(student)
    probability = predictor.probabilities(image)
    label_HW = np.full(image.shape[:2], 2, np.uint8)
    for start, end in ((1.0, 0.0), (0.3, 0.1)):
        weight = (start + end) / 2
        mixed = probability * (1 - weight)
        mixed[2] += weight
        config = FusionConfig(rule="mix", mix_start=start, mix_end=end)
        out_HW, _ = predictor.enhance(image, label_HW, label_HW, config, 0.5)
        clear = np.sort(mixed, axis=0)[-1] - np.sort(mixed, axis=0)[-2] > 1e-3
        np.testing.assert_array_equal(out_HW[clear], mixed.argmax(0)[clear])


def test_a_label_of_another_size_is_refused(student):
    label = np.zeros((30, 40), np.uint8)
    with pytest.raises(ValueError, match=r"label of \(30, 40\), image of \(30, 41\)"):
        Predictor(student).enhance(picture(30, 41), label, label, FusionConfig(), 0.5)


# Counts ------------------------------------------------------------------------------------------


def test_counts_of_a_model_are_those_of_its_labels(student):
    predictor, rng = Predictor(student), np.random.default_rng(0)
    images = [picture(20 + i, 31, seed=i) for i in range(3)]
    truths = [rng.integers(0, K, image.shape[:2]).astype(np.uint8) for image in images]
    truths[1][:5] = 255
    counts = evaluate_model(predictor, zip(images, truths, strict=True), K)
    expected = sum(
        confusion(t, predictor.predict(i)[0], K) for i, t in zip(images, truths, strict=True)
    )
    np.testing.assert_array_equal(counts, expected)
    assert counts.shape == (K, K + 1) and counts.sum() == sum((t != 255).sum() for t in truths)
    with pytest.raises(ValueError, match="shape"):
        evaluate_model(predictor, [(images[0], truths[1])], K)
