"""What a bundle costs on this machine: memory and time of fresh processes that load it and generate.

For each variant: one process is stopped at each stage of its life and its memory looked at from outside; a
second one does the same while the first stands still, so that its private memory is what one more process
costs; and several run through without a stop, one after the other, for the times. These are cold processes
with warm files: the bundle and the libraries are in the system's file cache, as they are once anything ran.

Memory is what the system says of the whole process, split for those who plan a device:

    rss after the last token  =  runtime (interpreter and libraries)  +  weights (the file of the graph)
                                 +  state (of one session)  +  unaccounted (the rest: buffers, packed copies)
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from . import errors
from .atoms import with_atoms
from .bundle import read_bundle
from .container import shown
from .encoding import encode
from .errors import MeasureError, ParameterError
from .memory import Memory, gpu_memory, read_memory
from .prepared import cpu_identity, prepare
from .providers import onnxruntime
from .stages import STAGES

PROMPT = "Once upon a time"
_CODE = f"from {__package__}.stages import main; main()"
_INT8_KERNELS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp")
"""Features of processors by which kernels are chosen, the quickest first: names alone tell little."""
_PATIENCE = 10.0  # seconds until a child that should end is ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Medians over cold processes, in seconds."""

    imports: float
    """Importing the runtime, numpy, tokenizers and onnxruntime."""
    load: float
    """`Generator.load`: reading and checking the bundle, and making a session."""
    first_token: float
    """From starting the process until its first token is there, prompt included."""
    first_token_cpu: float
    """The same of the processor's time: on a busy machine it is what an idle one would take, about."""
    fastest: float
    """The quickest first token."""
    slowest: float
    """The slowest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantFootprint:
    """What one variant costs. Sizes in bytes; None is what this machine does not tell."""

    variant: str
    """Its name."""
    atoms: int | None
    """Atoms of each layer, where fewer were asked for than there are."""
    provider: str
    """Where it ran: cpu, cuda, …"""
    file: int
    """The file of its graph, without the atoms that are left out."""
    weights: int | None
    """What of the memory is the weights, as large as that file; None on a GPU, which has them instead."""
    state: int
    """The state of one session, however long its text."""
    runtime: int | None
    """Resident memory before a bundle is opened: the interpreter and its libraries."""
    unaccounted: int | None
    """Resident memory after the last token, without runtime, weights and state."""
    peak: int | None
    """The most resident memory of the whole life."""
    second_process: int | None
    """Private memory of a second process that runs the same at the same time: what one more costs."""
    gpu: int | None
    """Memory on the GPU."""
    stages: dict[str, Memory]
    """Memory at the end of each of `STAGES`."""
    seconds: Seconds
    """Times of cold processes."""
    not_told: tuple[str, ...]
    """Figures that this machine does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a bundle costs on one machine."""

    path: str
    """The bundle."""
    name: str
    """The model's name."""
    machine: dict[str, str | int | None]
    """What it was measured on, and with."""
    prompt: str
    """The prompt."""
    prompt_tokens: int
    """Its tokens."""
    tokens: int
    """Tokens generated after the first."""
    repeats: int
    """Cold processes for each variant."""
    prepared: bool
    """Whether weights were mapped in their prepared form."""
    atoms: int | None
    """Atoms of each layer that were asked for; None: all."""
    variants: tuple[VariantFootprint, ...]
    """One for each variant."""

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return asdict(self)


def measure_footprint(
    path: str | Path,
    variants: Sequence[str] = (),
    *,
    providers: str | Sequence[str] = "auto",
    threads: int | None = None,
    prompt: str = PROMPT,
    tokens: int = 128,
    repeats: int = 5,
    prepared: bool = False,
    atoms: int | None = None,
) -> Footprint:
    """Measure a bundle in fresh child processes; without `variants`, all of them.

    `prepared` and `atoms`: as `Generator.load` takes them; what is to be prepared is prepared before.

    Raises:
        BundleError: the bundle is damaged, or lacks a variant.
        ProviderError: ONNX Runtime, or a provider that was asked for, is not there.
        ParameterError: a parameter makes no sense.
        MeasureError: a child process died.
        CacheError: what is prepared cannot be used or written.
    """
    _check_number("tokens", tokens)
    _check_number("repeats", repeats)
    bundle = read_bundle(path)
    chosen = [bundle.variant(name) for name in dict.fromkeys(variants or bundle.manifest.variants)]
    asked: dict[str, Any] = {"path": str(path), "providers": providers, "threads": threads, "prompt": prompt}
    asked |= {"prepared": prepared, "atoms": atoms}
    measured = []
    for variant in chosen:
        run = bundle if atoms is None else with_atoms(bundle, atoms, variant.name)
        if prepared:
            prepare(run, variant.name)
        size, state = run.size(variant.name), 4 * run.config.state_size
        left = None if run.atoms_of is None else run.atoms
        measured.append(_measure({**asked, "variant": variant.name}, left, size, state, tokens, repeats))
    return Footprint(
        path=str(path),
        name=bundle.manifest.name,
        machine=machine() | {"threads": threads or 1},
        prompt=prompt,
        prompt_tokens=sum(1 for _ in encode(bundle.tokenizer, prompt)),
        tokens=tokens,
        repeats=repeats,
        prepared=prepared,
        atoms=atoms,
        variants=tuple(measured),
    )


def machine() -> dict[str, str | int | None]:
    """The machine that figures belong to."""
    found = cpu_identity()
    cpu = found.get("model name") or platform.processor() or platform.machine()
    features = found.get("flags", found.get("Features", "")).split()
    if quickest := next((name for name in _INT8_KERNELS if name in features), None):
        cpu += f" with {quickest}"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime().__version__,
    }


def _measure(
    asked: dict[str, Any], atoms: int | None, file: int, state: int, tokens: int, repeats: int
) -> VariantFootprint:
    slowly = {**asked, "tokens": tokens, "pauses": True}
    with Child(slowly) as first:
        stages, provider = _memories(first), first.provider
        gpu = gpu_memory(first.pid) if provider == "cuda" else None
        with Child(slowly) as second:
            for _ in second.life(STAGES):
                pass
            second_process = read_memory(second.pid).private
    times = [_times(asked) for _ in range(repeats)]
    firsts = [seconds["first_token"] for seconds in times]
    runtime, last = stages["imports"].rss, stages[STAGES[-1]]
    weights = file if provider == "cpu" else None
    unaccounted = None
    if last.rss is not None and runtime is not None:
        unaccounted = last.rss - runtime - (weights or 0) - state
    values = {**asdict(last), "second_process": second_process}
    return VariantFootprint(
        variant=asked["variant"],
        atoms=atoms,
        provider=provider,
        file=file,
        weights=weights,
        state=state,
        runtime=runtime,
        unaccounted=unaccounted,
        peak=last.peak,
        second_process=second_process,
        gpu=gpu,
        stages=stages,
        seconds=Seconds(
            imports=median(seconds["imports"] for seconds in times),
            load=median(seconds["load"] for seconds in times),
            first_token=median(firsts),
            first_token_cpu=median(seconds["first_token_cpu"] for seconds in times),
            fastest=min(firsts),
            slowest=max(firsts),
        ),
        not_told=tuple(
            [name for name, value in values.items() if value is None]
            + (["gpu"] if provider == "cuda" and gpu is None else [])
        ),
    )


def measure_memory(path: str | Path, variant: str | None = None, *, tokens: int = 16) -> dict[str, Memory]:
    """The memory of one fresh process that generates on the CPU, at the end of each of its stages.

    Raises:
        BundleError: the bundle is damaged, or lacks the variant.
        ProviderError: ONNX Runtime is not there.
        ParameterError: `tokens` is no number from 1.
        MeasureError: the process died.
    """
    _check_number("tokens", tokens)
    asked = {"path": str(path), "variant": variant, "providers": "cpu", "threads": None, "prompt": PROMPT}
    with Child({**asked, "tokens": tokens, "pauses": True}) as child:
        return _memories(child)


def _check_number(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ParameterError(f"{name}: expected a whole number from 1, got {shown(value)}; leave it out")


def _memories(child: "Child") -> dict[str, Memory]:
    """The memory of a process at the end of each of its stages; it stands still after the last."""
    stages: dict[str, Memory] = {}
    for told in child.life(STAGES):
        memory = read_memory(told["pid"])
        stages[told["stage"]] = memory if told["peak"] is None else replace(memory, peak=told["peak"])
    return stages


def _times(asked: dict[str, Any]) -> dict[str, float]:
    """The times of one cold process."""
    with Child({**asked, "tokens": 0, "pauses": False}) as child:
        life = {told["stage"]: told for told in child.life(STAGES[:-1])}
        first_token = time.perf_counter() - child.started
    at = {stage: told["seconds"] for stage, told in life.items()}
    return {
        "imports": at["imports"] - at["interpreter"],
        "load": at["session"] - at["imports"],
        "first_token": first_token,
        "first_token_cpu": life["first_token"]["cpu"],
    }


class Child:
    """A fresh process that goes through stages, and tells each."""

    def __init__(self, asked: dict[str, Any], code: str = _CODE) -> None:
        self.pid, self.provider, self._at = 0, "", "start"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed at the end of the block
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )

    def life(self, stages: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What it tells at each stage; it goes on to the next one when that is asked for."""
        for stage in stages:
            if self._at != "start":
                self._go_on()
            told = self._told()
            assert told["stage"] == stage
            self._at = stage
            self.pid, self.provider = told["pid"], told.get("provider", self.provider)
            yield told

    def _go_on(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is dead, which is told where its next line is missing
            self._process.stdin.write("\n")
            self._process.stdin.flush()

    def _told(self) -> dict[str, Any]:
        """Its next line; what it died of becomes an error here."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if not line.startswith('{"stage": '):
                continue  # a library has something to say
            told: dict[str, Any] = json.loads(line)
            if told["stage"] == "error":
                raise getattr(errors, told["kind"])(told["message"])
            return told
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").split("\n")
        why = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise MeasureError(
            f"the measured process ended after its stage {self._at} with code {code}: {why[:200]}; "
            "free memory where it was killed, or see whether sdgm-edge generate works"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let it end by itself where all went well, so that others who wait for it see a normal end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kind is not None:
            self._process.kill()
        with suppress(OSError):  # it is dead already
            self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
