"""The model card: a bundle's README.md."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence

from sdgm_edge.models import ModelConfig

from .atoms import Reduction
from .gates import Accuracy
from .report import VariantExport
from .screening import Screening

TEMPLATE = """\
# {name}

A Spectral Dictionary language model, in constant memory. {parameters:,} parameters,
{num_layers} {layer} layer{s} of {num_atoms} atoms, width {width}, vocabulary {vocab_size:,}. The whole state
of a text is {state:,} numbers ({kilobytes:.1f} KB), however long it is.{pointing}

## Use

```python
from sdgm_edge.runtime import Generator

gen = Generator.load({name_in_python})  # where this bundle lies
print(gen.generate({prompt}, max_new_tokens=64, seed=1).text)
```

`sdgm-edge generate -m {name_in_shell} -p "…"` does the same, and `sdgm-edge verify {name_in_shell}`
compares the machine that it runs on with the one that exported the model.

## Variants

{table}

`{default}` runs unless another is asked for. Held-out text: {num_bytes:,} bytes, {num_tokens:,} tokens,
sha256 `{sha256:.16}…`, of which the float32 graph makes {reference}. *Loss* is the increase
of bits per byte against that. *Parity* is the largest difference of a logit between the graph and the trained
model with the same rounded weights, over {steps} steps: absolute in fp32, elsewhere relative to how far words
lie apart.
{mixed}{screened}{reduced}
Model `{model_id:.16}…`, made with {made_with}.
"""


def model_card(
    *,
    name: str,
    prompt: str,
    config: ModelConfig,
    trained_window: int,
    num_parameters: int,
    variants: Sequence[VariantExport],
    reference: Accuracy,
    reduction: Reduction | None,
    model_id: str,
    made_with: Mapping[str, str],
) -> str:
    """Return the text of a bundle's README.md; the first variant is its default."""
    rows = [
        "| variant | file | MB | bits per byte | word perplexity | loss | parity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for variant in variants:
        figures = variant.accuracy
        rows.append(
            f"| {variant.name} | `{variant.file}` | {variant.num_bytes / 1e6:.2f} "
            f"| {_told(figures.bits_per_byte, '.4f')} "
            f"| {_told(figures.word_perplexity, '.2f')} | {figures.loss_increase:+.2%} "
            f"| {variant.parity.logits:.1e} |"
        )
    held = ", ".join(f"`{matrix}`" for variant in variants for matrix in variant.at_8_bits)
    return TEMPLATE.format(
        name=name,
        name_in_python=json.dumps(name, ensure_ascii=False),
        name_in_shell=shlex.quote(name),
        prompt=json.dumps(prompt, ensure_ascii=False),
        parameters=num_parameters,
        s="" if config.num_layers == 1 else "s",
        num_layers=config.num_layers,
        layer=config.layer,
        num_atoms=config.num_atoms,
        width=config.width,
        vocab_size=config.vocab_size,
        state=config.state_size,
        kilobytes=config.state_size * 4 / 1e3,
        pointing=_pointing(config.copy_window, trained_window),
        table="\n".join(rows),
        default=variants[0].name,
        num_bytes=reference.num_bytes,
        num_tokens=reference.num_tokens,
        sha256=reference.sha256,
        reference=f"{_told(reference.bits_per_byte, '.4f')} bits per byte",
        steps=variants[0].parity.steps,
        mixed=f"In q4, {held} stayed in 8 bits.\n" if held else "",
        screened="".join(_screened(v.name, v.screened) for v in variants if v.screened),
        reduced="" if reduction is None else f"The trained model has more atoms: {reduction}.\n",
        model_id=model_id,
        made_with=", ".join(f"{package} {version}" for package, version in made_with.items()),
    )


def _pointing(window: int, trained: int) -> str:
    if not window:
        return ""
    told = "" if window == trained else f"; it was trained with {trained:,}"
    return f" The head can copy from the last {window:,} tokens{told}."


def _screened(variant: str, s: Screening) -> str:
    return (
        f"In {variant}, logits come from a preview of rank {s.rank}, of the {s.num_exact} likeliest words "
        f"exact ones: {s.perplexity_increase:+.2%} perplexity against the head read whole.\n"
    )


def _told(figure: float | None, form: str) -> str:
    return "–" if figure is None else format(figure, form)
