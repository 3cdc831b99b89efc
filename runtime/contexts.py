"""What a token costs after so many others: fresh processes that read a context and then decode.

Each process loads tokenizer and graph, reads a prompt and takes its first token, which is the cold start.
Then it begins again, reads as many tokens as the context has, and decodes greedily, one token at a time. All
that it holds on the way is in its peak of memory. It is a `Stepper` that runs the graph, so that models of
any kind of state are measured in one loop, on the CPU and one thread.

Speed is of the processor's time, the median over tokens: on a machine that does nothing else it is that of
the clock, and on any other it is what it would be there.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .container import shown
from .errors import ParameterError
from .footprint import PROMPT, Child
from .memory import read_memory
from .stages import own_peak

REPEATS = 3
_STAGES = ("first_token", "decoded")
_CODE = f"from {__package__}.contexts import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextCost:
    """What decoding costs after a context: medians over processes."""

    tokens_per_second: float
    """Decoding, by the processor's time."""
    tokens_per_second_by_clock: float
    """The same by the clock."""
    peak: int | None
    """The most resident memory of the process, in bytes; None where the system does not tell."""
    first_token: float
    """Seconds from starting the process until the first token after a short prompt."""


def measure_context(
    graph: Path,
    tokenizer: Path,
    context: int,
    *,
    chunk: int,
    block: int = 0,
    tokens: int,
    repeats: int = REPEATS,
) -> ContextCost:
    """Measure a graph in fresh processes; `chunk` and `block` are as `Stepper` takes them.

    Raises:
        ParameterError: a number that makes no sense.
        BundleError: the graph is refused.
        MeasureError: a process died.
    """
    for name, value, least in (("context", context, 0), ("tokens", tokens, 1), ("repeats", repeats, 1)):
        if type(value) is not int or value < least:
            raise ParameterError(
                f"{name}: expected a whole number from {least}, got {shown(value)}; give one"
            )
    asked: dict[str, Any] = {"graph": str(graph), "tokenizer": str(tokenizer), "context": context}
    asked |= {"chunk": chunk, "block": block, "tokens": tokens}
    lives = [_live(asked) for _ in range(repeats)]
    peaks = [life["peak"] for life in lives if life["peak"] is not None]
    return ContextCost(
        tokens_per_second=1 / median(life["cpu"] for life in lives),
        tokens_per_second_by_clock=1 / median(life["wall"] for life in lives),
        peak=int(median(peaks)) if peaks else None,
        first_token=median(life["first_token"] for life in lives),
    )


def _live(asked: dict[str, Any]) -> dict[str, Any]:
    """One process."""
    with Child(asked, _CODE) as child:
        stages = child.life(_STAGES)
        next(stages)
        first_token = time.perf_counter() - child.started
        told = next(stages)
        peak = told["peak"] or read_memory(told["pid"]).peak
    return {"first_token": first_token, "peak": peak, "cpu": told["cpu"], "wall": told["wall"]}


def main() -> None:
    """Be that process, with what the first argument asks for, as JSON."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    from .errors import SdgmError

    def tell(stage: str, **facts: object) -> None:
        sys.stdout.write(f"{json.dumps({'stage': stage, 'pid': os.getpid(), 'peak': own_peak(), **facts})}\n")
        sys.stdout.flush()

    try:
        from tokenizers import Tokenizer

        from .stepper import Stepper

        tokenizer = Tokenizer.from_file(asked["tokenizer"])
        prompt = [0, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]
        capacity = max(len(prompt), asked["context"] + asked["tokens"])
        sizes = {"chunk": asked["chunk"], "block": asked["block"], "capacity": capacity}
        stepper = Stepper(Path(asked["graph"]), **sizes)
        tokenizer.decode([int(stepper.read(prompt).argmax())])
        tell("first_token")
        sys.stdin.readline()
        stepper.reset()
        token = 0
        for ids in _text(asked["context"], tokenizer.get_vocab_size()):
            token = int(stepper.read(ids).argmax())
        cpu, wall = [], []
        for _ in range(asked["tokens"]):
            at = time.process_time(), time.perf_counter()
            token = int(stepper.step(token).argmax())
            cpu.append(time.process_time() - at[0])
            wall.append(time.perf_counter() - at[1])
        tell("decoded", cpu=median(cpu), wall=median(wall))
        sys.stdin.readline()
    except SdgmError as e:
        tell("error", kind=type(e).__name__, message=str(e))


def _text(length: int, vocab_size: int, piece: int = 1024) -> Iterator[list[int]]:
    """Tokens that follow no pattern, in pieces."""
    for at in range(0, length, piece):
        yield [7919 * i % vocab_size for i in range(at, min(at + piece, length))]
