"""The whole of the paper's comparison, small enough for the time that it is given: `make paper`.

    python benchmarks/paper.py                          # the embedded corpus, about half an hour on two cores
    python benchmarks/paper.py --data path/to/ptb       # a folder with train.txt and valid.txt
    python benchmarks/paper.py --data path/to/ptb --minutes 600 --params 4M --vocab-size 8192

Everything goes into one folder: `report.md`, `report.json` and `report.html` with all that was measured,
plots, and a folder of its own for each part:

    pace/        a short training of the paper's model, which tells how much text the others can have
    paper/       the paper's model, this project's (`ringing`) and the paper's baselines under its own terms,
                 and its ablations: the same text for all, and a pointer
    best/        this project's model and all baselines under this project's terms: the same time for all
    judge/       a larger model, which says how likely generated texts are
    memory/      copy, selective, recall, needle: what models keep in mind
    generation/  texts with the Gaussian mixture and without

Given again, the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sdgm_edge import child, console, probe_generation
from sdgm_edge.compare import ABLATIONS, PRODUCT, Outcome, Terms, compare, parse_budget
from sdgm_edge.config import PRESET_RUNS, CorpusConfig
from sdgm_edge.models import MIXERS
from sdgm_edge.probe import TASKS, Finding, Probe, probe, table
from sdgm_edge.report import Table, draw_plots, make_report, page
from sdgm_edge.runtime import RunError, replacing
from sdgm_edge.shards import Corpus, corpus_of

PAPERS = ("sdgm", PRODUCT, "gpt2", "transformer-xl", "linformer")
REMEMBERING = ("sdgm", "sdgm:layer=clock", "gpt2", "lstm")
TRAINED, REMEMBERED = 0.4, 0.15
"""Parts of the time that trainings and tasks have; loading, scoring and measuring take the rest."""
VALID_BYTES = 2000
"""Of the validation text for each minute: scoring it is not to take longer than training."""


@dataclass
class Report:
    """What came of all parts."""

    about: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    plots: list[tuple[str, bytes]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Leave all of it in a folder, whole or not at all, each file."""
        pictures = {f"plot-{i}.png": png for i, (_, png) in enumerate(self.plots, start=1)}
        lines = [
            "# The paper's comparison",
            "",
            *(f"- {name}: {value}" for name, value in self.about.items()),
        ]
        lines += ["", *(part.markdown() for part in self.tables), *(f"- {note}" for note in self.notes), ""]
        lines += [f"![{title}]({name})\n" for (title, _), name in zip(self.plots, pictures, strict=True)]
        whole = page("The paper's comparison", self.about, self.tables, self.plots, self.notes)
        figures = json.dumps(finite({"about": self.about, **self.figures}), indent=2, allow_nan=False) + "\n"
        texts = {"report.md": "\n".join(lines), "report.html": whole, "report.json": figures}
        for name, data in {**pictures, **{name: text.encode() for name, text in texts.items()}}.items():
            with replacing(folder / name, RunError) as file:
                file.write(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """What is compared, and where."""

    folder: Path
    cache: Path
    corpus: Corpus
    terms: Terms
    minutes: float
    contexts: tuple[int, ...]
    baselines: tuple[str, ...]
    ablations: tuple[str, ...]
    tasks: tuple[str, ...]

    def run(self) -> Report:
        """Do all parts that are not done, and report."""
        papers = tuple(name for name in PAPERS if name in ("sdgm", PRODUCT, *self.baselines))
        entries = {
            "paper": tuple(dict.fromkeys((*papers, *self.ablations))),
            "best": ("sdgm", *self.baselines),
            "judge": ("sdgm",),
        }
        # The judge has twice as much time as another, the pace half as much.
        each = TRAINED * self.minutes / (sum(map(len, entries.values())) + 1.5)
        papers_terms = replace(self.terms, protocol="paper", minutes=each)
        terms = {
            "paper": self._on_the_same_text(papers_terms),
            "best": replace(self.terms, minutes=each),
            "judge": replace(self.terms, minutes=2 * each, num_parameters=3 * self.terms.num_parameters),
        }
        outcomes = {name: self._compare(name, entries[name], terms[name]) for name in entries}
        made = make_report(outcomes["best"], terms["best"], self.corpus)
        about = {**made.about, "minutes asked for": self.minutes}
        of_one_part = ("protocol", "pointer", "training", "matched in")
        report = Report({name: value for name, value in about.items() if name not in of_one_part})
        report.notes.extend(made.notes)
        for name, titles in (
            ("paper", {"The paper's terms, on the same text": papers,
                       "Ablations of the paper's model, on the same text": self.ablations}),
            ("best", {"This project's model and all baselines, for the same time": entries["best"]}),
        ):  # fmt: skip
            self._tell(report, name, outcomes[name], terms[name], titles)
        self._remember(report)
        self._generate(report, outcomes)
        return report

    def _on_the_same_text(self, terms: Terms) -> Terms:
        """Return the terms with as many steps as the SDGM makes in their minutes; never more than its epochs.

        Raises:
            RunError: the SDGM cannot be trained.
        """
        (pace,) = self._compare("pace", ("sdgm",), replace(terms, minutes=terms.minutes / 2))
        if pace.result.tokens_per_second is None:
            reason = pace.result.reason or "fewer than three steps fit its time; give more minutes"
            raise RunError(f"{pace.folder}: the paper's model has no speed: {reason}")
        training = {**asdict(PRESET_RUNS["paper"].training), **(terms.training or {})}
        step = training["batch_size"] * terms.window
        most = training["epochs"] * (len(self.corpus.train) // step)
        steps = min(most, round(60 * terms.minutes * pace.result.tokens_per_second / step))
        changed = {**(terms.training or {}), "max_steps": max(1, steps)}
        return replace(terms, minutes=0.0, training=changed)

    def _compare(self, name: str, entries: Sequence[str], terms: Terms) -> list[Outcome]:
        contexts = self.contexts if name == "best" else ()
        return compare(entries, terms, self.folder / name, self.cache, contexts=contexts, progress=say)

    def _tell(
        self,
        report: Report,
        name: str,
        outcomes: Sequence[Outcome],
        terms: Terms,
        titles: Mapping[str, Sequence[str]],
    ) -> None:
        """Report a comparison, in tables of some of its entries each."""
        made = make_report(outcomes, terms, self.corpus)
        made.write(self.folder / name)
        report.figures[name] = made.rows
        for title, entries in titles.items():
            rows = [row for row in made.rows if row["entry"] in entries]
            if not rows:
                continue
            for part in replace(made, rows=rows).tables:
                report.tables.append(replace(part, title=f"{title}: {part.title.lower()}"))
            report.plots += [(f"{title}: {what}", png) for what, png in draw_plots(rows)]
        report.notes += [f"{row['entry']}: {row['reason']}" for row in made.rows if row["reason"]]

    def _remember(self, report: Report) -> None:
        """Report what models keep in mind."""
        models = tuple(name for name in REMEMBERING if name.startswith("sdgm") or name in self.baselines)
        settings = Probe(
            num_parameters=100_000,
            minutes=REMEMBERED * self.minutes / (len(models) * len(self.tasks)),
            trained_distance=64,
            distances=(16, 32, 64, 128, 256, 1024),
            device=self.terms.device,
        )
        findings = probe(models, self.tasks, settings, self.folder / "memory", progress=say)
        title = (
            f"Answers that are right, by distance (trained up to {settings.trained_distance}; 3 % by chance)"
        )
        report.tables.append(Table(title, *table(findings)))
        report.plots += [
            (f"{task}: answers that are right", draw_memory(findings, task)) for task in self.tasks
        ]
        report.figures["memory"] = [asdict(finding) for finding in findings]

    def _generate(self, report: Report, outcomes: dict[str, list[Outcome]]) -> None:
        """Report what is generated by this project's model and the paper's."""
        judge = outcomes["judge"][0]
        if judge.result.status != "finished":
            report.notes.append(f"generated texts have no judge: {judge.result.reason}")
        for name, title in (("best", "this project's model"), ("paper", "the paper's model")):
            outcome = outcomes[name][0]
            if outcome.result.status != "finished":
                report.notes.append(f"nothing is generated by {title}: {outcome.result.reason}")
                continue
            judging = ["--judge", str(judge.folder)] if judge.result.status == "finished" else []
            path = self.folder / "generation" / f"{name}.json"
            found = generated(path, outcome.folder, judging)
            if isinstance(found, str):
                report.notes.append(f"{title}: {found}")
                continue
            columns = probe_generation.COLUMNS
            cells = [[console.format_value(row[name]) for name in columns.values()] for row in found["rows"]]
            report.tables.append(Table(f"Texts generated by {title}", list(columns), cells))
            report.figures[f"generation_{name}"] = found


def generated(path: Path, run: Path, judging: Sequence[str]) -> dict[str, Any] | str:
    """Return what `sdgm-edge probe generation` tells of a run, or why it tells nothing."""
    if not path.exists():
        say(f"generation: {run}")
        command = ["-m", "sdgm_edge", "probe", "generation", str(run), str(run / "heldout.txt"), *judging]
        small = ["--number", "32", "--tokens", "64", "--strengths", "0.1,0.3,0.6", "--json"]
        done = child.run([*command, *small], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            said = done.stderr.strip().splitlines() if done.returncode > 0 else []
            return said[-1] if said else child.told(done.returncode)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, RunError) as file:
            file.write(done.stdout.encode())
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def finite(figures: Any) -> Any:
    """Return figures as JSON knows them: None for what no float holds, as a word perplexity of e^800."""
    if isinstance(figures, Mapping):
        return {name: finite(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def draw_memory(findings: Sequence[Finding], task: str) -> bytes:
    """Return a PNG of accuracy by distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for finding in findings:
        if finding.task == task:
            axes.plot(*zip(*sorted(finding.accuracy.items()), strict=True), "o-", label=finding.entry)
    axes.set(
        xlabel="distance, tokens", ylabel="answers that are right", xscale="log", ylim=(0, 1.02), title=task
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, metadata={"Software": None})
    return data.getvalue()


def beginning(source: Path, target: Path, limit: int) -> Path:
    """Return a text, or a copy of its beginning, to a line end, where it is longer than some bytes."""
    data = source.read_bytes()
    if len(data) <= limit:
        return source
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target, RunError) as file:
        file.write(data[: data.rfind(b"\n", 0, limit) + 1])
    return target


def say(message: str) -> None:
    """Tell how things go."""
    print(message, file=sys.stderr, flush=True)


def listed(text: str) -> tuple[str, ...]:
    """Read "a,b"; nothing for nothing."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def main() -> None:
    """Run the comparison and print where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="folder with train.txt and valid.txt; none: embedded corpus"
    )
    parser.add_argument("--out", type=Path, help="folder for everything; none: runs/paper-<name of the data>")
    parser.add_argument("--minutes", type=float, default=30, help="about how long it may take on two cores")
    parser.add_argument("--params", default="400k", help="parameters of each model")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the bpe vocabulary")
    parser.add_argument("--window", type=int, default=128, help="tokens of a training window")
    parser.add_argument("--copy-window", type=int, help="tokens that all can copy; none: the protocol's")
    parser.add_argument("--batch-size", type=int, default=16, help="windows in a batch")
    parser.add_argument("--contexts", default="0,1024", help="tokens after which decoding is measured")
    parser.add_argument("--baselines", default=",".join(MIXERS), help="models beside the SDGM")
    parser.add_argument(
        "--ablations", default=",".join(ABLATIONS["paper"]), help="entries under paper's terms"
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="what is kept in mind")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    folder = options.out or Path("runs") / f"paper-{options.data.name if options.data else 'pydoc'}"
    sources = CorpusConfig(vocab_size=options.vocab_size)
    with child.ending():
        if options.data:
            limit = int(VALID_BYTES * options.minutes)
            valid = beginning(options.data / "valid.txt", folder / "valid.txt", limit).resolve()
            train = (options.data / "train.txt").resolve()
            sources = replace(sources, train=(str(train),), valid=(str(valid),))
        cache = console.cache_folder()
        corpus = corpus_of(sources, cache)
        terms = Terms(
            corpus=sources,
            vocab_size=corpus.tokenizer.vocab_size,
            num_parameters=parse_budget(options.params),
            training={"batch_size": options.batch_size},
            window=options.window,
            copy_window=options.copy_window,
            device=options.device,
        )
        Paper(
            folder=folder,
            cache=cache,
            corpus=corpus,
            terms=terms,
            minutes=options.minutes,
            contexts=tuple(map(int, listed(options.contexts))),
            baselines=listed(options.baselines),
            ablations=listed(options.ablations),
            tasks=listed(options.tasks),
        ).run().write(folder)
    print(folder / "report.html")


if __name__ == "__main__":
    main()
