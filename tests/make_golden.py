"""Make tests/data/golden.sdgm: python tests/make_golden.py

It is committed, so that a bundle written today is read for ever. Make it anew only with a new format version,
or where what was written proved wrong.
"""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import tiny
import torch
import trained
from torch.nn.functional import cross_entropy

from sdgm_edge.export import export_run, pipeline
from sdgm_edge.models import SDGM, ModelConfig
from sdgm_edge.tokenization import Tokenizer

PATH = Path(__file__).parent / "data" / "golden.sdgm"


def model() -> SDGM:
    """A model that has learned one sentence."""
    torch.manual_seed(0)
    made = SDGM(ModelConfig(vocab_size=tiny.VOCAB, num_layers=1, width=16, num_atoms=8, glu_width=16))
    ids = torch.tensor([[0, *Tokenizer.load(trained.tokenizer_path()).encode(tiny.TEXT)]])
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-2)
    for _ in range(150):
        loss = cross_entropy(made(ids[:, :-1]).logits_BTV.flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval()


def main() -> None:
    """Write the bundle."""
    made = model()
    size = made.config.mixing_size
    ids = torch.tensor([[0, *Tokenizer.load(trained.tokenizer_path()).encode(tiny.TEXT)]])
    with torch.no_grad():
        mixing = made(ids).mixing_BTM[0]
    half = len(mixing) // 2
    parts = (mixing[:half], mixing[half:])
    prior = {
        "weights": torch.tensor([0.5, 0.5]).numpy(),
        "means": torch.stack([part.mean(0) for part in parts]).numpy(),
        "variances": torch.stack([part.var(0) + 1e-3 for part in parts]).numpy(),
    }
    assert prior["means"].shape == (2, size)
    run = replace(
        trained.run(), path=Path("golden"), config=made.config, model=made, prior=prior, heldout=tiny.TEXT
    )
    with mock.patch.object(pipeline, "load_run", return_value=run):
        export_run("golden", PATH, (32, 8, 4), max_loss_increase=1.0)


if __name__ == "__main__":
    main()
