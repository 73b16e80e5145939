"""CLIP's two jobs here: segments to embeddings, class names to a `TextBank`.

What enters: an open_clip model that someone else has loaded, images, `Segments`, class names. What
leaves: unit vectors in CLIP's joint space; comparing them is `TextBank.similarity`, without torch.

Two ways of embedding a segment stand behind one function:
- `gem`, the paper's, and its neighbours `maskclip`, `sclip` and `naclip`: one forward pass over the
  whole image gives a dense feature map I, and a segment's embedding is its mean over the mask S_k,
  f_k = sum(I * S_k) / sum(S_k), with I upsampled bilinearly to the image. `pooling` gets there
  exactly without upsampling anything. The four differ in `dense` alone: how I is taken from CLIP.
- `crop`: the segment's box through CLIP, as CLIP was trained; R forward passes, better for things
  smaller than a patch, blind to the mask.

Dense input: the image is squashed to dense_px x dense_px, as the official GEM does (448 x 448);
SCLIP's and NACLIP's own programs slide a window of 224 px over it instead, a forward pass each.
One shape for all images means one cost for all images, also for panoramas, and the position
embedding is stretched alike in both directions; the price is that things in a 4:3 image look a
quarter narrower to CLIP.

Crops: the box is widened to a square with what the image shows around it, shifted to stay inside;
where the image is too small the rest is CLIP's mean colour. CLIP's own preprocessing would cut the
ends off a long box, and squashing would deform it.

Shape suffixes: B batch, C channels, H W pixels, R segments, N patches, K classes, A aliases,
T templates, D embedding.

Source: pooling: Saito et al., arXiv 2505.19846; dense input size: WalBouss/GEM (MIT).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor

from zsplg_ray.config import ClipConfig, PromptsConfig
from zsplg_ray.label.dense import DENSE_METHODS, dense_features
from zsplg_ray.label.pooling import pooling_weights
from zsplg_ray.label.segments import Segments
from zsplg_ray.label.textbank import TextBank
from zsplg_ray.settings import complain
from zsplg_ray.vocab import ClassList

logger = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]
"""Texts to token ids int64 [B, context length], as `open_clip.get_tokenizer` returns it."""

_TEXT_BATCH = 256


class ClipEncoder:
    """A CLIP model with all that belongs to it, ready to embed segments and class names.

    Raises: ValueError at once, not at the first image, if the settings do not fit the model.
    """

    def __init__(
        self,
        model: open_clip.CLIP,
        tokenizer: Tokenizer,
        config: ClipConfig,
        device: str | torch.device = "cpu",
    ) -> None:
        """Move the model to the device and check that it can do what is asked.

        Args:
            model: open_clip model; mean, std, size and interpolation are taken from it.
            tokenizer: the model's own.
            config: `gem_depth` and `dense_px` must be given for the "gem" embedder.
            device: where to compute.
        """
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.config = config
        self.device = torch.device(device)
        self.crop_batch = config.crop_batch
        self._cfg = merge_preprocess_dict(
            PreprocessCfg(), open_clip.get_model_preprocess_cfg(self.model)
        )
        if config.embedder not in _EMBEDDERS:
            rule = f"one of {sorted(_EMBEDDERS)}"
            raise ValueError(complain("clip.embedder", rule, config.embedder, "choose one"))
        if config.embedder in DENSE_METHODS:
            self._check_dense()
            side = (config.dense_px, config.dense_px)
            cfg = self._cfg | {"size": side, "resize_mode": "squash"}
        else:
            cfg = self._cfg
        self._preprocess: Any = image_transform_v2(PreprocessCfg(**cfg), is_train=False)

    @property
    def embedding_dim(self) -> int:
        """D, the width of the joint space."""
        visual: Any = self.model.visual
        return visual.output_dim

    @torch.inference_mode()
    def embed(self, image_HWC: np.ndarray, segments: Segments) -> np.ndarray:
        """Embed the segments of one image.

        Args:
            image_HWC: uint8 RGB.
            segments: of the same height and width.

        Returns:
            embedding_RD, float32, L2-normalised; NaN for segments without a pixel.

        Raises:
            ValueError: image not uint8 RGB, or not of the segments' size.
        """
        if image_HWC.dtype != np.uint8 or image_HWC.shape != (*segments.size_hw, 3):
            rule = f"uint8 {[*segments.size_hw, 3]} like its segments"
            got = f"{image_HWC.dtype} {list(image_HWC.shape)}"
            raise ValueError(complain("image_HWC", rule, got, "give the image that was segmented"))
        embedding_RD = np.full((len(segments), self.embedding_dim), np.nan, np.float32)
        filled_R = segments.area_px > 0
        if filled_R.any():
            filled = segments if filled_R.all() else segments.select(filled_R)
            feature_RD = _EMBEDDERS[self.config.embedder](self, image_HWC, filled)
            embedding_RD[filled_R] = F.normalize(feature_RD.float(), dim=-1).cpu().numpy()
        return embedding_RD

    @torch.inference_mode()
    def encode_classes(self, classes: ClassList, prompts: PromptsConfig) -> TextBank:
        """Embed the class names.

        Every alias is put into every template, and its embeddings are averaged over the templates
        (mean of unit vectors, normalised again). Aliases stay apart: a class is as similar as its
        best alias. Background prompts are words like class names, put into the same templates, so
        that their similarities are on the same scale; they are aliases of class 0.

        Args:
            classes: names and aliases.
            prompts: `templates` must be given; `background` may be empty or None.

        Raises:
            ValueError: no templates.
        """
        if not prompts.templates:
            fix = "give for example 'a photo of a {class}'"
            raise ValueError(complain("prompts.templates", "given", prompts.templates, fix))
        words_by_class = [prompts.background or (), *classes.aliases[1:]]
        words = [word for words in words_by_class for word in words]
        texts = [t.replace("{class}", word) for word in words for t in prompts.templates]
        text_ATD = self._encode_texts(texts).unflatten(0, (len(words), len(prompts.templates)))
        return TextBank(
            embedding_AD=F.normalize(text_ATD.mean(dim=1), dim=-1).cpu().numpy(),
            class_index_A=np.repeat(
                np.arange(len(words_by_class)), [len(words) for words in words_by_class]
            ),
            n_classes=len(words_by_class),
        )

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """CLIP's image embedding, [B, D], of preprocessed images."""
        return self.model.encode_image(self._to_model(image_BCHW))

    def dense(self, image_HWC: np.ndarray) -> Tensor:
        """Features of one image squashed to a square, float32 [D, H, W] on the patch grid.

        Only for embedders that are dense: which method it is, is the setting `clip.embedder`.
        """
        image_BCHW = self._to_model(self.preprocess(Image.fromarray(image_HWC))[None])
        return self._dense_features(image_BCHW)[0].float()

    def preprocess(self, image: Image.Image) -> Tensor:
        """CLIP's own preprocessing, float32 [C, H, W]; squashed to the dense size if dense."""
        return self._preprocess(image)

    def square_crop(self, image_HWC: np.ndarray, box_xyxy: Sequence[int] | np.ndarray) -> Tensor:
        """One segment's box as CLIP sees it, preprocessed, float32 [C, H, W]."""
        height, width = image_HWC.shape[:2]
        x0, y0, x1, y1 = square_box(box_xyxy, (height, width))
        mean_colour = [round(255 * m) for m in self._cfg["mean"]]
        crop_HWC = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        crop_HWC[:] = mean_colour
        top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
        crop_HWC[top - y0 : bottom - y0, left - x0 : right - x0] = image_HWC[top:bottom, left:right]
        return self.preprocess(Image.fromarray(crop_HWC))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors, float32 [B, D]."""
        parts = [
            self.model.encode_text(self.tokenizer(texts[i : i + _TEXT_BATCH]).to(self.device))
            for i in range(0, len(texts), _TEXT_BATCH)
        ]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def _to_model(self, image_BCHW: Tensor) -> Tensor:
        """On the model's device, in the dtype of its first convolution.

        With reduced precision open_clip leaves norms and single tokens in float32.
        """
        dtype = next(p.dtype for p in self.model.visual.parameters() if p.ndim == 4)
        return image_BCHW.to(self.device, dtype)

    def _dense_features(self, image_BCHW: Tensor) -> Tensor:
        method, gem_depth = self.config.embedder, self.config.gem_depth
        if method != "gem":
            return dense_features(self.model, image_BCHW, method=method)
        assert gem_depth is not None, "checked when made"
        return dense_features(self.model, image_BCHW, method=method, gem_depth=gem_depth)

    @torch.inference_mode()
    def _check_dense(self) -> None:
        """Check tower, depth and size with an image of one patch."""
        config = self.config
        needed = {"clip.dense_px": config.dense_px}
        needed |= {"clip.gem_depth": config.gem_depth} if config.embedder == "gem" else {}
        for name, value in needed.items():
            if value is None:
                rule, fix = f"given for clip.embedder {config.embedder}", "resolve the config first"
                raise ValueError(complain(name, rule, value, fix))
        patch_hw = getattr(self.model.visual, "patch_size", (1, 1))
        self._dense_features(self._to_model(torch.zeros(1, 3, *patch_hw)))
        step, dense_px = math.lcm(*patch_hw), config.dense_px
        assert dense_px is not None
        if dense_px % step:
            near = max(step, round(dense_px / step) * step)
            rule = f"a multiple of the model's patch, {step}"
            raise ValueError(complain("clip.dense_px", rule, dense_px, f"use {near}"))


def square_box(
    box_xyxy: Sequence[int] | np.ndarray, size_hw: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Widen a box to a square around its centre, shifted into the image.

    Args:
        box_xyxy: half-open, pixels, inside the image.
        size_hw: height and width of the image.

    Returns:
        x0, y0, x1, y1, a square that contains the box. Where it is wider than the image it juts out
        on both sides alike.
    """
    x0, y0, x1, y1 = (int(v) for v in box_xyxy)
    side = max(x1 - x0, y1 - y0)
    left = _shift((x0 + x1 - side) // 2, side, size_hw[1])
    top = _shift((y0 + y1 - side) // 2, side, size_hw[0])
    return left, top, left + side, top + side


def _shift(start: int, side: int, limit: int) -> int:
    if side > limit:
        return (limit - side) // 2
    return min(max(start, 0), limit - side)


def _embed_dense(encoder: ClipEncoder, image_HWC: np.ndarray, segments: Segments) -> Tensor:
    feature_DHW = encoder.dense(image_HWC)
    weight_RN = pooling_weights(segments, (feature_DHW.shape[1], feature_DHW.shape[2]))
    return torch.from_numpy(weight_RN).to(encoder.device) @ feature_DHW.flatten(1).T


def _embed_crop(encoder: ClipEncoder, image_HWC: np.ndarray, segments: Segments) -> Tensor:
    """One crop a segment; the batch is halved, for good, when the device runs out of memory."""
    features: list[Tensor] = []
    done = 0
    while done < len(segments):
        boxes = segments.box_xyxy[done : done + encoder.crop_batch]
        crop_BCHW = torch.stack([encoder.square_crop(image_HWC, box) for box in boxes])
        try:
            features.append(encoder.encode_image(crop_BCHW))
            done += len(boxes)
        except torch.OutOfMemoryError:
            if len(boxes) == 1:
                raise
            encoder.crop_batch = len(boxes) // 2
            logger.warning("out of memory: now %d crops at a time", encoder.crop_batch)
    return torch.cat(features)


_EMBEDDERS: dict[str, Callable[[ClipEncoder, np.ndarray, Segments], Tensor]] = {
    **dict.fromkeys(DENSE_METHODS, _embed_dense),
    "crop": _embed_crop,
}
"""Name to (encoder, image_HWC uint8, segments with pixels) -> feature_RD, not normalised."""
