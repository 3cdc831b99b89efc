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
    """Keep `torch.compile` out of a function: `torch.compiler.disable`, which loads the compiler, later.

    To load it takes as long as to load torch, and only who compiles (or makes an optimizer) has it anyway.
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
