"""The gated recurrence h_t = f_t · h_{t−1} + b_t, in three forms that agree.

Shapes: T time, B batch, P planes that share a gate (real and imaginary part), K atoms. Time comes first, so
that one step of the whole batch is one contiguous block.

- `scan_naive`: the definition, for autograd and for tests.
- `scan_steps`: one fused multiply-add a step, with its gradient written out. Nothing of size T is ever
  computed twice and no logarithm is taken: the form for a CPU, where a call is cheap and memory is not.
- `scan_chunks`: cumulative sums inside bounded chunks, a short loop across them: the form for a GPU, where a
  call is dear. It needs log f, bounded below by `LOG_DECAY_FLOOR`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .compiling import uncompiled

LOG_DECAY_FLOOR = -5.0
"""No atom forgets faster than by e^−5 a token: in a chunk exp(−Σ log f) then stays below e^40, which leaves
float32 room for what it is multiplied by, in both directions."""

CHUNK = 8


def scan_naive(f_TB1K: Tensor, b_TBPK: Tensor, h_BPK: Tensor) -> Tensor:
    """Return all h, (T, B, P, K), by the definition."""
    steps = []
    for f, b in zip(f_TB1K, b_TBPK, strict=True):
        h_BPK = f * h_BPK + b
        steps.append(h_BPK)
    return torch.stack(steps)


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, f: Tensor, b: Tensor, h: Tensor) -> Tensor:
        states = torch.empty((len(b) + 1, *b.shape[1:]), dtype=b.dtype, device=b.device)
        states[0] = h
        rows = states.unbind(0)
        for f_t, b_t, before, after in zip(f.unbind(0), b.unbind(0), rows, rows[1:], strict=False):
            torch.addcmul(b_t, f_t, before, out=after)
        ctx.save_for_backward(f, states)
        return states[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, states = ctx.saved_tensors  # type: ignore[attr-defined]
        # g_t = ∂loss/∂h_t in full: what reaches h_t directly, and what reaches it through h_{t+1}.
        full = torch.empty_like(grad)
        full[-1] = grad[-1]
        rows, gates = full.unbind(0), f.unbind(0)
        for t in range(len(grad) - 2, -1, -1):
            torch.addcmul(grad[t], gates[t + 1], rows[t + 1], out=rows[t])
        grad_f = (full * states[:-1]).sum(dim=2, keepdim=True)
        return grad_f, full, f[0] * full[0]


@uncompiled  # a loop over time: unrolled, it would be compiled step by step
def scan_steps(f_TB1K: Tensor, b_TBPK: Tensor, h_BPK: Tensor) -> Tensor:
    """Return all h, (T, B, P, K), step by step with a hand-written gradient."""
    states: Tensor = _Steps.apply(f_TB1K, b_TBPK, h_BPK)  # type: ignore[no-untyped-call]
    return states


def scan_chunks(log_f_TB1K: Tensor, b_TBPK: Tensor, h_BPK: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return all h, (T, B, P, K): h_t = e^{s_t} (h_0 + Σ_{τ≤t} e^{−s_τ} b_τ) with s_t = Σ_{τ≤t} log f_τ."""
    num_steps = len(b_TBPK)
    pad = -num_steps % chunk
    log_f = torch.nn.functional.pad(log_f_TB1K, (0, 0, 0, 0, 0, 0, 0, pad))
    b = torch.nn.functional.pad(b_TBPK, (0, 0, 0, 0, 0, 0, 0, pad))
    decay = log_f.unflatten(0, (-1, chunk)).cumsum(1)  # (T/chunk, chunk, B, 1, K)
    inner = torch.exp(decay) * (torch.exp(-decay) * b.unflatten(0, (-1, chunk))).cumsum(1)
    carries = [h_BPK]
    for total, last in zip(torch.exp(decay[:, -1]), inner[:, -1], strict=True):
        carries.append(total * carries[-1] + last)
    states = inner + torch.exp(decay) * torch.stack(carries[:-1])[:, None]
    all_states: Tensor = states.flatten(0, 1)[:num_steps]
    return all_states
