"""The recurrence of ringing atoms, z_t = f_t · e^{iω} · z_{t−1} + (1 − f_t) · v_t, in three forms that agree.

Shapes: T time, B batch, K atoms; 2 is real and imaginary part. Time comes first, so that one step of the
whole batch is one contiguous block.

- `ring_naive`: the definition, with complex numbers and automatic gradients.
- `ring_steps`: step by step with a hand-written gradient. What a step works on stays in a processor's
  cache: the form for a CPU.
- `ring_chunks`: h_t = e^{−iωt} z_t turns with the atoms, its recurrence is real, and `scan_chunks` computes
  it in a few large operations: the form for a GPU, and for few sequences, as where a text is scored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .compiling import uncompiled
from .scan import scan_chunks

FEW = 512
"""Atoms of all sequences up to which a CPU spends more time on beginning a step than on the step."""


def ring_naive(v_TBK: Tensor, f_TBK: Tensor, omega_K: Tensor, z_B2K: Tensor) -> Tensor:
    """Return all z, (T, B, 2, K), by the definition."""
    turn = torch.polar(torch.ones_like(omega_K), omega_K)
    z_BK = torch.complex(z_B2K[:, 0], z_B2K[:, 1])
    steps = []
    for v, f in zip(v_TBK, f_TBK, strict=True):
        z_BK = f * turn * z_BK + (1 - f) * v
        steps.append(torch.stack([z_BK.real, z_BK.imag], dim=1))
    return torch.stack(steps)


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, f: Tensor, omega: Tensor, z: Tensor) -> Tensor:
        states = torch.empty((len(v) + 1, *z.shape), dtype=z.dtype, device=z.device)
        states[0] = z
        cos, sin = torch.cos(omega), torch.sin(omega)
        turned = torch.empty_like(z)
        steps = zip(states.unbind(0), states[1:, :, 0].unbind(0), states[1:, :, 1].unbind(0), strict=False)
        for (before, real, imag), v_t, f_t in zip(steps, v.unbind(0), f.unbind(0), strict=True):
            _turn(before, cos, sin, turned)
            torch.lerp(v_t, turned[:, 0], f_t, out=real)
            torch.mul(turned[:, 1], f_t, out=imag)
        ctx.save_for_backward(v, f, cos, sin, states)
        return states[1:]

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        v, f, cos, sin, states = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_v, grad_f = torch.empty_like(v), torch.empty_like(f)
        grad_omega = torch.zeros_like(v[0])
        turned, back = torch.empty_like(states[0]), torch.zeros_like(states[0])
        steps = zip(*(t.unbind(0) for t in (grad, states[:-1], v, f, grad_v, grad_f)), strict=True)
        for grad_t, before, v_t, f_t, grad_v_t, grad_f_t in reversed(list(steps)):
            full = grad_t + back  # ∂loss/∂z_t: what reaches it directly, and through z_{t+1}
            _turn(before, cos, sin, turned)
            torch.mul(full[:, 1], turned[:, 1], out=grad_f_t)
            grad_f_t.addcmul_(full[:, 0], turned[:, 0] - v_t)
            through = full * f_t[:, None]
            torch.sub(full[:, 0], through[:, 0], out=grad_v_t)
            grad_omega.addcmul_(through[:, 1], turned[:, 0]).addcmul_(through[:, 0], turned[:, 1], value=-1)
            _turn(through, cos, -sin, back)
        return grad_v, grad_f, grad_omega.sum(0), back


def _turn(z_B2K: Tensor, cos_K: Tensor, sin_K: Tensor, out_B2K: Tensor) -> None:
    """Multiply by e^{iω}."""
    torch.mul(z_B2K, cos_K, out=out_B2K)
    out_B2K[:, 0].addcmul_(z_B2K[:, 1], sin_K, value=-1)
    out_B2K[:, 1].addcmul_(z_B2K[:, 0], sin_K)


@uncompiled  # a loop over time: unrolled, it would compile forever
def ring_steps(v_TBK: Tensor, f_TBK: Tensor, omega_K: Tensor, z_B2K: Tensor) -> Tensor:
    """Return all z, (T, B, 2, K), step by step."""
    states: Tensor = _Steps.apply(v_TBK, f_TBK, omega_K, z_B2K)  # type: ignore[no-untyped-call]
    return states


def ring_chunks(v_TBK: Tensor, f_TBK: Tensor, omega_K: Tensor, z_B2K: Tensor) -> Tensor:
    """Return all z, (T, B, 2, K), from the frame that turns with the atoms."""
    time = torch.arange(1, len(v_TBK) + 1, device=v_TBK.device)[:, None, None]
    angle = omega_K.double() * time  # (T, 1, K); in float32 a fast atom's phase would drift
    cos, sin = torch.cos(angle).float(), torch.sin(angle).float()
    b_TBK = (1 - f_TBK) * v_TBK
    turned_TB2K = torch.stack([b_TBK * cos, -b_TBK * sin], dim=2)
    h = scan_chunks(f_TBK.log()[:, :, None], turned_TB2K, z_B2K)
    real, imag = h.unbind(2)
    return torch.stack([real * cos - imag * sin, real * sin + imag * cos], dim=2)
