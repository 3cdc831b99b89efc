"""The command that finds a model for a device. What `cli.py` says of commands holds here too."""

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .commands_measure import BYTES, quantity

if TYPE_CHECKING:
    from sdgm_edge.export import PlanReport


def plan(
    budget: Annotated[str, typer.Option(help="Most that the bundle may take: 16MB, 8MiB.")] = "16MB",
    speed: Annotated[
        float, typer.Option(help="Least tokens a second here, one thread, without sampling; 0 for any.")
    ] = 0.0,
    max_rss: Annotated[
        str | None, typer.Option(help="Most memory of a process that generates, at its peak: 100MB.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option("--vocab", "--vocab-size", help="Tokens of the vocabulary.")
    ] = 4096,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="8, 4, 16 or 32; several are tried in this order. Default: 8, then 4."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the config for train here: plan.toml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Find a model that a device has room and time for, before anything is trained."""
    from sdgm_edge.export import BITS, Wishes, plan_model, plan_toml
    from sdgm_edge.runtime import ConfigError, check_place, replacing

    wishes = Wishes(
        bundle=quantity("--budget", budget, BYTES, "16MB"),
        speed=speed,
        vocab_size=vocab_size,
        memory=math.inf if max_rss is None else quantity("--max-rss", max_rss, BYTES, "100MB"),
        bits=tuple(dict.fromkeys(bits)) if bits else BITS,
    )
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out: expected a file to write, got the folder {out}; name a file in it")
        check_place(out, ConfigError)
    report = plan_model(wishes, lambda message: print(message, file=sys.stderr, flush=True))
    toml = plan_toml(report.proposed)
    if out is not None:
        with replacing(out, ConfigError) as file:
            file.write(toml.encode())
    commands = [f"sdgm-edge train my.txt --config {shlex.quote(str(out or 'plan.toml'))}"]
    if out is None and report.proposed.preset:
        commands = [f"sdgm-edge train my.txt --preset {report.proposed.preset} --vocab-size {vocab_size}"]
    commands.append(f"sdgm-edge export --bits {report.proposed.bits}")
    if as_json:
        console.print_json({**report.to_dict(), "config": toml, "commands": commands})
        return
    _print(report)
    if out is None and not report.proposed.preset:
        commands.insert(0, f"cat > plan.toml <<'END'\n{toml}END")
    print("To train the first and export it:\n", *commands, sep="\n")


def _print(report: "PlanReport") -> None:
    """The table for a person; the proposed model comes first."""
    wishes, machine = report.wishes, report.machine
    asked = [f"a bundle of {wishes.bundle / 1e6:g} MB at most"]
    asked += [f"{wishes.speed:,g} tokens/s at least"] if wishes.speed else []
    asked += [f"{wishes.memory / 1e6:g} MB of memory at most"] if wishes.memory < math.inf else []
    columns = ("params M", "bundle MB", "peak RSS MB", "state bytes", "t/s")
    console.print_table(
        ("", "layers", "width", "atoms", "vocabulary", "bits", *columns, "preset"),
        [
            (
                "" if number else "proposed",
                c.config.num_layers,
                c.config.width,
                c.config.num_atoms,
                c.config.vocab_size,
                c.bits,
                c.num_parameters / 1e6,
                c.bundle / 1e6,
                console.UNTOLD if c.peak is None else c.peak / 1e6,
                c.state,
                round(c.tokens_per_second),
                c.preset or "",
            )
            for number, c in enumerate((report.proposed, *report.alternatives))
        ],
        title=f"{', '.join(asked)}; t/s and memory as told for {machine['cpu']}, one thread, ONNX Runtime "
        f"{machine['onnxruntime']}",
    )
