"""What a run leaves behind of its course: a CSV log, TensorBoard events and a picture of the loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAIN = (
    "loss",
    "language",
    "reconstruction",
    "spectrum",
    "prior",
    "cosine",
    "learning_rate",
    "tokens_per_second",
)
VALID = ("valid_token_perplexity", "valid_word_perplexity")
COLUMNS = ("step", "epoch", *TRAIN, *VALID)


class Recorder:
    """Appends to `log.csv` and TensorBoard; a resumed run first drops the rows past its checkpoint."""

    def __init__(self, folder: Path, from_step: int) -> None:
        self.path = folder / "log.csv"
        rows = [row for row in read_log(self.path) if int(row["step"]) <= from_step]
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.rows = csv.DictWriter(self.file, COLUMNS)
        self.rows.writeheader()
        self.rows.writerows(rows)
        self.events: SummaryWriter | None = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as reason:  # torch has it, the tensorboard package is an extra
            if reason.name != "tensorboard":
                raise
        else:
            self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def add(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Record some of the columns for a step."""
        self.rows.writerow(
            {"step": step, "epoch": f"{epoch:.4f}", **{k: f"{v:.6g}" for k, v in values.items()}}
        )
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name.replace("valid_", "valid/"), value, step)

    def close(self) -> None:
        """Finish the files."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; none where there is no log yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def draw_curve(folder: Path) -> Path:
    """Draw `log.csv` as `curve.png`: training loss and validation loss a token, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_log(folder / "log.csv")
    trained = [(int(r["step"]), float(r["language"] or r["loss"])) for r in rows if r["loss"]]
    valid = [
        (int(r["step"]), math.log(float(r["valid_token_perplexity"])))
        for r in rows
        if r["valid_token_perplexity"]
    ]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    if trained:
        axes.plot(*zip(*trained, strict=True), label="training", linewidth=1)
    if valid:
        axes.plot(*zip(*valid, strict=True), "o-", label="validation")
        best = min(loss for _, loss in valid)
        axes.set_title(f"{folder.name}: best validation perplexity {math.exp(best):.1f} a token")
    axes.set(xlabel="step", ylabel="nats per token")
    if trained or valid:
        axes.legend()
    axes.grid(alpha=0.3)
    path = folder / "curve.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path
