"""What `sdgm-edge plan` tells of the presets before they are trained, against what they cost when they are.

    python benchmarks/plan.py                 # edge-nano, edge-micro, edge-small in 8 and 4 bits
    python benchmarks/plan.py --bits 32 --json

The models have random weights of full rank and the tokenizer of a text, where `plan` makes do with stand-ins.
Speed is tg128 of `sdgm-edge bench`, by the processor's time; memory is the peak of its fresh processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bundles import EDGE, Bench, described
from sdgm_edge.export.variants import VARIANTS

from sdgm_edge.console import print_table
from sdgm_edge.export import BITS, Costs, Wishes
from sdgm_edge.models import preset
from sdgm_edge.runtime import measure_speed

LIMITS = {"bundle, MB": 0.10, "peak RSS, MB": 0.10, "generating, tokens/s": 0.25}
"""How far off a figure may be, as a part of what is measured."""


@dataclass(frozen=True)
class Row:
    """One figure of one model."""

    model: str
    figure: str
    told: float
    measured: float

    @property
    def off(self) -> float:
        """How far it was off, as a part of what is measured."""
        return self.told / self.measured - 1

    @property
    def kept(self) -> bool:
        """Whether that is within its limit."""
        return abs(self.off) <= LIMITS[self.figure]


def compare(bits: Sequence[int], repeats: int) -> Iterator[Row]:
    """Tell and measure; on stderr what is being done."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    costs = Costs(Wishes(bits=tuple(bits)), say)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), None)
        for name in EDGE:
            for count in bits:
                told = costs.of(preset(name), count)
                path = bench.write(f"{name}-{count}", preset(name), count)
                speed = measure_speed(path, depths=(0,), repeats=repeats, progress=say)
                size = sum(file.stat().st_size for file in path.iterdir())
                model = f"{name} {VARIANTS[count].name}"
                yield Row(model, "bundle, MB", told.bundle / 1e6, size / 1e6)
                if told.peak is not None and speed.footprint.peak is not None:
                    yield Row(model, "peak RSS, MB", told.peak / 1e6, speed.footprint.peak / 1e6)
                generating = speed.tests[1].tokens_per_cpu_second
                yield Row(model, "generating, tokens/s", told.tokens_per_second, generating)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare what plan tells with what is measured.")
    parser.add_argument("--bits", type=int, action="append", choices=list(VARIANTS), help="default: 8 and 4")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of a measurement")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    here, rows = described(), list(compare(options.bits or BITS, options.repeats))
    if options.json:
        found = [asdict(row) | {"off": row.off, "kept": row.kept} for row in rows]
        print(json.dumps({"machine": here, "limits": LIMITS, "figures": found}, indent=2, ensure_ascii=False))
        return
    print(", ".join(f"{name} {value}" for name, value in here.items()))
    print_table(
        ("model", "", "told before", "measured", "off", "limit", "kept"),
        [
            (
                row.model,
                row.figure,
                row.told,
                row.measured,
                f"{row.off:+.1%}",
                f"{LIMITS[row.figure]:.0%}",
                row.kept,
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
