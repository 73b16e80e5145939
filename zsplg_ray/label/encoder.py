"""Image -> SAM embedding: the numbers of segment_anything's `ImageEncoderViT`, sooner.

What enters: the official module and a batch of normalised, padded images. What leaves: the float32
embedding that the module itself would give, equal but for rounding.

Why this way. The official forward pass writes every score of a block to memory, several times
over, and on CPUs spends most of its time there. Here
 - attention goes by chunks of queries whose scores stay in the cache, and the relative positions
   enter as a view of one small matrix product (`_relative`);
 - global attention is attention in one window as large as the image: one code for both;
 - tokens that only pad a window cost no query and no product: their keys and values are the bias;
 - MLPs go by chunks of tokens, and no temporary is so large that malloc would map it anew each
   time;
 - products are `products.linear`'s, with GELU and positions added while the numbers are at hand.

Legend: B images, H W token rows and columns, T = H x W, C channels, N heads, D channels of a head,
G = images x windows x heads, M queries, S keys along one side of a window, K = S x S keys.
"""

from __future__ import annotations

import itertools
import typing
from typing import Literal

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn

from zsplg_ray.label import products
from zsplg_ray.settings import complain

Precision = Literal["float32", "bfloat16"]

CPU_TOKENS = 4096
"""Tokens of images encoded together on a CPU: more than these leave the caches."""

CPU_MLP_TOKENS = 512
"""Tokens that pass an MLP together on a CPU."""

CPU_ATTENTION_MIB = 2
CUDA_ATTENTION_MIB = 1024


class ImageEncoder:
    """The forward pass of segment_anything's `ImageEncoderViT`: same numbers, less memory and time.

    Args:
        vit: In eval mode and on the device where it stays. Its parameters are read in place;
            changing them later changes float32 results, except for the position tables.
        precision: "bfloat16" multiplies the blocks' matrices (copied here once) in bfloat16; the
            residual stream, norms, neck, and on CPUs attention stay in float32.
        attention_mib: Most MiB that the attention scores of one chunk may take, 1 or more; one row
            of queries is always allowed. None: what suits the device (second-level cache, or 1 GiB
            on a GPU).

    Raises:
        ValueError: For an unknown precision or attention_mib < 1.

    Source: segment_anything/modeling/image_encoder.py (Meta, Apache-2.0), which follows ViTDet.
    """

    def __init__(
        self,
        vit: ImageEncoderViT,
        precision: Precision = "float32",
        attention_mib: int | None = None,
    ) -> None:
        known = typing.get_args(Precision)
        if precision not in known:
            rule = f"one of {', '.join(known)}"
            raise ValueError(complain("sam.precision", rule, precision, "choose one of them"))
        if attention_mib is not None and attention_mib < 1:
            fix = "leave it out for what suits the device"
            raise ValueError(complain("attention_mib", ">= 1", attention_mib, fix))
        self.vit = vit
        self.patch = vit.patch_embed.proj
        self.device = self.patch.weight.device
        self.on_cpu = self.device.type == "cpu"
        self.grid = vit.img_size // self.patch.kernel_size[0]
        default_mib = CPU_ATTENTION_MIB if self.on_cpu else CUDA_ATTENTION_MIB
        dtype = getattr(torch, precision)
        with torch.inference_mode():
            self.blocks = [
                _FastBlock(
                    typing.cast("Block", block),
                    grid=self.grid,
                    dtype=dtype,
                    attention_dtype=torch.float32 if self.on_cpu else dtype,
                    attention_bytes=(attention_mib or default_mib) << 20,
                    mlp_tokens=CPU_MLP_TOKENS if self.on_cpu else None,
                )
                for block in vit.blocks
            ]

    @torch.inference_mode()
    def __call__(self, image_BCHW: Tensor) -> Tensor:
        """Embeds images.

        Args:
            image_BCHW: float32 [B, 3, img_size, img_size], normalised and padded as
                `Sam.preprocess` does, on the module's device.

        Returns:
            float32 [B, out_chans, H, W], one vector a patch. Each image's numbers are those that it
            has alone, but for rounding.

        Raises:
            ValueError: For an image of another shape.
        """
        side = self.vit.img_size
        if image_BCHW.shape[1:] != (self.patch.in_channels, side, side):
            rule = f"B x {self.patch.in_channels} x {side} x {side}"
            got = " x ".join(map(str, image_BCHW.shape))
            raise ValueError(complain("image_BCHW", rule, got, "preprocess it as Sam does"))
        together = max(1, CPU_TOKENS // self.grid**2) if self.on_cpu else len(image_BCHW)
        parts = [self._encode(part) for part in image_BCHW.split(max(1, together))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode(self, image_BCHW: Tensor) -> Tensor:
        x_BHWC = self._embed_patches(image_BCHW)
        for block in self.blocks:
            block.apply(x_BHWC)
        return self._neck(x_BHWC)

    def _embed_patches(self, image_BCHW: Tensor) -> Tensor:
        """The patch convolution, whose patches do not overlap, as one matrix product."""
        side, count = self.patch.kernel_size[0], self.grid
        cut = image_BCHW[:, :, : count * side, : count * side]
        patch = cut.unflatten(3, (count, side)).unflatten(2, (count, side))
        patch_BHWF = patch.permute(0, 2, 4, 1, 3, 5).flatten(3)
        x_BHWC = products.linear(patch_BHWF, self.patch.weight.flatten(1), self.patch.bias)
        return x_BHWC if self.vit.pos_embed is None else x_BHWC.add_(self.vit.pos_embed)

    def _neck(self, x_BHWC: Tensor) -> Tensor:
        """The neck; its norms see the channels last and are then plain layer norms."""
        conv1, norm1, conv2, norm2 = typing.cast("list[nn.Conv2d]", list(self.vit.neck))
        x_BHWC = _norm_channels(products.linear(x_BHWC, conv1.weight.flatten(1), None), norm1)
        # Channels first again: torch sums a channels-last convolution with 5 times the rounding.
        y_BCHW = F.conv2d(_channels_first(x_BHWC), conv2.weight, padding=conv2.padding)
        return _channels_first(_norm_channels(y_BCHW.permute(0, 2, 3, 1), norm2))


class _FastBlock:
    """One transformer block: `apply` changes the residual stream in place."""

    def __init__(
        self,
        block: Block,
        *,
        grid: int,
        dtype: torch.dtype,
        attention_dtype: torch.dtype,
        attention_bytes: int,
        mlp_tokens: int | None,
    ) -> None:
        attention, mlp = block.attn, block.mlp
        self.block = block
        self.dtype = dtype
        self.mlp_tokens = mlp_tokens
        self.heads = attention.num_heads
        self.window = block.window_size or grid
        self.attention_dtype = attention_dtype
        self.attention_bytes = attention_bytes
        self.scale = attention.scale
        self.table_LD = _relative_table(attention, self.window, attention_dtype)
        # In three, because one result for all of q, k, v is more than malloc keeps between calls.
        weight, bias = _parameters(attention.qkv, dtype)
        weights_CC = weight.chunk(3)
        biases_C = (None, None, None) if bias is None else bias.chunk(3)
        self.qkv = list(zip(weights_CC, biases_C, strict=True))
        self.proj = _parameters(attention.proj, dtype)
        self.mlp_in = _parameters(mlp.lin1, dtype)
        self.mlp_out = _parameters(mlp.lin2, dtype)

    def apply(self, x_BHWC: Tensor) -> None:
        """Adds the outputs of attention and MLP to float32 contiguous x_BHWC."""
        x_TC = x_BHWC.flatten(0, 2)
        y_BHWC = self._attention(self.block.norm1(x_BHWC).to(self.dtype))
        x_TC += products.linear(y_BHWC.flatten(0, 2), *self.proj)
        for chunk_TC in x_TC.split(self.mlp_tokens or len(x_TC)):
            y_TC = self.block.norm2(chunk_TC).to(self.dtype)
            y_TC = products.linear(y_TC, *self.mlp_in, act=self.block.mlp.act)
            chunk_TC += products.linear(y_TC, *self.mlp_out)

    def _attention(self, x_BHWC: Tensor) -> Tensor:
        """Multi-head attention in windows, before the output projection, in the block's dtype."""
        qkv_BHWND = [products.linear(x_BHWC, *p).unflatten(-1, (self.heads, -1)) for p in self.qkv]
        out_BHWND = torch.empty_like(qkv_BHWND[0])
        bands = [_bands(size, self.window) for size in x_BHWC.shape[1:3]]
        for (rows, height), (columns, width) in itertools.product(*bands):
            q, k, v = (_windows(t[:, rows, columns], height, width) for t in qkv_BHWND)
            q_GMD = self._whole(q).view(-1, height * width, q.shape[-1])
            k_GKD, v_GKD = (
                self._padded(t, bias).view(len(q_GMD), self.window**2, -1)
                for t, (_, bias) in zip((k, v), self.qkv[1:], strict=True)
            )
            self._attend(q_GMD, k_GKD, v_GKD, width)
            _windows(out_BHWND[:, rows, columns], height, width).copy_(q_GMD.view(q.shape))
        return out_BHWND.flatten(3)

    def _padded(self, part: Tensor, bias_C: Tensor | None) -> Tensor:
        """Keys or values B x rows x columns x N x h x w x D, filled up to whole windows.

        The official module pads before the projection: a padded token's key and value are its bias.
        """
        *head, height, width, channels = part.shape
        if height == width == self.window:
            return self._whole(part)
        shape = (*head, self.window, self.window, channels)
        full = part.new_zeros(shape, dtype=self.attention_dtype)
        if bias_C is not None:
            full += bias_C.view(self.heads, 1, 1, channels)
        full[..., :height, :width, :] = part
        return full

    def _whole(self, part: Tensor) -> Tensor:
        """A part of its own in memory: queries are overwritten, and oneDNN wants it whole."""
        contiguous = torch.contiguous_format
        return part.to(self.attention_dtype, memory_format=contiguous, copy=True)

    def _attend(self, q_GMD: Tensor, k_GKD: Tensor, v_GKD: Tensor, width: int) -> None:
        """Overwrites the queries, window rows of `width`, by what they read from the values."""
        queries, keys = q_GMD.shape[1], k_GKD.shape[1]
        row_bytes = width * keys * q_GMD.element_size()
        rows = min(queries // width, max(1, self.attention_bytes // row_bytes))
        groups = max(1, self.attention_bytes // (queries // width * row_bytes))
        parts = (t.split(groups) for t in (q_GMD, k_GKD, v_GKD))
        for q, k, v in zip(*parts, strict=True):
            relative = None
            if self.table_LD is not None:
                relative = _relative(q, self.table_LD, width, self.window)
            q *= self.scale
            v = v.mT.contiguous().mT if _per_head(q) else v
            for row in range(0, queries // width, rows):
                chunk_GMD = q[:, row * width : (row + rows) * width]
                bias_GMK = None
                if relative is not None:
                    high, wide = (r[:, row : row + rows] for r in relative)
                    bias_GMK = (high[..., None] + wide[..., None, :]).flatten(3).flatten(1, 2)
                chunk_GMD.copy_(_weighted(chunk_GMD, k, v, bias_GMK))


def _parameters(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A layer's own weight and bias, or their copies in another dtype."""
    bias = linear.bias
    return linear.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)


def _bands(size: int, window: int) -> list[tuple[slice, int]]:
    """The rows (or columns) in whole windows, and those in the cut one, each with its extent."""
    whole = size // window * window
    bands = [(slice(0, whole), window), (slice(whole, size), size - whole)]
    return [(part, extent) for part, extent in bands if part.stop > part.start]


def _windows(t_BHWND: Tensor, height: int, width: int) -> Tensor:
    """A view by windows: B x rows x columns x N x height x width x D."""
    t = t_BHWND.unflatten(2, (-1, width)).unflatten(1, (-1, height))
    return t.permute(0, 1, 3, 5, 2, 4, 6)


def _relative_table(attention: Attention, side: int, dtype: torch.dtype) -> Tensor | None:
    """Position embeddings of rows, then of columns, [2 x (2 side - 1), D]; None without any.

    They are stretched to `side` as the official ones are, and turned round: entry i is that of a
    key i - (side - 1) places after its query.
    """
    if not attention.use_rel_pos:
        return None
    tables = []
    for table_LD in (attention.rel_pos_h.detach(), attention.rel_pos_w.detach()):
        if len(table_LD) != 2 * side - 1:
            table_LD = F.interpolate(table_LD.mT[None], size=2 * side - 1, mode="linear")[0].mT
        tables.append(table_LD.flip(0))
    return torch.cat(tables).to(dtype)


def _relative(q_GMD: Tensor, table_LD: Tensor, width: int, side: int) -> tuple[Tensor, Tensor]:
    """What relative position adds to the scores: by key row and by key column.

    One product gives each query's value for every distance; a query in row y finds its `side` key
    rows side by side from side - 1 - y on, so that both results are skewed views of the product.

    Returns:
        Two views [G, query rows, width, side].
    """
    groups, queries, _ = q_GMD.shape
    value_GML = products.linear(q_GMD, table_LD, None)
    length = len(table_LD)
    shape = (groups, queries // width, width, side)
    group, row = queries * length, width * length
    high = value_GML.as_strided(shape, (group, row - 1, length, 1), side - 1)
    wide = value_GML.as_strided(shape, (group, row, length - 1, 1), length // 2 + side - 1)
    return high, wide


def _per_head(q_GMD: Tensor) -> bool:
    """Whether oneDNN multiplies one head at a time; many small ones are MKL's in one call."""
    return len(q_GMD) == 1 and products.has_onednn(q_GMD.device.type, q_GMD.dtype)


def _weighted(q_GMD: Tensor, k_GKD: Tensor, v_GKD: Tensor, bias_GMK: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) v; the bias is overwritten."""
    if not q_GMD.is_cpu:
        return _weighted_fused(q_GMD, k_GKD, v_GKD, bias_GMK)
    if _per_head(q_GMD):
        score_MK = products.linear(
            q_GMD[0], k_GKD[0], None, add=None if bias_GMK is None else bias_GMK[0]
        )
        torch.softmax(score_MK, -1, out=score_MK)
        return products.linear(score_MK, v_GKD[0].mT, None)[None]
    score_GMK = q_GMD @ k_GKD.mT if bias_GMK is None else bias_GMK.baddbmm_(q_GMD, k_GKD.mT)
    torch.softmax(score_GMK, -1, out=score_GMK)
    return score_GMK @ v_GKD


def _weighted_fused(q_GMD: Tensor, k_GKD: Tensor, v_GKD: Tensor, bias_GMK: Tensor | None) -> Tensor:
    """The same by torch's fused kernel, which GPUs have for four dimensions only.

    On CPUs it takes nearly twice as long: its products are MKL's.
    """
    mask = None if bias_GMK is None else bias_GMK[None]
    return F.scaled_dot_product_attention(
        q_GMD[None], k_GKD[None], v_GKD[None], attn_mask=mask, scale=1.0
    )[0]


def _channels_first(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2).contiguous()


def _norm_channels(x_BHWC: Tensor, norm: nn.Module) -> Tensor:
    """segment_anything's LayerNorm2d, whose channels are last here."""
    weight, bias, eps = norm.weight, norm.bias, typing.cast("float", norm.eps)
    return F.layer_norm(
        x_BHWC, x_BHWC.shape[-1:], typing.cast("Tensor", weight), typing.cast("Tensor", bias), eps
    )
