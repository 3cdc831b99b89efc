"""The pointer-generator head: a gate between saying a word of the vocabulary and copying a recent token.

    k_j = W_k h_{j−1}                     the key of token w_j is what the model knew just before it came
    b_tj = Σ_n β_n [w_{j−n} … w_{j−1} = w_{t−n+1} … w_t]
                                          what it gains where the last n tokens stand before it
    a_t = softmax_j(W_q h_t · k_j / √P + b_tj)
                                          attention over the last M tokens, w_t included
    r_t = Σ_j a_tj E[w_j]                 the context vector
    g_t = sigmoid(w_g · [h_t; r_t])       the gate
    p(w) = g_t · softmax(E W_o [h_t; r_t])_w + (1 − g_t) · Σ_{j: w_j = w} a_tj

b has `copy_context` terms, none by default: a copy then goes on with what followed the same words before.
The last M keys and ids are the state: constant, however long the text. Ids are held as id + 1, so that the
zeros of a fresh state are empty places.

Shapes: T time, B batch, D width, P key width, M window.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import ModelConfig


class Pointed(NamedTuple):
    """What the pointer adds to a head."""

    hidden_TBD: Tensor
    """Input of the vocabulary's softmax."""
    log_gate_TB: Tensor
    """log g: the vocabulary's share."""
    log_copy_TB: Tensor
    """log (1 − g): the copy's share."""
    attention_TBJ: Tensor
    """Weight of each place of `ids`; sums to one."""
    ids_BJ: Tensor
    """Token + 1 in each place, 0 where it is empty."""


class PointerHead(nn.Module):
    """Attention over a bounded window of recent tokens, at constant state."""

    state_names = ("last_key", "keys", "ids")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, P = config.width, config.copy_width
        self.window, self.copy_context = config.copy_window, config.copy_context
        self.query = nn.Linear(D, P, bias=False)
        self.key = nn.Linear(D, P, bias=False)
        if config.copy_context:
            self.agreement = nn.Parameter(torch.ones(config.copy_context))
        self.merge = nn.Linear(2 * D, D, bias=False)
        self.gate = nn.Linear(2 * D, 1)
        nn.init.constant_(self.gate.bias, 2.0)  # begin by trusting the vocabulary

    def forward(
        self,
        h_TBD: Tensor,
        ids_TB: Tensor,
        embedding: nn.Embedding,
        last_key: Tensor,
        keys: Tensor,
        ids: Tensor,
    ) -> tuple[Pointed, tuple[Tensor, Tensor, Tensor]]:
        """Attend from every position of a window to the M tokens that end with its own."""
        num_steps, M = len(h_TBD), self.window
        new_keys = torch.cat(
            [last_key, self.key(h_TBD).transpose(0, 1).to(last_key.dtype)], dim=1
        )  # (B, 1 + T, P)
        keys_BJP = torch.cat([keys, new_keys[:, :-1]], dim=1)  # J = M + T
        ids_BJ = torch.cat([ids, (ids_TB.T + 1).to(ids.dtype)], dim=1)
        query_BTP = self.query(h_TBD).transpose(0, 1)
        scores_BTJ = torch.bmm(query_BTP, keys_BJP.transpose(1, 2).to(query_BTP.dtype)).float()
        place = torch.arange(M + num_steps, device=ids.device)
        behind = (
            torch.arange(num_steps, device=ids.device)[:, None] + M - place
        )  # 0 for the token's own place
        seen = (behind >= 0) & (behind < M) & (ids_BJ > 0)[:, None]
        scores_BTJ = scores_BTJ / math.sqrt(self.key.out_features)
        if self.copy_context:
            scores_BTJ = scores_BTJ + self._gain(ids_BJ, behind)
        scores_BTJ = scores_BTJ.masked_fill(~seen, -math.inf)
        attention_BTJ = torch.softmax(scores_BTJ, dim=-1)
        words_BJD = embedding((ids_BJ - 1).clamp_min(0).long())
        context_TBD = torch.bmm(attention_BTJ.to(words_BJD.dtype), words_BJD).transpose(0, 1)
        both = torch.cat([h_TBD, context_TBD.to(h_TBD.dtype)], dim=-1)
        gate = self.gate(both).squeeze(-1).float()
        pointed = Pointed(
            self.merge(both),
            functional.logsigmoid(gate),
            functional.logsigmoid(-gate),
            attention_BTJ.transpose(0, 1),
            ids_BJ,
        )
        return pointed, (new_keys[:, -1:], keys_BJP[:, num_steps:], ids_BJ[:, num_steps:])

    def _gain(self, ids_BJ: Tensor, behind_TJ: Tensor) -> Tensor:
        """Return what places gain before which the last tokens stand, (B, T, J)."""
        num_steps, J = behind_TJ.shape
        gain = torch.zeros((), device=ids_BJ.device)
        agrees = torch.ones_like(behind_TJ, dtype=torch.bool)
        for back, worth in enumerate(self.agreement.float()):
            before_BJ = functional.pad(ids_BJ, (back + 1, 0))[:, :J]
            now_BT = functional.pad(ids_BJ, (back, 0))[:, J - num_steps : J]
            remembered = behind_TJ < self.window - back  # by a state of M ids
            agrees = agrees & remembered & (before_BJ[:, None] == now_BT[..., None])
            gain = gain + worth * agrees
        return gain


def copy_log_probs(pointed: Pointed, targets_TB: Tensor) -> Tensor:
    """Return log Σ_{j: w_j = target} a_tj, (T, B); −inf where the target is not in the window."""
    same_TBJ = pointed.ids_BJ == (targets_TB + 1)[:, :, None]
    share = (pointed.attention_TBJ * same_TBJ).sum(-1)
    # The logarithm of zero has no gradient: such places are left out of it.
    return torch.where(share > 0, share, 1).log().masked_fill(share <= 0, -math.inf)


def mixed_log_probs(pointed: Pointed, logits_TBV: Tensor) -> Tensor:
    """Return the log of the gated mixture over the whole vocabulary, (T, B, V)."""
    copied = torch.zeros_like(logits_TBV, dtype=torch.float32)
    places = (pointed.ids_BJ - 1).clamp_min(0).long().expand(pointed.attention_TBJ.shape)
    copied.scatter_add_(-1, places, pointed.attention_TBJ)  # empty places weigh nothing
    said = functional.log_softmax(logits_TBV.float(), dim=-1) + pointed.log_gate_TB[..., None]
    least = torch.finfo(torch.float32).tiny  # the logarithm of zero has no gradient
    return torch.logaddexp(said, copied.clamp_min(least).log() + pointed.log_copy_TB[..., None])
