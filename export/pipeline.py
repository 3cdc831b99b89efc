"""From a trained run to a bundle: build, hold to the gates, write.

Nothing is written before every variant has passed, and then all at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from sdgm_edge.models import SDGM
from sdgm_edge.run import Run, load_run, newest_run, with_copy_window
from sdgm_edge.runtime import (
    LONGEST_NAME,
    AccuracyError,
    BundleError,
    Engine,
    ExportError,
    ParityError,
    Score,
    StateError,
    UsageError,
    check_place,
    check_replaceable,
    with_line_end,
)
from sdgm_edge.tokenization import BEGIN_ID, UNKNOWN, Tokenizer

from .atoms import Reduction, strongest_first
from .gates import (
    Accuracy,
    Parity,
    accuracy,
    check_finite,
    check_half,
    check_parity,
    perplexity_increase,
    refuse,
    score_graph,
)
from .golden import golden_prompt, golden_steps
from .graph import weights_of
from .matrices import Precision
from .reach import find_reach
from .report import ExportReport, VariantExport
from .screening import MAX_INCREASE, SCREENED_BITS, Screen, Screening, is_large, screen_for
from .search import Found, mixed_precision
from .variants import CHUNK, VARIANTS, Variant, build, bundle_config, model_as_held, variant_of
from .writing import Gated, Passed, write_export

MAX_LOSS_INCREASE = 0.01
BUNDLES = Path("bundles")
HEADS = ("auto", "whole", "screened")
SPEED_SECONDS = 0.3


def export_run(
    run_path: str | Path | None = None,
    out: str | Path | None = None,
    bits: Iterable[int] = (32,),
    *,
    head: str = "auto",
    atoms: int | None = None,
    copy_window: int | None = None,
    drafts: bool = False,
    loop: bool = False,
    force: bool = False,
    max_loss_increase: float = MAX_LOSS_INCREASE,
    single_file: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> ExportReport:
    """Export a run, the newest by default, as a bundle with a variant for each of `bits`.

    `bits`: 32, 16, 8 (int8) and 4. `out`: a folder, or a file `*.sdgm`; by default `bundles/<name of the
    run>`. `head`: "whole", "screened" (of 8 and 4 bits: not read whole), or "auto": screened if large and
    where that loses nearly nothing. `atoms`: so many of each layer, the strongest. `copy_window`: a head that
    points looks back over so many tokens, in place of as many as it was trained with. `drafts`: in 8 bits
    a token is rounded as it would be alone, so that drafts can be checked exactly. `loop`: the decoding loop
    of the default variant, too, as `generate.onnx`. `force` writes variants that lose more than
    `max_loss_increase`, relative, in bits per byte. `progress` is told what is being done.

    Raises:
        UsageError: `bits`, `head`, `atoms`, `copy_window` or `max_loss_increase` make no sense.
        RunError: there is no such run.
        ExportError: it is one of a baseline, or its weights are no numbers or too large.
        ParityError: a graph does not compute what the model computes.
        AccuracyError: a variant loses too much.
        BundleError: the bundle cannot be written.
    """
    wanted = {variant_of(b).bits for b in bits}
    _check_request(wanted, head, drafts, max_loss_increase)
    folder = newest_run() if run_path is None else Path(run_path)
    run = load_run(folder)
    trained_window = run.config.copy_window
    if copy_window is not None:
        run = with_copy_window(run, copy_window)
    if not isinstance(run.model, SDGM):
        raise ExportError(
            f"{folder}: expected a model of {' or '.join(CHUNK)} atoms, got the layer {run.config.layer!r}: "
            "baselines are measured by sdgm-edge compare, and not made into bundles"
        )
    name, whole = folder.resolve().name + ("" if atoms is None else f"-{atoms}-atoms"), run.model
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ExportError(
            f"{folder}: expected a folder whose name, which the bundle takes, has at most {LONGEST_NAME} "
            "characters that can be printed; rename it"
        )
    target = BUNDLES / name if out is None else Path(out)
    check_place(target, BundleError)  # before the work, not after
    if single_file and target.suffix != ".sdgm":
        target = target.with_name(f"{target.name}.sdgm")
    if head == "screened" and run.config.copy_window:
        raise UsageError(
            f"head: expected a head without a pointer to screen, got copy_window = {run.config.copy_window}; "
            "leave --head out: a head that points is read whole"
        )
    check_replaceable(target)
    check_finite(weights_of(whole), folder)
    if atoms is not None or run.config.layer == "ringing":
        progress("putting atoms in the order of their strength")
        run = strongest_first(run, atoms)
    assert isinstance(run.model, SDGM)
    variants = [variant for variant in VARIANTS.values() if variant.bits in wanted]
    reach = None
    if drafts:
        progress("looking how far activations reach")
        reach, variants = find_reach(run.model), [variant.by_rows() for variant in variants]
    gates = _Gates(
        run,
        run.model,
        head=head,
        limit=max_loss_increase,
        force=force,
        progress=progress,
        reach=reach,
        whole=None if atoms is None else whole,
    )
    gated = gates.pass_all(variants)
    progress(f"writing {target}")
    return write_export(target, name, run, gated, trained_window=trained_window, loop=loop)


def _check_request(wanted: Collection[int], head: str, drafts: bool, max_loss_increase: float) -> None:
    """Raise UsageError for what makes no sense whatever the run is."""
    if not wanted:
        raise UsageError("bits: expected at least one of 4, 8, 16, 32, got none; leave it out for 32")
    if not (math.isfinite(max_loss_increase) and max_loss_increase >= 0):
        raise UsageError(
            f"max_loss_increase: expected a share from 0, got {max_loss_increase}; "
            "0.01 allows 1% more bits per byte"
        )
    if head not in HEADS:
        raise UsageError(f"head: expected {', '.join(HEADS)}, got {head!r}; leave it out for auto")
    if head == "screened" and SCREENED_BITS.isdisjoint(wanted):
        raise UsageError(
            f"head: expected 8 or 4 among the bits for a screened head, got {sorted(wanted)}; "
            "floats are there to be exact: ask for --bits 8 too, or leave --head out"
        )
    if drafts and not {8, 4} & set(wanted):
        raise UsageError(
            f"drafts: expected 8 or 4 among the bits, got {sorted(wanted)}; "
            "floats can be drafted as they are: leave --drafts out"
        )


class _Gates:
    """What every variant of one run is held to."""

    def __init__(
        self,
        run: Run,
        model: SDGM,
        *,
        head: str,
        limit: float,
        force: bool,
        progress: Callable[[str], None],
        reach: Mapping[str, float] | None,
        whole: SDGM | None,
    ) -> None:
        """`reach`: by matrix, how far activations reach, where they are rounded in fixed steps. `whole`: the
        model with all its atoms, where some are left out."""
        self.run, self.model, self.head, self.limit = run, model, head, limit
        self.force, self.progress, self.reach, self.whole = force, progress, reach, whole
        self.eight: Precision = "q8" if reach is None else "rows8"  # for a matrix raised from 4 bits
        self.config = run.config
        self.weights = weights_of(model)
        self.tokenizer = Tokenizer.load(run.tokenizer_path)
        words = self.tokenizer.kind == "word"
        self.tokens = self.tokenizer.encode(with_line_end(run.heldout) if words else run.heldout)
        self.has_unk = words and self.tokenizer.token_id(UNKNOWN) in self.tokens
        self.prompt_ids = self.tokenizer.encode(golden_prompt(run.heldout))
        self.sizes = bundle_config(self.config)

    def pass_all(self, variants: list[Variant]) -> Gated:
        """Build all variants and hold them to the gates; float32 is always built, to be the reference."""
        float32 = VARIANTS[32]
        graph = build(self.config, self.weights, float32.plan(self.weights))
        engine = self._engine(graph, float32)
        self.progress("fp32: comparing with torch")
        parity = check_parity(float32, self.model, engine)
        self.progress(f"fp32: scoring {len(self.tokens)} held-out tokens")
        reference = self._score(engine, float32)
        own = accuracy(reference, reference, self.limit)
        reduction = None if self.whole is None else self._reduction(self.whole, reference)
        passed, failures = [], []
        for variant in variants:
            if variant is float32:
                passed.append(self._passed(variant, graph, engine, parity, own, (), None))
                continue
            try:
                passed.append(self._pass(variant, reference))
            except ExportError as failure:
                failures.append(failure)
        if failures:
            kind = ParityError if any(isinstance(f, ParityError) for f in failures) else type(failures[0])
            raise kind("; and ".join(map(str, failures)))
        return Gated(tuple(passed), own, reduction)

    def _reduction(self, whole: SDGM, reference: Score) -> Reduction:
        weights, float32 = weights_of(whole), VARIANTS[32]
        graph = build(whole.config, weights, float32.plan(weights))
        engine = Engine(graph, bundle_config(whole.config), float32.file, providers="cpu")
        score = self._score(engine, float32)
        found = Reduction(self.config.num_atoms, whole.config.num_atoms, reference.nll / score.nll - 1)
        self.progress(str(found))
        return found

    def _pass(self, variant: Variant, reference: Score) -> Passed:
        def attempt(plan: dict[str, Precision]) -> Found:
            graph = build(self.config, self.weights, plan, reach=self.reach)
            score = self._score(self._engine(graph, variant), variant)
            return Found(plan, graph, accuracy(score, reference, self.limit))

        self.progress(f"{variant.name}: scoring")
        plan = variant.plan(self.weights)
        check_half(plan, self.weights)
        found = attempt(plan)
        if variant.bits == 4 and not found.accuracy.within:
            mixed = mixed_precision(
                self.model, self.weights, plan, self.tokens, attempt, self.progress, self.eight
            )
            found = mixed if mixed.accuracy.within else found
        if not (found.accuracy.within or self.force):
            raise refuse(variant.name, found.accuracy)
        screen, screened = None, None
        if self._screens(variant):
            found, screen, screened = self._screen(variant, found, reference)
        engine = self._engine(found.graph, variant)
        self.progress(f"{variant.name}: comparing with torch")
        held = model_as_held(self.model, found.plan)
        preview = None if screen is None else model_as_held(self.model, found.plan, screen)
        parity = check_parity(variant, held, engine, preview=preview)
        raised = tuple(name for name in plan if found.plan[name] != plan[name])
        return self._passed(variant, found.graph, engine, parity, found.accuracy, raised, screened)

    def _screens(self, variant: Variant) -> bool:
        """Whether a screened head is to be tried."""
        if self.head == "auto":
            return is_large(self.config, variant.bits)
        return self.head == "screened" and variant.bits in SCREENED_BITS

    def _screen(
        self, variant: Variant, whole: Found, reference: Score
    ) -> tuple[Found, Screen | None, Screening | None]:
        """Screen the head of a graph that reads it whole, or leave it so where that loses too much.

        Raises:
            AccuracyError: it loses too much, and was asked for.
        """
        self.progress(f"{variant.name}: screening the head")
        screen = screen_for(self.model, whole.plan["embedding.weight"])
        graph = build(self.config, self.weights, whole.plan, screen, self.reach)
        score = self._score(self._engine(graph, variant), variant)
        found = Found(whole.plan, graph, accuracy(score, reference, self.limit))
        more = (found.accuracy.loss_increase - whole.accuracy.loss_increase) * reference.nll
        increase = perplexity_increase(more, reference.num_tokens)
        rank, num_exact = len(screen.down_RD), screen.num_exact
        told = f"{variant.name}: a head screened by rank {rank} with {num_exact} exact words"
        if not self.force and (increase > MAX_INCREASE or not found.accuracy.within):
            if self.head == "screened":
                raise AccuracyError(
                    f"{told} loses too much on the held-out text: expected at most {MAX_INCREASE:.0%} more "
                    f"perplexity than read whole and {self.limit:.2%} more bits per byte than float32, got "
                    f"{increase:.2%} and {found.accuracy.loss_increase:.2%}; "
                    "leave --head out to read it whole, or allow it with --force"
                )
            self.progress(f"{told} adds {increase:.2%} to the perplexity: the head is read whole")
            return whole, None, None
        self.progress(f"{told} adds {increase:.2%} to the perplexity")
        return found, screen, Screening(rank, num_exact, increase)

    def _passed(
        self,
        variant: Variant,
        graph: bytes,
        engine: Engine,
        parity: Parity,
        found: Accuracy,
        raised: tuple[str, ...],
        screened: Screening | None,
    ) -> Passed:
        golden = golden_steps(engine, BEGIN_ID, self.prompt_ids)
        one_by_one, in_chunks = measure_speed(engine)
        told = VariantExport(
            name=variant.name,
            file=variant.file,
            num_bytes=len(graph),
            parity=parity,
            accuracy=found,
            at_8_bits=raised,
            screened=screened,
            decode_speed=one_by_one,
            prompt_speed=in_chunks,
        )
        return Passed(told, graph, golden)

    def _engine(self, graph: bytes, variant: Variant) -> Engine:
        return Engine(graph, self.sizes, variant.file, providers="cpu")

    def _score(self, engine: Engine, variant: Variant) -> Score:
        try:
            return score_graph(engine, self.run.heldout, self.tokens, BEGIN_ID, self.has_unk)
        except StateError as e:
            raise AccuracyError(
                f"{variant.name}: expected a score on the held-out text, got NaN: the graph computes what is "
                "no number there; check the weights for extreme values, or ask for other bits"
            ) from e


def measure_speed(engine: Engine) -> tuple[float, float]:
    """Return tokens a second, one by one and in chunks, on this machine now."""
    rates = []
    for length in (1, engine.chunk):
        ids = [i % engine.config.vocab_size for i in range(length)]
        state = engine.last(ids, engine.zeros())[1]
        seconds: list[float] = []
        while sum(seconds) < SPEED_SECONDS:
            begin = time.perf_counter()
            state = engine.last(ids, state)[1]
            seconds.append(time.perf_counter() - begin)
        rates.append(length / statistics.median(seconds))
    return rates[0], rates[1]
