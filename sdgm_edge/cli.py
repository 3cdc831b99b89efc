"""The command line: thin commands over the library.

A command is one function. What it needs is imported inside it, so that `sdgm-edge --help` answers at once and
a device without torch can run what a device runs. Results go to stdout, progress and logs to stderr.
"""

import dataclasses
import errno
import io
import logging
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from . import (
    __version__,
    commands_bench,
    commands_compare,
    commands_device,
    commands_inspect,
    commands_measure,
    commands_plan,
    commands_probe,
    console,
)

app = typer.Typer(
    name="sdgm-edge",
    help="From a text file to a small language model that runs on a device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXTRAS = {
    "torch": "train",
    "sklearn": "train",
    "safetensors": "train",
    "matplotlib": "train",
    "tensorboard": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxruntime": "cpu",
}
_debug = False


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sdgm-edge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Log more; -vv logs all.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What holds for all commands, given before the command."""
    global _debug
    _debug = debug
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)


@app.command()
def train(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders, globs, .gz, or - for stdin. None: the reference that CPython carries."
        ),
    ] = None,
    valid: Annotated[
        list[str] | None, typer.Option(help="Text to validate on. Default: a part is held out.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, edge-nano, edge-micro (default) or edge-small.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with tables corpus, model, loss, training; or the name of a recipe."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: a new one under runs/.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out, or with the newest run.")
    ] = False,
    begun_from: Annotated[
        Path | None,
        typer.Option("--from", help="A run: begin with its weights, its tokenizer and its settings."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe, or word for the published protocol.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Tokens of the vocabulary, at most.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the text.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps in all, in place of epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order and dropout.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model (needs a C++ compiler).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a model on text, into a run folder."""
    from sdgm_edge.runtime import UsageError

    console.check_choice("--device", device, console.DEVICES)
    console.check_choice("--precision", precision, console.PRECISIONS)
    from .config import load_config
    from .run import RUNS, check_unused, new_folder, newest_run, read_run_config
    from .shards import corpus_of
    from .sources import lasting
    from .tokenization import Tokenizer
    from .training import Interrupted
    from .training import train as run_training

    if resume:
        settled = {
            "texts": texts or None, "--valid": valid or None, "--config": config, "--preset": preset,
            "--tokenizer": tokenizer, "--vocab-size": vocab_size, "--epochs": epochs,
            "--max-steps": max_steps, "--seed": seed, "--from": begun_from,
        }  # fmt: skip
        if changed := ", ".join(console.given(**settled)):
            raise UsageError(
                f"--resume goes on with a run as it was begun: expected none of its settings, got {changed}; "
                "leave them out, or begin another run"
            )
        folder = out or newest_run()
        settings = read_run_config(folder)
    else:
        base = None
        if begun_from is not None:
            base = read_run_config(begun_from)
            corpus_there = dataclasses.replace(base.corpus, train=(), valid=())
            base = dataclasses.replace(base, begun_from=str(begun_from.absolute()), corpus=corpus_there)
        corpus_table = console.given(train=texts, valid=valid, tokenizer=tokenizer, vocab_size=vocab_size)
        training_table = console.given(epochs=epochs, max_steps=max_steps, seed=seed)
        settings = load_config(config, preset, base, corpus=corpus_table, training=training_table)
        if base is not None:
            kind, size = settings.corpus.tokenizer, settings.corpus.vocab_size
            if (kind, size) != (base.corpus.tokenizer, base.corpus.vocab_size):
                raise UsageError(
                    f"--from takes the tokenizer of {begun_from}: expected none, got {kind} of {size}; "
                    "leave it out"
                )
        if settings.corpus.tokenizer == "word" and vocab_size is not None:
            raise UsageError(
                f"--vocab-size: expected none with words, of which all are taken, got {vocab_size}; "
                "leave it out, or take --tokenizer bpe"
            )
        folder = out or new_folder(RUNS, settings)
        check_unused(folder)  # before the text is read, which may take long
        text = settings.corpus
        kept = [lasting(sources, console.cache_folder()) for sources in (text.train, text.valid)]
        text = dataclasses.replace(text, train=kept[0], valid=kept[1])
        settings = dataclasses.replace(settings, corpus=text)
    learnt = None
    if settings.begun_from:  # which may be gone when this one is resumed
        learnt = Tokenizer.load((folder if resume else Path(settings.begun_from)) / "tokenizer.json")
    with console.text_progress() as progress:
        corpus = corpus_of(
            settings.corpus, console.cache_folder(), at_most=True, tokenizer=learnt, progress=progress
        )
    try:
        with console.training_progress(folder) as on_step:
            summary = run_training(
                settings,
                corpus,
                folder,
                resume=resume,
                device=device,
                precision=precision,
                compiled=compiled,
                on_step=on_step,
            )
    except Interrupted as reason:
        print(f"{folder}: {reason}", file=sys.stderr)
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, the first speaks
        return
    record = {**dataclasses.asdict(summary), "folder": str(folder)}
    if as_json:
        console.print_json(record)
    else:
        console.print_record(record, title="trained")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, or a bundle.")],
    texts: Annotated[
        list[str], typer.Argument(help="Text to score: files, folders, globs, .gz, or - for stdin.")
    ],
    variant: Annotated[str | None, typer.Option(help="Variant of a bundle, such as int8.")] = None,
    atoms: commands_device.Atoms = None,
    copy_window: Annotated[
        int | None,
        typer.Option(help="Tokens that the head of a run looks back over. Default: as it was trained."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Score a model on text: perplexities and bits per byte, every token once."""
    from .run import is_run, load_run, with_copy_window
    from .sources import read_text

    text = read_text(texts)
    if is_run(model, variant=variant, atoms=atoms):
        from .evaluation import score
        from .process import keep_memory
        from .tokenization import Tokenizer

        keep_memory()
        run = load_run(model)
        if copy_window is not None:
            run = with_copy_window(run, copy_window)
        result = score(run.model, Tokenizer.load(run.tokenizer_path), text)
    else:
        from sdgm_edge.runtime import Generator, UsageError

        if copy_window is not None:
            raise UsageError(
                f"--copy-window chooses in a run, and {model} is none: give it to sdgm-edge export"
            )
        generator = Generator.load(model, variant=variant, atoms=atoms)
        result = generator.score(text)
        atoms = atoms and generator.atoms
    if as_json:
        console.print_json(result.to_dict())
        return
    figures = result.to_dict()
    figures["token_perplexity (tokenizer-dependent)"] = figures.pop("token_perplexity")
    with_atoms = f" with {atoms} atoms" if atoms else ""
    console.print_record(figures, title=f"{model}{with_atoms} on {', '.join(texts)}")


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="A run folder. Default: the newest under runs/.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a file *.sdgm. Default: bundles/<name of the run>.")
    ] = None,
    quantize: Annotated[bool, typer.Option("--quantize", help="int8, as --bits 8.")] = False,
    bits: Annotated[
        list[int] | None,
        typer.Option(help="4, 8 (int8), 16 (for GPUs) or 32; several make a bundle of several. Default: 32."),
    ] = None,
    head: Annotated[
        str,
        typer.Option(help="whole; screened: not read whole (8 and 4 bits); auto: screened if large."),
    ] = "auto",
    atoms: Annotated[
        int | None, typer.Option(help="Keep so many atoms of each layer, the strongest: less to read.")
    ] = None,
    copy_window: Annotated[
        int | None,
        typer.Option(help="Tokens that a head that points looks back over. Default: as it was trained."),
    ] = None,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Round each token as if alone in 8 and 4 bits: drafts are exact.")
    ] = False,
    loop: Annotated[
        bool, typer.Option("--loop", help="Write generate.onnx too: the decoding loop as a graph.")
    ] = False,
    max_loss_increase: Annotated[
        str, typer.Option(help="Most that a variant may lose in bits per byte on held-out text.")
    ] = "1%",
    force: Annotated[bool, typer.Option("--force", help="Write variants that lose more than that.")] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="One file *.sdgm, not a folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Turn a run into a bundle that runs without torch; every variant must pass its gates."""
    from sdgm_edge.export import export_run

    report = export_run(
        run,
        out,
        [*(bits or []), *([8] if quantize else [])] or [32],
        head=head,
        loop=loop,
        atoms=atoms,
        copy_window=copy_window,
        drafts=drafts,
        force=force,
        max_loss_increase=_share(max_loss_increase),
        single_file=single_file,
        progress=lambda message: print(message, file=sys.stderr, flush=True),
    )
    if as_json:
        console.print_json(report.to_dict())
        return
    console.print_table(
        ("variant", "MB", "bits/byte", "word perplexity", "loss", "parity", "tokens/s", "prompt tokens/s"),
        [
            (
                v.name,
                v.num_bytes / 1e6,
                v.accuracy.bits_per_byte,
                v.accuracy.word_perplexity,
                f"{v.accuracy.loss_increase:+.2%}",
                v.parity.logits,
                round(v.decode_speed),
                round(v.prompt_speed),
            )
            for v in report.variants
        ],
        title=f"{report.path} ({report.default} by default; speeds: one thread here, without sampling)",
    )


@app.command()
def detokenize(
    texts: Annotated[
        list[str] | None, typer.Argument(help="WikiText: files, folders, globs, .gz. Default: stdin.")
    ] = None,
) -> None:
    """Write WikiText as natural text to stdout: spaces as people set them, no sentence with an <unk>."""
    from .detokenization import naturalized
    from .sources import open_documents

    with TemporaryDirectory() as spool:
        for document in open_documents(texts or ["-"], Path(spool)):
            for line in naturalized("".join(document.pieces()).split("\n")):
                print(line)


for command in (
    commands_device.generate,
    commands_device.verify,
    commands_inspect.inspect,
    commands_plan.plan,
    commands_bench.bench,
    commands_measure.footprint,
    commands_measure.prepare,
    commands_compare.compare,
):
    app.command()(command)
app.add_typer(commands_probe.app, name="probe")


def _share(text: str) -> float:
    """Read "1%" or "0.01"."""
    from sdgm_edge.runtime import UsageError

    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise UsageError(f"expected a share such as 1% or 0.01, got {text!r}; write it so") from None


def main() -> None:
    """Run the command line and exit: 0 fine, 1 failed, 2 misuse, 130 interrupted."""
    try:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # the caller closed it
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # of a character that the terminal cannot show
        try:
            app(prog_name="sdgm-edge")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read us has had enough: leave nothing to flush, and say nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if _debug:
            raise
        message, exit_code = _explain(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_code)


def _explain(error: Exception) -> tuple[str, int]:
    """One line and an exit code for an error."""
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) in _EXTRAS:
        return f"{name} is not installed; type: pip install 'sdgm-edge[{_EXTRAS[name]}]'", 1
    from sdgm_edge.runtime import SdgmError

    if isinstance(error, SdgmError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = error.filename or "the output"
        return f"{place} cannot be written: {error.strerror}; free some space, or write elsewhere", 1
    if isinstance(error, PermissionError):
        place = error.filename or "a file"
        return f"{place} may not be used: {error.strerror}; check its permissions, or choose another place", 1
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        what = " ".join(str(error).split()) or "Python has no more"
        return f"not enough memory: {what}; take a smaller model, batch_size, window or vocabulary", 1
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected {what}; `sdgm-edge --debug …` shows where: please report it", 1
