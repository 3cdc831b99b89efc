import logging
import types

import numpy as np
import onnx
import pytest
import tiny
from sdgm_edge.runtime.engine import Blend, Engine
from sdgm_edge.runtime.providers import CPU, CUDA, TIDY, onnxruntime

from sdgm_edge.runtime import BundleError, Generator, ProviderError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Generator.load(tiny.write(tmp_path_factory.mktemp("b") / "tiny"), providers="cpu").engine


def load(path, model):
    return Generator.load(tiny.write(path, {"model": model.SerializeToString()}), providers="cpu")


def test_last_is_the_end_of_all(engine):
    ids = [1, 2, 3]
    logits_V, state = engine.last(ids, engine.zeros())
    logits_TV, same = engine.all(ids, engine.zeros())
    assert logits_TV.shape == (3, tiny.VOCAB)
    np.testing.assert_allclose(logits_V, logits_TV[-1], **CLOSE)
    np.testing.assert_array_equal(engine.download(state), engine.download(same))


def test_no_state_is_written_to(engine):
    state = engine.upload(np.ones(tiny.STATE))
    before = engine.download(state).copy()
    engine.last([1], state, Blend(0.5, np.ones(tiny.MIXING, np.float32)))
    engine.mixing([1, 2], state)
    np.testing.assert_array_equal(engine.download(state), before)


def test_values_take_the_place_of_others_where_logits_are_many_and_nothing_else_changes(
    engine, tmp_path, monkeypatch
):
    monkeypatch.setattr("sdgm_edge.runtime.engine._MANY_LOGITS", 1)
    other = Generator.load(tiny.write(tmp_path / "tiny"), providers="cpu").engine
    reuses = [e.opened.session.get_session_options().enable_mem_reuse for e in (engine, other)]
    assert reuses == [False, True]
    for ids in ([1, 2, 3], [4]):
        for ours, theirs in zip(engine.all(ids, engine.zeros()), other.all(ids, other.zeros()), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_state_that_stays_on_a_device_gives_the_same(engine, tmp_path):
    bound = Generator.load(tiny.write(tmp_path / "tiny"), providers="cpu").engine
    bound._device = "cpu"
    state, expected = bound.zeros(), engine.zeros()
    for ids in ([1, 2, 3], [4], [5]):
        logits_V, state = bound.last(ids, state)
        expected_V, expected = engine.last(ids, expected)
        np.testing.assert_array_equal(logits_V, expected_V)
    np.testing.assert_array_equal(bound.download(state), engine.download(expected))
    mixing_TM, _ = bound.mixing([1, 2], state)
    np.testing.assert_array_equal(mixing_TM, engine.mixing([1, 2], expected)[0])
    blend = Blend(0.5, np.ones(tiny.MIXING, np.float32))
    np.testing.assert_array_equal(bound.last([1], state, blend)[0], engine.last([1], expected, blend)[0])


def renamed(kind, old, new):
    model = tiny.graph()
    values = {"input": model.graph.input, "output": model.graph.output}[kind]
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
    for value in [*values, *model.graph.initializer]:
        if value.name == old:
            value.name = new
    return model


@pytest.mark.parametrize(
    ("kind", "old", "message"),
    [
        ("input", "ids", "inputs of the graph: expected ids, state, got"),
        ("input", "blend", "input with defaults of the graph: expected start, blend, drawn, got"),
        ("output", "logits", "outputs of the graph: expected logits, next_state, mixing, got"),
    ],
)
def test_other_names_are_refused(tmp_path, kind, old, message):
    with pytest.raises(BundleError, match=message):
        load(tmp_path / "b", renamed(kind, old, "other"))


def test_other_shapes_are_refused(tmp_path):
    with pytest.raises(
        BundleError, match=r"input state of the graph: expected tensor\(float\) \['B', 9\], got .*10"
    ):
        load(tmp_path / "state", tiny.graph(state=10))
    with pytest.raises(BundleError, match=r"output logits of the graph: expected .* 300\], got .*299"):
        load(tmp_path / "vocab", tiny.graph(vocab=299))


def test_shapes_that_are_not_declared_are_found_when_tried(engine, monkeypatch):
    computed = np.ones((1, 2, 299)), engine.zeros(), np.ones((1, 2, tiny.MIXING))
    monkeypatch.setattr(engine, "_run", lambda outputs, feeds: computed)
    with pytest.raises(BundleError, match=r"logits as the graph computes it: .*300\), got \(1, 2, 299\)"):
        engine._check_contract()


def test_a_graph_that_computes_nan_is_refused(tmp_path):
    model = tiny.graph()
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            nan = np.full((tiny.MIXING, tiny.VOCAB), np.nan, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(nan, "head"))
    with pytest.raises(BundleError, match=r"logits as the graph computes it: .* got NaN"):
        load(tmp_path / "b", model)


def test_a_graph_that_fails_is_a_bundle_error(engine):
    with pytest.raises(BundleError, match=r"model\.onnx: the graph fails: "):
        engine.last([10**6], engine.zeros())


def test_the_engine_refuses_what_the_session_would_have_checked(engine):
    assert isinstance(engine, Engine)
    with pytest.raises(BundleError, match="the graph fails"):
        engine.last([1], np.zeros((1, 3), np.float32))


def test_room_for_many_logits_is_given_back(engine, monkeypatch):
    class Recorded:
        def __init__(self, session):
            self.session, self.options = session, []

        def run(self, outputs, feeds, options):
            self.options.append(options and options.get_run_config_entry(TIDY[0]))
            return self.session.run(outputs, feeds, options)

    monkeypatch.setattr(engine, "_session", session := Recorded(engine._session))
    few, _ = engine.all([1, 2, 3], engine.zeros())
    monkeypatch.setattr("sdgm_edge.runtime.engine._MANY_LOGITS", 2 * tiny.VOCAB)
    many, _ = engine.all([1, 2, 3], engine.zeros())
    engine.all([1, 2, 3], engine.zeros(), 1)
    engine.last([1, 2, 3], engine.zeros())
    assert session.options == [None, TIDY[1], None, None]
    np.testing.assert_array_equal(many, few)


class OnCuda:
    """A session of the CPU that says it is CUDA's, and fails where that has no room."""

    def __init__(self, session):
        self.session = session

    def __getattr__(self, name):
        return getattr(self.session, name)

    def get_providers(self):
        return [CUDA, CPU]

    def io_binding(self):
        raise RuntimeError("Rotary embedding dim\n must be <= max_threads_per_block")


@pytest.fixture(params=["run", "upload"])
def failing_cuda(request, monkeypatch):
    """Pretend that CUDA starts and then fails to run a graph, or to take a state; told is what it says."""
    real = onnxruntime()

    def make(graph, options, providers, provider_options, **kwargs):
        session = real.InferenceSession(graph, options, providers=[CPU], **kwargs)
        return OnCuda(session) if CUDA in providers else session

    def value_of(array, device="cpu", number=0):
        if request.param == "upload" and device == "cuda":
            raise RuntimeError("CUDA out of memory")
        return real.OrtValue.ortvalue_from_numpy(array)

    fake = types.SimpleNamespace(
        InferenceSession=make,
        SessionOptions=real.SessionOptions,
        RunOptions=real.RunOptions,
        OrtValue=types.SimpleNamespace(ortvalue_from_numpy=value_of),
        get_available_providers=lambda: [CUDA, CPU],
        get_all_providers=real.get_all_providers,
    )
    for module in ("engine", "providers"):
        monkeypatch.setattr(f"sdgm_edge.runtime.{module}.onnxruntime", lambda: fake)
    return {"run": "Rotary embedding dim must be <= max", "upload": "CUDA out of memory"}[request.param]


def test_auto_takes_the_cpu_where_cuda_fails_at_the_trial_and_says_why(
    engine, tmp_path, failing_cuda, caplog
):
    with caplog.at_level(logging.INFO):
        other = Generator.load(tiny.write(tmp_path / "tiny")).engine
    assert other.opened.provider == "cpu"
    assert other.opened.reason.startswith(f"CUDA could not run the graph: {failing_cuda}")
    assert f"running on cpu: {other.opened.reason}" in caplog.text
    for ours, theirs in zip(
        engine.last([1, 2], engine.zeros()), other.last([1, 2], other.zeros()), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("providers", ["cuda", ["cuda", "cpu"]])
def test_cuda_that_was_asked_for_and_fails_is_an_error(tmp_path, failing_cuda, providers):
    told = rf"model\.onnx: the graph fails on cuda: {failing_cuda}.*; use providers='cpu'$"
    with pytest.raises(ProviderError, match=told):
        Generator.load(tiny.write(tmp_path / "tiny"), providers=providers)


def test_another_contract_is_one_on_the_cpu_too(tmp_path, failing_cuda):
    with pytest.raises(BundleError, match="inputs of the graph: expected ids, state, got"):
        Generator.load(
            tiny.write(tmp_path / "b", {"model": renamed("input", "ids", "other").SerializeToString()})
        )
