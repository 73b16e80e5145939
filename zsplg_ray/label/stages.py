"""What the segment benchmark measures: both sides of each stage, and how far they agree.

What enters: a `Scene` (weights, image, device). What leaves: `Pair`s of functions that do the same
work, the official way and ours.

How real decoder and plausible masks go together: both sides run their encoder and decoder in full.
The decoder's IoU head is replaced by a tape of plausible predicted IoUs, which decide what is kept;
when the decoder is done, its logits are exchanged for those of `synthetic`. What costs time is
computed, and what post-processing sees is as in a photograph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zsplg_ray.config import ClipConfig, SamConfig
from zsplg_ray.images import decode_image
from zsplg_ray.label.budget import points_together
from zsplg_ray.label.clip import ClipEncoder
from zsplg_ray.label.decoder import Decoded, PointDecoder
from zsplg_ray.label.encoder import ImageEncoder
from zsplg_ray.label.official import (
    Agreement,
    agreement,
    official_generator,
    official_proposals,
    together,
)
from zsplg_ray.label.pooling import pooling_weights
from zsplg_ray.label.presets import resolve_sam
from zsplg_ray.label.proposals import Proposals
from zsplg_ray.label.sam import MaskProposer
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.synthetic import VoronoiLogits
from zsplg_ray.label.weights import blank_sam, load_sam
from zsplg_ray.shapes.scenes import make_scene

DECODER_POINTS = 128
"""Prompts of the decoder's row, spread over the grid."""

REGIMES: dict[str, dict[str, Any]] = {
    "D": {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95},
    "S": {"pred_iou_thresh": 0.92, "stability_score_thresh": 0.96},
}
"""SAM's default thresholds, and stricter ones."""


@dataclass(frozen=True)
class Pair:
    """The same work twice."""

    stage: str
    official: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[Any, Any], str]
    """(official's result, ours) -> how far they agree."""
    images: int = 1
    """Images that ours does while the official side does one."""


@dataclass(frozen=True)
class Scene:
    """What both sides work on."""

    sam: str
    checkpoint: str | None
    device: str
    points_per_side: int
    size_hw: tuple[int, int]
    image: str | None

    def config(self, **settings: Any) -> SamConfig:
        """Resolved settings of the generator."""
        given = {"points_per_side": self.points_per_side, **settings}
        return resolve_sam(SamConfig(model=self.sam, **given))  # type: ignore[arg-type]

    @functools.cached_property
    def model(self) -> Sam:
        """The SAM that both sides use."""
        if self.checkpoint is not None:
            return load_sam(self.config(checkpoint=self.checkpoint), self.device)
        sam = load_sam(self.config(random_weights=True))
        generator = torch.Generator().manual_seed(0)
        for name, value in sam.named_parameters():
            if value.ndim == 1 or "rel_pos" in name or "pos_embed" in name:
                value += 0.02 * torch.randn(value.shape, generator=generator)
        return sam.to(self.device)

    @functools.cached_property
    def image_HWC(self) -> np.ndarray:
        """uint8 RGB."""
        if self.image is not None:
            return decode_image(Path(self.image).read_bytes())
        return np.random.default_rng(0).integers(0, 256, (*self.size_hw, 3), np.uint8)

    @functools.cached_property
    def input_1CHW(self) -> Tensor:
        """The image as the encoder takes it."""
        predictor = SamPredictor(self.model)
        pixels = torch.from_numpy(predictor.transform.apply_image(self.image_HWC))
        return self.model.preprocess(pixels.to(self.device).permute(2, 0, 1)[None])

    @functools.cached_property
    def plausible(self) -> tuple[Tensor, Tensor]:
        """Logits float32 [points, 3, low, low] and predicted IoUs float32 [points, 3]."""
        low_px = self.model.prompt_encoder.mask_input_size[0]
        height, width = self.image_HWC.shape[:2]
        scale = low_px / max(height, width)
        extent_hw = (round(height * scale), round(width * scale))
        masks = VoronoiLogits(0, self.points_per_side, low_px, extent_hw)
        logit_QKHW, iou_QK = masks.chunk(0, len(masks))
        return logit_QKHW.to(self.device), iou_QK.to(self.device)


class Tape(nn.Module):
    """Stands for the IoU head: gives the noted values, as many as it is asked for.

    At the end it starts again. Several images at once have their points mixed, so that they get
    other values than alone: as many masks are kept, not the same ones.
    """

    def __init__(self, iou_QK: Tensor) -> None:
        super().__init__()
        self.iou_QK, self.place = iou_QK, 0

    def forward(self, token_BC: Tensor) -> Tensor:
        """float32 [B, 4]; the first of the four is the single-mask output, not used here."""
        start, self.place = self.place, self.place + len(token_BC)
        points = torch.arange(start, self.place, device=token_BC.device) % len(self.iou_QK)
        return F.pad(self.iou_QK[points], (1, 0))


@contextmanager
def taped(scene: Scene) -> Iterator[Tape]:
    """The scene's SAM with a tape for an IoU head."""
    decoder = scene.model.mask_decoder
    head, decoder.iou_prediction_head = decoder.iou_prediction_head, Tape(scene.plausible[1])  # type: ignore[assignment]
    try:
        yield decoder.iou_prediction_head  # type: ignore[misc]
    finally:
        decoder.iou_prediction_head = head


def relative(theirs: Tensor, ours: Tensor) -> str:
    """Largest difference over largest value."""
    gap = (theirs - ours).abs().max() / theirs.abs().max()
    return f"relative {gap.item():.1e}"


def told(found: Agreement) -> str:
    """An agreement in words."""
    if found.exact:
        return f"{found.theirs} records bit-identical"
    return (
        f"{found.ours}/{found.theirs} records, {found.same_records} in order, "
        f"{found.identical} identical, least IoU {found.least_iou:.6f}, "
        f"mean best IoU {found.mean_best_iou:.5f}"
    )


def encoder(scene: Scene) -> Iterator[Pair]:
    """Image encoder."""
    official = torch.inference_mode()(lambda: scene.model.image_encoder(scene.input_1CHW))
    for precision in ("float32", "bfloat16"):
        ours = ImageEncoder(scene.model.image_encoder, precision)
        yield Pair(
            f"encoder {precision}", official, functools.partial(ours, scene.input_1CHW), relative
        )


def decoder(scene: Scene) -> Iterator[Pair]:
    """Prompts to low-resolution logits; ours makes only those that are kept."""
    config, sam = scene.config(**REGIMES["D"]), scene.model
    proposer = MaskProposer(sam, config)
    feature = ImageEncoder(sam.image_encoder)(scene.input_1CHW)
    n = scene.points_per_side**2
    place = torch.linspace(0, n - 1, min(n, DECODER_POINTS)).long()
    grid_Q2 = torch.from_numpy(proposer.grids[0])[place] * sam.image_encoder.img_size
    grid_Q2 = grid_Q2.to(scene.device)
    extent_hw = sam.prompt_encoder.mask_input_size
    min_iou = config.pred_iou_thresh
    assert min_iou is not None

    @torch.inference_mode()
    def official() -> Tensor:
        parts = []
        for start in range(0, len(grid_Q2), config.points_per_batch):
            points = grid_Q2[start : start + config.points_per_batch, None]
            labels = torch.ones(points.shape[:2], device=points.device)
            sparse, dense = sam.prompt_encoder((points, labels), None, None)
            pe = sam.prompt_encoder.get_dense_pe()
            parts.append(sam.mask_decoder(feature, pe, sparse, dense, multimask_output=True)[0])
        return torch.cat(parts).flatten(0, 1)

    @torch.inference_mode()
    def ours() -> list[Decoded]:
        with taped(scene) as tape:
            tape.iou_QK = scene.plausible[1][place.to(scene.device)]
            side = proposer.decoder.prepare(feature, extent_hw)
            step = points_together(sam, config.points_per_batch, scene.device)
            return [
                proposer.decoder.decode(side, grid_Q2[None, start : start + step], min_iou)
                for start in range(0, len(grid_Q2), step)
            ]

    def same(theirs_MHW: Tensor, found: list[Decoded]) -> str:
        gaps, start = [0.0], 0
        for decoded in found:
            gap_MHW = (theirs_MHW[start + decoded.index_M] - decoded.logit_MHW).abs()
            gaps += gap_MHW.flatten(1).amax(1).tolist()
            start += decoded.iou_IQ3.numel()
        rms = theirs_MHW.square().mean().sqrt().item()
        return (
            f"{len(gaps) - 1} of {start} kept, largest gap {max(gaps):.1e} (logits' rms {rms:.2g})"
        )

    yield Pair(f"decoder, {len(grid_Q2)} points", official, ours, same)


class HandOut:
    """Stands for `PointDecoder`: gives the plausible logits, with or without computing others."""

    def __init__(self, scene: Scene, real: PointDecoder | None = None) -> None:
        self.scene, self.real, self.place = scene, real, 0
        self.extent_hw = scene.model.prompt_encoder.mask_input_size
        self._made: dict[Any, Decoded] = {}

    def prepare(self, feature_ICHW: Tensor, extent_hw: tuple[int, int]) -> Any:
        """Start again with the first point."""
        self.extent_hw, self.place = extent_hw, 0
        return None if self.real is None else self.real.prepare(feature_ICHW, extent_hw)

    def decode(self, side: Any, point_IQ2: Tensor, min_iou: float) -> Decoded:
        """What belongs to the next points."""
        if self.real is not None:
            self.real.decode(side, point_IQ2, min_iou)
        start, self.place = self.place, self.place + point_IQ2.shape[1]
        key = (len(point_IQ2), start, self.place, min_iou, self.extent_hw)
        if key not in self._made:
            self._made[key] = self._make(len(point_IQ2), slice(start, self.place), min_iou)
        return self._made[key]

    def _make(self, images: int, points: slice, min_iou: float) -> Decoded:
        """The same masks for every image."""
        logit_QKHW, iou_QK = self.scene.plausible
        iou_IQK = iou_QK[points].expand(images, -1, -1)
        index_M = (iou_IQK.flatten() > min_iou).nonzero().flatten()
        height, width = self.extent_hw
        logit_NHW = logit_QKHW[points].flatten(0, 1)
        logit_MHW = logit_NHW[index_M % len(logit_NHW), :height, :width]
        return Decoded(iou_IQK, index_M, logit_MHW.contiguous())


class HandOutPredictor(SamPredictor):
    """Stands for `SamPredictor`: neither encodes nor decodes, upsamples the plausible logits."""

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene.model)
        self.scene, self.place = scene, 0

    def set_torch_image(self, transformed_image: Tensor, original_image_size: Any) -> None:
        """Preprocess the image, as our side does, and start again with the first point."""
        self.original_size = original_image_size
        self.input_size = tuple(transformed_image.shape[-2:])
        self.model.preprocess(transformed_image)
        self.place = 0

    def predict_torch(self, point_coords: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What belongs to the next points."""
        start, self.place = self.place, self.place + len(point_coords)
        low = self.scene.plausible[0][start : self.place]
        masks = self.model.postprocess_masks(low, self.input_size, self.original_size)
        return masks, self.scene.plausible[1][start : self.place], low


def post_processing(scene: Scene) -> Iterator[Pair]:
    """Low-resolution logits to records."""
    for regime, thresholds in REGIMES.items():
        config = scene.config(**thresholds)
        proposer = MaskProposer(scene.model, config)
        proposer.encoder = lambda input_ICHW: input_ICHW  # type: ignore[assignment]
        proposer.decoder = HandOut(scene)  # type: ignore[assignment]
        generator = official_generator(scene.model, config)
        generator.predictor = HandOutPredictor(scene)
        yield _images(f"post-processing {regime}", scene, generator, proposer)


def whole(scene: Scene) -> Iterator[Pair]:
    """One image, everything; the masks of both precisions are fed, so see `shapes` for them."""
    sam = scene.model
    for precision in ("float32", "bfloat16"):
        config = scene.config(precision=precision)
        proposer = MaskProposer(sam, config)
        proposer.decoder = HandOut(scene, proposer.decoder)  # type: ignore[assignment]
        generator = official_generator(sam, config)
        yield _fed(scene, _images(f"whole image {precision}", scene, generator, proposer))


def _fed(scene: Scene, pair: Pair) -> Pair:
    """The pair with plausible masks after the real decoder; ours must have a `HandOut`."""
    sam = scene.model

    def official() -> Any:
        with taped(scene) as tape:

            def exchange(module: nn.Module, args: Any, out: Any) -> Any:
                return scene.plausible[0][tape.place - len(out[0]) : tape.place], out[1]

            hook = sam.mask_decoder.register_forward_hook(exchange)
            try:
                return pair.official()
            finally:
                hook.remove()

    def ours() -> Any:
        with taped(scene):
            return pair.ours()

    return dataclasses.replace(pair, official=official, ours=ours)


def records(scene: Scene) -> Iterator[Pair]:
    """The image with masks as they come, for all ways of cropping and cleaning; few points.

    Nothing is dropped for its scores or for being alike: with random weights nearly all would be.
    """
    for layers in (0, 1):
        for area_px in (0, 100):
            config = scene.config(
                points_per_side=min(6, scene.points_per_side),
                pred_iou_thresh=0.0,
                stability_score_thresh=0.0,
                box_nms_thresh=1.0,
                crop_nms_thresh=1.0,
                crop_n_layers=layers,
                min_mask_region_area=area_px,
            )
            generator = official_generator(scene.model, config)
            stage = f"records, {layers} crop layers, regions of {area_px} px"
            yield _images(stage, scene, generator, MaskProposer(scene.model, config))


def shapes(scene: Scene) -> Iterator[Pair]:
    """60 scenes with the tiny SAM, whose masks are real; everything."""
    images = [make_scene(seed).image_HWC for seed in range(60)]
    base = resolve_sam(SamConfig(model="shapes"))
    sam = load_sam(base, scene.device)
    generator = official_generator(sam, base)
    for precision in ("float32", "bfloat16"):
        proposer = MaskProposer(sam, dataclasses.replace(base, precision=precision))

        def same(theirs: list[Proposals], ours: list[Proposals]) -> str:
            return told(together([agreement(*both) for both in zip(ours, theirs, strict=True)]))

        yield Pair(
            f"shapes, {len(images)} images, {precision}",
            lambda: [official_proposals(generator, image) for image in images],
            functools.partial(proposer.proposals, images),
            same,
        )


def pooling(scene: Scene) -> Iterator[Pair]:
    """Mean features of 60 masks: upsample then average, against weights from the runs."""
    segments, masks_RHW = _ellipses(scene.image_HWC.shape[:2])
    feature_DHW = torch.randn(512, 28, 28, generator=torch.Generator().manual_seed(0))

    def official() -> Tensor:
        full_DHW = F.interpolate(
            feature_DHW[None], segments.size_hw, mode="bilinear", align_corners=False
        )[0]
        area_R1 = torch.from_numpy(segments.area_px)[:, None]
        return masks_RHW.flatten(1) @ full_DHW.flatten(1).T / area_R1

    def weights() -> Tensor:
        return torch.from_numpy(pooling_weights(segments, (28, 28)))

    yield Pair(
        "pooling 60 masks, weights",
        official,
        weights,
        lambda theirs, ours: relative(theirs, ours @ feature_DHW.flatten(1).T),
    )
    yield Pair(
        "pooling 60 masks, with the product",
        official,
        lambda: weights() @ feature_DHW.flatten(1).T,
        relative,
    )


def clip(scene: Scene) -> Iterator[Pair]:
    """Embeddings of 60 segments by ViT-B-16: a crop each, against one dense forward and pooling."""
    segments, _ = _ellipses(scene.image_HWC.shape[:2])
    torch.manual_seed(0)
    model: Any = open_clip.create_model("ViT-B-16")
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    sides = [
        ClipEncoder(
            model, tokenizer, ClipConfig(embedder=name, gem_depth=7, dense_px=448), scene.device
        )
        for name in ("crop", "gem")
    ]
    crop, gem = (functools.partial(side.embed, scene.image_HWC, segments) for side in sides)
    yield Pair("60 crops against gem + pooling", crop, gem, lambda *_: "(another embedding)")


def throughput(scene: Scene) -> Iterator[Pair]:
    """Images one by one and as many together as memory takes; masks are fed, see `whole`."""
    most = MaskProposer(scene.model, scene.config()).images_at_once
    for precision in ("float32", "bfloat16"):
        config = scene.config(precision=precision)
        for n in sorted({1, most}):
            proposer = MaskProposer(scene.model, config)
            proposer.images_at_once = n
            proposer.decoder = HandOut(scene, proposer.decoder)  # type: ignore[assignment]
            generator = official_generator(scene.model, config)
            stage = f"{n} images at once, {precision}"
            yield _fed(scene, _images(stage, scene, generator, proposer, n))


def official_tflop(scene: Scene) -> float:
    """Operations of the official encoder and decoder for one image, 1e12, counted by torch."""
    sam = blank_sam(scene.sam)
    points = scene.points_per_side**2
    side = sam.image_encoder.img_size
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        feature = sam.image_encoder(torch.empty(1, 3, side, side))
        width = sam.mask_decoder.transformer_dim
        dense = torch.empty(1, width, *sam.prompt_encoder.image_embedding_size)
        one_point = torch.empty(1, 2, width)
        encoder = counted.get_total_flops()
        sam.mask_decoder(feature, dense, one_point, dense, multimask_output=True)
    decoder = counted.get_total_flops() - encoder
    return (encoder + points * decoder) / 1e12


def one_image(scene: Scene) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The scene's image through the official generator, and through ours; masks as they come."""
    config = scene.config()
    pair = _images(
        "", scene, official_generator(scene.model, config), MaskProposer(scene.model, config)
    )
    return pair.official, pair.ours


def _images(
    stage: str, scene: Scene, generator: Any, proposer: MaskProposer, images: int = 1
) -> Pair:
    """The scene's image officially, against ours with it so many times together."""
    return Pair(
        stage,
        lambda: official_proposals(generator, scene.image_HWC),
        lambda: proposer.proposals([scene.image_HWC] * images)[0],
        lambda theirs, ours: told(agreement(ours, theirs)),
        images,
    )


def _ellipses(size_hw: tuple[int, ...]) -> tuple[Segments, Tensor]:
    """60 masks of various sizes, and the same as float32 [R, H, W]."""
    rng = np.random.default_rng(0)
    height, width = size_hw
    y, x = np.mgrid[:height, :width]
    masks = []
    for _ in range(60):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(0.02, 0.3, 2) * (height, width)
        masks.append(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1)
    masks_RHW = np.stack(masks)
    segments = Segments.from_masks(masks_RHW, [1.0] * 60, [1.0] * 60)
    return segments, torch.from_numpy(masks_RHW).float()


STAGES: dict[str, Callable[[Scene], Iterator[Pair]]] = {
    "encoder": encoder,
    "decoder": decoder,
    "post-processing": post_processing,
    "pooling": pooling,
    "clip": clip,
    "shapes": shapes,
    "whole": whole,
    "records": records,
    "throughput": throughput,
}
"""Name to what it measures."""
