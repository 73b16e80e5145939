"""Dense CLIP features: a CLIP image tower that answers for every patch, not once for the image.

Enters: an open_clip `CLIP` with a ViT image tower, and a batch of normalised images of any height
and width that are multiples of the patch. Leaves: a map of features in CLIP's joint image-text
space, one per patch. Several ways of getting such a map without training are known; they all stand
behind `dense_features`. Those that change no more than the last block are in `dense_attention`.
Published mIoU on VOC-21 with ViT-B-16 and no SAM: GEM 46.2, NACLIP 58.9, SCLIP 59.1.

Why CLIP's own patch tokens are not enough: CLIP is trained on its pooled output only, so its
attention mixes background into objects. GEM keeps the weights and changes the path: beside the
ordinary forward pass, which stays as it is, runs a second residual stream that receives, from each
of the last blocks, attention of values to values, keys to keys and queries to queries
("self-self"), and no MLP. Similar tokens average with each other, so regions become uniform, and
stay in the space that the text knows.

Why it is written as free functions over a model, not as a wrapper: nothing is replaced inside the
model, so one model serves crops, plain tokens and GEM at once, with or without gradients.

Shape suffixes: B batch, C channels, H W pixels or patches, N tokens (class token first), E width of
the tower, D joint embedding, A attention heads, F features of one head.

Source: Bousselham, Petersen, Ferrari, Kuehne: "Grounding Everything: Emerging Localization
Properties in Vision-Language Transformers", CVPR 2024, and its official code (WalBouss/GEM,
gem_torch, MIT licence), re-implemented for the batch-first blocks of open_clip 3. The published
figures: MARS-CLIP, arXiv 2609.08283, table 4.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from zsplg_ray.label.dense_attention import (
    LAST_BLOCKS,
    PLAIN,
    LastBlock,
    add_mlp,
    merge_heads,
    ordinary_block,
    query_key_value,
    run_blocks,
)

DENSE_METHODS = ("gem", *LAST_BLOCKS)
"""Methods that are made for maps; `dense_features` knows "plain" besides."""

Method: TypeAlias = Callable[[VisionTransformer, Tensor, int], Tensor]
"""(tower, image_BCHW, gem_depth) -> token_BND, class token first."""


class DenseTokens(NamedTuple):
    """Projected tokens of both streams of one forward pass, class token first, not normalised."""

    gem_BND: Tensor
    """GEM stream, in CLIP's joint space; dtype of the tower."""
    plain_BND: Tensor
    """Ordinary stream; its pooled tokens are what `encode_image` returns at the native size."""


def dense_features(
    model: open_clip.CLIP, image_BCHW: Tensor, *, method: str = "gem", gem_depth: int = 7
) -> Tensor:
    """Map images to one feature per patch in CLIP's joint image-text space.

    The features are NOT L2-normalised, as in the official GEM, whose wrapper normalises only right
    before it compares with text: whoever pools over a mask decides whether tokens count alike.

    Args:
        model: CLIP with an open_clip `VisionTransformer`; it is read, never changed.
        image_BCHW: float, normalised as the model wants, height and width multiples of the patch;
            may differ from the size the model was trained at, and need not be square (the position
            embedding is interpolated).
        method: "gem"; "maskclip", "sclip" or "naclip", which change the last block only (see
            `zsplg_ray.label.dense_attention`); or "plain" for the tower's own patch tokens.
        gem_depth: GEM's depth, 1 to the tower's number of blocks, counted as officially: the last
            `gem_depth - 1` blocks feed the GEM stream, so 1 gives the plain tokens. Only for "gem".

    Returns:
        feature_BDHW in the tower's dtype, on the patch grid.

    Raises:
        ValueError: Unknown method, depth out of range, tower not a plain ViT, size not a multiple.
    """
    if method not in _METHODS:
        raise ValueError(
            f"method must be one of {sorted(_METHODS)}, got {method!r}; choose one of these"
        )
    visual = _check_tower(model)
    _check_image(visual, image_BCHW)
    token_BND = _METHODS[method](visual, image_BCHW, gem_depth)
    return token_BND[:, 1:].transpose(1, 2).unflatten(2, _grid(visual, image_BCHW))


def gem_tokens(model: open_clip.CLIP, image_BCHW: Tensor, *, gem_depth: int = 7) -> DenseTokens:
    """Run both streams, GEM's and the ordinary one, and return all their tokens.

    Args:
        model: see `dense_features`.
        image_BCHW: see `dense_features`.
        gem_depth: see `dense_features`.

    Returns:
        Tokens of both streams after the last layer norm and projection, class token first. For a
        tower with `final_ln_after_pool` the layer norm is applied to each token, as if alone.

    Raises:
        ValueError: as `dense_features`.
    """
    visual = _check_tower(model)
    _check_image(visual, image_BCHW)
    return gem_streams(visual, embed_patches(visual, image_BCHW), gem_depth=gem_depth)


def embed_patches(visual: VisionTransformer, image_BCHW: Tensor) -> Tensor:
    """Class token and patches with their positions, B x N x E, ready for the first block.

    Args:
        visual: Image tower; patch dropout is left out, as a map needs every patch.
        image_BCHW: see `dense_features`.
    """
    patch_BEHW = visual.conv1(image_BCHW)
    patch_BNE = patch_BEHW.flatten(2).transpose(1, 2)
    class_B1E = visual.class_embedding.to(patch_BNE.dtype).expand(len(patch_BNE), 1, -1)
    position_NE = _position(visual, tuple(patch_BEHW.shape[2:]))
    return visual.ln_pre(torch.cat([class_B1E, patch_BNE], 1) + position_NE.to(patch_BNE.dtype))


def gem_streams(visual: VisionTransformer, token_BNE: Tensor, *, gem_depth: int) -> DenseTokens:
    """Both streams from embedded tokens on, of which a part may have been left out.

    Args:
        visual: Image tower.
        token_BNE: From `embed_patches`, the class token first.
        gem_depth: see `dense_features`.

    Raises:
        ValueError: Depth out of range.
    """
    blocks: Any = visual.transformer.resblocks
    if not 1 <= gem_depth <= len(blocks):
        raise ValueError(
            f"gem_depth must be 1 to {len(blocks)}, the number of blocks, got {gem_depth}; "
            "7 is usual for 12 blocks"
        )
    n_ordinary = len(blocks) - (gem_depth - 1)
    plain_BNE = token_BNE
    for block in blocks[:n_ordinary]:
        plain_BNE = ordinary_block(block, plain_BNE)
    gem_BNE = plain_BNE
    for block in blocks[n_ordinary:]:
        gem_BNE, plain_BNE = _gem_block(block, gem_BNE, plain_BNE)
    return DenseTokens(_project(visual, gem_BNE), _project(visual, plain_BNE))


def _gem(visual: VisionTransformer, image_BCHW: Tensor, gem_depth: int) -> Tensor:
    return gem_streams(visual, embed_patches(visual, image_BCHW), gem_depth=gem_depth).gem_BND


def _changed(last: LastBlock) -> Method:
    def run(visual: VisionTransformer, image_BCHW: Tensor, gem_depth: int) -> Tensor:
        token_BNE = embed_patches(visual, image_BCHW)
        return _project(visual, run_blocks(visual, token_BNE, _grid(visual, image_BCHW), last))

    return run


_METHODS: dict[str, Method] = {
    "gem": _gem,
    "plain": _changed(PLAIN),
    **{name: _changed(last) for name, last in LAST_BLOCKS.items()},
}


def _check_tower(model: open_clip.CLIP) -> VisionTransformer:
    """Return the image tower if its parts are those that this file knows how to walk through."""
    visual = model.visual
    rule = "model.visual must be an open_clip VisionTransformer with ordinary attention blocks"
    fix = "use a ViT CLIP such as ViT-B-16/openai"
    if not isinstance(visual, VisionTransformer):
        raise ValueError(f"{rule}, got {type(visual).__name__}; {fix}")
    if visual.attn_pool is not None:
        raise ValueError(f"{rule}, got one with attentional pooling; {fix}")
    for block in visual.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock):
            raise ValueError(f"{rule}, got blocks of {type(block).__name__}; {fix}")
    return visual


def _check_image(visual: VisionTransformer, image_BCHW: Tensor) -> None:
    patch_h, patch_w = visual.patch_size
    shape = tuple(image_BCHW.shape)
    fits = len(shape) == 4 and min(shape[2:]) > 0 and not (shape[2] % patch_h or shape[3] % patch_w)
    if not fits:
        raise ValueError(
            "image_BCHW must be B x 3 x H x W with H, W multiples of the patch "
            f"{patch_h} x {patch_w}, got {' x '.join(map(str, shape))}; resize or pad the image"
        )


def _grid(visual: VisionTransformer, image_BCHW: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    patch_h, patch_w = visual.patch_size
    return image_BCHW.shape[2] // patch_h, image_BCHW.shape[3] // patch_w


def _position(visual: VisionTransformer, grid_hw: tuple[int, ...]) -> Tensor:
    """Position embedding for a patch grid: bicubic, antialiased (as officially), in float32."""
    position_NE = visual.positional_embedding
    if grid_hw == tuple(visual.grid_size):
        return position_NE
    patch_1EHW = position_NE[1:].float().T.unflatten(1, tuple(visual.grid_size))[None]
    patch_1EHW = F.interpolate(patch_1EHW, size=grid_hw, mode="bicubic", antialias=True)
    return torch.cat([position_NE[:1].float(), patch_1EHW[0].flatten(1).T])


def _gem_block(
    block: ResidualAttentionBlock, gem_BNE: Tensor, plain_BNE: Tensor
) -> tuple[Tensor, Tensor]:
    """One block for both streams: both read the ordinary tokens, GEM's skips the MLP."""
    normed_BNE = block.ln_1(plain_BNE)
    query, key, value = query_key_value(block.attn, normed_BNE)
    attended_BANF = F.scaled_dot_product_attention(query, key, value)
    grouped_BANF = _self_self_attention(
        query, key, value, _inverse_temperature(block.attn, normed_BNE)
    )
    gem_BNE = gem_BNE + block.ls_1(merge_heads(block.attn, grouped_BANF))
    plain_BNE = plain_BNE + block.ls_1(merge_heads(block.attn, attended_BANF))
    return gem_BNE, add_mlp(block, plain_BNE)


def _inverse_temperature(attention: nn.MultiheadAttention, normed_BNE: Tensor) -> Tensor:
    """GEM's adaptive 1 / temperature, one an image: mean token norm / root of the head width."""
    return (normed_BNE.norm(dim=-1).mean(dim=-1) * attention.head_dim**-0.5).view(-1, 1, 1, 1)


def _self_self_attention(query: Tensor, key: Tensor, value: Tensor, inverse_B111: Tensor) -> Tensor:
    """Mean of value-value, key-key and query-query attention, after one round of self-grouping.

    Source: section 3.2 of the paper (L2-normalised, one iteration, adaptive temperature).
    """
    projected = torch.cat([value, key, query])
    inverse = inverse_B111.to(projected.dtype).repeat(3, 1, 1, 1)
    projected = F.normalize(projected, dim=-1)
    projected = F.scaled_dot_product_attention(projected * inverse, projected, projected, scale=1.0)
    projected = F.normalize(projected, dim=-1)
    attended = F.scaled_dot_product_attention(
        projected * inverse, projected, value.repeat(3, 1, 1, 1), scale=1.0
    )
    return attended.unflatten(0, (3, -1)).mean(dim=0)


def _project(visual: VisionTransformer, token_BNE: Tensor) -> Tensor:
    token_BNE = visual.ln_post(token_BNE)
    return token_BNE if visual.proj is None else token_BNE @ visual.proj
