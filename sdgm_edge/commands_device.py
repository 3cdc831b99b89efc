"""The commands that a device runs: they need no torch. What `cli.py` says of commands holds here too."""

import dataclasses
import logging
import os
import secrets
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console

if TYPE_CHECKING:
    from sdgm_edge.runtime import Generation, Generator

log = logging.getLogger(__name__)

BUNDLES = Path("bundles")

Provider = Annotated[
    str, typer.Option("--providers", "--provider", help="auto, cpu, cuda, or several with commas.")
]
Atoms = Annotated[
    int | None, typer.Option(help="Run so many atoms of each layer, the strongest. Default: all.")
]
BundleArgument = Annotated[
    Path | None, typer.Argument(help="A bundle, folder or *.sdgm. Default: the newest, as for generate.")
]


def generate(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="A bundle. Default: the newest under bundles/, else wikitext-2, which came with it.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on with. Default: what stdin holds.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A file that holds the prompt; - is stdin.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Tokens to generate at most.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Default: 1.")] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", "-s", help="The same seed gives the same text.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temp", "--temperature", help="0 is greedy, 1 the model's own.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest of this share; 1: all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens this times as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No run of so many tokens twice; 0 is off.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the generation; may be given again.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: so many likeliest alternatives for each token.")
    ] = None,
    candidates: Annotated[
        int,
        typer.Option(
            "--candidates",
            "-c",
            help="Texts to generate, with seeds that follow each other; a line heads each.",
        ),
    ] = 1,
    draft: Annotated[int | None, typer.Option(help="Guess so many tokens and check them at once.")] = None,
    prior_strength: Annotated[
        float | None, typer.Option(help="0 to 1: how far to move to draws from the mixture.")
    ] = None,
    prior_mode: Annotated[str | None, typer.Option(help="posterior (follows the context) or prior.")] = None,
    steer: Annotated[
        str | None, typer.Option(help="Component of the mixture to pin, or factors: 3=2,5=0.")
    ] = None,
    providers: Provider = "auto",
    variant: Annotated[str | None, typer.Option(help="Such as int8. Default: the bundle's.")] = None,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Map weights packed for this CPU; the first time, pack them.")
    ] = False,
    atoms: Atoms = None,
    heal: Annotated[
        bool, typer.Option("--heal/--no-heal", help="Complete the word that the prompt ends in.")
    ] = True,
    state: Annotated[
        Path | None, typer.Option(help="Session to go on with, if the file exists, and to save after.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each text.")] = False,
) -> None:
    """Generate text: streamed to stdout, and nothing else there.

    A prompt may end anywhere, also inside a word. The last line end of a file or of stdin is not part of it.
    Defaults are those of the bundle. Ctrl-C ends the text. Several candidates are written when all are there,
    each under a line such as `--- 2 of 3, seed 8 ---`.
    """
    from sdgm_edge.runtime import Generator, UsageError

    if candidates < 1:
        raise UsageError(f"--candidates: expected a number of texts from 1, got {candidates}; 1 is usual")
    if state is not None and candidates != 1:
        raise UsageError("--state goes on with one text, and --candidates asks for several: leave one out")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs are told in JSON: add --json")
    params = console.given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        stop=stop or None,
        seed=seed,
        logprobs=0 if as_json and logprobs is None else logprobs,
        draft=draft,
        prior_strength=prior_strength,
        prior_mode=prior_mode,
        steer=None if steer is None else _steering(steer),
    )
    text = _prompt(prompt, file)
    generator = Generator.load(
        model or newest_bundle(),
        variant,
        console.split_providers(providers),
        threads,
        prepared=prepared,
        atoms=atoms,
    )
    if atoms is not None:
        log.info("%d atoms of each layer", generator.atoms)
    default = generator.bundle.generation.sampling.seed
    seed = next(s for s in (seed, default, secrets.randbits(32)) if s is not None)
    params["seed"] = seed  # one that is told, so that the text can be had again
    log.info("seed %d", seed)
    with _interruptible() as cancel, console.reading_progress() as progress:
        params |= {"heal": heal, "cancel": cancel, "progress": progress}
        if candidates != 1:
            texts = generator.candidates(text, candidates, **params)
        else:
            texts = [_write(generator, text, state, silent=as_json, **params)]
        interrupted = cancel()
    for number, generation in enumerate(texts):
        own_seed = (seed + number) % 2**64
        t = generation.timing
        log.info(
            "%d tokens read and the first chosen in %.3f s, then %.0f tokens/s; ended by %s",
            t.prompt_tokens, t.prompt_seconds, t.tokens_per_second, generation.finish_reason,
        )  # fmt: skip
        if drafted := generation.drafted:
            log.info("%d of %d drafted tokens were right", drafted.accepted, drafted.proposed)
        if as_json:
            console.print_json_line(_record(generator, generation, own_seed))
        elif candidates != 1:
            print(f"--- {number + 1} of {candidates}, seed {own_seed} ---\n{generation.text}")
    if interrupted:
        raise typer.Exit(130)


def _write(
    generator: "Generator", prompt: str | None, state: Path | None, *, silent: bool, **options: Any
) -> "Generation":
    """Generate one text, tell it as it comes, and keep the session where one is asked for."""
    session = None
    if state is not None:
        session = generator.load_session(state) if os.path.exists(state) else generator.session()
    stream = generator.stream(prompt, session=session, **options)
    if session is not None and state is not None:
        session.save(state)  # a place that cannot be written is told before anything is generated
    try:
        for piece in stream:
            if not silent:
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:  # what was said is kept, also where nobody reads on
        if session is not None and state is not None:
            session.save(state)
    if not silent and sys.stdout.isatty():
        print()  # elsewhere stdout holds the text and nothing else
    return stream.generation


def _record(generator: "Generator", generation: "Generation", seed: int) -> dict[str, object]:
    """One text as a machine reads it."""
    timing = generation.timing
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "logprobs": generation.logprobs,
        "top": [
            [{"token": i, "text": generator.decode([i]), "logprob": p} for i, p in sampled.top]
            for sampled in generation.sampled
        ],
        "finish_reason": generation.finish_reason,
        "stop": generation.stop,
        "seed": seed,
        "model": str(generator.bundle.path),
        "variant": generator.variant,
        "provider": generator.provider,
        "atoms": generator.atoms,
        "drafted": None if generation.drafted is None else generation.drafted._asdict(),
        "timing": {**timing._asdict(), "tokens_per_second": timing.tokens_per_second},
    }


def newest_bundle(root: Path = BUNDLES) -> Path:
    """Return the bundle under `root`, or one level further down, that was written last; without any, the one
    that came with the package."""
    from sdgm_edge.runtime import pretrained

    found = [
        (path.stat().st_mtime_ns, str(path), path if path.suffix == ".sdgm" else path.parent)
        for pattern in ("*.sdgm", "*/*.sdgm", "*/manifest.json", "*/*/manifest.json")
        for path in root.glob(pattern)
        if path.exists()  # no link to nothing
        and not any(part.startswith(".") for part in path.relative_to(root).parts)  # being written
    ]
    return max(found)[-1] if found else pretrained()


def _prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt as given, or as a file or stdin holds it; None where nobody gave any."""
    from sdgm_edge.runtime import CorpusError, UsageError

    if prompt is not None:
        if file is not None:
            raise UsageError("--prompt and --file both give a prompt: leave one out")
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python holds stray bytes
            raise UsageError("--prompt is not UTF-8: expected text, got other bytes; check its encoding")
        if not prompt:
            raise UsageError(
                "--prompt is empty: expected text; to begin from nothing, leave it out and give </dev/null"
            )
        return prompt
    name = "standard input" if file is None or str(file) == "-" else str(file)
    try:
        if name == str(file):
            data = Path(name).read_bytes()
        elif sys.stdin is None or (file is None and sys.stdin.isatty()):
            return None  # a person who gave no prompt is not waited for
        else:
            data = sys.stdin.buffer.read()
            if not data and file is None and stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode):
                return None  # /dev/null: there is no input
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror or error}; check the path") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; "
            "convert it, for example with `iconv -f LATIN1 -t UTF-8`"
        ) from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise CorpusError(
            f"{name} is empty: expected a prompt; give one with --prompt, or </dev/null for none"
        )
    return text


def _steering(text: str) -> int | dict[int, float]:
    """Read "3", or "3=2,5=0"."""
    from sdgm_edge.runtime import UsageError

    try:
        if "=" not in text:
            return int(text)
        pairs = [part.split("=") for part in text.split(",")]
        factors = {int(component): float(factor) for component, factor in pairs}
        if len(factors) < len(pairs):
            raise ValueError("a component twice")
        return factors
    except ValueError:
        raise UsageError(
            "--steer: expected a component such as 3, or factors such as 3=2,5=0, each once, "
            f"got {text!r}; write it so"
        ) from None


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ask whether Ctrl-C was pressed, in place of being cut off; pressed again, it cuts off."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def verify(
    bundle: BundleArgument = None,
    providers: Provider = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check a bundle on this machine: hashes, sizes, versions, and the golden prompt."""
    from sdgm_edge.runtime import verify as run_verify

    bundle = bundle or newest_bundle()
    report = run_verify(bundle, providers=console.split_providers(providers))
    if as_json:
        console.print_json({**dataclasses.asdict(report), "ok": report.ok})
    else:
        console.print_table(
            ("variant", "provider", "golden tokens", "same here", "max difference", "allowed", "agrees"),
            [
                (v.variant, v.provider, v.num_tokens, v.num_same, v.max_difference, v.tolerance, v.ok)
                for v in report.variants
            ],
            title=f"{bundle}: {report.num_files} files, {report.num_bytes / 1e6:.2f} MB, none damaged",
        )
    if not report.ok:
        what = (
            "the golden prompt gives other results"
            if report.prompt_ok
            else "the tokenizer gives other tokens"
        )
        print(f"{bundle}: {what} here: export it again, or compare versions", file=sys.stderr)
        raise typer.Exit(1)
