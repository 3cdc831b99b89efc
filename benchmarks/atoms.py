"""What atoms are worth: quality and speed of a bundle with all of its atoms, half of them, a quarter, …

    python benchmarks/atoms.py BUNDLE TEXT [--variant int8] [--tokens 16384] [--rounds 9] [--json]

Each time the strongest atoms of every layer run, as `Generator.load(BUNDLE, atoms=N)` takes them. Scored is
the text of a file, or its beginning. Speeds are medians of rounds, in which all take their turn, on one
thread: tokens one by one without sampling, and a prompt of 512.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sdgm_edge.runtime import Generator, pinned, spent

LEAST = 8
"""Atoms of the smallest budget, at least."""
DECODED, PROMPT, ROUNDS = 128, 512, 9


def budgets(bundle: Path, variant: str | None) -> list[Generator]:
    """The bundle with all of its atoms, half of them, and so on."""
    found = [Generator.load(bundle, variant, "cpu", 1)]
    count = found[0].atoms or 0
    while (count := count // 2) >= LEAST:
        fewer = Generator.load(bundle, variant, "cpu", 1, atoms=count)
        if fewer.atoms != found[-1].atoms:  # blocks of weights are kept whole
            found.append(fewer)
    return found


def decode(gen: Generator, ids: list[int]) -> None:
    """Run tokens one by one."""
    session = gen.session(history=0)
    for token in ids[:DECODED]:
        session.push(token)
        _ = session.logits


def prompt(gen: Generator, ids: list[int]) -> None:
    """Read a prompt."""
    session = gen.session(history=0)
    session.feed(ids[:PROMPT])
    _ = session.logits


def speeds(gens: list[Generator], ids: list[int], rounds: int = ROUNDS) -> list[tuple[float, float]]:
    """Tokens a second, one by one and of a prompt; the first round warms up."""
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds + 1):
        for i, gen in enumerate(gens):
            for j, work in enumerate((decode, prompt)):
                seconds.setdefault((i, j), []).append(spent(partial(work, gen, ids)).wall)
    lengths = min(DECODED, len(ids)), min(PROMPT, len(ids))
    rates = [[lengths[j] / median(seconds[i, j][1:]) for j in (0, 1)] for i in range(len(gens))]
    return [(decoded, read) for decoded, read in rates]


def measure(gens: list[Generator], text: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """What each of them costs, and gives on so many tokens from the beginning of a text."""
    text, found = gens[0].decode(gens[0].encode(text)[:tokens]), []
    for gen, speed in zip(gens, speeds(gens, gens[0].encode(text), rounds), strict=True):
        score = gen.score(text)
        found.append(
            {
                "atoms": gen.atoms,
                "bytes": gen.bundle.size(gen.variant),
                "state_bytes": 4 * gen.bundle.config.state_size,
                "nats_per_token": score.nll / score.num_tokens,
                "token_perplexity": score.token_perplexity,
                "bits_per_byte": None if score.has_unk else score.bits_per_byte,
                "decode_tokens_per_second": speed[0],
                "prompt_tokens_per_second": speed[1],
            }
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what atoms are worth, on this machine.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--variant")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with pinned(1):
        gens = budgets(options.bundle, options.variant)
        if gens[0].atoms is None:
            what = "expected ringing atoms in the order of their strength, got a bundle that tells no order"
            parser.exit(2, f"error: {options.bundle}: {what}; export a run of ringing atoms again\n")
        found = measure(gens, options.text.read_text(encoding="utf-8"), options.tokens, options.rounds)
    variant = gens[0].variant
    if options.json:
        print(json.dumps({"bundle": str(options.bundle), "variant": variant, "budgets": found}, indent=2))
        return
    print(f"{options.bundle}, {variant}: the strongest atoms of each layer")
    print("  atoms     MB  state KB  bits/byte  perplexity  nats more  tokens/s  prompt tokens/s")
    for row in found:
        bits = "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        more = row["nats_per_token"] / found[0]["nats_per_token"] - 1
        print(
            f"  {row['atoms']:5} {row['bytes'] / 1e6:6.2f} {row['state_bytes'] / 1e3:9.1f} {bits:>10} "
            f"{row['token_perplexity']:11.2f} {more:+10.2%} {row['decode_tokens_per_second']:9.0f} "
            f"{row['prompt_tokens_per_second']:16.0f}"
        )


if __name__ == "__main__":
    main()
