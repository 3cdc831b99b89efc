"""The commands that measure a bundle on a device; no torch. What `cli.py` says of commands holds here too."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console
from .commands_device import Atoms, BundleArgument, Provider, newest_bundle

if TYPE_CHECKING:
    from sdgm_edge.runtime import Footprint, VariantFootprint

BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def footprint(
    bundle: BundleArgument = None,
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="Such as int8; may be given again. Default: all.")
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Read before the first token.")
    ] = "Once upon a time",
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens after the first.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", "-r", help="Cold processes for the times.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Default: 1.")] = None,
    providers: Provider = "auto",
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Measure with prepared weights (sdgm-edge prepare).")
    ] = False,
    atoms: Atoms = None,
    max_rss: Annotated[
        str | None, typer.Option(help="Exit 1 where a variant's peak is above this: 64MB, 60MiB.")
    ] = None,
    max_first_token: Annotated[
        str | None, typer.Option(help="Exit 1 where a cold first token takes longer (median): 200ms, 1.5s.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw memory by stage (*.png, *.svg).")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure what a bundle costs here, in fresh processes: memory by stage, load time, first token."""
    from sdgm_edge.runtime import measure_footprint

    console.check_one_form(markdown, as_json)
    limits = {
        "--max-rss": None if max_rss is None else quantity("--max-rss", max_rss, BYTES, "64MB"),
        "--max-first-token": None
        if max_first_token is None
        else quantity("--max-first-token", max_first_token, _SECONDS, "200ms"),
    }
    if chart is not None:
        _check_chart(chart)
    bundle = bundle or newest_bundle()
    measured = measure_footprint(
        bundle,
        variants or (),
        providers=console.split_providers(providers),
        threads=threads,
        prompt=prompt,
        tokens=tokens,
        repeats=repeats,
        prepared=prepared,
        atoms=atoms,
    )
    above = [line for variant in measured.variants for line in _above(variant, limits)]
    if as_json:
        console.print_json({**measured.to_dict(), "limits": limits, "above_limits": above})
    else:
        _print(measured, markdown)
    if chart is not None:
        _draw(measured, chart)
    if above:
        for line in above:
            print(f"{bundle}: {line}", file=sys.stderr)
        raise typer.Exit(1)


def prepare(
    bundle: BundleArgument = None,
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="Such as int8; may be given again. Default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Keep the weights in the cache as this CPU wants them, mapped by all processes (generate --prepared)."""
    from sdgm_edge.runtime import prepare as run_prepare
    from sdgm_edge.runtime import read_bundle

    bundle = bundle or newest_bundle()
    found = read_bundle(bundle)
    done = [run_prepare(found, name) for name in dict.fromkeys(variants or found.manifest.variants)]
    if as_json:
        console.print_json([{**entry._asdict(), "folder": str(entry.folder)} for entry in done])
        return
    console.print_table(
        ("variant", "MB", "made now", "folder"),
        [(entry.variant, entry.num_bytes / 1e6, entry.made, str(entry.folder)) for entry in done],
        title=f"{bundle}: prepared for this CPU and this release of ONNX Runtime",
    )


def quantity(flag: str, text: str, units: dict[str, float], example: str) -> float:
    """Read "64MB" or "200ms" as bytes or seconds."""
    from sdgm_edge.runtime import UsageError

    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].lower() not in units:
        raise UsageError(
            f"{flag}: expected a number with one of {', '.join(units)}, got {text!r}; write {example}"
        )
    return float(match[1]) * units[match[2].lower()]


def _above(variant: "VariantFootprint", limits: dict[str, float | None]) -> list[str]:
    """The limits that a variant does not keep, or cannot be held to."""
    found: list[str] = []
    for what, value, scale, unit, flag in (
        ("peak RSS", variant.peak, 1e6, "MB", "--max-rss"),
        ("cold first token", variant.seconds.first_token, 1e-3, "ms", "--max-first-token"),
    ):
        limit = limits[flag]
        if limit is None or (value is not None and value <= limit):
            continue
        got = console.UNTOLD if value is None else f"{value / scale:.2f} {unit}"
        found.append(
            f"{variant.variant}: {what}: expected at most {limit / scale:g} {unit} ({flag}), got {got}"
        )
    return found


def _print(measured: "Footprint", markdown: bool) -> None:
    """The tables for a person."""
    show = console.print_markdown if markdown else console.print_table
    machine = measured.machine
    show(
        ("variant", "stage", "RSS MB", "anonymous MB", "file-backed MB", "private MB", "peak MB"),
        [
            (_name(variant), stage.replace("_", " "), *map(_mb, _memory(memory)))
            for variant in measured.variants
            for stage, memory in variant.stages.items()
        ],
        title=f"{measured.path} ({measured.name}{', prepared' if measured.prepared else ''}): "
        "memory of a fresh process; first token after a prompt of "
        f"{measured.prompt_tokens} tokens, then {measured.tokens} more",
    )
    on_gpu = any(variant.provider == "cuda" for variant in measured.variants)
    show(
        ("variant", "provider", "file MB", "runtime MB", "weights MB", "state bytes", "unaccounted MB",
         "second process MB", *(["GPU MB"] if on_gpu else [])),
        [
            (_name(v), v.provider, _mb(v.file), _mb(v.runtime), _mb(v.weights), v.state, _mb(v.unaccounted),
             _mb(v.second_process), *([_mb(v.gpu)] if on_gpu else []))
            for v in measured.variants
        ],
        title="RSS after the last token = runtime + weights + state + unaccounted; "
        "a second process at the same time takes its private memory more",
    )  # fmt: skip
    show(
        ("variant", "imports ms", "load ms", "first token ms", "fastest", "slowest"),
        [
            (_name(v), *(1e3 * s for s in (v.seconds.imports, v.seconds.load, v.seconds.first_token,
                                            v.seconds.fastest, v.seconds.slowest)))
            for v in measured.variants
        ],
        title=f"times of {measured.repeats} cold processes with warm files, medians; threads: "
        f"{machine['threads']}; {machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python "
        f"{machine['python']}, ONNX Runtime {machine['onnxruntime']}",
    )  # fmt: skip


def _name(variant: "VariantFootprint") -> str:
    return variant.variant if variant.atoms is None else f"{variant.variant}, {variant.atoms} atoms"


def _memory(memory: Any) -> tuple[int | None, ...]:
    return memory.rss, memory.anonymous, memory.file_backed, memory.private, memory.peak


def _mb(size: int | None) -> float | str:
    return console.UNTOLD if size is None else size / 1e6


def _check_chart(path: Path) -> None:
    """Refuse before anything is measured what could not be drawn after."""
    from sdgm_edge.runtime import MeasureError, UsageError, check_place

    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise UsageError(
            "--chart draws with matplotlib, which is not installed; type: pip install matplotlib"
        ) from e
    if not path.parent.is_dir():
        raise UsageError(f"--chart: there is no folder {path.parent}; make it first")
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UsageError(f"--chart: expected a file *.png or *.svg, got {str(path)!r}; name it so")
    check_place(path, MeasureError)


def _draw(measured: "Footprint", path: Path) -> None:
    """Bars of anonymous and file-backed memory, one for each stage of each variant."""
    from matplotlib.figure import Figure

    from sdgm_edge.runtime import MeasureError

    num_stages = max(len(variant.stages) for variant in measured.variants)
    figure = Figure(figsize=(2 + 0.8 * num_stages * len(measured.variants), 4), layout="constrained")
    axes = figure.subplots(1, len(measured.variants), sharey=True, squeeze=False)[0]
    for axis, variant in zip(axes, measured.variants, strict=True):
        names = [stage.replace("_", "\n") for stage in variant.stages]
        memories = list(variant.stages.values())
        if all(memory.anonymous is not None for memory in memories):
            anonymous = [(m.anonymous or 0) / 1e6 for m in memories]
            axis.bar(names, anonymous, color="#c1554e", label="anonymous")
            backed = [(m.file_backed or 0) / 1e6 for m in memories]
            axis.bar(names, backed, bottom=anonymous, color="#b8c4d0", label="file-backed")
        else:
            axis.bar(names, [(m.rss or 0) / 1e6 for m in memories], color="#8090a0", label="resident")
        axis.set_title(f"{variant.variant}: file {variant.file / 1e6:.1f} MB", fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_ylabel("MB")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.suptitle(f"{measured.name} on {measured.machine['cpu']}", fontsize=11)
    try:
        figure.savefig(path, dpi=144)
    except OSError as e:
        raise MeasureError(
            f"{path}: cannot be written: {e.strerror or e}; choose a place that you may write to"
        ) from e
