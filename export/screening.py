"""A head that is not read whole: all logits nearly, and those of the likeliest words exactly.

A head of V words reads V · D weights for every token, nearly all of them for words that nobody will say. But
the vectors h that a trained model hands to its head lie near a few directions. So a preview of low rank

    s = Q Pᵀ h + b'                                      P (D, R), Q (V, R), R about D / 4

tells all logits nearly; the N words that it puts first get their exact logits, from their rows of the
embedding, and all others keep the preview's. The sum over the vocabulary hardly moves, the likeliest words
not at all.

Of all products of rank R, the preview is the nearest where the model is: with mean μ and covariance C = L Lᵀ
of h, E‖W (h − μ) − Q Pᵀ (h − μ)‖² is least where Q Pᵀ L holds the first R singular vectors of W L. What h is
like is seen on text that the model itself writes: no text is needed for it, and the held-out text, at which
the gates look, stays unseen.

Shapes: B batch, T time, U positions whose logits are asked for, D width, V vocabulary, R rank, N exact words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.runtime import ExportError

from .builder import Array, ints
from .layers import Trace
from .matrices import Matrix, Precision, as_held

SCREENED_BITS = {8, 4}
LEAST_WEIGHTS = 1 << 23
"""Heads from here on are screened unless asked otherwise: smaller ones are read whole as quickly."""
MAX_INCREASE = 0.01
"""Most that a screened head may add to the perplexity of a whole one."""
EXACT_WORDS: Mapping[Precision, int] = {"q8": 256, "rows8": 256, "q4": 128, "rows4": 128}
"""By how the embedding is held: ONNX Runtime looks rows of 4 bits up at a third of the speed."""
PREVIEW: Mapping[Precision, Precision] = {"q8": "q4", "rows8": "rows4", "q4": "q4", "rows4": "rows4"}
"""How Q is held, by how the embedding is: its rows see each other only where those of the embedding do."""
LANES, STEPS = 64, 128
"""Of the text that the model writes to be seen on."""


@dataclass(frozen=True, slots=True)
class Screen:
    """A preview of the logits, and how many words get exact ones."""

    down_RD: Array
    """Pᵀ."""
    up_VR: Array
    """Q."""
    bias_V: Array
    """b′."""
    num_exact: int
    """N."""
    precision: Precision
    """How Q is held."""


@dataclass(frozen=True, slots=True)
class Screening:
    """A screened head that passed its gate."""

    rank: int
    """Of the preview."""
    num_exact: int
    """Words with exact logits."""
    perplexity_increase: float
    """Relative increase of the held-out text's perplexity (by tokens), against the head read whole."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for the manifest."""
        return asdict(self) | {"perplexity_increase": float(f"{self.perplexity_increase:.6g}")}


class Previewed(SDGM):
    """A model whose logits are all the preview's, as the graph holds it."""

    down: Tensor
    up: Tensor
    lift: Tensor

    def __init__(self, config: ModelConfig, screen: Screen) -> None:
        super().__init__(config)
        held = {"down": screen.down_RD, "up": as_held(screen.up_VR, screen.precision), "lift": screen.bias_V}
        for name, array in held.items():
            self.register_buffer(name, torch.from_numpy(array.copy()), persistent=False)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the preview."""
        return nn.functional.linear(nn.functional.linear(hidden, self.down), self.up, self.lift)


def is_large(config: ModelConfig, bits: int) -> bool:
    """Whether a head of so many bits is screened unless asked otherwise."""
    size = config.vocab_size * config.width
    return bits in SCREENED_BITS and size >= LEAST_WEIGHTS and not config.copy_window


def screen_for(model: SDGM, embedding: Precision) -> Screen:
    """Return the screen of a model whose embedding is held so."""
    return find_screen(model, EXACT_WORDS[embedding], PREVIEW[embedding])


def find_screen(model: SDGM, num_exact: int, precision: Precision = "q4") -> Screen:
    """Return the nearest preview of a model's head.

    The same model gives the same one. Exact logits for `num_exact` words, or for a quarter of the vocabulary
    where that is less, but for one at least.
    """
    V, D = model.config.vocab_size, model.config.width
    rank = rank_of(D)
    hidden = hidden_vectors(model).numpy().astype(np.float64)
    weight, bias = (x.detach().double().numpy() for x in (model.embedding.weight, model.bias))
    mean = hidden.mean(0)
    covariance = np.atleast_2d(np.cov(hidden.T))  # of width 1 it is a single number
    variance = np.trace(covariance) or 1.0  # 0 where all vectors are alike
    covariance += 1e-6 * variance / D * np.eye(D)  # directions that never occurred
    lower = np.linalg.cholesky(covariance)
    spread = weight @ lower  # W L
    directions = np.linalg.eigh(spread.T @ spread)[1][:, : -rank - 1 : -1]  # right singular vectors
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((rank, rank)))[0]
    directions = directions @ turn  # spans the same; its columns are alike, so that 4 bits lose least
    up, down = spread @ directions, np.linalg.solve(lower.T, directions).T
    lift = bias + weight @ mean - up @ (down @ mean)
    down, up, lift = (np.ascontiguousarray(x, np.float32) for x in (down, up, lift))
    return Screen(down, up, lift, min(num_exact, max(1, V // 4)), precision)


def rank_of(width: int) -> int:
    """Return D / 4, or the power of two above."""
    return 1 << (-(-width // 4) - 1).bit_length()


@torch.no_grad()
def hidden_vectors(model: SDGM) -> Tensor:
    """Return what the head is given while the model writes, (LANES · STEPS, D)."""
    hidden_TBD = model.features(written(model), model.initial_state(LANES)).hidden_TBD
    return hidden_TBD.reshape(-1, model.config.width)


@torch.no_grad()
def written(model: SDGM) -> Tensor:
    """Return text that the model writes, (STEPS, LANES); the same model writes the same.

    Raises:
        ExportError: its logits are no numbers.
    """
    chance = torch.Generator().manual_seed(0)
    ids_B, state = torch.zeros(LANES, dtype=torch.int64), model.initial_state(LANES)
    fed = []
    for _ in range(STEPS):
        fed.append(ids_B)
        logits_BV, _, state = model.step(ids_B, state)
        if not logits_BV.isfinite().all():
            raise ExportError(
                f"the model: expected finite logits, got {logits_BV[~logits_BV.isfinite()][0]} at token "
                f"{len(fed)} of a text of its own; its weights are too large: train anew with a lower "
                "learning rate"
            )
        ids_B = torch.multinomial(logits_BV.softmax(-1), 1, generator=chance)[:, 0]
    return torch.stack(fed)


def screened_scores(t: Trace, embedding: Matrix, hidden: ir.Value, screen: Screen) -> ir.Value:
    """Return the logits (B, U, V) of hidden vectors (B, U, D).

    A `Scan` looks rows up for one position after another: those of one fit into the processor's cache, and
    memory does not grow with U. To a single position it adds next to nothing. What a position gives does not
    depend, bit for bit, on how many are computed at once.
    """
    g, body, V = t.g, t.g.branch(), t.config.vocab_size
    with g.at("preview"):
        code = Matrix(g, "preview.down", screen.down_RD, "fp32").product(hidden)
        preview = Matrix(g, "preview.up", screen.up_VR, screen.precision).product(code, screen.bias_V)
    with g.at("exact"):
        bias = t.weight("bias")
        preview_BV = body.input("preview", ir.DataType.FLOAT, ("batch", V))
        hidden_BD = body.input("hidden", ir.DataType.FLOAT, ("batch", t.config.width))
        _, chosen = body.ops(2, "TopK", preview_BV, ints(screen.num_exact), axis=1, sorted=0)
        column = body.op("Unsqueeze", hidden_BD, ints(2))
        exact = body.op("MatMul", embedding.rows(chosen, body, many=True), column)  # (B, N, D) by (B, D, 1)
        exact = body.op("Add", body.op("Squeeze", exact, ints(2)), body.op("Gather", bias, chosen))
        logits = body.op("ScatterElements", preview_BV, chosen, exact, axis=1)
        body.output(logits.name or "", logits, ir.DataType.FLOAT, ("batch", V))
        return g.scan(body, preview, hidden, axes=(1, 1))
