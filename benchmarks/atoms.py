"""What atoms are worth: quality and speed of a run's model with all of its atoms, half of them, a quarter, …

    python benchmarks/atoms.py RUN [--bits 8] [--tokens 16384] [--json]

Each time the strongest atoms of every layer are kept, as `sdgm-edge export --atoms` keeps them. Scored is the
held-out text of the run, or its beginning. Speed is that of the graph, without sampling, on one thread.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sdgm_edge.export.atoms import reduced
from sdgm_edge.export.gates import score_graph
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.pipeline import measure_speed
from sdgm_edge.export.variants import build, bundle_config, variant_of

from sdgm_edge.run import Run, load_run
from sdgm_edge.runtime import Engine
from sdgm_edge.tokenization import BEGIN_ID, Tokenizer


def measure(run: Run, bits: int, num_tokens: int) -> dict[str, Any]:
    """Size, quality and speed of one variant of a run's model."""
    tokenizer, weights, variant = Tokenizer.load(run.tokenizer_path), weights_of(run.model), variant_of(bits)
    graph = build(run.config, weights, variant.plan(weights))
    engine = Engine(graph, bundle_config(run.config), variant.file, providers="cpu")
    ids = tokenizer.encode(run.heldout)[:num_tokens]
    score = score_graph(engine, tokenizer.decode(ids), ids, BEGIN_ID, has_unk=tokenizer.kind == "word")
    decode, prompt = measure_speed(engine)
    return {
        "atoms": run.config.num_atoms,
        "bytes": len(graph),
        "state_bytes": 4 * run.config.state_size,
        "nats_per_token": score.nll / score.num_tokens,
        "token_perplexity": score.token_perplexity,
        "bits_per_byte": None if score.has_unk else score.bits_per_byte,
        "decode_tokens_per_second": decode,
        "prompt_tokens_per_second": prompt,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what atoms are worth, on this machine.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    run = load_run(options.run)
    found, count = [measure(run, options.bits, options.tokens)], run.config.num_atoms // 2
    while count >= 8:
        found.append(measure(reduced(run, count), options.bits, options.tokens))
        count //= 2
    if options.json:
        print(json.dumps({"run": str(options.run), "bits": options.bits, "budgets": found}, indent=2))
        return
    print(f"{options.run}, {options.bits} bits: the strongest atoms of each layer")
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
