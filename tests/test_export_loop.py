"""The decoding loop as a graph: the runtime's tokens when greedy, the model's distribution when not."""

import functools

import numpy as np
import onnx
import pytest
import trained
from scipy.stats import chisquare
from sdgm_edge.export.graph import weights_of
from sdgm_edge.export.loop import LOOP, Looped, checked_loop, loop_graph
from sdgm_edge.export.screening import find_screen
from sdgm_edge.export.variants import VARIANTS, build, bundle_config

from sdgm_edge.export import export_run, pipeline
from sdgm_edge.runtime import Engine, Generator, ParityError, verify

PROMPT = [0, 3, 1, 4, 1, 5]


@functools.cache
def made(name="ringing", bits=8, screened=False):
    model = trained.model(name)
    weights, variant = weights_of(model), VARIANTS[bits]
    screen = find_screen(model, 12) if screened else None
    graph = build(model.config, weights, variant.plan(weights), screen)
    return graph, loop_graph(graph, variant.file), variant.file, bundle_config(model.config)


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """Calling it gives the loop of a graph in a session."""

    @functools.cache
    def call(*key):
        graph, loop, file, config = made(*key)
        folder = tmp_path_factory.mktemp("loop")
        (folder / file).write_bytes(graph)
        (folder / LOOP).write_bytes(loop)
        return Looped(folder / LOOP, config)

    return call


def step_by_step(ids, count, *key):
    """Greedy tokens, the state before the last, and all logits, from the variant's own graph."""
    graph, _, _, config = made(*key)
    engine = Engine(graph, config, "graph", providers="cpu")
    state, tokens, rows, fed = engine.zeros(), [], [], list(ids)
    while len(fed) > engine.chunk:
        _, state = engine.last(fed[: engine.chunk], state)
        fed = fed[engine.chunk :]
    for _ in range(count):
        logits_V, state = engine.last(fed, state)
        rows.append(logits_V)
        fed = [int(logits_V.argmax())]
        tokens += fed
    return tokens, engine.download(state), rows


@pytest.mark.parametrize("name", trained.CONFIGS)
@pytest.mark.parametrize("bits", [8, 4, 32])
def test_greedy_is_what_the_runtime_takes(looped, name, bits):
    tokens, state = looped(name, bits).generate(PROMPT, 24)
    expected, expected_state, _ = step_by_step(PROMPT, 24, name, bits)
    assert tokens == expected
    assert np.array_equal(state, expected_state)


def test_a_screened_head_and_a_prompt_longer_than_a_chunk(looped):
    long = np.random.default_rng(0).integers(0, trained.VOCAB, 300).tolist()
    tokens, _ = looped("ringing", 8, True).generate(long, 8)
    assert tokens == step_by_step(long, 8, "ringing", 8, True)[0]


def test_the_next_call_goes_on_with_the_last_token(looped):
    loop = looped()
    whole, _ = loop.generate(PROMPT, 12)
    begun, state = loop.generate(PROMPT, 5)
    assert begun + loop.generate(begun[-1:], 7, state)[0] == whole


def test_an_end_token_ends_and_a_count_of_none_gives_none(looped):
    whole, _ = looped().generate(PROMPT, 12)
    end = whole[4]
    assert looped().generate(PROMPT, 12, end=[end])[0] == whole[: whole.index(end) + 1]
    tokens, state = looped().generate(PROMPT, 0)
    assert tokens == []
    assert not state.any()


def test_no_input_has_a_default():
    graph = onnx.load_from_string(made()[1]).graph
    assert not {i.name for i in graph.input} & {i.name for i in graph.initializer}
    assert [i.name for i in graph.input] == ["ids", "state", "count", "temperature", "top_k", "seed", "end"]


@pytest.mark.parametrize("top_k", [0, 5])
def test_samples_follow_the_distribution(looped, top_k):
    count = 4000
    counts = np.zeros(trained.VOCAB)
    for seed in range(count):
        (token,), _ = looped().generate(PROMPT, 1, temperature=1.5, top_k=top_k, seed=seed)
        counts[token] += 1
    logits_V = step_by_step(PROMPT, 1)[2][0].astype(np.float64)
    if top_k:
        logits_V[logits_V < np.sort(logits_V)[-top_k]] = -np.inf
    expected = np.exp((logits_V - logits_V.max()) / 1.5)
    expected *= count / expected.sum()
    often = expected >= 5
    assert counts[expected == 0].sum() == 0
    rest = [counts[~often].sum()], [expected[~often].sum()]
    kept = [np.append(values[often], r) for values, r in zip((counts, expected), rest, strict=True)]
    found, wanted = (values[kept[1] > 1e-9] for values in kept)
    assert chisquare(found, wanted).pvalue > 1e-3


def test_the_same_seed_gives_the_same_tokens_and_another_others(looped):
    options = {"temperature": 1.0, "top_k": 0}
    first = looped().generate(PROMPT, 20, seed=7, **options)[0]
    assert looped().generate(PROMPT, 20, seed=7, **options)[0] == first
    assert looped().generate(PROMPT, 20, seed=8, **options)[0] != first
    assert len(set(first)) > 5


def test_weights_stay_in_the_file_of_the_variant():
    graph, loop, file, _ = made()
    (node,) = (n for n in onnx.load_from_string(loop).graph.node if n.op_type == "Loop")
    body = node.attribute[0].g
    external = [t for t in body.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    told = [{e.key: e.value for e in tensor.external_data} for tensor in external]
    assert told
    assert {entry["location"] for entry in told} == {file}
    assert all(len(tensor.raw_data) < 1024 for tensor in body.initializer)
    inside = {t.name: t.raw_data for t in onnx.load_from_string(graph).graph.initializer}
    for tensor, entry in zip(external, told, strict=True):
        offset, length = int(entry["offset"]), int(entry["length"])
        assert graph[offset : offset + length] == inside[tensor.name]


def test_a_loop_that_takes_other_tokens_is_refused(looped):
    graph, loop, file, config = made()
    tokens, _ = looped().generate(PROMPT, 6)
    assert checked_loop(graph, file, config, PROMPT, tokens) == loop
    with pytest.raises(ParityError, match=r"the loop does not take the tokens .* leave --loop out"):
        checked_loop(graph, file, config, PROMPT, [*tokens[:-1], tokens[-1] + 1])


def test_a_bundle_with_the_loop_is_a_bundle(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load_run", lambda folder: trained.run())
    monkeypatch.setattr(pipeline, "SPEED_SECONDS", 0.001)
    export_run("runs/tale", tmp_path / "b", (8, 4), loop=True)
    assert verify(tmp_path / "b", providers="cpu").ok
    generator = Generator.load(tmp_path / "b")
    golden = generator.bundle.manifest.golden
    loop = Looped(tmp_path / "b" / LOOP, generator.bundle.config)
    assert loop.generate([0, *golden.ids], 16)[0] == golden.tokens["int8"]
    export_run("runs/tale", tmp_path / "b", (8,))  # a bundle with a loop may be replaced
    assert not (tmp_path / "b" / LOOP).exists()
