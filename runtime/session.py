"""A session: one sequence of tokens, its state, and the way back.

What a session holds does not grow with the text: the state before each of its recent runs (segments), and its
last tokens. A run takes place when its result is needed and not before, so that tokens which are fed one by
one are run together, and the last token of a text costs nothing.

    feed      extends the last segment while it has not been run, or begins a new one
    rewind    drops segments and cuts the last one: exact, since it is run again as a prompt that ended there
              would have been
    fork      copies the list of segments; states are never written to, so they are shared, and what has not
              been run is run once, by the first that needs it
    save      writes the state before the last few segments, and these; `load_session` runs them again, as
              they were run before, so that a loaded session can be rewound a little too
"""

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .atomic import replacing
from .container import shown
from .encoding import encode
from .engine import Blend, Engine, Floats, State
from .errors import ParameterError, StateError

HISTORY = 64
"""Tokens that a session can be rewound by, unless it is made with another number."""
SAVED_HISTORY = 16
"""Tokens that a session can be rewound by after it was saved and loaded: so many are run again on loading."""
RECENT = 1024
"""Tokens that a session remembers for penalties on repetition."""
MOST_HISTORY = 4096

_MAGIC, _VERSION = b"SDGMSTAT", 1
# magic, version, model, variant, position, numbers of segments, ids, recent and drawn, η
_HEADER = struct.Struct("<8sI32s8sQ4If")
_DIGEST = 32


class Identity(NamedTuple):
    """What a state belongs to."""

    model_id: str
    """sha256 of the model, in hexadecimal."""
    variant: str
    """Name of the variant."""


class Segment(NamedTuple):
    """Tokens that are run together."""

    state: State
    """The state before them."""
    ids: list[int]
    """1 to `chunk` tokens."""
    blend: Blend | None = None
    """How the mixing vector is moved, for a single token."""


class _Shared(NamedTuple):
    """The last segment, which is run once for all forks that stand there."""

    segment: Segment
    results: dict[int, tuple[Floats, State]]
    """By how many of its tokens were run: logits after them, and the state."""


class Session:
    """One sequence; made by `Generator.session()`. A session belongs to one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        identity: Identity,
        segments: Iterable[Segment],
        *,
        history: int = HISTORY,
        position: int = 0,
        recent: Iterable[int] = (),
    ) -> None:
        if type(history) is not int or not 0 <= history <= MOST_HISTORY:
            raise ParameterError(
                f"history: expected 0 to {MOST_HISTORY} tokens, got {shown(history)}; 64 is usual"
            )
        self._engine, self._tokenizer, self._identity = engine, tokenizer, identity
        self._history, self._position = history, position
        self._segments = deque(segments)
        self._held = sum(len(segment.ids) for segment in self._segments)
        self._recent = deque(recent, maxlen=RECENT + history + engine.chunk)
        self._after: State | None = None  # the state after the last segment, once it is known
        self._logits_V: Floats | None = None  # likewise its logits
        self._shared: _Shared | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return self._engine.config.vocab_size

    @property
    def position(self) -> int:
        """How many tokens were fed, without the begin token."""
        return self._position

    @property
    def tokens(self) -> list[int]:
        """The last tokens, at most `RECENT`, without the begin token."""
        return list(islice(self._recent, max(0, len(self._recent) - RECENT), None))

    @property
    def logits(self) -> Floats:
        """What comes next: logits (V,), to be read only."""
        if self._logits_V is None:
            self._run()
        assert self._logits_V is not None
        return self._logits_V

    @property
    def state(self) -> Floats:
        """The whole state, (S,), as a copy."""
        return self._engine.download(self._state()).copy()

    def feed(self, text: str | Iterable[int]) -> int:
        """Read a text, or ids, in constant memory; returns the number of tokens.

        Raises:
            ParameterError: an id that the model does not have, or text that is not valid Unicode; what lies
                whole chunks before it is fed.
        """
        before = self._position
        if isinstance(text, bytes | bytearray) or not isinstance(text, Iterable):
            raise ParameterError(f"feed: expected text or token ids, got {shown(text)}; decode bytes first")
        ids = encode(self._tokenizer, text) if isinstance(text, str) else iter(text)
        while batch := list(islice(ids, self._engine.chunk)):
            self._append(self._checked(batch))
        return self._position - before

    def push(self, token: int) -> None:
        """Append one token that a sampler chose."""
        self._append([token])

    def fork(self) -> "Session":
        """A session that stands where this one stands, and goes its own way."""
        self._results()  # made here, the twin has the same
        twin = Session.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin._segments, twin._recent = self._segments.copy(), self._recent.copy()
        return twin

    def rewind(self, count: int) -> None:
        """Take back the last `count` tokens, exactly.

        Raises:
            StateError: there are not so many, or they lie further back than this session remembers.
        """
        if type(count) is not int or count < 0:
            raise ParameterError(f"rewind: expected a number of tokens from 0, got {shown(count)}; give one")
        if count > self._position:
            raise StateError(
                f"rewind: expected at most the {self._position} tokens fed, got {count}; rewind by less"
            )
        if count >= self._held:
            raise StateError(
                f"rewind: expected at most {self._held - 1} tokens here, got {count}; "
                "make the session with a longer history, as session(history=256), or fork it beforehand"
            )
        if count == 0:
            return
        left = count
        while left >= len(self._segments[-1].ids):
            segment = self._segments.pop()
            left -= len(segment.ids)
            self._after = segment.state
        if left:
            state, ids, blend = self._segments[-1]
            self._segments[-1] = Segment(state, ids[: len(ids) - left], blend)
            self._after = None
        self._logits_V = None
        self._position -= count
        self._held -= count
        for _ in range(min(count, len(self._recent))):
            self._recent.pop()

    def blend(self, strength: float, draw: Callable[[Floats | None], Floats], *, look: bool) -> None:
        """Compute the next logits with the last token's mixing vector moved towards `draw(c)`.

        With `look`, c (M,) is computed first, by one more run; without, `draw` is given None.
        """
        self._isolate_last()
        state, ids, _ = self._segments[-1]
        c_M = self._engine.mixing(ids, state)[0][0] if look else None
        self._segments[-1] = Segment(state, ids, Blend(strength, draw(c_M)))
        self._after = self._logits_V = None

    def save(self, path: str | Path, *, history: int = SAVED_HISTORY) -> None:
        """Write the state file: a few kilobytes, bound to the model, replaced as a whole or not at all.

        Once loaded, the session can be rewound by `history` tokens, if no token before the last was blended.
        """
        _check_history(history)
        kept: list[Segment] = []
        for segment in reversed(self._segments):
            if kept and (segment.blend or sum(len(s.ids) for s in kept) > history):
                break
            kept.insert(0, segment)
        lengths, ids, recent = [len(s.ids) for s in kept], [i for s in kept for i in s.ids], self.tokens
        strength, drawn_M = kept[-1].blend or Blend(0.0, np.zeros(0, np.float32))
        header = _HEADER.pack(
            _MAGIC, _VERSION, bytes.fromhex(self._identity.model_id), self._identity.variant.encode(),
            self._position, len(lengths), len(ids), len(recent), len(drawn_M), strength,
        )  # fmt: skip
        state_S = self._engine.download(kept[0].state).astype("<f4")
        integers = np.array(lengths + ids + recent, "<u4")
        body = b"".join((header, state_S.tobytes(), integers.tobytes(), drawn_M.astype("<f4").tobytes()))
        with replacing(Path(path), StateError) as file:
            file.write(body + hashlib.sha256(body).digest())

    def _append(self, ids: list[int]) -> None:
        place, count = 0, len(ids)
        while place < count:
            tail = self._segments[-1]
            pending = self._after is None and self._logits_V is None and tail.blend is None
            if pending and (room := self._engine.chunk - len(tail.ids)) > 0:
                taken = ids[place : place + room]
                self._segments[-1] = Segment(tail.state, tail.ids + taken)
            else:
                taken = ids[place : place + self._engine.chunk]
                self._segments.append(Segment(self._state(), taken))
                self._after = self._logits_V = None
            place += len(taken)
            self._held += len(taken)
            # One token more than the history stays, so that logits can always be computed again.
            while self._held - len(self._segments[0].ids) > self._history:
                self._held -= len(self._segments.popleft().ids)
        self._position += count
        self._recent.extend(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        try:
            array = np.array(ids)
        except ValueError:  # a ragged list
            array = np.array(None)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ParameterError(f"feed: expected text or token ids, got {shown(ids)}; encode the text first")
        low, high, size = int(array.min()), int(array.max()), self._engine.config.vocab_size
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise ParameterError(
                f"feed: expected ids from 0 to {size - 1}, got {wrong}; use this model's tokenizer"
            )
        return array.tolist()  # type: ignore[no-any-return]

    def _run(self) -> None:
        self._logits_V, self._after = self._last(len(self._segments[-1].ids))

    def _last(self, count: int) -> tuple[Floats, State]:
        """Run the first `count` tokens of the last segment."""
        state, ids, blend = self._segments[-1]
        results = self._results()
        if count not in results:
            results[count] = self._engine.last(ids[:count], state, blend)
        return results[count]

    def _results(self) -> dict[int, tuple[Floats, State]]:
        if self._shared is None or self._shared.segment is not self._segments[-1]:
            self._shared = _Shared(self._segments[-1], {})
        return self._shared.results

    def _state(self) -> State:
        if self._after is None:
            self._run()
        return self._after

    def _isolate_last(self) -> None:
        """Make the last token a segment of its own."""
        state, ids, blend = self._segments[-1]
        if len(ids) > 1:
            _, between = self._last(len(ids) - 1)
            self._segments[-1] = Segment(state, ids[:-1], blend)
            self._segments.append(Segment(between, ids[-1:]))


def load_session(
    engine: Engine, tokenizer: Tokenizer, identity: Identity, path: Path, *, history: int = HISTORY
) -> Session:
    """Read a state file that `Session.save` wrote.

    Raises:
        StateError: it is missing, damaged, of another version, or of another model.
    """
    config, again = engine.config, "save the session again"
    most = config.state_size + 2 * (MOST_HISTORY + config.chunk) + RECENT + config.mixing_size
    data = _read(path, _HEADER.size + 4 * most + _DIGEST)
    if data[: len(_MAGIC)] != _MAGIC:
        raise StateError(f"{path}: not a state file: expected {_MAGIC!r}, got {data[:8]!r}; check the path")
    if len(data) < _HEADER.size + _DIGEST:
        least = _HEADER.size + _DIGEST
        raise StateError(f"{path}: cut: expected at least {least} bytes, got {len(data)}; {again}")
    fields = _HEADER.unpack_from(data)
    _, version, model, name, position, num_segments, num_ids, num_recent, num_drawn, strength = fields
    if version != _VERSION:
        remedy = "upgrade with: pip install --upgrade sdgm-edge" if version > _VERSION else again
        raise StateError(f"{path}: another version: expected {_VERSION}, got {version}; {remedy}")
    if hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise StateError(f"{path}: damaged: its sha256 does not match its content; {again}")
    if model.hex() != identity.model_id:
        raise StateError(
            f"{path}: of another model: expected {identity.model_id[:16]}…, got {model.hex()[:16]}…; "
            "load it with the bundle that it was saved with"
        )
    variant = name.rstrip(b"\0").decode("ascii", "replace")
    if variant != identity.variant:
        expected, got = identity.variant, shown(variant)
        remedy = f"load the bundle with variant={got}"
        raise StateError(f"{path}: of another variant: expected {expected}, got {got}; {remedy}")
    counts = (config.state_size, num_segments, num_ids, num_recent, num_drawn)
    if len(data) != _HEADER.size + 4 * sum(counts) + _DIGEST or num_drawn not in (0, config.mixing_size):
        raise StateError(f"{path}: of another shape: expected lengths that add up, got {counts}; {again}")
    numbers = np.frombuffer(data, "<u4", sum(counts), _HEADER.size)
    state, lengths, ids, recent, drawn = np.split(numbers, np.cumsum(counts[:-1]))
    floats_S, drawn_M = state.view("<f4").astype(np.float32), drawn.view("<f4").astype(np.float32)
    if not (np.isfinite(floats_S).all() and np.isfinite(drawn_M).all() and 0 <= strength <= 1):
        raise StateError(f"{path}: expected finite numbers, got NaN or infinity; {again}")
    fits = num_segments and lengths.min() > 0 and lengths.max() <= config.chunk and lengths.sum() == num_ids
    if not fits or max(ids.max(), recent.max(initial=0)) >= config.vocab_size:
        raise StateError(
            f"{path}: expected tokens below {config.vocab_size} in short runs, got others; {again}"
        )
    segments: list[Segment] = []
    before = engine.upload(floats_S)
    for run in np.split(ids, np.cumsum(lengths[:-1])):
        if segments:
            _, before = engine.last(segments[-1].ids, before)
        segments.append(Segment(before, run.tolist()))
    if num_drawn:
        segments[-1] = segments[-1]._replace(blend=Blend(strength, drawn_M))
    return Session(
        engine, tokenizer, identity, segments, history=history, position=position, recent=recent.tolist()
    )


def _check_history(history: int) -> None:
    if type(history) is not int or not 0 <= history <= MOST_HISTORY:
        raise ParameterError(
            f"history: expected 0 to {MOST_HISTORY} tokens, got {shown(history)}; 64 is usual"
        )


def _read(path: Path, cap: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(cap + 1)
    except OSError as e:
        raise StateError(
            f"{path}: cannot be read: {e.strerror or e}; check the path and its permissions"
        ) from e
    if len(data) > cap:
        raise StateError(f"{path}: too large for this model: expected at most {cap} bytes; check the path")
    return data
