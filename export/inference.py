"""What models of any kind cost on a device: `python -m sdgm_edge.export.inference FOLDER CONTEXTS`.

FOLDER is a run; its model becomes an int8 graph, by the same matrices for an SDGM as for a baseline, which is
held against the model for a few steps: what computes something else is not measured. Then each of CONTEXTS
(numbers with commas) is measured in fresh processes that hold nothing but the runtime, and noted at once in
`inference.json`: a call that was cut short goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sdgm_edge import child
from sdgm_edge.inference import TOKENS, Inference
from sdgm_edge.models import SDGM, MixerModel
from sdgm_edge.run import Run, load_run
from sdgm_edge.runtime import (
    Engine,
    ExportError,
    RunError,
    Stepper,
    measure_context,
    replacing,
)

from . import baselines, gates, variants
from .baselines.parity import check_parity
from .graph import weights_of

GRAPH = "model_int8.onnx"
STEPS = 96
"""Over which a graph is held against its model, before it is measured."""
_INT8 = variants.VARIANTS[8]


@dataclass(frozen=True, slots=True)
class Measurable:
    """A graph, and how it takes its tokens."""

    graph: bytes
    chunk: int
    block: int
    window: int


def measurable(run: Run) -> Measurable:
    """Return the int8 graph of a run's model.

    Raises:
        ExportError: nobody laid it out, or it does not compute what the model computes.
    """
    model, config, weights = run.model, run.config, weights_of(run.model)
    if isinstance(model, SDGM):
        plan = _INT8.plan(weights)
        made = Measurable(variants.build(config, weights, plan), variants.CHUNK[config.layer], 0, 0)
        engine = Engine(made.graph, variants.bundle_config(config), GRAPH, providers="cpu")
        gates.check_parity(_INT8, variants.model_as_held(model, plan), engine, STEPS)
        return made
    assert isinstance(model, MixerModel)
    if config.layer not in baselines.GRAPHS:
        there = ", ".join(baselines.GRAPHS)
        raise ExportError(
            f"{config.layer}: expected a layer with a graph ({there}), got one without; write one as "
            "docs/compare.md says, or compare with --no-inference"
        )
    plan = baselines.plan_of(_INT8, weights)
    chunk, block = baselines.chunk_of(config), baselines.block_of(config)
    graph = baselines.build(config, weights, plan)
    stepper = Stepper(graph, chunk=chunk, block=block, capacity=max(STEPS, config.window))
    check_parity(_INT8, baselines.model_as_held(model, plan), stepper, STEPS)
    return Measurable(graph, chunk, block, config.window if config.windowed else 0)


def measure(
    folder: Path, contexts: Sequence[int], progress: Callable[[str], None] = lambda message: None
) -> Inference:
    """Measure what is not measured yet of a run, and leave it in its folder.

    Raises:
        RunError: there is no such run.
        MeasureError: a process died.
    """
    found = Inference.read(folder) or Inference()
    missing = [context for context in contexts if context not in found.costs]
    if not missing and found.graph_bytes is not None:
        return found
    run = load_run(folder)
    try:
        made = measurable(run)
    except ExportError as reason:
        found = Inference(reason=str(reason))
        found.write(folder)
        return found
    with replacing(folder / GRAPH, RunError) as file:
        file.write(made.graph)
    found = replace(found, reason=None, graph_bytes=len(made.graph), window=made.window)
    found.write(folder)
    for context in missing:
        progress(f"{folder.name}: decoding after {context:,} tokens")
        cost = measure_context(
            folder / GRAPH, run.tokenizer_path, context, chunk=made.chunk, block=made.block, tokens=TOKENS
        )
        found = replace(found, costs={**found.costs, context: cost})
        found.write(folder)
    return found


def main() -> None:
    """Measure the run of a folder, as a process."""
    folder, contexts = Path(sys.argv[1]), [int(context) for context in sys.argv[2].split(",")]
    with child.ending():
        measure(folder, contexts, lambda message: print(message, file=sys.stderr, flush=True))  # noqa: T201


if __name__ == "__main__":
    main()
