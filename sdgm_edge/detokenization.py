"""From the tokens of WikiText back to text as a person writes it.

WikiText is stored as tokens with spaces between: ` @-@ ` for a hyphen inside a word, a space before every
comma, ` = = Heading = = `, `<unk>` for a rare word. What a rare word was cannot be known, so a sentence that
has one is left out; the rest is joined as it is written.

>>> naturalize(' It was a " real @-@ time " game ( 2011 ) , wasn \\'t it ? It cost <unk> yen . ')
'It was a "real-time" game (2011), wasn\\'t it?'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

UNKNOWN = "<unk>"

_CLOSERS = (",", ";", ")", "]", ".", "?", "!")
_HEADING = re.compile(r"^(?:= )+(.*?)(?: =)+$")
_RULES = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:?!%)\]}]|\.{2,}|'(?:s|t|re|m|ve|ll|d)\b)(?!\w)"), r"\1"),
    (re.compile(r"([(\[{$£€₹#]) (?=\S)"), r"\1"),
    (re.compile(r"(?<=\w) (?='[A-Z][a-z])"), ""),  # O 'Brien
    (re.compile(r"(?<=s) ' (?=\w)"), "' "),  # the series ' gameplay
    (re.compile(r"(?<=\d) ([°′″])(?= |$)"), r"\1"),
)
_QUOTED = re.compile(r'(^|[ (\[])" (.*?) "(?=$|[ ,.;:?!)\]])')


def naturalize(line: str) -> str:
    """Return one line of WikiText as it was written, without the sentences that hold an unknown word."""
    text = line.strip()
    if heading := _HEADING.match(text):
        text = heading[1]
    text = " ".join(word for sentence in _sentences(text) if UNKNOWN not in sentence for word in sentence)
    text = _QUOTED.sub(r'\1"\2"', text)
    for pattern, written in _RULES:
        text = pattern.sub(written, text)
    return text


def _sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each sentence; what stands in quotation marks is never cut."""
    sentence: list[str] = []
    quoted = False
    words = text.split()
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        sentence.append(word)
        quoted ^= word == '"'
        ended = word if word != '"' else sentence[-2] if len(sentence) > 1 else ""
        if ended in (".", "?", "!") and not quoted and following not in _CLOSERS:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def naturalized(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of natural text: paragraphs and headings, those left with nothing dropped."""
    return (text for line in lines if (text := naturalize(line)))
