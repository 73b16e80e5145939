"""The tiny SAM of the embedded world: segment_anything's own classes at small sizes.

Enters: nothing, or a weights file. Leaves: a `segment_anything.modeling.Sam` in eval mode, to be
used like any other (`SamPredictor`, `SamAutomaticMaskGenerator`), and `GENERATOR_SETTINGS`, the
generator's arguments that fit it.

Why this way: code that works with this model works with SAM ViT-H, because nothing but sizes
differs. The weights are safetensors in float16 (half the bytes, no pickle) and are cast to float32
when loaded. The model was trained on point and box prompts only (see `train_sam`); mask prompts and
negative points exist but were never trained.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)

WEIGHTS = Path(__file__).parent / "weights" / "sam_shapes.safetensors"
"""The trained weights: float16 safetensors, keys as in `Sam.state_dict()`."""

IMAGE_SIZE_PX = 128
"""Longest side that the encoder sees; the predictor resizes to it."""

PATCH_PX = 8
EMBED_DIM = 128
DEPTH = 4
PROMPT_DIM = 64

GENERATOR_SETTINGS: dict[str, Any] = {
    "points_per_side": 12,
    "points_per_batch": 64,
    "pred_iou_thresh": 0.4,
    "stability_score_thresh": 0.7,
    "stability_score_offset": 0.5,
    "box_nms_thresh": 0.5,
    "min_mask_region_area": 80,
}
"""Arguments of `SamAutomaticMaskGenerator` that fit this SAM, tuned on training-side scenes."""


def build_sam_shapes(checkpoint: str | None = None) -> Sam:
    """Builds the tiny SAM; called like the builders in `segment_anything.sam_model_registry`.

    Args:
        checkpoint: Safetensors file with every parameter, of any float type; None leaves it
        untrained.
            The trained weights are at `WEIGHTS`.

    Returns:
        float32 model in eval mode. Images up to 128 px a side are seen at full resolution.

    Raises:
        RuntimeError: If the file's keys or shapes are not exactly those of this model.
    """
    grid = IMAGE_SIZE_PX // PATCH_PX
    sam = Sam(
        image_encoder=ImageEncoderViT(
            depth=DEPTH,
            embed_dim=EMBED_DIM,
            img_size=IMAGE_SIZE_PX,
            mlp_ratio=2,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),  # pyright: ignore[reportArgumentType]
            num_heads=4,
            patch_size=PATCH_PX,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=tuple(range(DEPTH)),
            window_size=0,
            out_chans=PROMPT_DIM,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=PROMPT_DIM,
            image_embedding_size=(grid, grid),
            input_image_size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=PROMPT_DIM, mlp_dim=128, num_heads=2
            ),
            transformer_dim=PROMPT_DIM,
            iou_head_depth=3,
            iou_head_hidden_dim=64,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
    if checkpoint is not None:
        state = {name: value.float() for name, value in load_file(checkpoint).items()}
        sam.load_state_dict(state)
    return sam.eval()
