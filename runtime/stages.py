"""What a child process of `footprint` does: live a model's life in stages, and tell each to its parent.

It is measured from outside, so nothing is imported here that a program which generates would not import. A
stage is one line of JSON on stdout; where the parent asks for pauses, the child stands still until a line
comes back, and the parent looks at its memory.
"""

import json
import os
import sys
import time
from typing import Any

STAGES = ("interpreter", "imports", "session", "first_token", "after_tokens")


def main() -> None:
    """Go through the stages with what the first argument asks for, as JSON."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    begun = time.perf_counter()

    def reached(stage: str, **facts: object) -> None:
        seconds = time.perf_counter() - begun
        line = {"stage": stage, "pid": os.getpid(), "seconds": seconds, "cpu": time.process_time()}
        line |= {"peak": own_peak(), **facts}
        sys.stdout.write(f"{json.dumps(line)}\n")
        sys.stdout.flush()
        if asked["pauses"]:
            sys.stdin.readline()

    reached("interpreter")
    from .errors import SdgmError

    try:
        from .generator import Generator
        from .providers import onnxruntime

        onnxruntime()
        reached("imports")
        generator = Generator.load(
            asked["path"],
            asked["variant"],
            asked["providers"],
            asked["threads"],
            prepared=asked.get("prepared", False),
            atoms=asked.get("atoms"),
        )
        reached("session", provider=generator.provider)
        session = generator.session(history=0)  # as a text is generated that nobody will rewind
        params: dict[str, Any] = {"seed": 0, "banned_tokens": generator.bundle.generation.end_tokens}
        first = generator.generate(asked["prompt"], session=session, max_new_tokens=1, **params)
        reached("first_token", tokens=len(first.tokens))
        if asked["tokens"]:
            more = generator.generate(None, session=session, max_new_tokens=asked["tokens"], **params)
            reached("after_tokens", tokens=len(more.tokens))
    except SdgmError as e:
        reached("error", kind=type(e).__name__, message=str(e))


def own_peak() -> int | None:
    """The peak of this process in bytes where nobody else can ask for it, which is on macOS."""
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
