"""The commands that probe models: what they remember, generate and cost. See `cli.py` on commands."""

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from . import child, console

app = typer.Typer(no_args_is_help=True, help="Probe models: what they remember, generate and cost.")


Number = TypeVar("Number", int, float)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@app.command()
def memory(
    models: Annotated[
        str, typer.Option(help="Names with commas, as for compare.")
    ] = "sdgm,gpt2,transformer-xl,gated-recurrence,lstm",
    tasks: Annotated[str, typer.Option(help="Names with commas.")] = "copy,selective,recall,needle",
    params: Annotated[str, typer.Option(help="Parameters of each model.")] = "250k",
    steps: Annotated[int, typer.Option(help="Training steps for each model and task.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Train each for so long, in place of steps.")] = 0.0,
    trained_distance: Annotated[int, typer.Option(help="The longest distance in training.")] = 128,
    distances: Annotated[str, typer.Option(help="Distances to test.")] = "32,64,128,256,512,1024,2048,4096",
    seed: Annotated[int, typer.Option(help="Of weights and tasks.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for findings; those in it are not made again.")] = Path(
        "runs/probe"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Measure what models keep in mind, and how long: accuracy by distance, on tasks made on the fly."""
    from .compare import parse_budget, parse_entries
    from .probe import Probe, table
    from .probe import probe as run_probe

    console.check_choice("--device", device, console.DEVICES)
    settings = Probe(
        num_parameters=parse_budget(params),
        steps=steps,
        minutes=minutes,
        trained_distance=trained_distance,
        distances=_numbers("--distances", distances, int),
        seed=seed,
        device=device,
    )
    findings = run_probe(
        parse_entries(models), [task.strip() for task in tasks.split(",")], settings, out, progress=_say
    )
    if as_json:
        console.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        title = f"answers that are right, by distance (trained up to {trained_distance}; by chance 3 %)"
        console.print_table(*table(findings), title=title)


@app.command()
def generation(
    model: Annotated[Path, typer.Argument(help="A bundle, or a run folder (which is exported first).")],
    texts: Annotated[
        list[str],
        typer.Argument(help="Held-out text to draw prompts from: files, folders, globs, .gz, or -."),
    ],
    judge: Annotated[
        Path | None, typer.Option(help="A larger model's run or bundle, to tell how likely the texts are.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a bundle, such as int8.")] = None,
    number: Annotated[int, typer.Option(help="Texts for each way of sampling.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="Tokens of each text.")] = 128,
    prompt_words: Annotated[int, typer.Option(help="Words of each prompt.")] = 16,
    strengths: Annotated[str, typer.Option(help="η of the posterior mode, with commas.")] = "0.1,0.3,0.6",
    temp: Annotated[float, typer.Option(help="Temperature.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures and texts as JSON.")] = False,
) -> None:
    """Measure how varied, likely and typical texts are: sampled plainly, with the mixture, and human ones."""
    from sdgm_edge.runtime import Generator

    from .probe_generation import COLUMNS, Settings, evaluate_generation, open_scorer
    from .run import is_run
    from .sources import read_text

    console.check_one_form(markdown, as_json)
    settings = Settings(
        num_texts=number,
        num_tokens=tokens,
        prompt_words=prompt_words,
        strengths=_numbers("--strengths", strengths, float),
        temperature=temp,
        top_p=top_p,
        seed=seed,
    )
    text = read_text(texts)
    scorer = None if judge is None else open_scorer(judge)
    with ExitStack() as stack:
        bundle = model
        if is_run(model, variant=variant):
            bundle = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle.sdgm"
            _export(model, bundle)
        generator = Generator.load(bundle, variant=variant)
        rows = evaluate_generation(generator, text, settings, scorer, progress=_say)
    if as_json:
        about = {
            "model": str(model),
            "variant": generator.variant,
            "judge": None if judge is None else str(judge),
        }
        console.print_json(
            {**about, **dataclasses.asdict(settings), "rows": [dataclasses.asdict(row) for row in rows]}
        )
        return
    (console.print_markdown if markdown else console.print_table)(
        list(COLUMNS),
        [[getattr(row, field) for field in COLUMNS.values()] for row in rows],
        title=f"{model} ({generator.variant}): {number} texts of {tokens} tokens, temperature {temp:g}, "
        f"top-p {top_p:g}, seed {seed}" + (f"; judge: {judge}" if judge else ""),
    )


@app.command()
def scale(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Text to train on, as for train. None: CPython's reference.")
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="Text to validate on. Default: a part is held out.")
    ] = None,
    models: Annotated[str, typer.Option(help="Names with commas, as for compare.")] = "sdgm,gpt2",
    windows: Annotated[
        str, typer.Option(help="Tokens of a training window, with commas; the first with all vocabularies.")
    ] = "128,1024,4096,16384",
    vocab_sizes: Annotated[
        str, typer.Option(help="Tokens of a bpe vocabulary, with commas; the first with all windows.")
    ] = "2048,8192,32768,65536",
    params: Annotated[str, typer.Option(help="Parameters of each model with the first vocabulary.")] = "2M",
    minutes: Annotated[float | None, typer.Option(help="Train each for so long. Default: 2.")] = None,
    max_steps: Annotated[int, typer.Option(help="Steps of each training, in place of minutes.")] = 0,
    inference: Annotated[
        bool, typer.Option(help="Export what was trained to int8, and measure how it decodes.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for runs; what is in it is not done again. Default: runs/scale-…."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure what longer windows and larger vocabularies cost in speed and memory, and what they give."""

    from .compare import parse_budget, parse_entries
    from .config import CorpusConfig
    from .probe_scale import COLUMNS, Scale, cells, probe_scale
    from .run import RUNS, name_of
    from .sources import lasting

    console.check_one_form(markdown, as_json)
    console.check_choice("--device", device, console.DEVICES)
    train, held = (lasting(given or [], console.cache_folder()) for given in (texts, valid))
    rows = probe_scale(
        parse_entries(models),
        Scale(
            corpus=CorpusConfig(train=train, valid=held),
            windows=_numbers("--windows", windows, int),
            vocabularies=_numbers("--vocab-sizes", vocab_sizes, int),
            num_parameters=parse_budget(params),
            minutes=(0.0 if max_steps else 2.0) if minutes is None else minutes,
            max_steps=max_steps,
            inference=inference,
            device=device,
        ),
        out or RUNS / f"scale-{name_of(texts or [])}",
        console.cache_folder(),
        progress=_say,
    )
    if as_json:
        console.print_json([dataclasses.asdict(row) for row in rows])
        return
    (console.print_markdown if markdown else console.print_table)(list(COLUMNS), cells(rows))
    for row in rows:
        if row.reason:
            print(f"{row.entry}, window {row.window:,}, vocabulary {row.vocab_size:,}: {row.reason}")


def _export(run: Path, target: Path) -> None:
    """Export a run in float32, as a process of its own: only the command line may lean on the exporter."""
    from sdgm_edge.runtime import ExportError

    command = ["-m", "sdgm_edge", "export", str(run), "--out", str(target), "--bits", "32"]
    done = child.run(command, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise ExportError(f"{run} could not be exported (exit code {done.returncode}): see above")


def _numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """Read "1,2,3"."""
    from sdgm_edge.runtime import UsageError

    try:
        return tuple(kind(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{flag}: expected numbers with commas, got {text!r}; write 1,2,3") from None
