"""The fast decoder against the official one: every number, whatever the sizes; filter and crop."""

import copy
import functools

import pytest
import torch
from segment_anything.build_sam import sam_model_registry
from segment_anything.modeling import MaskDecoder, Sam, TwoWayTransformer
from torch import nn

from zsplg_ray.label import products
from zsplg_ray.label.decoder import PointDecoder, points_in_cache
from zsplg_ray.shapes.sam import WEIGHTS, build_sam_shapes

GRID = 16
DIM = 64


def randomise(sam: Sam, seed: int) -> Sam:
    """Biases and norms too: their initial zeros and ones would hide mistakes."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in (sam.mask_decoder, sam.prompt_encoder):
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
        # so that thresholds over 0 have something on both sides
        sam.mask_decoder.iou_prediction_head.layers[-1].bias += 1  # pyright: ignore
    return sam.eval()


@functools.cache
def tiny_sam(depth=2, heads=2, iou_depth=3, act=nn.GELU, downsample=2) -> Sam:
    torch.manual_seed(1)
    sam = build_sam_shapes()
    sam.mask_decoder = MaskDecoder(
        transformer_dim=DIM,
        transformer=TwoWayTransformer(
            depth=depth,
            embedding_dim=DIM,
            num_heads=heads,
            mlp_dim=96,
            activation=act,
            attention_downsample_rate=downsample,
        ),
        activation=act,
        iou_head_depth=iou_depth,
        iou_head_hidden_dim=40,
    )
    return randomise(sam, 2)


def features_and_points(images=1, points=5, seed=3):
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(images, DIM, GRID, GRID, generator=generator)
    return feature, 128 * torch.rand(images, points, 2, generator=generator, dtype=torch.float64)


@torch.no_grad()
def official(sam: Sam, feature_ICHW, point_IQ2, dtype=torch.float32):
    """Predicted IoU [I, Q, 3] and logits [I, Q, 3, H, W], as `SamPredictor.predict_torch` does."""
    results = []
    for feature_CHW, point_Q2 in zip(feature_ICHW, point_IQ2, strict=True):
        label_Q1 = torch.ones(len(point_Q2), 1, dtype=torch.int, device=point_Q2.device)
        sparse, dense = sam.prompt_encoder((point_Q2[:, None], label_Q1), None, None)
        results.append(
            sam.mask_decoder(
                image_embeddings=feature_CHW[None].to(dtype),
                image_pe=sam.prompt_encoder.get_dense_pe().to(dtype),
                sparse_prompt_embeddings=sparse.to(dtype),
                dense_prompt_embeddings=dense.to(dtype),
                multimask_output=True,
            )
        )
    logits, ious = zip(*results, strict=True)
    return torch.stack(ious), torch.stack(logits)


def assert_close(ours, theirs):
    scale = max(1.0, float(theirs.square().mean().sqrt()))  # trained logits are 6 or so
    torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-5)


def assert_official(sam, feature, point):
    decoder = PointDecoder(sam)
    decoded = decoder.decode(decoder.prepare(feature), point, min_iou=0)
    iou, logit = official(sam, feature, point)
    assert decoded.iou_IQ3.dtype == decoded.logit_MHW.dtype == torch.float32
    assert_close(decoded.iou_IQ3, iou)
    assert_close(decoded.logit_MHW, logit.flatten(0, 2))
    assert torch.equal(decoded.index_M, torch.arange(iou.numel(), device=iou.device))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_equals_the_official_decoder_at_any_depth_and_head_count(depth, heads):
    assert_official(tiny_sam(depth, heads), *features_and_points())


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("points", [1, 5])
def test_equals_the_official_decoder_for_several_images_at_once(images, points):
    assert_official(tiny_sam(), *features_and_points(images, points))


@pytest.mark.parametrize(
    "sizes",
    [{"iou_depth": 1}, {"iou_depth": 2}, {"act": nn.ReLU}, {"act": nn.SiLU}, {"downsample": 1}],
    ids=str,
)
def test_equals_the_official_decoder_with_other_modules(sizes):
    assert_official(tiny_sam(**sizes), *features_and_points())


def test_equals_the_official_decoder_without_onednn(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda device, dtype: False)
    assert_official(tiny_sam(), *features_and_points(3))


def test_equals_the_official_decoder_for_strong_features():
    feature, point = features_and_points()
    assert_official(tiny_sam(), 30 * feature + 10, point)


@functools.cache
def trained() -> tuple[Sam, torch.Tensor, torch.Tensor]:
    sam = build_sam_shapes(str(WEIGHTS))
    image = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(4))
    image[:, :, 30:80, 20:90] += 1
    with torch.no_grad():
        feature = sam.image_encoder(4 * image - 2)
    return sam, feature, features_and_points(2, 6)[1]


def test_equals_the_official_decoder_with_trained_weights():
    assert_official(*trained())


def test_is_as_near_to_the_truth_as_the_official_decoder():
    sam, feature, point = trained()
    double = copy.deepcopy(sam)
    double.mask_decoder.double()
    _, truth = official(double, feature, point, torch.float64)
    _, theirs = official(sam, feature, point)
    decoder = PointDecoder(sam)
    ours = decoder.decode(decoder.prepare(feature), point, 0).logit_MHW.view(theirs.shape)
    error, allowed = ((x - truth).square().mean().sqrt() for x in (ours, theirs))
    assert error < 1.5 * allowed < 1e-5


def test_equals_the_official_decoder_at_the_published_size():
    torch.manual_seed(5)
    sam = randomise(sam_model_registry["vit_b"](), 6)
    feature = torch.randn(1, 256, 64, 64) / 2
    assert_official(sam, feature, 1024 * torch.rand(1, 2, 2, dtype=torch.float64))


def test_points_do_not_depend_on_their_neighbours():
    feature, point = features_and_points(points=6)
    decoder = PointDecoder(tiny_sam())
    side = decoder.prepare(feature)
    whole = decoder.decode(side, point, 0)
    parts = [decoder.decode(side, point[:, q : q + 2], 0) for q in (0, 2, 4)]
    assert_close(torch.cat([part.iou_IQ3 for part in parts], 1), whole.iou_IQ3)
    assert_close(torch.cat([part.logit_MHW for part in parts]), whole.logit_MHW)


def test_changes_nothing_that_enters():
    feature, point = features_and_points()
    decoder = PointDecoder(tiny_sam())
    before = feature.clone(), point.clone()
    side = decoder.prepare(feature)
    first = decoder.decode(side, point, 0)
    again = decoder.decode(side, point, 0)
    assert torch.equal(feature, before[0]) and torch.equal(point, before[1])
    assert torch.equal(first.logit_MHW, again.logit_MHW)


@pytest.mark.parametrize("extent_hw", [(64, 64), (1, 64), (64, 1), (49, 64), (64, 33), (7, 10)])
def test_extent_is_a_crop_of_all_logits(extent_hw):
    feature, point = features_and_points(images=2)
    decoder = PointDecoder(tiny_sam())
    whole = decoder.decode(decoder.prepare(feature), point, 0)
    decoded = decoder.decode(decoder.prepare(feature, extent_hw), point, 0)
    height, width = extent_hw
    assert_close(decoded.logit_MHW, whole.logit_MHW[:, :height, :width])
    assert decoded.logit_MHW.shape[1:] == extent_hw and decoded.logit_MHW.is_contiguous()
    assert torch.equal(decoded.iou_IQ3, whole.iou_IQ3)


@pytest.mark.parametrize("extent_hw", [(0, 64), (64, 65), (-1, 3)])
def test_refuses_an_extent_outside_the_logits(extent_hw):
    decoder = PointDecoder(tiny_sam())
    with pytest.raises(AssertionError):
        decoder.prepare(features_and_points()[0], extent_hw)


def test_refuses_points_of_another_number_of_images():
    decoder = PointDecoder(tiny_sam())
    side = decoder.prepare(features_and_points(images=2)[0])
    with pytest.raises(AssertionError, match="one row of points an image"):
        decoder.decode(side, features_and_points(images=1)[1], 0)


@pytest.mark.parametrize("images", [1, 2])
def test_only_masks_over_the_threshold_come_in_order(images):
    feature, point = features_and_points(images, 6)
    decoder = PointDecoder(tiny_sam())
    side = decoder.prepare(feature)
    whole = decoder.decode(side, point, 0)
    iou = whole.iou_IQ3.flatten()
    # a predicted IoU that occurs: equal is not over
    for rank in (0, len(iou) // 3, len(iou) // 2, len(iou) - 2):
        min_iou = float(iou.sort().values[rank])
        assert min_iou > 0
        decoded = decoder.decode(side, point, min_iou)
        expected = (iou > min_iou).nonzero()[:, 0]
        assert 0 < len(expected) < len(iou)
        assert torch.equal(decoded.index_M, expected) and decoded.index_M.dtype == torch.int64
        assert torch.equal(decoded.iou_IQ3, whole.iou_IQ3)
        assert_close(decoded.logit_MHW, whole.logit_MHW[expected])


@pytest.mark.parametrize("min_iou", [0.0, -0.5])
def test_no_threshold_keeps_negative_predictions_too(min_iou):
    sam = randomise(build_sam_shapes(), 7)
    with torch.no_grad():
        sam.mask_decoder.iou_prediction_head.layers[-1].bias -= 100  # pyright: ignore
    feature, point = features_and_points()
    decoder = PointDecoder(sam)
    decoded = decoder.decode(decoder.prepare(feature), point, min_iou)
    assert decoded.iou_IQ3.max() < -0.5
    assert decoded.index_M.tolist() == list(range(15)) and len(decoded.logit_MHW) == 15


def test_nothing_kept_leaves_empty_tensors_of_the_right_shape():
    feature, point = features_and_points(images=2)
    decoder = PointDecoder(tiny_sam())
    decoded = decoder.decode(decoder.prepare(feature, (30, 64)), point, 1e9)
    assert decoded.iou_IQ3.shape == (2, 5, 3)
    assert decoded.index_M.shape == (0,) and decoded.index_M.dtype == torch.int64
    assert decoded.logit_MHW.shape == (0, 30, 64) and decoded.logit_MHW.dtype == torch.float32


def test_more_points_a_call_where_there_is_more_room():
    assert points_in_cache(256) > points_in_cache(4096) >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_equals_the_official_decoder_on_a_gpu():
    feature, point = features_and_points(2, 70)
    sam = randomise(build_sam_shapes(), 8).cuda()
    assert_official(sam, feature.cuda(), point.cuda())
