"""What looking back is worth: quality, speed and state of a run whose head points, by how far back it looks.

    python benchmarks/windows.py RUN TEXT [--windows 64,128] [--bits 8] [--tokens 16384] [--rounds 9] [--json]

By default half of the tokens that it was trained with, all, twice and four times as many. The run is exported
with each, and measured as `atoms.py` measures: one thread, medians of rounds in which all take their turn.
"""

import argparse
import json
import tempfile
from pathlib import Path

from atoms import ROUNDS, measure

from sdgm_edge.export import export_run
from sdgm_edge.run import read_run_config
from sdgm_edge.runtime import Generator, SdgmError, pinned
from sdgm_edge.sources import read_text


def numbers(text: str) -> list[int]:
    """Numbers with commas."""
    return [int(number) for number in text.split(",")]


def exported(run: Path, windows: list[int], bits: int, folder: Path) -> list[Generator]:
    """The run as a bundle with each of the windows, loaded."""
    paths = [folder / str(window) for window in windows]
    for path, window in zip(paths, windows, strict=True):
        export_run(run, path, (bits,), copy_window=window, force=True)
    return [Generator.load(path, providers="cpu", threads=1) for path in paths]


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description="Measure what looking back is worth, on this machine.")
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=numbers, help="numbers of tokens, with commas")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            M = read_run_config(options.run).model.copy_window
            windows = options.windows or [max(1, M // 2), M, 2 * M, 4 * M]
            text = read_text([options.text])
            gens = exported(options.run, windows, options.bits, Path(folder))
        except SdgmError as reason:
            parser.exit(2, f"error: {reason}\n")
        with pinned(1):
            rows = measure(gens, text, options.tokens, options.rounds)
    found = [{"window": window, **row} for window, row in zip(windows, rows, strict=True)]
    variant = gens[0].variant
    if options.json:
        print(json.dumps({"run": str(options.run), "variant": variant, "windows": found}, indent=2))
        return
    print(f"{options.run}, {variant}: a head that looks back over so many tokens, trained with {M}")
    print("  tokens  state KB  bits/byte  perplexity  tokens/s  prompt tokens/s")
    for row in found:
        bits = "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        print(
            f"  {row['window']:6} {row['state_bytes'] / 1e3:9.1f} {bits:>10} {row['token_perplexity']:11.2f} "
            f"{row['decode_tokens_per_second']:9.0f} {row['prompt_tokens_per_second']:16.0f}"
        )


if __name__ == "__main__":
    main()
