"""The stepper: any graph with its state by name, in place, reads and steps as plain runs do."""

import numpy as np
import onnxruntime as ort
import pytest
import trained
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS, build

from sdgm_edge.runtime import Stepper

IDS = np.random.default_rng(0).integers(0, trained.VOCAB, 41).tolist()


@pytest.fixture(scope="module")
def graph():
    model = trained.model("ringing")
    weights = weights_of(model)
    return build(model.config, weights, VARIANTS[32].plan(weights))


@pytest.fixture(scope="module")
def expected(graph):
    """All logits, and the last state, of one plain run."""
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    state = np.zeros((1, session.get_inputs()[1].shape[1]), np.float32)
    logits, after, _ = session.run(None, {"ids": np.array([IDS]), "state": state})
    return logits[0], after


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5)


def test_a_bundles_graph_steps_and_reads_as_a_plain_run(graph, expected):
    logits, after = expected
    stepper = Stepper(graph, chunk=8)
    for token, row in zip(IDS[:5], logits, strict=False):
        close(stepper.step(token), row)
    close(stepper.read_all(IDS[5:22]), logits[5:22])
    close(stepper.read(IDS[22:]), logits[-1])
    close(stepper.piece("state"), after)
    assert stepper.position == len(IDS)
    stepper.reset()
    close(stepper.read(IDS), logits[-1])


def test_no_call_crosses_a_block(graph, expected):
    stepper = Stepper(graph, chunk=8, block=5)
    stepper.read(IDS[:3])
    assert [len(piece) for piece in stepper._pieces(IDS[3:])][:3] == [2, 5, 5]
    close(stepper.read(IDS[3:]), expected[0][-1])
