"""What drafts bring: tokens a second with and without, on texts that repeat themselves and that do not.

    python benchmarks/drafts.py BUNDLE [--variant int8] [--draft 16] [--json]

Both ways generate the same tokens, which is checked. They take turns, so that what else the machine does
weighs on both; of each the quickest of the rounds is told.
"""

import argparse
import json
from typing import Any

from sdgm_edge.runtime import Generation, Generator, SdgmError

TOKENS, ROUNDS = 512, 5


def texts(gen: Generator) -> dict[str, dict[str, object]]:
    """Prompts and parameters by name; the prompts are made up by the model."""
    made_up = gen.generate(
        None, max_new_tokens=200, temperature=0.8, top_p=0.95, seed=0, logit_bias=ends(gen)
    )
    text = made_up.text
    drawn = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
    return {
        "quotes: each of its own words is forced": {"prompt": text, "forced_tokens": made_up.tokens},
        "greedy, ends in a circle": {"prompt": text, "temperature": 0.0},
        "drawn": {"prompt": text, **drawn},
        "drawn, nothing said twice": {"prompt": text, **drawn, "no_repeat_ngram_size": 2},
    }


def ends(gen: Generator) -> dict[int, float]:
    """A bias that lets no text end."""
    return dict.fromkeys(gen.bundle.generation.end_tokens, -100.0)


def timed(gen: Generator, params: dict[str, object], draft: int) -> Generation:
    """Generate."""
    count = len(params.get("forced_tokens", ())) or TOKENS  # type: ignore[arg-type]
    options = {"max_new_tokens": count, "logit_bias": {} if "forced_tokens" in params else ends(gen)}
    return gen.generate(**options, **params, draft=draft)  # type: ignore[arg-type]


def measure(gen: Generator, draft: int, rounds: int) -> list[dict[str, Any]]:
    """What each text costs, with drafts and without."""
    found: list[dict[str, Any]] = []
    for name, params in texts(gen).items():
        best: dict[int, Generation] = {}
        for _ in range(rounds):
            for length in (0, draft):
                made = timed(gen, params, length)
                if length not in best or made.timing.seconds < best[length].timing.seconds:
                    best[length] = made
        plain, drafted = best[0], best[draft]
        assert plain.tokens == drafted.tokens, name
        assert drafted.drafted is not None
        found.append(
            {
                "text": name,
                "tokens": len(plain.tokens),
                "calls": drafted.drafted.calls,
                "proposed": drafted.drafted.proposed,
                "accepted": drafted.drafted.accepted,
                "plain_tokens_per_second": plain.timing.tokens_per_second,
                "draft_tokens_per_second": drafted.timing.tokens_per_second,
            }
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure what drafts bring, on this machine.")
    parser.add_argument("bundle")
    parser.add_argument("--variant")
    parser.add_argument("--draft", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    try:
        gen = Generator.load(options.bundle, options.variant, "cpu")
        found = measure(gen, options.draft, options.rounds)
    except SdgmError as reason:
        parser.exit(2, f"error: {reason}\n")
    if options.json:
        print(json.dumps({"variant": gen.variant, "draft": options.draft, "texts": found}, indent=2))
        return
    print(f"{options.bundle}, {gen.variant}, drafts of {options.draft}; tokens a second, the best of rounds")
    for row in found:
        plain, drafted = row["plain_tokens_per_second"], row["draft_tokens_per_second"]
        print(
            f"  {row['text']:42} {plain:7.0f} → {drafted:7.0f}  ({drafted / plain - 1:+.1%}; "
            f"{row['accepted']} of {row['proposed']} right, {row['calls']} calls for {row['tokens']} tokens)"
        )


if __name__ == "__main__":
    main()
