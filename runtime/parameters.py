"""The sampling parameters: every knob with its range, checked when it is set; to and from JSON."""

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from .container import shown
from .errors import ParameterError


def refuse(name: str, expected: str, got: object, remedy: str) -> ParameterError:
    """Make the error for one parameter: what, expected, got, remedy."""
    return ParameterError(f"{name}: expected {expected}, got {shown(got)}; {remedy}")


def _integer(name: str, value: Any, low: int, high: float, remedy: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise refuse(
            name, f"an integer of at least {low}" + f" and at most {high}" * (high < math.inf), value, remedy
        )
    return number


def _real(name: str, value: Any, low: float, high: float, remedy: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise refuse(name, f"a number from {low:g} to {high:g}", value, remedy)
    return number


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refuse(name, "a sequence of token ids", value, "give a list such as [5, 17]")
    return tuple(_integer(name, token, 0, math.inf, "give token ids, not text") for token in value)


def _weights(name: str, value: Any, low: float, high: float) -> dict[int, float]:
    """A mapping from non-negative integers (as text in JSON) to numbers in a range."""
    if not isinstance(value, Mapping):
        raise refuse(name, "a mapping from ids to numbers", value, "give a dict such as {5: 2.0}")
    weights = {}
    for key, number in value.items():
        readable = isinstance(key, str) and re.fullmatch("[0-9]{1,20}", key)
        index = _integer(name, int(key) if readable else key, 0, math.inf, "the keys are ids")
        weights[index] = _real(f"{name}[{index}]", number, low, high, "choose a value in this range")
    return weights


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(text, str) and text for text in texts):
        raise refuse("stop", "texts of at least one character", value, r"give a list such as ['\n\n']")
    return texts


RECENT = 1024
"""Tokens that a session remembers for penalties on repetition."""
_OPTIONAL = ("seed", "logprobs")
_INTEGERS: dict[str, tuple[int, float, str]] = {
    "max_new_tokens": (1, math.inf, "ask for at least one token"),
    "top_k": (0, math.inf, "0 keeps all tokens"),
    "repetition_window": (1, RECENT, "256 is usual"),
    "no_repeat_ngram_size": (0, math.inf, "0 is off"),
    "draft": (0, 64, "0 is off, 16 is usual"),
    "seed": (0, 2**64 - 1, "None draws a fresh seed"),
    "logprobs": (0, 1000, "None is off"),
}
_REALS: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 100, "0 is greedy, 1 is the model's own"),
    "top_p": (0, 1, "1 keeps all tokens"),
    "min_p": (0, 1, "0 keeps all tokens"),
    "repetition_penalty": (0.1, 10, "1 is off"),
    "prior_strength": (0, 1, "0 is the plain model"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The defaults draw from the model's own distribution, unchanged.

    >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1).top_p
    0.95
    """

    max_new_tokens: int = 256
    """How many tokens to generate at most; at least 1."""
    temperature: float = 1.0
    """0 is greedy; from 0.001 to 100, logits are divided by it: below 1 safer, above 1 wilder."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that together have this probability; above 0, and 1 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least this times as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides (above 1: weakens) the logit of each distinct token in the window; from 0.1 to 10, 1 is off."""
    repetition_window: int = 256
    """How many of the last tokens the penalty and the n-gram rule look at; from 1 to 1024."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice in the window; 0 is off."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token id to what is added to its logit, from -100 to 100."""
    banned_tokens: tuple[int, ...] = ()
    """Token ids that never occur."""
    forced_tokens: tuple[int, ...] = ()
    """Token ids that the new text begins with (after healing, where that is at work)."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation, and are not part of it."""
    seed: int | None = None
    """The same seed and the same logits give the same tokens; None draws a fresh seed."""
    logprobs: int | None = None
    """How many likeliest alternatives to report per token; 0: the token alone, None: off."""
    draft: int = 0
    """How many tokens to guess at most and check in one call, where the text repeats itself; 0 is off."""
    prior_strength: float = 0.0
    """η from 0 to 1: how far mixing vectors move to a draw from the mixture; 0 is the plain model."""
    prior_mode: str = "posterior"
    """The mixture component is drawn for this context ("posterior") or by the weights alone ("prior")."""
    steer: Mapping[int, float] | int | None = None
    """A component to pin, or component to factor on its probability (1 where not named, 0 excludes)."""

    def __post_init__(self) -> None:
        for name, (low, high, remedy) in _INTEGERS.items():
            if getattr(self, name) is not None or name not in _OPTIONAL:
                self._put(name, _integer(name, getattr(self, name), low, high, remedy))
        for name, (least, most, remedy) in _REALS.items():
            self._put(name, _real(name, getattr(self, name), least, most, remedy))
        self._put("logit_bias", _weights("logit_bias", self.logit_bias, -100, 100))
        self._put("banned_tokens", _ids("banned_tokens", self.banned_tokens))
        self._put("forced_tokens", _ids("forced_tokens", self.forced_tokens))
        self._put("stop", _stops(self.stop))
        if isinstance(self.steer, Mapping):
            self._put("steer", _weights("steer", self.steer, 0, 1e6))
        elif self.steer is not None:
            remedy = "give one component, or a dict from components to factors"
            self._put("steer", _integer("steer", self.steer, 0, math.inf, remedy))
        self._check_together()

    def _put(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_together(self) -> None:
        if 0 < self.temperature < 1e-3:
            raise refuse("temperature", "0, or at least 0.001", self.temperature, "0 is greedy")
        if self.top_p == 0:
            raise refuse("top_p", "a number above 0", self.top_p, "use temperature=0 for greedy decoding")
        if (size := self.no_repeat_ngram_size) > self.repetition_window:
            expected = f"at most the repetition_window of {self.repetition_window}"
            raise refuse("no_repeat_ngram_size", expected, size, "lengthen the window or shorten the n-gram")
        if clash := set(self.banned_tokens) & set(self.forced_tokens):
            raise refuse("forced_tokens", "no banned token", min(clash), "take it out of one of the two")
        if self.draft and self.prior_strength:
            expected = "0 beside prior_strength, whose draws for a token wait for the one before"
            raise refuse("draft", expected, self.draft, "leave one of them out")
        if self.prior_mode not in ("posterior", "prior"):
            raise refuse("prior_mode", "'posterior' or 'prior'", self.prior_mode, "'prior' ignores context")
        if self.prior_strength == 0 and (self.steer is not None or self.prior_mode == "prior"):
            expected = "a number above 0, without which steer and prior_mode='prior' do nothing"
            raise refuse("prior_strength", expected, self.prior_strength, "set it, for example to 0.5")

    def replace(self, **kwargs: Any) -> Self:
        """These parameters with some changed. Raises ParameterError that names an unknown one."""
        return dataclasses.replace(self, **_known(type(self), kwargs))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` gave. Raises ParameterError on unknown keys."""
        if not isinstance(values, Mapping):
            raise refuse("sampling parameters", "a mapping", values, "give what to_dict returned")
        return cls(**_known(cls, {str(name): value for name, value in values.items()}))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON knows them: `generation_config.json`."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping):
                value = {str(key): number for key, number in value.items()}
            values[field.name] = list(value) if isinstance(value, tuple) else value
        return values

    def rng(self, stream: int = 0) -> "np.random.Generator":
        """Return a PCG64 generator of the seed; stream 0 draws tokens (see `Uniform`), 1 mixing vectors."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(stream,))))


def _known(cls: type[SamplingParams], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    for name in kwargs:
        if name not in names:
            import difflib

            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "see docs/sampling.md"
            raise refuse("unknown sampling parameter", "one of " + ", ".join(names), name, remedy)
    return kwargs
