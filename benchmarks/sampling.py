"""What choosing a token costs: `Sampler.sample` alone, without a model.

Logits are like those of a language model (Zipf's law with noise) or nearly flat, the worst case of `top_p`.
Prints a table of medians in microseconds; run it with OMP_NUM_THREADS=1 on an idle machine.
"""

import platform
import statistics
import timeit

import numpy as np

from sdgm_edge.runtime import Sampler, SamplingParams

SETTINGS = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "temperature, top_k 40": {"temperature": 0.8, "top_k": 40},
    "temperature, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "temperature, min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "top_k 40, repetition_penalty": {"top_k": 40, "repetition_penalty": 1.2},
    "top_k 40, no_repeat_ngram_size 3": {"top_k": 40, "no_repeat_ngram_size": 3},
    "top_k 40, logprobs 5": {"top_k": 40, "logprobs": 5},
}


def logits_like(kind: str, vocab_size: int) -> np.ndarray:
    """Return logits in random order, (V,)."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(vocab_size)
    logits = 1.5 * noise if kind == "flat" else noise - 1.6 * np.log(np.arange(1, vocab_size + 1))
    return rng.permutation(logits).astype(np.float32)


def microseconds(params: dict, logits: np.ndarray, calls: int = 300) -> float:
    """Return the median time of one call."""
    sampler = Sampler(SamplingParams(seed=1, **params), len(logits), range(300))
    return (
        statistics.median(timeit.repeat(lambda: sampler.sample(logits), number=calls, repeat=9)) / calls * 1e6
    )


def main() -> None:
    """Measure and print."""
    columns = [(kind, size) for size in (4096, 32_000) for kind in ("zipf", "flat")]
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, µs per token\n")
    print("| | " + " | ".join(f"{kind}, V {size}" for kind, size in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, params in SETTINGS.items():
        times = [microseconds(params, logits_like(kind, size)) for kind, size in columns]
        print(f"| {name} | " + " | ".join(f"{time:.1f}" for time in times) + " |")


if __name__ == "__main__":
    main()
