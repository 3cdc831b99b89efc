"""Attention of several heads, as the models that have it share it.

Shapes: B batch, T queries, J keys, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

HEAD_WIDTH = 64


def num_heads(width: int) -> int:
    """Return how many heads a width has: as near to 64 numbers each as divides it, as in GPT-2."""
    return next(h for h in range(max(1, width // HEAD_WIDTH), 0, -1) if width % h == 0)


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """Return (B, H, T, D / H)."""
    split: Tensor = x_BTD.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


def attend(
    q_BTD: Tensor, k_BJD: Tensor, v_BJD: Tensor, heads: int, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Return what the queries read, time first (T, B, D); a mask is True, or finite, where they may look."""
    q, k, v = (split_heads(x, heads) for x in (q_BTD, k_BJD, v_BJD))
    read = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return read.permute(2, 0, 1, 3).flatten(2)  # (B, H, T, D/H) → (T, B, D)


def read_naively(q_HE: Tensor, k_JHE: Tensor, v_JHE: Tensor, bias_JH: Tensor | None = None) -> Tensor:
    """Return what one query reads from J places, (D,), by the definition; E is D / H."""
    scores_JH = torch.einsum("he,jhe->jh", q_HE, k_JHE)
    if bias_JH is not None:
        scores_JH = scores_JH + bias_JH
    weights_JH = torch.softmax(scores_JH / math.sqrt(q_HE.shape[-1]), dim=0)
    return torch.einsum("jh,jhe->he", weights_JH, v_JHE).flatten()
