"""The commands that measure models against each other. What `cli.py` says of commands holds here too."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import console


def compare(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Text to train on, as for train. None: CPython's reference.")
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="Text to validate on. Default: a part is held out.")
    ] = None,
    models: Annotated[
        str,
        typer.Option(help="Names with commas; NAME:KEY=VALUE changes one; ablations. See docs/compare.md."),
    ] = "sdgm,gpt2,transformer-xl,linformer",
    params: Annotated[str, typer.Option(help="Parameters of each model, within 5 %: 4M, 250k.")] = "4M",
    protocol: Annotated[str, typer.Option(help="best, or paper for the paper's set-up.")] = "best",
    epochs: Annotated[int | None, typer.Option(help="Passes over the text. Default: the protocol's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps in all, in place of epochs.")] = None,
    minutes: Annotated[float, typer.Option(help="Train each for so long, in place of epochs.")] = 0.0,
    rates: Annotated[
        str, typer.Option(help="Learning rates with commas: every model is trained at each of them.")
    ] = "",
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a training window.")] = 128,
    copy_window: Annotated[
        int | None,
        typer.Option(help="Recent tokens that every model can copy; 0 for none. Default: the protocol's."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How often each is trained.")] = 1,
    tokenizer: Annotated[str, typer.Option(help="bpe, or word for the published protocol.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens of a bpe vocabulary.")] = 4096,
    out: Annotated[
        Path | None, typer.Option(help="Folder for runs and report. Default: runs/compare-<text>.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    contexts: Annotated[
        str, typer.Option(help="Tokens with commas: after so many, decoding is measured.")
    ] = "0,128,1024,4096,16384",
    inference: Annotated[
        bool, typer.Option(help="Export what was trained to int8, and measure how it decodes.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train models of one size under the same terms, and report. Run again, it goes on where it stopped."""
    from .compare import Terms, at_rates, entry_config, parse_budget, parse_contexts, parse_entries
    from .compare import compare as run_comparison
    from .config import RunConfig
    from .report import make_report
    from .run import RUNS, name_of
    from .shards import corpus_of
    from .sources import lasting

    console.check_choice("--device", device, console.DEVICES)
    console.check_choice("--precision", precision, console.PRECISIONS)
    training = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}
    train, held = (lasting(given or [], console.cache_folder()) for given in (texts, valid))
    table = {"train": list(train), "valid": list(held)}
    settings = RunConfig.from_dict({"corpus": {**table, "tokenizer": tokenizer, "vocab_size": vocab_size}})
    entries = at_rates(parse_entries(models, protocol), rates)
    measured = parse_contexts(contexts) if inference else ()
    terms = Terms(
        corpus=settings.corpus,
        vocab_size=vocab_size,
        num_parameters=parse_budget(params),
        protocol=protocol,
        training={name: value for name, value in training.items() if value is not None},
        window=window,
        copy_window=copy_window,
        minutes=minutes,
        device=device,
        precision=precision,
    )
    if tokenizer == "bpe":  # how many words there are is not known yet
        for entry in entries:
            entry_config(entry, terms, 0)  # what is wrong is told before the text is read
    with console.text_progress() as progress:
        corpus = corpus_of(settings.corpus, console.cache_folder(), progress=progress)
    terms = replace(terms, vocab_size=corpus.tokenizer.vocab_size)
    folder = out or RUNS / f"compare-{name_of(texts or [])}"
    outcomes = run_comparison(
        entries,
        terms,
        folder,
        console.cache_folder(),
        seeds,
        measured,
        progress=lambda message: print(message, file=sys.stderr, flush=True),
    )
    report = make_report(outcomes, terms, corpus)
    report.write(folder)
    if as_json:
        print(report.json(), end="")
    else:
        for part in report.tables:
            console.print_table(part.titles, part.cells, title=part.title)
        print(f"{folder}/report.html")
    if all(outcome.result.status != "finished" for outcome in outcomes):
        raise typer.Exit(1)
