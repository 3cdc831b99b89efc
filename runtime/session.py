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

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .container import shown
from .encoding import encode
from .engine import Blend, Engine, Floats, State
from .errors import ParameterError, StateError
from .parameters import RECENT
from .state_file import MOST_HISTORY, Identity, Saved, read_state, write_state

HISTORY = 64
"""Tokens that a session can be rewound by, unless it is made with another number."""
SAVED_HISTORY = 16
"""Tokens that a session can be rewound by after it was saved and loaded: so many are run again on loading."""


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


class _Ahead(NamedTuple):
    """Tokens that were run after the text, and are no part of it yet."""

    ids: list[int]
    """At least one."""
    logits_TV: Floats
    """What comes after each."""
    end: State
    """The state after all."""


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
        _check_history(history)
        self._engine, self._tokenizer = engine, tokenizer
        self.identity = identity
        """The model and the variant that it belongs to."""
        self._history, self._position = history, position
        self._segments = deque(segments)
        self._held = sum(len(segment.ids) for segment in self._segments)
        # As many are left after a rewind; a loaded session may be rewound further than its own history.
        self._recent = deque(recent, maxlen=RECENT + max(history, self._held) + engine.chunk)
        self._after: State | None = None  # the state after the last segment, once it is known
        self._logits_V: Floats | None = None  # likewise its logits
        self._ahead: _Ahead | None = None
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

    def push(self, token: int) -> bool:
        """Append one token that a sampler chose; true where it had been looked ahead to."""
        if not 0 <= token < self._engine.config.vocab_size:
            self._checked([token])
        ahead = self._ahead
        if ahead is None or ahead.ids[0] != token:
            self._append([token])
            return False
        self._segments[-1] = Segment(self._segments[-1].state, [*self._segments[-1].ids, token])
        self._count([token])
        self._logits_V, self._after = ahead.logits_TV[0], None
        if len(ahead.ids) > 1:
            self._ahead = _Ahead(ahead.ids[1:], ahead.logits_TV[1:], ahead.end)
        else:
            self._ahead, self._after = None, ahead.end
        return True

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens were run ahead that may still come."""
        return self._ahead is not None

    def look(self, ids: list[int]) -> int:
        """Run tokens ahead of the text, together with what is pending, in one call.

        If they are pushed next, one after another, what comes after each is known. How many were run: fewer
        than `ids` where a call takes no more, none where the last token was blended.
        """
        state, pending, blend = self._segments[-1]
        ids = ids[: self._engine.chunk - len(pending)] if blend is None else []
        if ids:
            logits_TV, end = self._engine.all([*pending, *ids], state, start=len(pending) - 1)
            self._logits_V, self._ahead = logits_TV[0], _Ahead(ids, logits_TV[1:], end)
        return len(ids)

    @property
    def num_pending(self) -> int:
        """Tokens that the next call runs: those whose state is not known."""
        return len(self._segments[-1].ids) if self._after is None else 0

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
        left, self._ahead = count, None
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
        self._after = self._logits_V = self._ahead = None

    def unblend(self) -> None:
        """Take back what `blend` did, where no token came of it."""
        state, ids, blend = self._segments[-1]
        if blend is not None:
            self._segments[-1] = Segment(state, ids)
            self._after = self._logits_V = self._ahead = None

    def save(self, path: str | Path, *, history: int = SAVED_HISTORY) -> None:
        """Write the state file: some kilobytes, bound to the model, replaced as a whole or not at all.

        Once loaded, the session can be rewound by `history` tokens, if no token before the last was blended.
        """
        _check_history(history)
        kept: list[Segment] = []
        for segment in reversed(self._segments):
            if kept and (segment.blend or sum(len(s.ids) for s in kept) > history):
                break
            kept.insert(0, segment)
        runs, state_S = [segment.ids for segment in kept], self._engine.download(kept[0].state)
        held = sum(map(len, runs))  # as many tokens it can be rewound by, and RECENT are left then
        recent = list(self._recent)[-RECENT - max(history, held) :]
        saved = Saved(self._position, state_S, runs, recent, kept[-1].blend)
        write_state(Path(path), self.identity, saved)

    def _append(self, ids: list[int]) -> None:
        place, count, self._ahead = 0, len(ids), None
        while place < count:
            tail = self._segments[-1]
            pending = self._after is None and tail.blend is None
            if pending and (room := self._engine.chunk - len(tail.ids)) > 0:
                taken = ids[place : place + room]
                self._segments[-1] = Segment(tail.state, tail.ids + taken)
            else:
                taken = ids[place : place + self._engine.chunk]
                self._segments.append(Segment(self._state(), taken))
                self._after = None
            self._logits_V = None
            place += len(taken)
            self._count(taken)

    def _count(self, ids: list[int]) -> None:
        """Note tokens that the last segment took."""
        self._held += len(ids)
        # One token more than the history stays, so that logits can always be computed again.
        while self._held - len(self._segments[0].ids) > self._history:
            self._held -= len(self._segments.popleft().ids)
        self._position += len(ids)
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
    saved = read_state(path, identity, engine.config)
    segments: list[Segment] = []
    before = engine.upload(saved.state_S)
    for run in saved.runs:
        if segments:
            _, before = engine.last(segments[-1].ids, before)
        segments.append(Segment(before, run))
    segments[-1] = segments[-1]._replace(blend=saved.blend)
    position, recent = saved.position, saved.recent
    return Session(engine, tokenizer, identity, segments, history=history, position=position, recent=recent)


def _check_history(history: int) -> None:
    if type(history) is not int or not 0 <= history <= MOST_HISTORY:
        raise ParameterError(
            f"history: expected 0 to {MOST_HISTORY} tokens, got {shown(history)}; 64 is usual"
        )
