import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sdgm_edge.runtime.parameters import RECENT
from sdgm_edge.runtime.session import HISTORY, SAVED_HISTORY

from sdgm_edge.runtime import Generator, ParameterError, StateError

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a run of many tokens adds in another order than runs of one
TOKENS = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=3 * tiny.CHUNK)


@pytest.fixture(scope="module")
def gen(tmp_path_factory):
    return Generator.load(tiny.write(tmp_path_factory.mktemp("bundle") / "tiny.sdgm"), providers="cpu")


@pytest.fixture
def state_file(gen, tmp_path):
    session = gen.session()
    session.feed("Once upon a time")
    session.save(tmp_path / "s.state")
    return tmp_path / "s.state"


def stepwise(gen, ids):
    """A session that ran every token by itself."""
    session = gen.session()
    for token in ids:
        session.push(token)
        assert session.logits.shape == (tiny.VOCAB,)
    return session


def same(a, b):
    """Whether two sessions are in exactly the same place."""
    np.testing.assert_array_equal(a.logits, b.logits)
    np.testing.assert_array_equal(a.state, b.state)
    assert (a.position, a.tokens) == (b.position, b.tokens)


def test_logits_are_those_of_the_reference(gen):
    ids = gen.encode("Once upon a river")
    _, rows = tiny.reference(ids, count=1)
    session = gen.session()
    assert session.feed("Once upon a river") == len(ids)
    np.testing.assert_allclose(session.logits, rows[0], **CLOSE)
    assert session.position == len(ids)
    assert session.tokens == ids
    assert session.state.shape == (tiny.STATE,)
    assert session.state[-1] == len(ids) + 1, "the begin token counts in the graph"


def test_a_new_session_stands_after_the_begin_token(gen):
    session = gen.session()
    np.testing.assert_allclose(session.logits, tiny.reference([], count=1)[1][0], **CLOSE)
    assert (session.position, session.tokens) == (0, [])


@given(ids=TOKENS)
@settings(max_examples=40)
def test_chunked_is_stepwise(gen, ids):
    whole = gen.session()
    whole.feed(ids)
    np.testing.assert_allclose(whole.logits, stepwise(gen, ids).logits, **CLOSE)
    np.testing.assert_allclose(whole.state, stepwise(gen, ids).state, **CLOSE)


@given(ids=TOKENS, data=st.data())
@settings(max_examples=40)
def test_a_split_prompt_is_the_whole_prompt(gen, ids, data):
    cut = data.draw(st.integers(0, len(ids)))
    split, whole = gen.session(), gen.session()
    split.feed(ids[:cut])
    if data.draw(st.booleans()):
        assert split.logits is not None
    split.feed(np.array(ids[cut:], np.int64))
    whole.feed(iter(ids))
    np.testing.assert_allclose(split.logits, whole.logits, **CLOSE)
    assert split.tokens == whole.tokens


@given(ids=TOKENS, more=TOKENS, steps=st.booleans())
@settings(max_examples=40)
def test_a_saved_session_goes_on_exactly(gen, tmp_path_factory, ids, more, steps):
    session = stepwise(gen, ids) if steps else gen.session()
    session.feed(more)
    path = tmp_path_factory.getbasetemp() / "property.state"
    session.save(path)
    loaded = gen.load_session(path)
    same(loaded, session)
    back = min(SAVED_HISTORY, session.position)
    session.rewind(back)
    loaded.rewind(back)
    same(loaded, session)
    for one in (session, loaded):
        one.feed(ids)
    same(loaded, session)


@given(before=TOKENS, mine=TOKENS, its=TOKENS)
@settings(max_examples=40)
def test_a_fork_is_independent(gen, before, mine, its):
    session, alone = gen.session(), gen.session()
    session.feed(before)
    alone.feed(before)
    twin = session.fork()
    same(twin, session)
    assert alone.logits is not None
    twin.feed(its)
    assert twin.logits is not None
    session.feed(mine)
    alone.feed(mine)
    same(session, alone)


@given(before=TOKENS, its=TOKENS, mine=TOKENS)
@settings(max_examples=40)
def test_what_a_fork_runs_changes_nothing_for_the_other(gen, before, its, mine):
    session, alone = gen.session(), gen.session()
    session.feed(before)
    alone.feed(before)
    twin = session.fork()
    assert twin.logits is not None
    twin.feed(its)
    session.feed(mine)
    alone.feed(mine)
    same(session, alone)


def test_forks_run_what_is_pending_once_between_them(gen, monkeypatch):
    runs, real = 0, gen.engine._run

    def counted(*arguments):
        nonlocal runs
        runs += 1
        return real(*arguments)

    session = gen.session()
    session.feed(range(5))
    monkeypatch.setattr(gen.engine, "_run", counted)
    twins = [session.fork(), session.fork().fork()]
    twins[0].push(1)
    for one in (twins[1], session, session.fork()):
        np.testing.assert_array_equal(one.logits, session.logits)
    assert runs == 1
    whole = gen.session()
    whole.feed([*range(5), 1])
    same(twins[0], whole)
    session.push(2)
    same(session.fork(), session)


@given(ids=st.lists(st.integers(0, 299), min_size=1, max_size=200), data=st.data())
@settings(max_examples=60)
def test_rewinding_is_exactly_the_prefix(gen, ids, data):
    count = data.draw(st.integers(0, min(len(ids), HISTORY)))
    steps = data.draw(st.booleans())
    prefix = ids[: len(ids) - count]
    if steps:
        session, expected = stepwise(gen, ids), stepwise(gen, prefix)
    else:
        session, expected = gen.session(), gen.session()
        session.feed(ids)
        expected.feed(prefix)
    if data.draw(st.booleans()):
        assert session.logits is not None
    session.rewind(count)
    same(session, expected)
    session.feed([1, 2, 3])
    expected.feed([1, 2, 3])
    same(session, expected)


def test_rewinding_again_and_again_reaches_the_beginning(gen):
    session = gen.session(history=100)
    session.feed(range(100))
    for _ in range(50):
        session.rewind(2)
    same(session, gen.session())


def test_rewinding_too_far_says_what_to_do(gen):
    session = gen.session()
    session.feed("Once")
    with pytest.raises(StateError, match=r"expected at most the . tokens fed, got 50; rewind by less"):
        session.rewind(50)
    for i in range(300):
        session.push(i % 300)
        assert session.logits is not None
    before = session.logits
    with pytest.raises(
        StateError, match=r"at most 64 tokens here, got 65; .* session\(history=256\), or fork"
    ):
        session.rewind(HISTORY + 1)
    assert session.logits is before, "a refused rewind changes nothing"
    session.rewind(HISTORY)
    for wrong in (-1, 1.0, "1", True):
        with pytest.raises(ParameterError, match="rewind: expected a number of tokens"):
            session.rewind(wrong)


def test_a_longer_history_is_kept_when_asked_for(gen):
    session = gen.session(history=200)
    for i in range(300):
        session.push(i)
        assert session.logits is not None
    session.rewind(200)
    same(session, stepwise(gen, range(100)))
    for wrong in (-1, 4097, 1.5):
        with pytest.raises(ParameterError, match="history: expected 0 to 4096 tokens"):
            gen.session(history=wrong)


def test_what_a_session_holds_does_not_grow(gen):
    session = gen.session()
    held = []
    for i in range(3000):
        session.push(i % 300)
        assert session.logits is not None
        held.append((len(session._segments), len(session._recent)))
    assert max(held[2000:]) == held[-1]
    assert len(session._segments) == HISTORY + 1
    assert len(session.tokens) == RECENT
    assert session.tokens[-1] == 2999 % 300
    session.rewind(HISTORY)
    assert len(session.tokens) == RECENT, "the window stays full over a rewind"


def test_a_loaded_session_that_is_rewound_remembers_as_many_tokens(gen, tmp_path):
    session = gen.session()
    session.feed(i % 300 for i in range(1500))
    session.save(tmp_path / "s")
    loaded = gen.load_session(tmp_path / "s")
    assert loaded.tokens == session.tokens
    for one in (session, loaded):
        one.rewind(SAVED_HISTORY)
    assert loaded.tokens == session.tokens
    assert len(loaded.tokens) == RECENT


def test_a_loaded_session_remembers_as_many_however_far_it_is_rewound(gen, tmp_path):
    ids = [i % 300 for i in range(3000)]
    session = gen.session(history=2000)
    session.feed(ids)
    session.save(tmp_path / "s", history=2000)
    loaded = gen.load_session(tmp_path / "s")
    loaded.rewind(1500)
    assert loaded.tokens == ids[1500 - RECENT : 1500]


def test_a_loaded_session_remembers_as_many_also_where_it_can_be_rewound_further_than_asked(gen, tmp_path):
    chunk = gen.engine.chunk
    session = gen.session(history=2 * chunk)
    session.feed(i % 300 for i in range(chunk * (2 + RECENT // chunk)))
    session.save(tmp_path / "s", history=3)
    loaded = gen.load_session(tmp_path / "s")
    for one in (session, loaded):
        one.rewind(chunk - 2)
    assert loaded.tokens == session.tokens
    assert len(loaded.tokens) == RECENT


def test_a_token_that_is_none_of_the_model_is_refused(gen):
    session = gen.session()
    for token in (-1, gen.vocab_size):
        with pytest.raises(ParameterError, match=f"expected ids from 0 to {gen.vocab_size - 1}, got {token}"):
            session.push(token)
    same(session, gen.session())


def test_a_prompt_of_a_million_tokens_is_read_lazily(gen):
    served = 0

    def ids():
        nonlocal served
        for i in range(1_000_000):
            served += 1
            yield i % 300

    session, stream = gen.session(), ids()
    assert session.feed(stream) == served == 1_000_000
    assert len(session._segments) <= 2 + HISTORY // tiny.CHUNK
    assert np.isfinite(session.logits).all()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([300], "ids from 0 to 299, got 300"),
        ([5, -1], "ids from 0 to 299, got -1"),
        ([2**70], "text or token ids"),
        ([1.5], "text or token ids"),
        (["a"], "text or token ids"),
        ([True], "text or token ids"),
        ([[1], [1, 2]], "text or token ids"),
        ([None], "text or token ids"),
        (7, "text or token ids"),
        (b"bytes", "decode bytes first"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_what_is_no_text_and_no_token_is_refused(gen, ids, message):
    session = gen.session()
    with pytest.raises(ParameterError, match=message):
        session.feed(ids)
    same(session, gen.session())


def test_a_bound_blend_is_rewound_saved_and_forked(gen, tmp_path):
    def drawn(c_M):
        return np.full(tiny.MIXING, 0.5, np.float32)

    session = gen.session()
    session.feed("Once upon a time")
    plain = session.logits
    session.blend(0.5, drawn, look=False)
    blended = session.logits
    assert np.abs(blended - plain).max() > 1e-3
    session.save(tmp_path / "s.state")
    np.testing.assert_array_equal(gen.load_session(tmp_path / "s.state").logits, blended)
    np.testing.assert_array_equal(session.fork().logits, blended)
    session.push(1)
    assert session.logits is not None
    session.rewind(1)
    np.testing.assert_array_equal(session.logits, blended)
    session.save(tmp_path / "s.state")
    loaded = gen.load_session(tmp_path / "s.state")
    np.testing.assert_array_equal(loaded.logits, blended)


def test_a_blend_of_all_is_the_drawn_vector_and_looks_where_asked(gen):
    seen = []

    def draw(c_M):
        seen.append(c_M)
        return np.ones(tiny.MIXING, np.float32)

    session = gen.session()
    session.feed("Once")
    session.blend(1.0, draw, look=True)
    head = {t.name: t for t in tiny.graph().graph.initializer}["head"]
    expected = np.ones(tiny.MIXING) @ tiny.onnx.numpy_helper.to_array(head)
    np.testing.assert_allclose(session.logits, expected, **CLOSE)
    np.testing.assert_allclose(seen[0], session.state[: tiny.MIXING], **CLOSE)
    session.blend(1.0, draw, look=False)
    assert seen[1] is None


# State files


def test_a_state_file_is_small_and_replaced_as_a_whole(gen, tmp_path):
    session = stepwise(gen, range(300))
    session.save(tmp_path / "s.state")
    session.feed([1])
    session.save(tmp_path / "s.state")
    same(gen.load_session(tmp_path / "s.state"), session)
    assert [p.name for p in tmp_path.iterdir()] == ["s.state"]
    assert (tmp_path / "s.state").stat().st_size < 4 * (tiny.STATE + RECENT + 100)


def test_a_state_file_can_be_saved_with_a_longer_way_back(gen, tmp_path):
    session = stepwise(gen, range(100))
    session.save(tmp_path / "s.state", history=60)
    loaded = gen.load_session(tmp_path / "s.state")
    loaded.rewind(60)
    same(loaded, stepwise(gen, range(40)))
    session.save(tmp_path / "s.state")
    with pytest.raises(StateError, match=f"at most {SAVED_HISTORY} tokens here"):
        gen.load_session(tmp_path / "s.state").rewind(SAVED_HISTORY + 1)


def resealed(data):
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def patched(offset, value):
    return lambda data: resealed(data[:offset] + value + data[offset + len(value) :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a state file"),
        (lambda data: b"PK\3\4" + data[4:], "not a state file"),
        (lambda data: data[:20], "cut: expected at least"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[:100] + b"\7" + data[101:], "damaged: its sha256"),
        (lambda data: data + bytes(100_000), "too large for this model"),
        (patched(8, struct.pack("<I", 2)), "another version: expected 1, got 2; upgrade"),
        (patched(8, struct.pack("<I", 0)), "another version: expected 1, got 0; save the session again"),
        (
            patched(12, bytes(32)),
            "of another model: expected .*, got 0000000000000000….*bundle that it was saved",
        ),
        (patched(44, b"int8\0\0\0\0"), "of another variant: expected fp32, got 'int8'; .*variant='int8'"),
        (patched(60, struct.pack("<I", 7)), "of another shape"),
        (patched(80, struct.pack("<f", float("nan"))), "of another shape|finite numbers"),
        (patched(84, struct.pack("<f", float("inf"))), "finite numbers"),
    ],
)
def test_each_damage_has_its_message(gen, state_file, damage, message):
    state_file.write_bytes(damage(state_file.read_bytes()))
    with pytest.raises(StateError, match=message) as e:
        gen.load_session(state_file)
    assert "\n" not in str(e.value)


def test_ids_and_lengths_in_a_state_file_are_checked(gen, state_file):
    data = state_file.read_bytes()
    lengths = 80 + 4 * tiny.STATE
    for place in (lengths, len(data) - 36):
        state_file.write_bytes(patched(place, struct.pack("<I", 300))(data))
        with pytest.raises(StateError, match="tokens below 300 in short runs"):
            gen.load_session(state_file)


def test_every_truncation_and_a_flip_of_every_byte_is_refused(gen, state_file):
    data = state_file.read_bytes()
    for place in range(len(data)):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]):
            state_file.write_bytes(damaged)
            with pytest.raises(StateError):
                gen.load_session(state_file)


def test_the_state_of_another_variant_names_the_right_one(gen, state_file):
    other = Generator.load(gen.bundle.path, variant="int8")
    with pytest.raises(StateError, match="load the bundle with variant='fp32'"):
        other.load_session(state_file)


def test_places_that_cannot_be_read_or_written_are_refused(gen, tmp_path):
    with pytest.raises(StateError, match="cannot be read: No such file"):
        gen.load_session(tmp_path / "nothing")
    with pytest.raises(StateError, match="cannot be read: Is a directory"):
        gen.load_session(tmp_path)
    with pytest.raises(StateError, match=r"cannot be written: .*; free some space"):
        gen.session().save(Path(__file__) / "s.state")
    gen.session().save(tmp_path / "made" / "s.state")
    assert os.listdir(tmp_path / "made") == ["s.state"]
