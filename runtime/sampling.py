"""From logits to a token.

The knobs of `SamplingParams` apply in this order, each to what the one before has left:

1. `forced_tokens`, one a step, before anything is drawn
2. `repetition_penalty`, `logit_bias`
3. `no_repeat_ngram_size`, `banned_tokens` and the caller's `allowed` set
4. `temperature` (0 takes the likeliest token and ends here)
5. `top_k`, `top_p`, `min_p`
6. one uniform number, and the inverse of the cumulative distribution in the order of ids

The vocabulary is reduced to a few candidates in float32, and the candidates are weighed in float64: the
rounding of `exp`, which differs between processors, then hardly ever moves a draw to another token.

V vocabulary.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import ParameterError, StateError
from .parameters import SamplingParams, refuse
from .uniform import Uniform

__all__ = ["Sampled", "Sampler", "SamplingParams"]

_MANY = 1024
"""Weights from here on are sorted by order of magnitude first."""
_GROUPS = 1024
"""Groups of logits, in each of which the largest is sought first."""
_FEW = 256
"""Tokens among which `top_p` is sought first."""
_BLOCK = 64
"""Weights that are summed at once."""
_ONES = np.ones(_BLOCK, np.float32)

Floats = NDArray[np.floating[Any]]
Choice = NDArray[np.integer[Any]] | NDArray[np.bool_]


class Sampled(NamedTuple):
    """One token, and what the model thought of it.

    `logprob` and `top` (id and log-probability, likeliest first) are natural logarithms in the model's own
    distribution: temperature 1, before penalties, bias and filters. None and () unless `logprobs` is on.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class _Window:
    """The last `size` ids as one contiguous array, in constant time per token."""

    def __init__(self, size: int, ids: Sequence[int]) -> None:
        self._size, self._end = size, 0
        self._ids = np.zeros(2 * size, np.int64)
        for token in ids[-size:]:
            self.push(token)

    def push(self, token: int) -> None:
        if self._end == len(self._ids):
            self._end = self._size - 1
            self._ids[: self._end] = self._ids[len(self._ids) - self._end :]
        self._ids[self._end] = token
        self._end += 1

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[max(0, self._end - self._size) : self._end]

    def completing(self, size: int) -> NDArray[np.int64]:
        """The ids that would complete a run of `size` tokens which the window holds already."""
        ids = self.ids
        places = len(ids) - size + 1
        if places < 1:
            return ids[:0]
        hits = np.ones(places, bool)
        for offset, token in enumerate(ids[len(ids) - size + 1 :]):
            hits &= ids[offset : offset + places] == token
        return ids[size - 1 :][hits]


class Sampler:
    """Chooses one token after another; remembers what it chose. One sampler serves one text."""

    def __init__(self, params: SamplingParams, vocab_size: int, context_ids: Sequence[int] = ()) -> None:
        """`context_ids`: the text so far. Raises ParameterError on ids of `params` beyond the vocabulary."""
        for name in ("banned_tokens", "forced_tokens", "logit_bias"):
            for token in getattr(params, name):
                if token >= vocab_size:
                    raise refuse(name, f"ids below {vocab_size}", token, "use this model's tokenizer")
        self.params = params
        self._buffer_V = np.empty(vocab_size, np.float32)
        self._blocks = np.zeros((-(-vocab_size // _BLOCK), _BLOCK), np.float32)
        self._weights_V = self._blocks.reshape(-1)[:vocab_size]  # what lies behind it weighs nothing
        self._heavy_V = np.empty(vocab_size, bool)
        self._uniform = Uniform(params.seed)
        self._forced = deque(params.forced_tokens)
        self._banned = np.array(sorted(set(params.banned_tokens)), np.int64)
        self._biased = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._penalty = np.float32(params.repetition_penalty)
        looks_back = params.repetition_penalty != 1 or params.no_repeat_ngram_size > 0
        self._window = _Window(params.repetition_window, context_ids) if looks_back else None
        self._adjusts = looks_back or len(self._banned) > 0 or len(self._biased) > 0

    def sample(self, logits_V: Floats, allowed: Choice | None = None) -> Sampled:
        """Choose the next token.

        `allowed` limits the choice to some ids (as ids, or as one bool per id); forced tokens wait for None.
        Raises ParameterError where no token is left, StateError where the logits hold NaN or +inf.
        """
        logits_V = np.asarray(logits_V, np.float32)
        if logits_V.shape != self._buffer_V.shape:
            raise refuse("logits", f"shape {self._buffer_V.shape}", logits_V.shape, "give one position")
        if self._forced and allowed is None:
            token = self._forced.popleft()
        elif self._adjusts or allowed is not None:
            token = self._choose(self._adjust(logits_V, allowed))
        else:
            token = self._choose(logits_V)
        if self._window is not None:
            self._window.push(token)
        if self.params.logprobs is None:
            return Sampled(token)
        logprobs_V = logits_V - np.float32(_log_sum_exp(logits_V))
        top = _largest(logprobs_V, self.params.logprobs)
        top = top[np.argsort(-logprobs_V[top], kind="stable")]
        return Sampled(
            token, float(logprobs_V[token]), tuple(zip(top.tolist(), logprobs_V[top].tolist(), strict=True))
        )

    def _adjust(self, logits_V: Floats, allowed: Choice | None) -> Floats:
        """Apply all that changes single logits, in the sampler's own buffer."""
        x_V = self._buffer_V
        np.copyto(x_V, logits_V)
        if self._window is not None and allowed is None:  # a word that is completed is no repetition
            if self._penalty != 1:
                # A logit counts from that of the uniform distribution: its sign then means something, whether
                # or not the graph has normalised. All is read before it is written: repeated ids count once.
                zero = np.float32(_log_sum_exp(logits_V) - math.log(len(x_V)))
                ids = self._window.ids
                seen = x_V[ids] - zero
                x_V[ids] = np.where(seen > 0, seen / self._penalty, seen * self._penalty) + zero
            if self.params.no_repeat_ngram_size:
                banned = self._window.completing(self.params.no_repeat_ngram_size)
                x_V[banned] = -np.inf
        x_V[self._biased] += self._bias
        x_V[self._banned] = -np.inf
        if allowed is not None:
            kept = x_V[allowed]
            x_V.fill(-np.inf)
            x_V[allowed] = kept
        return x_V

    def _choose(self, x_V: Floats) -> int:
        best = int(x_V.argmax())  # the first NaN, where there is one
        top = x_V[best]
        if not math.isfinite(top):
            raise _hopeless(float(top))
        p = self.params
        if p.temperature == 0:
            return best
        with np.errstate(over="ignore"):  # what is too far below the top for float32 weighs nothing
            if 0 < p.top_k < len(x_V):
                ids = _largest(x_V, p.top_k)
                weights = self._weigh(x_V, ids, top)
                if p.top_p < 1:
                    kept = _nucleus(weights, p.top_p * float(weights.sum()))
                    ids, weights = ids[kept], weights[kept]
            elif p.top_p < 1:
                ids, weights = self._likeliest(x_V, best)
            elif p.min_p > 0:
                ids = (x_V >= top + p.temperature * math.log(p.min_p)).nonzero()[0]
                weights = self._weigh(x_V, ids, top)
            else:
                self._weigh_all(x_V, top)
                return _draw_of_many(self._blocks, self._uniform.random())
        if p.min_p > 0:
            heavy = weights >= p.min_p  # the likeliest weighs 1
            ids, weights = ids[heavy], weights[heavy]
        return int(ids[_draw(weights, self._uniform.random())])

    def _weigh(self, x_V: Floats, ids: NDArray[np.intp], top: np.floating[Any]) -> NDArray[np.float64]:
        """The weights of some tokens; the likeliest weighs 1."""
        weights: NDArray[np.float64] = np.exp((x_V[ids].astype(np.float64) - top) / self.params.temperature)
        return weights

    def _weigh_all(self, x_V: Floats, top: np.floating[Any]) -> Floats:
        """As `_weigh`, the weights of all tokens, in the sampler's own buffer."""
        weights_V = np.subtract(x_V, top, out=self._weights_V)
        weights_V *= np.float32(1 / self.params.temperature)
        return np.exp(weights_V, out=weights_V)

    def _likeliest(self, x_V: Floats, best: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The tokens that `top_p` keeps, and their weights.

        Where one of them stands out, they are sought among few; then, if that was in vain, among all.
        """
        top = x_V[best]
        top_p, weights_V = self.params.top_p, self._weigh_all(x_V, top)
        total = float(np.einsum("i->", weights_V))  # as `sum`, in half the time
        if top_p * total <= 1:
            return np.array([best]), np.ones(1)
        counts = (_FEW, len(weights_V)) if 8 * total < _FEW else (len(weights_V),)
        for count in counts:
            # Only more than `count` tokens below this weight can make up what top_p leaves out.
            floor = np.float32((1 - top_p) * total / count)
            ids = np.greater_equal(weights_V, floor, out=self._heavy_V).nonzero()[0]
            weights = self._weigh(x_V, ids, top)
            kept = _nucleus(weights, top_p * total)
            if len(kept) < len(weights):
                break
        return ids[kept], weights[kept]


def _hopeless(top: float) -> ParameterError | StateError:
    if top == -math.inf:
        return refuse(
            "sampling", "at least one token to choose from", "none",
            "ban fewer tokens, or lower no_repeat_ngram_size or repetition_window",
        )  # fmt: skip
    return StateError(
        f"logits: expected finite numbers, got {top}; the session's state or the bundle is damaged: "
        "start a new session, and check the bundle with `sdgm-edge verify`"
    )


def _log_sum_exp(x_V: Floats) -> float:
    top = x_V.max()
    if not math.isfinite(top):
        raise _hopeless(float(top))
    weights_V = x_V - top
    return float(top) + math.log(float(np.exp(weights_V, out=weights_V).sum()))


def _largest(values: Floats, count: int) -> NDArray[np.intp]:
    """Places of the `count` largest values, in rising order; of equal ones the first."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.arange(0)
    if len(values) < 8 * _GROUPS or count > _GROUPS // 4:
        return _from(_nth(values, count), values, count)
    # No value is sought that is below the nth of the largest of the groups.
    groups = values[: len(values) // _GROUPS * _GROUPS].reshape(-1, _GROUPS).max(0)
    places: NDArray[np.intp] = (values >= _nth(groups, count)).nonzero()[0]
    some = values[places]
    return places[_from(_nth(some, count), some, count)]


def _nth(values: Floats, count: int) -> np.floating[Any]:
    """The smallest of the `count` largest values."""
    nth: np.floating[Any] = np.partition(values, len(values) - count)[len(values) - count]
    return nth


def _nucleus(weights: Floats, mass: float) -> NDArray[np.intp]:
    """Places of the fewest largest weights that make up `mass`, in rising order; all, where none do.

    Weights lie in (0, 1]. Of many only those are sorted among which the sum passes: those of one binary order
    of magnitude, or an eighth of one.
    """
    first, before, some = 0, 0.0, weights
    if len(weights) > _MANY:
        # Of a positive float64 the upper bits are its order of magnitude; 1 comes first.
        order = ((np.float64(1).view(np.int64) - weights.view(np.int64)) >> 49).astype(np.int64)
        sums = np.bincount(order, weights).cumsum()
        crossing = int(sums.searchsorted(mass))
        if crossing < len(sums):
            some = weights[order == crossing]
            first = int(np.count_nonzero(order < crossing))
            before = float(sums[crossing - 1]) if crossing else 0.0
    falling = np.sort(some)[::-1]
    inside = int((before + falling.cumsum()).searchsorted(mass)) + 1
    if inside > len(falling) and len(some) == len(weights):
        return np.arange(len(weights))
    inside = min(inside, len(falling))  # rounding may have put the sum of its parts a little lower
    return _from(falling[inside - 1], weights, first + inside)


def _from(floor: np.floating[Any], values: Floats, count: int) -> NDArray[np.intp]:
    """As `_largest`, where the smallest of the `count` largest values is known."""
    places: NDArray[np.intp] = (values >= floor).nonzero()[0]
    if len(places) > count:
        ties = (values[places] == floor).nonzero()[0]
        places = np.delete(places, ties[count - len(places) :])
    return places


def _draw(weights: NDArray[np.float64], uniform: float) -> int:
    """Return the place at which the cumulative weight passes `uniform` times their sum."""
    if len(weights) == 1:
        return 0
    rising = weights.cumsum()
    return _passes(rising, uniform * rising[-1])


def _draw_of_many(blocks: Floats, uniform: float) -> int:
    """As `_draw`, of float32 weights in rows: first a row, then inside it. A long running sum is slow."""
    sums = (blocks @ _ONES).cumsum(dtype=np.float64)
    target = uniform * sums[-1]
    row = _passes(sums, target)
    inside = blocks[row].cumsum(dtype=np.float64)
    return row * _BLOCK + _passes(inside, target - (sums[row] - inside[-1]))


def _passes(rising: NDArray[np.float64], target: float) -> int:
    """The first place above `target`, which rounding may have put a little below 0 or up to the end."""
    return int(min(rising.searchsorted(max(0.0, target), "right"), rising.searchsorted(rising[-1])))
