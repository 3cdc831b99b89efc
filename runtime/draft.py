"""Drafts: what comes next if the text repeats itself.

A text that quotes, lists, or edits what stands before it says the same runs of tokens again. Where its end
has occurred before, what followed there is a guess at what follows now. Several guesses are run in one call
of the graph, which costs little more than one token, and then the sampler draws as it always does: where it
draws what was guessed, the next logits are there already. Nothing is accepted that would not have been drawn,
so the text is the same, token for token, as without a draft.

The graph tells the state after the last of its tokens alone. Where a guess fails, nothing is rolled back: the
state of before is still there, and the tokens that were right are run again in the next call, which they
make a little longer.

Whether to guess is learned as the text goes on. Every token, drafted or not, tells whether following the
match would have been right; how often it was, by the length of the match, is the chance of the next guess.
A text that does not repeat itself is drafted nothing, and pays for a look-up a token.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

REACH = 4096
"""Matches are found so far back at least, and twice as far at most."""
LEAST = 3
"""Tokens that a match begins with."""
LONGEST = 16
"""Matches from here on are as good as each other."""
SETUP, ROW = 0.15, 0.25
"""What several tokens at once cost in addition to one, and each of them, in calls of one token."""
RATE = 1 / 16
"""Weight of the newest token in the chance that a guess is right."""


class Drafted(NamedTuple):
    """What drafts did for a generation."""

    proposed: int
    """Tokens that were guessed and checked."""
    accepted: int
    """Those of them that the text went on with."""
    calls: int
    """Calls of the graph that chose the tokens; without drafts, as many as tokens."""


class Drafter:
    """Guesses the next tokens from the text so far: constant time a token, bounded memory."""

    def __init__(self, vocab_size: int, ids: Iterable[int] = ()) -> None:
        self._size = vocab_size
        self._ids = array("I")
        self._dropped = 0
        """Tokens before the first of `_ids`."""
        self._after: dict[int, int] = {}
        """Run of tokens, as one number, to the place after it; `_older` holds those of before."""
        self._older: dict[int, int] = {}
        self._run, self._runs = 0, vocab_size**LEAST
        """The last tokens as one number, and how many such numbers there are."""
        self._at, self._length = 0, 0
        """Where the match goes on in `_ids`, and how long it is; 0 is none."""
        self._right = [length / (length + 4) for length in range(LONGEST + 1)]
        """The chance that a match goes on, by its length."""
        self.extend(ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        ids, length = self._ids, self._length
        if length:
            right = ids[self._at] == token
            self._right[length] += RATE * (right - self._right[length])
            self._at += 1
            self._length = length = min(length + 1, LONGEST) if right else 0
        ids.append(token)
        run = self._run = (self._run * self._size + token) % self._runs
        if (place := self._dropped + len(ids)) >= LEAST:
            if not length and (at := self._after.get(run) or self._older.get(run) or 0) > self._dropped:
                self._at, self._length = at - self._dropped, LEAST
            self._after[run] = place
        if len(ids) == 2 * REACH:
            del ids[:REACH]
            self._dropped += REACH
            self._older, self._after = self._after, {}
            self._at -= REACH
            self._length = self._length if self._at >= 0 else 0

    @property
    def follows(self) -> bool:
        """Whether the end of the text has occurred before."""
        return self._length > 0

    def propose(self, most: int) -> list[int]:
        """Guess up to `most` tokens: as many as are likely to be worth their cost, often none."""
        draft: list[int] = []
        chance, expected = 1.0, 0.0
        ids, at = self._ids, self._at
        if self._length:
            for length in range(self._length, self._length + most):
                likely = chance * self._right[min(length, LONGEST)]
                if likely < ROW:
                    break
                chance = likely
                expected += chance
                draft.append(ids[at] if at < len(ids) else draft[at - len(ids)])  # a text may repeat itself
                at += 1
        # Of a draft that fails, what was right is run again, with the token after it.
        again = (1 - chance) * (expected + 1)
        return draft if expected > SETUP + ROW * (len(draft) + again) else []
