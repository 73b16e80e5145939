"""The fastest exact matrix product here: oneDNN's where it is there and right, else torch's.

What enters: dense tensors of any layout. What leaves: their product, in their dtype, with a bias,
an activation or a summand if asked for. No gradients: this is for inference.

Why this way. On CPUs torch gives matrix products to MKL, which keeps AVX-512 for one maker's
processors; on others it reaches half of what oneDNN does. torch carries oneDNN, but uses it for
float32 products only inside compiled code, through an operator that is private: so it is tried once
a dtype, and without it, or if its numbers are off, all is as torch does it. It multiplies one pair
of matrices at a time, quickly only such as are whole in memory, rows or columns first, and takes
any bias for contiguous; this module sees to that. GPUs and other devices always take torch's way.

Legend: B pairs of matrices, M x K times K x N. Sums over K are in another order than torch's: the
results are equal but for rounding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    act: nn.Module | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """act(x weight^T + bias) + add.

    Args:
        x: [..., K] of any layout; copied if not contiguous.
        weight_NK: Of the same dtype; copied unless it or its transpose is contiguous.
        bias_N: None: zeros.
        act: Applied as it is, or, an `nn.GELU` on a CPU, while the numbers are at hand.
        add: Of the result's shape; it stays as it is. Not together with act.

    Returns:
        [..., N] of its own in memory.
    """
    assert act is None or add is None, "oneDNN fuses either"
    if not (has_onednn(x.device.type, x.dtype) and x.numel() and weight_NK.numel()):
        y = F.linear(x, weight_NK, bias_N)
        y = y if act is None else act(y)
        return y if add is None else y.add_(add)
    product = torch.ops.mkldnn._linear_pointwise
    x, bias_N = x.contiguous(), None if bias_N is None else bias_N.contiguous()
    weight_NK = weight_NK if weight_NK.mT.is_contiguous() else weight_NK.contiguous()
    if add is not None:
        return product.binary(x, add.contiguous(), weight_NK, bias_N, "add")
    if isinstance(act, nn.GELU):
        return product(x, weight_NK, bias_N, "gelu", [], act.approximate)
    y = product(x, weight_NK, bias_N, "none", [], "")
    return y if act is None else act(y)


def matmul(left_BMK: Tensor, right_BKN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """left right + bias for each pair, [B, M, N]; pays where matrices are large and few."""
    if not (has_onednn(left_BMK.device.type, left_BMK.dtype) and left_BMK.numel()):
        product_BMN = left_BMK @ right_BKN
        return product_BMN if bias_N is None else product_BMN.add_(bias_N)
    pairs = zip(left_BMK, right_BKN, strict=True)
    product_MN = [linear(left, right.mT, bias_N) for left, right in pairs]
    return product_MN[0][None] if len(product_MN) == 1 else torch.stack(product_MN)


@functools.cache
def has_onednn(device: str, dtype: torch.dtype) -> bool:
    """Whether `linear` uses oneDNN for tensors on this type of device; tried once a dtype."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, add = torch.randn(3, 16, 16, generator=generator).to(dtype)
    try:
        product = torch.ops.mkldnn._linear_pointwise
        gelu = product(x, weight, x[0], "gelu", [], "none")
        added = product.binary(x, add, weight.mT, None, "add")
    except (AttributeError, RuntimeError):
        return False
    error = 1e-5 if dtype == torch.float32 else 0.05
    near = functools.partial(torch.allclose, rtol=error, atol=error)
    return near(gelu, F.gelu(F.linear(x, weight, x[0]))) and near(added, x @ weight + add)
