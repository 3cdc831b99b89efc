"""Run a bundle: text generation with numpy, onnxruntime and tokenizers alone.

    from sdgm_edge.runtime import Generator

    gen = Generator.load("model.sdgm")
    for piece in gen.stream("Once upon a time", max_new_tokens=64, temperature=0.8, seed=1):
        print(piece, end="", flush=True)

Names beside the errors are imported when they are first used: a program that only catches errors starts
without numpy, and one that only reads bundles without ONNX Runtime.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AccuracyError,
    BundleError,
    CacheError,
    CheckpointError,
    ConfigError,
    CorpusError,
    DivergedError,
    ExportError,
    MeasureError,
    ParameterError,
    ParityError,
    ProviderError,
    RunError,
    SdgmError,
    StateError,
    TokenizerError,
    UsageError,
)

if TYPE_CHECKING:
    from .atomic import check_place, replacing, replacing_folder, sweep
    from .atoms import atoms_step
    from .bundle import Bundle, check_replaceable, read_bundle, write_bundle
    from .container import decode_arrays, encode_arrays
    from .contexts import ContextCost, measure_context
    from .draft import Drafted
    from .engine import Blend, Engine
    from .footprint import Footprint, VariantFootprint, machine, measure_footprint, measure_memory
    from .generation import Generation, Stream, Timing
    from .generator import Generator, TokenLogprob
    from .manifest import LONGEST_NAME, BundleConfig, GenerationConfig, Golden, Manifest, Variant, encode_json
    from .memory import Memory, read_memory
    from .mixture import ComponentReport, Mixture
    from .parameters import SamplingParams
    from .prepared import Prepared, cache_folder, prepare
    from .providers import check_threads, open_graph
    from .sampling import Sampled, Sampler
    from .scoring import Score, chunk_nlls, count_words, score_chunks, token_nlls, with_line_end
    from .session import Session
    from .shipped import pretrained
    from .speed import Speed, SpeedTest, Spent, measure_speed, pinned, spent, time_graph
    from .stepper import Stepper
    from .text import Healing, HealingMask, TokenStream, Vocabulary, heal
    from .verification import VariantReport, VerifyReport, verify

_LAZY = {
    "check_place": "atomic",
    "replacing": "atomic",
    "replacing_folder": "atomic",
    "sweep": "atomic",
    "atoms_step": "atoms",
    "Bundle": "bundle",
    "check_replaceable": "bundle",
    "read_bundle": "bundle",
    "write_bundle": "bundle",
    "decode_arrays": "container",
    "encode_arrays": "container",
    "ContextCost": "contexts",
    "measure_context": "contexts",
    "Drafted": "draft",
    "Blend": "engine",
    "Engine": "engine",
    "Footprint": "footprint",
    "VariantFootprint": "footprint",
    "machine": "footprint",
    "measure_footprint": "footprint",
    "measure_memory": "footprint",
    "Generation": "generation",
    "Stream": "generation",
    "Timing": "generation",
    "Generator": "generator",
    "TokenLogprob": "generator",
    "LONGEST_NAME": "manifest",
    "BundleConfig": "manifest",
    "GenerationConfig": "manifest",
    "Golden": "manifest",
    "Manifest": "manifest",
    "Variant": "manifest",
    "encode_json": "manifest",
    "Memory": "memory",
    "read_memory": "memory",
    "ComponentReport": "mixture",
    "Mixture": "mixture",
    "SamplingParams": "parameters",
    "Prepared": "prepared",
    "cache_folder": "prepared",
    "prepare": "prepared",
    "check_threads": "providers",
    "open_graph": "providers",
    "Sampled": "sampling",
    "Sampler": "sampling",
    "Score": "scoring",
    "count_words": "scoring",
    "score_chunks": "scoring",
    "chunk_nlls": "scoring",
    "token_nlls": "scoring",
    "with_line_end": "scoring",
    "Session": "session",
    "pretrained": "shipped",
    "Speed": "speed",
    "SpeedTest": "speed",
    "Spent": "speed",
    "measure_speed": "speed",
    "pinned": "speed",
    "spent": "speed",
    "time_graph": "speed",
    "Stepper": "stepper",
    "VariantReport": "verification",
    "VerifyReport": "verification",
    "verify": "verification",
    "Healing": "text",
    "HealingMask": "text",
    "TokenStream": "text",
    "Vocabulary": "text",
    "heal": "text",
}

__all__ = [
    "LONGEST_NAME",
    "AccuracyError",
    "Blend",
    "Bundle",
    "BundleConfig",
    "BundleError",
    "CacheError",
    "CheckpointError",
    "ComponentReport",
    "ConfigError",
    "ContextCost",
    "CorpusError",
    "DivergedError",
    "Drafted",
    "Engine",
    "ExportError",
    "Footprint",
    "Generation",
    "GenerationConfig",
    "Generator",
    "Golden",
    "Healing",
    "HealingMask",
    "Manifest",
    "MeasureError",
    "Memory",
    "Mixture",
    "ParameterError",
    "ParityError",
    "Prepared",
    "ProviderError",
    "RunError",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "Score",
    "SdgmError",
    "Session",
    "Speed",
    "SpeedTest",
    "Spent",
    "StateError",
    "Stepper",
    "Stream",
    "Timing",
    "TokenLogprob",
    "TokenStream",
    "TokenizerError",
    "UsageError",
    "Variant",
    "VariantFootprint",
    "VariantReport",
    "VerifyReport",
    "Vocabulary",
    "atoms_step",
    "cache_folder",
    "check_place",
    "check_replaceable",
    "check_threads",
    "chunk_nlls",
    "count_words",
    "decode_arrays",
    "encode_arrays",
    "encode_json",
    "heal",
    "machine",
    "measure_context",
    "measure_footprint",
    "measure_memory",
    "measure_speed",
    "open_graph",
    "pinned",
    "prepare",
    "pretrained",
    "read_bundle",
    "read_memory",
    "replacing",
    "replacing_folder",
    "score_chunks",
    "spent",
    "sweep",
    "time_graph",
    "token_nlls",
    "verify",
    "with_line_end",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
