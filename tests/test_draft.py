import functools
from collections import Counter

import numpy as np
import pytest
import tiny
import trained
from hypothesis import given
from hypothesis import strategies as st
from sdgm_edge.export.graph import matrix_names, weights_of
from sdgm_edge.export.reach import find_reach
from sdgm_edge.export.variants import build, bundle_config
from sdgm_edge.runtime.draft import LONGEST, REACH, Drafter

from sdgm_edge.runtime import (
    BundleConfig,
    Engine,
    Generator,
    ParameterError,
    SamplingParams,
    encode_json,
    read_bundle,
)

PROMPT = "Once upon a time there was a small river. Once upon a time there was a bell, and the bell"
EXACT = (
    "fp32", "rows8", "rows4", "fp32 with pointer", "rows8 with pointer", "rows4 with pointer",
    "fp32 with pointer that goes on", "rows8 with pointer that goes on",
)  # fmt: skip


@functools.cache
def engine(name):
    """A model in one precision; 8 bits by rows in fixed steps, where all rows are about equally loud."""
    precision, _, pointer = name.partition(" ")
    model = trained.model(f"ringing {pointer}".strip())
    plan = dict.fromkeys(matrix_names(weights_of(model)), precision)
    if precision == "int8":
        plan["embedding.weight"] = "q8"
    graph = build(model.config, weights_of(model), plan, reach=find_reach(model))
    return Engine(graph, bundle_config(model.config), "graph", providers="cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    generation = encode_json({"begin_token": 0, "end_tokens": [], "sampling": {}})
    path = tiny.write(tmp_path_factory.mktemp("bundle") / "tiny", {"generation_config": generation})
    return read_bundle(path)


@pytest.fixture(scope="module", params=EXACT)
def gen(request, bundle):
    trained.needs_rows_alone(request.param)
    return Generator(bundle, "fp32", engine(request.param))


@pytest.fixture(scope="module")
def exact(bundle):
    return Generator(bundle, "fp32", engine("fp32 with pointer"))  # it says various things


# The text


def test_greedy_text_is_the_same_and_takes_fewer_calls(gen):
    plain = gen.generate(PROMPT, max_new_tokens=1500, temperature=0)
    drafted = gen.generate(PROMPT, max_new_tokens=1500, temperature=0, draft=16)
    assert drafted.tokens == plain.tokens
    assert drafted.text == plain.text
    assert plain.drafted is None
    assert drafted.drafted is not None
    assert drafted.drafted.calls == 1500 - drafted.drafted.accepted < 300, "it runs into a circle"
    assert drafted.drafted.accepted <= drafted.drafted.proposed


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.3},
        {"temperature": 0.2, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.2, "min_p": 0.05, "repetition_penalty": 1.1, "repetition_window": 30},
        {"temperature": 0.2, "no_repeat_ngram_size": 7},
        {"temperature": 0.2, "logit_bias": {5: 3.0, 9: -100}, "banned_tokens": [7, 8]},
        {"temperature": 0.2, "forced_tokens": [4, 5, 6, 4, 5, 6], "logprobs": 2},
        {"temperature": 0.2, "heal": True},
        {"temperature": 0.3, "draft": 1},
        {"temperature": 0.3, "draft": 64},
        {"temperature": 0, "repetition_penalty": 1.05},
    ],
    ids=lambda params: ", ".join(params),
)
def test_sampled_text_is_the_same_seed_for_seed(gen, params):
    asked = {"draft": 16, **params}
    accepted = 0
    for seed in range(3):
        plain = gen.generate(PROMPT, max_new_tokens=200, seed=seed, **{**asked, "draft": 0})
        drafted = gen.generate(PROMPT, max_new_tokens=200, seed=seed, **asked)
        assert drafted.tokens == plain.tokens
        assert drafted.sampled == plain.sampled, "log-probabilities too"
        assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
        accepted += drafted.drafted.accepted
    assert accepted or "no_repeat_ngram_size" in params


def test_a_stop_text_ends_it_at_the_same_place(gen):
    whole = gen.generate(PROMPT, max_new_tokens=200, temperature=0)
    stop = whole.text[120:124]
    plain = gen.generate(PROMPT, max_new_tokens=200, temperature=0, stop=stop)
    session = gen.session()
    drafted = gen.generate(PROMPT, max_new_tokens=200, temperature=0, stop=stop, draft=16, session=session)
    assert (drafted.text, drafted.stop, drafted.tokens) == (plain.text, stop, plain.tokens)
    assert session.tokens == gen.encode(PROMPT) + plain.tokens, "what was looked ahead to is no part of it"


def test_drafts_do_not_change_the_distribution(exact):
    """Among the second tokens of many texts whose first one is forced, each as often as without drafts."""
    params = {"max_new_tokens": 3, "temperature": 0.4}
    session = exact.session(history=0)
    session.feed(exact.encode(PROMPT * 3))
    assert session.logits is not None
    counts = {
        draft: Counter(
            tuple(
                exact.generate(None, session=session.fork(), seed=seed + offset, draft=draft, **params).tokens
            )
            for seed in range(1500)
        )
        for draft, offset in ((0, 0), (16, 10_000))
    }
    common = [run for run, count in (counts[0] + counts[16]).items() if count >= 40]
    assert len(common) >= 3
    for run in common:
        a, b = counts[0][run] / 1500, counts[16][run] / 1500
        middle = (a + b) / 2
        assert abs(a - b) < 4.5 * (2 * middle * (1 - middle) / 1500) ** 0.5


def test_candidates_and_batches_are_drafted_too(exact):
    params = {"max_new_tokens": 60, "seed": 3, "temperature": 0.3}
    for plain, drafted in zip(
        exact.candidates(PROMPT, 3, **params), exact.candidates(PROMPT, 3, draft=8, **params), strict=True
    ):
        assert drafted.tokens == plain.tokens


# Sessions


def same(session, other):
    assert session.position == other.position
    assert session.tokens == other.tokens
    np.testing.assert_array_equal(session.logits, other.logits)
    np.testing.assert_array_equal(session.state, other.state)


@pytest.mark.parametrize("count", [*range(1, 40, 3), 100])
def test_a_session_stands_where_it_would_without_drafts(gen, count, tmp_path):
    sessions = [gen.session() for _ in range(2)]
    for session, draft in zip(sessions, (0, 16), strict=True):
        gen.generate(PROMPT, session=session, max_new_tokens=count, temperature=0, draft=draft)
    plain, drafted = sessions
    twin = drafted.fork()
    drafted.save(tmp_path / "s")
    same(gen.load_session(tmp_path / "s"), plain)
    same(twin, plain)
    for session in (plain, twin):
        session.rewind(min(count, 17))
    same(twin, plain)
    same(drafted, gen.load_session(tmp_path / "s"))
    texts = [gen.generate(" and", session=s, max_new_tokens=40, temperature=0, draft=d).tokens
             for s, d in ((plain, 0), (twin, 16))]  # fmt: skip
    assert texts[0] == texts[1]
    same(twin, plain)


@pytest.mark.parametrize("pieces", range(1, 12, 2))
def test_a_stream_that_is_closed_leaves_only_what_was_chosen(gen, pieces):
    session, plain = gen.session(), gen.session()
    stream = gen.stream(PROMPT, session=session, max_new_tokens=99, temperature=0, draft=16)
    for _ in range(pieces):
        next(stream)
    stream.close()
    plain.feed(PROMPT)
    for token in stream.generation.tokens:
        plain.push(token)
    same(session, plain)


def test_what_was_looked_ahead_to_is_forgotten_when_the_text_goes_elsewhere(exact):
    def looked():
        session = exact.session()
        session.feed([5, 6, 7])
        assert session.look([8, 9, 10]) == 3
        return session

    wrong, fed, back = looked(), looked(), looked()
    assert wrong.push(8) is True
    assert wrong.push(11) is False
    assert not wrong.looks_ahead
    fed.feed([8, 9])
    assert not fed.looks_ahead
    back.push(8)
    back.rewind(2)
    for session, ids in ((wrong, [5, 6, 7, 8, 11]), (fed, [5, 6, 7, 8, 9]), (back, [5, 6])):
        plain = exact.session()
        plain.feed(ids)
        same(session, plain)


@pytest.mark.parametrize("before", [True, False])
def test_a_look_at_the_state_changes_nothing_of_what_was_looked_ahead_to(exact, before):
    session, plain = exact.session(), exact.session()
    session.feed([5, 6, 7])
    if before:
        _ = session.logits
    session.look([10, 11, 12])
    if not before:
        _ = session.state
    assert session.push(10) is True
    assert session.push(99) is False
    plain.feed([5, 6, 7, 10, 99])
    same(session, plain)


def test_a_draft_is_exact_where_the_state_is_read_between_pieces(gen):
    texts = []
    for draft in (0, 16):
        session = gen.session()
        text = gen.generate(
            PROMPT, session=session, max_new_tokens=99, temperature=0, draft=draft,
            callback=lambda piece, session=session: session.state,
        )  # fmt: skip
        texts.append((text.tokens, session))
    assert texts[0][0] == texts[1][0]
    same(texts[0][1], texts[1][1])


# Where it cannot be exact


def test_a_graph_whose_rows_see_each_other_is_refused(bundle):
    int8 = Generator(bundle, "int8", engine("int8"))
    with pytest.raises(
        ParameterError, match=r"draft: expected .* for 17 tokens at once .*\(int8 on cpu\) that is off by"
    ):
        int8.generate(PROMPT, draft=16)
    assert int8.generate(PROMPT, max_new_tokens=2).tokens


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("wrong", [0.5, np.nan, np.inf])
def test_the_smallest_difference_is_seen(monkeypatch, output, wrong):
    sizes = BundleConfig(
        vocab_size=tiny.VOCAB, state_size=tiny.STATE, mixing_size=tiny.MIXING, chunk=tiny.CHUNK, model={}
    )
    made = Engine(tiny.graph().SerializeToString(), sizes, "graph", providers="cpu")
    assert made.differs(9) == 0
    run = made._run

    def wrong_for_five(outputs, feeds, options=None):
        values = run(outputs, feeds, options)
        if feeds["ids"].shape[1] == 5:
            values[output][..., -1] += np.float32(wrong)
        return values

    monkeypatch.setattr(made, "_run", wrong_for_five)
    assert made.differs(9) == 0, "tried once"
    made._differs.clear()
    assert made.differs(4) == 0
    assert made.differs(9) >= 0.4


def test_drafts_and_the_mixture_exclude_each_other():
    with pytest.raises(ParameterError, match="draft: expected 0 beside prior_strength"):
        SamplingParams(draft=4, prior_strength=0.1)
    with pytest.raises(
        ParameterError, match="draft: expected an integer of at least 0 and at most 64, got 65"
    ):
        SamplingParams(draft=65)


# Guesses


def guessed(ids, vocab_size=50, most=16):
    return Drafter(vocab_size, ids).propose(most)


def test_what_followed_is_guessed():
    text = list(range(1, 20))
    assert guessed([*text, 40, *text[:9]], most=3) == [10, 11, 12]
    assert guessed(text) == []
    assert guessed([]) == []
    assert guessed([*text, 40, *text[:9]], most=-1) == []


def test_a_circle_is_followed_round():
    guess = guessed([1, 2, 3] * 12, most=8)
    assert guess == [1, 2, 3, 1, 2, 3, 1, 2]
    assert guessed([7] * 40, most=5) == [7] * 5


def test_a_match_is_followed_while_it_holds():
    """Though its last tokens occurred later too, and something else followed there."""
    long, short = list(range(20)), [30, 10, 11, 12, 31]
    assert guessed([*long, *short, *long[:13]], most=2) == [13, 14]


def test_a_text_without_repetitions_is_drafted_next_to_nothing():
    rng = np.random.default_rng(0)
    drafter, proposed = Drafter(100), 0
    for token in rng.zipf(1.3, 5000) % 100:
        proposed += len(drafter.propose(16))
        drafter.push(int(token))
    assert proposed < 0.03 * 5000


def test_a_text_that_begins_to_repeat_itself_is_drafted_soon():
    rng = np.random.default_rng(0)
    run = rng.integers(0, 1000, 60).tolist()
    drafter = Drafter(1000, [*rng.integers(0, 1000, 500).tolist(), *run, 7, *run[:12]])
    draft = drafter.propose(8)
    assert draft == run[12 : 12 + len(draft)]
    assert len(draft) >= 4


@given(st.lists(st.integers(0, 3), max_size=300))
def test_a_match_is_one(ids):
    drafter = Drafter(4)
    for count, token in enumerate(ids, 1):
        drafter.push(token)
        length = drafter._length
        assert 0 <= length <= LONGEST
        if length:
            assert ids[drafter._at - length : drafter._at] == ids[count - length : count]
            assert drafter._at < count


def test_memory_is_bounded_and_near_matches_survive():
    rng = np.random.default_rng(0)
    drafter = Drafter(5000)
    for _ in range(5 * REACH // 1000):
        drafter.extend(rng.integers(0, 5000, 1000).tolist())
    assert len(drafter._ids) < 2 * REACH
    assert len(drafter._after) + len(drafter._older) <= 3 * REACH
    recent = list(drafter._ids)[-REACH + 10 :][:20]
    drafter.extend(recent[:12])
    assert drafter.propose(4) == recent[12:16]
