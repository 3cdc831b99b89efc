"""What a token costs after a context: measured in fresh processes of the runtime alone."""

import pytest
import tiny
import trained
from sdgm_edge.export.baselines import block_of, plan_of
from sdgm_edge.export.baselines import build as build_baseline
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.variants import VARIANTS, build

from sdgm_edge.models import build_model, sized
from sdgm_edge.runtime import BundleError, MeasureError, ParameterError, measure_context


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    model = trained.model("ringing")
    weights = weights_of(model)
    (folder / "model.onnx").write_bytes(build(model.config, weights, VARIANTS[8].plan(weights)))
    (folder / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    return folder / "model.onnx"


def measure(graph, context=20, **changes):
    settings = {"chunk": 8, "tokens": 3, "repeats": 1, **changes}
    return measure_context(graph, graph.parent / "tokenizer.json", context, **settings)


def test_speed_memory_and_first_token_are_measured(graph):
    cost = measure(graph)
    assert cost.tokens_per_second > 0
    assert cost.tokens_per_second_by_clock > 0
    assert cost.first_token > 0
    assert cost.peak is None or cost.peak > 10e6


def test_a_graph_with_caches_is_measured_beyond_its_window(graph, tmp_path):
    made = build_model(sized("linformer", 20_000, vocab_size=64, window=16)).eval()
    weights = weights_of(made)
    path = tmp_path / "model.onnx"
    path.write_bytes(build_baseline(made.config, weights, plan_of(VARIANTS[8], weights)))
    (tmp_path / "tokenizer.json").write_bytes((graph.parent / "tokenizer.json").read_bytes())
    assert measure(path, 50, block=block_of(made.config)).tokens_per_second > 0


def test_what_cannot_be_measured_is_told(graph, tmp_path):
    with pytest.raises(ParameterError, match="context: expected a whole number from 0, got -1"):
        measure(graph, -1)
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no graph")
    (tmp_path / "tokenizer.json").write_bytes(tiny.tokenizer_json())
    with pytest.raises(BundleError, match="ONNX Runtime refuses the graph"):
        measure(broken)
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(MeasureError, match="ended after its stage start with code 1"):
        measure(broken)
