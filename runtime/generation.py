"""The loop that turns logits into text, one token after another.

A stream remembers the ids of its tokens, two or four bytes each: text and all else that `generation` tells
are made from them when it is asked for. Only `logprobs` are kept as they come.
"""

import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import NamedTuple

import numpy as np

from .draft import Drafted, Drafter
from .engine import Floats
from .errors import SdgmError
from .mixture import Mixture
from .parameters import SamplingParams
from .sampling import Sampled, Sampler
from .session import Session
from .text import TokenStream, Vocabulary

Cancel = Callable[[], bool]
Progress = Callable[[int, int | None], object]
"""Told how many tokens of a prompt are read, and how many there are, None where it is not known yet."""
_BATCH = _BLOCK = 1024


class Timing(NamedTuple):
    """How long a generation took, without the time that its consumer took."""

    prompt_tokens: int
    """Tokens that were read."""
    prompt_seconds: float
    """To read them and choose the first token."""
    new_tokens: int
    """Tokens that were generated."""
    seconds: float
    """All together."""

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        rest = self.seconds - self.prompt_seconds
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0


class Generation(NamedTuple):
    """What was generated."""

    text: str
    """The text, without the prompt and without the stop text."""
    tokens: list[int]
    """The tokens that were sampled, all of them."""
    sampled: list[Sampled]
    """For each token its logprob and the top alternatives, where `logprobs` asked for them."""
    finish_reason: str
    """"length", "stop" (a stop text), "end" (the model ended the text), "cancelled", or "unfinished"."""
    stop: str | None
    """The stop text that was met."""
    timing: Timing
    """How long it took."""
    drafted: Drafted | None = None
    """What drafts did, where `draft` asked for them."""

    @property
    def logprobs(self) -> list[float]:
        """The log-probability of each token, where `logprobs` asked for them."""
        return [s.logprob for s in self.sampled if s.logprob is not None]


class _Ids:
    """Ids in blocks: one array that grows would be copied again and again, and leave holes in memory."""

    def __init__(self, vocab_size: int) -> None:
        self._empty = array("H" if vocab_size <= 1 << 16 else "I", [0]) * _BLOCK
        self._blocks: list[array[int]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, token: int) -> None:
        place = self._count % _BLOCK
        if place == 0:
            self._blocks.append(self._empty[:])
        self._blocks[-1][place] = token
        self._count += 1

    def tolist(self) -> list[int]:
        return [token for block in self._blocks for token in block][: self._count]


class Stream(Iterator[str]):
    """Pieces of text as they are generated, each of whole characters; `generation` tells all about them."""

    def __init__(
        self,
        session: Session,
        vocabulary: Vocabulary,
        params: SamplingParams,
        ids: Iterable[int],
        *,
        removed: bytes = b"",
        end_tokens: Sequence[int] = (),
        mixture: Mixture | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`ids`: the prompt, fed first; `removed`: the bytes at its end that are to be sampled again."""
        Sampler(params, session.vocab_size)  # what it refuses is refused here, not at the first piece
        self._session, self._vocabulary, self._params = session, vocabulary, params
        self._end_tokens, self._mixture, self._cancel = frozenset(end_tokens), mixture, cancel
        self._progress = progress
        self._removed, self._before, self._continues = removed, b"", False
        self._tokens = _Ids(session.vocab_size)
        self._sampled: list[Sampled] | None = None if params.logprobs is None else []
        self._told, self._told_all = 0, False  # tokens whose text was given; whether the rest was, too
        self._finish_reason, self._ended = "unfinished", False  # whether the model ended the text
        self._stop: str | None = None
        self._prompt_tokens, self._prompt_seconds, self._seconds = 0, 0.0, 0.0
        self._drafter: Drafter | None = None
        self._proposed = self._accepted = 0
        self._steps = self._generate(ids)

    def __next__(self) -> str:
        started = time.perf_counter()
        try:
            return next(self._steps)
        finally:
            self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """Stop here; what was generated stays in `generation`."""
        self._steps.close()

    @property
    def generation(self) -> Generation:
        """What was generated so far."""
        tokens, text = self._tokens.tolist(), self._text()
        pieces = [text.push(token) for token in tokens[: self._told]]
        return Generation(
            text="".join(pieces) + (text.finish(ended=self._ended) if self._told_all else ""),
            tokens=tokens,
            sampled=[Sampled(token) for token in tokens] if self._sampled is None else self._sampled.copy(),
            finish_reason=self._finish_reason,
            stop=self._stop,
            timing=Timing(
                prompt_tokens=self._prompt_tokens,
                prompt_seconds=self._prompt_seconds,
                new_tokens=len(tokens),
                seconds=self._seconds,
            ),
            drafted=self._drafted(len(tokens)),
        )

    def _drafted(self, count: int) -> Drafted | None:
        if not self._params.draft:
            return None
        return Drafted(proposed=self._proposed, accepted=self._accepted, calls=count - self._accepted)

    def _text(self) -> TokenStream:
        return TokenStream(
            self._vocabulary,
            self._params.stop,
            skip=self._removed,
            before=self._before,
            continues=self._continues,
        )

    def _generate(self, ids: Iterable[int]) -> Generator[str, None, None]:
        started = time.perf_counter()
        session, params, end_tokens = self._session, self._params, self._end_tokens
        if params.draft:
            self._drafter = Drafter(session.vocab_size, session.tokens)
        self._prompt_tokens, whole = read(session, ids, self._cancel, self._progress, self._drafter)
        tokens = session.tokens
        sampler = Sampler(params, session.vocab_size, tokens)
        self._before, self._continues = self._vocabulary.tail(tokens), session.position > 0
        text, removed, draw, drafter = self._text(), self._removed, self._draw(), self._drafter
        if draw is None:
            session.unblend()  # of a text that was steered and then rewound
        for step in range(params.max_new_tokens):
            if not whole or (self._cancel is not None and self._cancel()):
                self._finish_reason = "cancelled"
                break
            if draw is not None:
                session.blend(params.prior_strength, draw, look=params.prior_mode == "posterior")
            if drafter is not None and drafter.follows and not session.looks_ahead:
                self._look(drafter, params.max_new_tokens - step)
            allowed = self._vocabulary.mask.allowed(removed) if removed else None
            try:
                sampled = sampler.sample(session.logits, allowed)
            except SdgmError:
                if draw is not None:
                    session.unblend()
                raise
            token = sampled.token
            self._accepted += session.push(token)
            if drafter is not None:
                drafter.push(token)
            self._tokens.append(token)
            if self._sampled is not None:
                self._sampled.append(sampled)
            if step == 0:
                self._prompt_seconds = time.perf_counter() - started
            if token in end_tokens:
                self._finish_reason, self._ended = "end", True
                break
            if removed:
                removed = self._vocabulary.mask.advance(removed, token)
            piece = text.push(token)
            self._told += 1
            if text.stopped is not None:
                self._finish_reason, self._stop = "stop", text.stopped
            if piece:
                yield piece
            if text.stopped is not None:
                break
        else:
            self._finish_reason = "length"
        rest, self._told_all = text.finish(ended=self._ended), True
        if text.stopped is not None:
            self._finish_reason, self._stop = "stop", text.stopped
        if rest:
            yield rest

    def _look(self, drafter: Drafter, left: int) -> None:
        """Run a draft ahead; together with what is pending, no call takes more than one token and a draft."""
        session, most = self._session, self._params.draft + 1
        if pending := session.num_pending:
            draft = drafter.propose(min(most - pending, left - 1))
            self._proposed += session.look(draft)

    def _draw(self) -> Callable[[Floats | None], Floats] | None:
        mixture, params = self._mixture, self._params
        if mixture is None or params.prior_strength == 0:
            return None
        rng, zeros_M = params.rng(1), np.zeros(mixture.size, np.float32)

        def draw(c_M: Floats | None) -> Floats:
            return mixture.draw(zeros_M if c_M is None else c_M, rng, params.prior_mode, params.steer)

        return draw


def read(
    session: Session,
    ids: Iterable[int],
    cancel: Cancel | None = None,
    progress: Progress | None = None,
    drafter: Drafter | None = None,
) -> tuple[int, bool]:
    """Feed a prompt until `cancel` is true; how many of its tokens were read, and whether all were."""
    before, total, batches = session.position, len(ids) if isinstance(ids, Sized) else None, iter(ids)
    count, whole = 0, True
    while batch := list(islice(batches, _BATCH)):
        if cancel is not None and cancel():
            whole = False
            break
        session.feed(batch)
        if drafter is not None:
            drafter.extend(batch)
        count = session.position - before
        if progress is not None:
            progress(count, total)
    if progress is not None:
        progress(count, count)
    return count, whole
