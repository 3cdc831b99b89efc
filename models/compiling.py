"""What `torch.compile` is kept out of."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Keep `torch.compile` out of a function, as `torch.compiler.disable` does, but load no compiler for it.

    That takes as long as loading torch, and is left to whoever compiles something or makes an optimizer.
    """
    kept_out: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal kept_out
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            if kept_out is None:
                kept_out = torch.compiler.disable(function)
            return kept_out(*args, **kwargs)
        return function(*args, **kwargs)

    return call
