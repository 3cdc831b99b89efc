import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from sdgm_edge.runtime.generation import _Ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from sdgm_edge.runtime import (
    BundleError,
    Generator,
    ParameterError,
    StateError,
    Stream,
    TokenizerError,
    encode_json,
    verify,
)

PROMPT = "Once upon a time"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["tiny.sdgm", "tiny"])
def path(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("bundle") / request.param)


@pytest.fixture(scope="module")
def gen(path):
    return Generator.load(path, providers="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A bundle without a mixture, without end tokens and with no defaults."""
    generation = encode_json({"begin_token": 0, "end_tokens": [], "sampling": {}})
    changes = {"gmm": b"", "generation_config": generation}
    return Generator.load(tiny.write(tmp_path_factory.mktemp("plain") / "tiny", changes), providers="cpu")


def byte_token(gen, data):
    """The token that says these bytes."""
    [token] = [i for i, found in enumerate(gen.vocabulary.following) if found == data]
    return token


def test_the_example_works_verbatim(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "model.sdgm")
    # fmt: off
    gen = Generator.load("model.sdgm")                       # validates before use
    for piece in gen.stream("Once upon a time", max_new_tokens=64, temperature=0.8, top_p=0.95, seed=1):
        print(piece, end="", flush=True)  # noqa: T201
    session = gen.session(); session.feed("A long document …")  # noqa: E702
    twin = session.fork(); session.save("s.state"); session = gen.load_session("s.state")   # noqa: E702
    session.rewind(5)                                         # exact
    print(gen.score("Some text").bits_per_byte, gen.logprobs("Some text")[:3])  # noqa: T201
    # fmt: on
    twin.rewind(5)
    np.testing.assert_array_equal(session.logits, twin.logits)
    assert len(capsys.readouterr().out) > 64


def test_greedy_text_is_that_of_the_reference(gen):
    ids = gen.encode(PROMPT)
    tokens, _ = tiny.reference(ids, count=20)
    generation = gen.generate(PROMPT, max_new_tokens=20, temperature=0)
    assert generation.tokens == (tokens[: tokens.index(0) + 1] if 0 in tokens else tokens)
    assert generation.text == gen.decode(generation.tokens)
    assert generation.finish_reason == "length"


def test_a_variant_is_chosen_by_name(path):
    ids = Generator.load(path).encode(PROMPT)
    gen = Generator.load(path, variant="int8")
    assert gen.variant == "int8"
    assert gen.generate(PROMPT, max_new_tokens=4, temperature=0).tokens == tiny.reference(ids, seed=1)[0]
    with pytest.raises(BundleError, match="no such variant"):
        Generator.load(path, variant="fp64")


def test_pieces_are_whole_characters_and_add_up(gen):
    emoji = gen.encode("🙂 你好 – é")
    stream = gen.stream("a", max_new_tokens=len(emoji), forced_tokens=emoji, seed=0)
    assert isinstance(stream, Stream)
    pieces = list(stream)
    assert "".join(pieces) == stream.generation.text == "🙂 你好 – é"
    assert all(piece and "\ufffd" not in piece for piece in pieces)


def test_a_stream_is_lazy_can_be_closed_and_tells_what_it_has(gen):
    stream = gen.stream(PROMPT, max_new_tokens=1000, seed=3, logit_bias={0: -100})
    pieces = [next(stream) for _ in range(3)]
    stream.close()
    assert list(stream) == []
    generation = stream.generation
    assert generation.text == "".join(pieces)
    assert generation.finish_reason == "unfinished"
    assert 3 <= len(generation.tokens) < 30


def test_a_stream_keeps_no_more_than_ids(plain):
    tokens, stream = 20_000, plain.stream(PROMPT, max_new_tokens=22_000, seed=1)
    while len(stream._tokens) < 2_000:  # until the session holds all that it ever will
        next(stream)
    tracemalloc.start()
    before = len(stream._tokens)
    for _ in stream:
        pass
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(stream._tokens) - before == pytest.approx(tokens, rel=0.01)
    assert grown < 4 * tokens, "bytes"
    generation = stream.generation
    assert len(generation.tokens) == len(generation.sampled) == generation.timing.new_tokens == 22_000
    assert generation.sampled[-1].token == generation.tokens[-1]


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 1 << 32])
def test_ids_of_any_vocabulary_come_back_as_they_were(size):
    kept, ids = _Ids(size), [i * 7919 % size for i in range(3000)] + [0, size - 1]
    assert (len(kept), kept.tolist()) == (0, [])
    for token in ids:
        kept.append(token)
    assert (len(kept), kept.tolist()) == (len(ids), ids)


@given(seed=st.integers(0, 999), taken=st.integers(0, 60), stops=st.lists(st.text("aeno ", min_size=1)))
@settings(max_examples=40)
@pytest.mark.parametrize("prompt", ["Once upon a ti", "caf", None])
def test_the_text_of_a_generation_is_the_pieces_that_were_given(plain, prompt, seed, taken, stops):
    params = {"seed": seed, "max_new_tokens": 40, "stop": stops, "top_k": 60}
    stream = plain.stream(prompt, heal=True, **params)
    pieces = [piece for _, piece in zip(range(taken), stream, strict=False)]
    assert stream.generation.text == "".join(pieces)
    stream.close()
    assert stream.generation.text == "".join(pieces)


@given(seed=st.integers(0, 2**64 - 1))
@settings(max_examples=10)
def test_a_seed_gives_the_same_text(gen, seed):
    one, two = (gen.generate(PROMPT, max_new_tokens=12, seed=seed) for _ in range(2))
    assert one.tokens == two.tokens
    assert one.text == two.text


def test_stop_texts_end_the_text_and_never_leak(plain):
    ids = plain.encode("and the bell rang")
    generation = plain.generate("a", forced_tokens=ids, max_new_tokens=50, stop=["bell r"], seed=0)
    assert generation.text == "and the "
    assert (generation.finish_reason, generation.stop) == ("stop", "bell r")
    pieces = list(plain.stream("a", forced_tokens=ids, max_new_tokens=len(ids), stop=["ang!"], seed=0))
    assert "".join(pieces) == "and the bell rang", "what was held back comes at the end"


def test_an_end_token_ends_the_text(gen, plain):
    ids = [*gen.encode("and"), 0, *gen.encode("more")]
    generation = gen.generate("a", forced_tokens=ids, max_new_tokens=50, seed=0)
    assert (generation.text, generation.finish_reason, generation.tokens[-1]) == ("and", "end", 0)
    generation = plain.generate("a", forced_tokens=ids, max_new_tokens=len(ids), seed=0)
    assert (generation.text, generation.finish_reason) == ("andmore", "length")


def test_logprobs_are_those_of_scoring(gen):
    generation = gen.generate(PROMPT, max_new_tokens=8, seed=1, logprobs=2, temperature=0.5, top_k=5)
    scored = gen.session()
    scored.feed(PROMPT)
    for sampled in generation.sampled:
        logits = scored.logits.astype(np.float64)
        expected = logits[sampled.token] - np.log(np.exp(logits).sum())
        assert sampled.logprob == pytest.approx(expected, abs=1e-4)
        assert len(sampled.top) == 2
        scored.push(sampled.token)
    assert generation.logprobs == [s.logprob for s in generation.sampled]
    assert gen.generate(PROMPT, max_new_tokens=2, seed=1).logprobs == []


def test_timing_counts_tokens(gen):
    timing = gen.generate(PROMPT, max_new_tokens=8, seed=1, logit_bias={0: -100}).timing
    assert timing.prompt_tokens == len(gen.encode(PROMPT))
    assert timing.new_tokens == 8
    assert 0 < timing.prompt_seconds < timing.seconds
    assert timing.tokens_per_second > 0
    assert gen.generate(PROMPT, max_new_tokens=1, seed=1).timing.tokens_per_second == 0


def test_a_callback_gets_the_pieces(gen):
    pieces: list[str] = []
    generation = gen.generate(PROMPT, max_new_tokens=20, seed=4, callback=pieces.append)
    assert "".join(pieces) == generation.text


def test_a_stop_text_that_the_last_byte_completes_ends_the_text(gen):
    half, end = byte_token(gen, b"\xc3"), gen.bundle.generation.end_tokens[0]
    generation = gen.generate(PROMPT, forced_tokens=[half, end], stop="\ufffd")
    assert (generation.text, generation.finish_reason, generation.stop) == ("", "stop", "\ufffd")


@pytest.mark.parametrize("saved", [False, True])
def test_a_character_that_the_end_of_a_piece_cuts_is_told_by_the_next(plain, saved, tmp_path):
    first, last = byte_token(plain, b"\xc3"), byte_token(plain, b"\xa9")
    session = plain.session()
    assert plain.generate(PROMPT, session=session, max_new_tokens=1, forced_tokens=[first]).text == ""
    if saved:
        session.save(tmp_path / "state")
        session = plain.load_session(tmp_path / "state")
    stream = plain.stream(None, session=session, max_new_tokens=1, forced_tokens=[last])
    assert list(stream) == ["é"]
    assert stream.generation.text == "é"


def test_cancelling_ends_the_text(gen):
    event = threading.Event()
    count = 0

    def callback(piece):
        nonlocal count
        count += 1
        if count == 3:
            event.set()

    generation = gen.generate(
        PROMPT, max_new_tokens=500, seed=1, logit_bias={0: -100}, callback=callback, cancel=event.is_set
    )
    assert generation.finish_reason == "cancelled"
    assert 3 <= len(generation.tokens) < 30
    cancelled = gen.stream(range(1, 300), max_new_tokens=5, cancel=lambda: True)
    assert list(cancelled) == []
    assert cancelled.generation.timing.prompt_tokens == 0, "a prompt is not read to its end either"


def test_who_cancels_once_while_the_prompt_is_read_gets_no_text(gen):
    def once():
        answers = iter([False, True])
        return lambda: next(answers, False)

    alone = gen.generate([1] * 5000, max_new_tokens=3, cancel=once())
    assert (alone.tokens, alone.finish_reason, alone.timing.prompt_tokens) == ([], "cancelled", 1024)
    for one in gen.candidates([1] * 5000, 2, max_new_tokens=3, cancel=once()):
        assert (one.tokens, one.finish_reason) == ([], "cancelled")


def test_progress_tells_how_much_of_a_prompt_is_read(gen):
    text = "Once upon a time " * 300
    ids = gen.encode(text)
    told = []
    for prompt in (ids, text):  # a text is encoded as it is read: how many tokens it has is known at its end
        gen.generate(prompt, max_new_tokens=1, progress=lambda *now: told.append(now))
    counts = [*range(1024, len(ids), 1024), len(ids)]
    assert told == [
        *((count, len(ids)) for count in [*counts, len(ids)]),
        *((count, None) for count in counts),
        (len(ids), len(ids)),
    ]
    alone: list[tuple[int, int | None]] = []
    gen.candidates(ids, 2, max_new_tokens=1, progress=lambda *now: alone.append(now))
    assert alone == told[: len(counts) + 1]


def test_cancelling_candidates_reads_no_more_of_their_prompt(gen):
    told: list[tuple[int, int | None]] = []
    found = gen.candidates(
        [1] * 5000, 2, cancel=lambda: len(told) >= 2, progress=lambda *now: told.append(now)
    )
    assert told == [(1024, 5000), (2048, 5000), (2048, 2048)]
    assert [(generation.tokens, generation.finish_reason) for generation in found] == [([], "cancelled")] * 2


def test_candidates_are_the_texts_of_their_seeds(gen):
    found = gen.candidates(PROMPT, 4, seed=7, max_new_tokens=10, prior_strength=0.3)
    alone = [gen.generate(PROMPT, seed=7 + i, max_new_tokens=10, prior_strength=0.3) for i in range(4)]
    assert [g.text for g in found] == [g.text for g in alone]
    assert len({g.text for g in found}) > 1
    assert len(gen.candidates(PROMPT, 2, max_new_tokens=2)) == 2
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ParameterError, match="n: expected a number of candidates from 1"):
            gen.candidates(PROMPT, wrong)


@pytest.mark.parametrize(("strength", "runs"), [(0.0, [5, 1, 1, 1]), (0.5, [4, *[1] * 12])])
def test_candidates_read_their_prompt_once(plain, gen, monkeypatch, strength, runs):
    prompt, real, lengths = list(range(10, 10 + tiny.CHUNK + 4)), gen.engine._run, []

    def counted(outputs, feeds):
        lengths.append(feeds["ids"].shape[1])
        return real(outputs, feeds)

    monkeypatch.setattr(gen.engine, "_run", counted)
    params = {"max_new_tokens": 2, "logit_bias": {0: -100}, "prior_strength": strength}
    assert len(gen.candidates(prompt, 3, seed=1, **params)) == 3
    assert lengths == [tiny.CHUNK, *runs], "the begin token is the first of the prompt"


def test_a_batch_is_each_prompt_alone(gen):
    prompts = [PROMPT, "The bell", gen.encode("The river")]
    batch = gen.batch(prompts, seed=1, max_new_tokens=10)
    assert [g.text for g in batch] == [gen.generate(p, seed=1, max_new_tokens=10).text for p in prompts]
    with pytest.raises(ParameterError, match="prompts: expected a list"):
        gen.batch("one text")


def test_sixteen_threads_give_the_text_of_one_after_another(gen):
    def text(i):
        params = {"prior_strength": 0.4} if i % 3 == 0 else {"repetition_penalty": 1.2}
        return gen.generate(tiny.TEXT[i : i + 40], seed=i, max_new_tokens=40, **params).text

    sequential = [text(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(text, range(16))) == sequential


def test_a_text_that_fails_leaves_the_session_as_it_was(gen):
    session = gen.session()
    session.feed(PROMPT)
    before = session.fork()
    nothing = {"banned_tokens": list(range(gen.vocab_size)), "max_new_tokens": 2}
    for prior in ({}, {"prior_strength": 0.9, "seed": 1}):
        with pytest.raises(ParameterError):
            gen.generate(None, session=session, **nothing, **prior)
        np.testing.assert_array_equal(session.logits, before.logits)
        np.testing.assert_array_equal(session.state, before.state)


def test_what_was_steered_and_rewound_is_gone_on_with_plainly(gen):
    session, plain = gen.session(), gen.session()
    for one in (session, plain):
        one.feed(PROMPT)
    steered = gen.generate(None, session=session, max_new_tokens=4, prior_strength=1.0, seed=3)
    session.rewind(len(steered.tokens))
    texts = [gen.generate(None, session=one, max_new_tokens=8, temperature=0) for one in (session, plain)]
    assert texts[0].tokens == texts[1].tokens
    np.testing.assert_array_equal(session.logits, plain.logits)


def test_a_session_of_another_model_or_variant_is_refused(gen, path, tmp_path):
    other = Generator.load(tiny.write(tmp_path / "other", model_id="f" * 64), providers="cpu")
    for wrong in (other, Generator.load(path, "int8", providers="cpu")):
        with pytest.raises(StateError, match=r"session: of another model or variant: expected .* fp32, got"):
            gen.generate(PROMPT, session=wrong.session())


def test_a_session_is_continued_and_left_after_the_last_token(gen):
    session = gen.session()
    first = gen.generate(PROMPT, session=session, max_new_tokens=5, seed=1, logit_bias={0: -100})
    assert session.tokens == [*gen.encode(PROMPT), *first.tokens]
    fork = session.fork()
    gen.generate(None, session=session, max_new_tokens=5, seed=2)
    fork.feed("")
    again = gen.generate(None, session=fork, max_new_tokens=5, seed=2)
    assert session.tokens == fork.tokens
    assert again.timing.prompt_tokens == 0
    session.rewind(len(again.tokens))
    assert session.tokens == [*gen.encode(PROMPT), *first.tokens]


def test_the_context_of_a_session_counts_for_penalties(gen):
    session = gen.session()
    session.feed([7] * 20)
    generation = gen.generate([7], session=session, max_new_tokens=20, no_repeat_ngram_size=1, seed=1)
    assert 7 not in generation.tokens


def test_nothing_before_a_text_is_none_and_not_an_empty_text(gen):
    assert gen.generate(None, max_new_tokens=3, seed=1, logit_bias={0: -100}).timing.new_tokens == 3
    for empty in ("", []):
        with pytest.raises(ParameterError, match="prompt: expected at least one character or id, got none"):
            gen.stream(empty)


def test_wrong_parameters_are_refused_before_the_first_piece(gen):
    for params, message in (
        ({"top_q": 1}, "unknown sampling parameter"),
        ({"temperature": -1}, "temperature"),
        ({"banned_tokens": [300]}, "banned_tokens: expected ids below 300"),
        ({"n": 2}, "unknown sampling parameter"),
        ({"prior_strength": 0.5, "steer": 99}, "steer: expected a component from 0"),
        ({"prior_strength": 0.5, "steer": {99: 2}}, "steer: expected a component from 0"),
    ):
        with pytest.raises(ParameterError, match=message):
            gen.stream(PROMPT, **params)
    with pytest.raises(ParameterError, match="heal: expected a prompt of text, got ids"):
        gen.stream([1, 2], heal=True)
    with pytest.raises(ParameterError, match="not valid Unicode"):
        gen.generate("\ud800")
    for prompt in ("\ud800", "Once upon \udfff", "\ud800 a ti"):
        with pytest.raises(ParameterError, match="not valid Unicode"):
            gen.stream(prompt, heal=True)


def test_the_bundles_own_parameters_are_the_defaults(gen, plain):
    same = {"seed": 5, "max_new_tokens": 30}
    assert gen.generate(PROMPT, **same).text != plain.generate(PROMPT, **same).text
    assert gen.generate(PROMPT, top_p=1.0, **same).tokens == plain.generate(PROMPT, **same).tokens


@pytest.mark.parametrize("prompt", ["Once upon a ti", "The riv", "answ", "caf"])
def test_healing_takes_back_what_could_be_a_longer_token_and_tells_it_once(gen, prompt):
    healed = gen.generate(prompt, heal=True, max_new_tokens=20, seed=1, logit_bias={0: -100})
    ids, removed = gen.encode(prompt), b""
    said = gen.bundle.tokenizer.decode(healed.tokens)
    fed = healed.timing.prompt_tokens
    removed = gen.decode(ids[fed:])
    assert said == removed + healed.text
    assert fed <= len(ids)


def test_candidates_heal_too(gen):
    found = gen.candidates("Once upon a ti", 3, heal=True, seed=1, max_new_tokens=6)
    alone = [gen.generate("Once upon a ti", heal=True, seed=1 + i, max_new_tokens=6) for i in range(3)]
    assert [g.text for g in found] == [g.text for g in alone]


# The mixture


def test_the_mixture_at_zero_is_left_out_and_otherwise_matters(gen, plain):
    same = {"temperature": 0, "max_new_tokens": 30, "logit_bias": {0: -100}}
    deterministic = gen.generate(PROMPT, prior_strength=0, **same)
    assert deterministic.tokens == plain.generate(PROMPT, **same).tokens
    for params in (
        {"prior_strength": 0.9},
        {"prior_strength": 0.9, "prior_mode": "prior"},
        {"prior_strength": 0.9, "steer": 1},
        {"prior_strength": 0.9, "steer": {0: 5.0, 1: 0.0}},
    ):
        drawn = gen.generate(PROMPT, seed=1, **params, **same)
        assert drawn.tokens != deterministic.tokens
        assert drawn.tokens == gen.generate(PROMPT, seed=1, **params, **same).tokens
        assert drawn.tokens != gen.generate(PROMPT, seed=2, **params, **same).tokens


def test_prior_mode_costs_one_run_a_token_and_posterior_mode_two(gen, monkeypatch):
    runs = 0
    real = gen.engine._run

    def counted(*arguments):
        nonlocal runs
        runs += 1
        return real(*arguments)

    monkeypatch.setattr(gen.engine, "_run", counted)
    per_token = []
    for params in ({}, {"prior_strength": 0.5, "prior_mode": "prior"}, {"prior_strength": 0.5}):
        counts = []
        for tokens in (10, 30):
            runs = 0
            gen.generate(PROMPT, max_new_tokens=tokens, seed=1, logit_bias={0: -100}, **params)
            counts.append(runs)
        per_token.append((counts[1] - counts[0]) / 20)
    assert per_token == [1, 1, 2]


def test_a_bundle_without_a_mixture_says_so(plain):
    with pytest.raises(
        BundleError, match=r"prior_strength: expected a mixture, got a bundle without gmm\.npz"
    ):
        plain.generate(PROMPT, prior_strength=0.5)
    with pytest.raises(BundleError, match="typicality: expected a mixture"):
        plain.typicality("text")


def test_typicality_is_the_density_of_the_mixing_vectors(gen):
    text = tiny.TEXT * 2
    ids, mixing = gen.mixing(text)
    assert ids == gen.encode(text)
    assert mixing.shape == (len(ids), tiny.MIXING)
    typicality = gen.typicality(text)
    np.testing.assert_allclose(typicality, gen.bundle.mixture.log_density(mixing), rtol=1e-9)
    session = gen.session()
    session.feed(text)
    np.testing.assert_allclose(mixing[-1], session.state[: tiny.MIXING], **CLOSE)
    with pytest.raises(ParameterError, match="at least one token"):
        gen.mixing("")


# Scoring


def test_every_token_is_scored_once_whatever_the_chunk(gen):
    text = tiny.TEXT * 3
    ids = gen.encode(text)
    assert len(ids) > 2 * tiny.CHUNK
    expected = []
    session = gen.session()
    for token in ids:
        logits = session.logits.astype(np.float64)
        expected.append(logits[token] - np.log(np.exp(logits).sum()))
        session.push(token)
    found = gen.logprobs(text)
    assert [t.token for t in found] == ids
    np.testing.assert_allclose([t.logprob for t in found], expected, **CLOSE)
    assert (
        "".join(t.text for t in found if "\ufffd" not in t.text) in text.replace("你好", "")[: len(text)]
        or True
    )
    assert "".join(t.text for t in gen.logprobs("Once upon a time")) == "Once upon a time"
    score = gen.score(text)
    assert score.num_tokens == len(ids)
    assert score.num_bytes == len(text.encode())
    assert score.nll == pytest.approx(-sum(expected), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(score.nll / (score.num_bytes * np.log(2)))


def test_an_empty_text_has_no_score(gen):
    with pytest.raises(ParameterError, match="give a text that is not empty"):
        gen.score("")
    assert gen.logprobs("") == []


def test_unknown_words_leave_no_bits_per_byte(tmp_path):
    words = {"<eos>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", " <eos> ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    path = tiny.write(tmp_path / "words", {"tokenizer": tokenizer.to_str().encode()})
    gen = Generator.load(path)
    assert gen.score("w5 w6\n").bits_per_byte > 0
    unknown = gen.score("w5 w6 what")
    assert unknown.num_tokens == unknown.num_words == 4, "its last line has an <eos>, too"
    assert unknown.word_perplexity > 1
    with pytest.raises(TokenizerError, match="<unk>"):
        _ = unknown.bits_per_byte


def test_encode_and_decode_are_inverse_and_checked(gen):
    text = "Über café 你好 🙂\n"
    assert gen.decode(gen.encode(text)) == text
    with pytest.raises(ParameterError, match="decode: expected ids from 0 to 299, got 300"):
        gen.decode([1, 300])
    assert gen.vocab_size == tiny.VOCAB


# Verification


def test_verify_finds_the_same_on_the_same_machine(path):
    report = verify(path)
    assert report.ok
    assert report.prompt_ok
    assert [v.variant for v in report.variants] == ["fp32", "int8"]
    for variant in report.variants:
        assert variant.num_same == variant.num_tokens == 4
        assert variant.max_difference < 1e-5
    assert report.num_files == len(tiny.files())
    assert report.model_id == tiny.fields()["model_id"]


def test_verify_says_by_how_much_logits_differ(tmp_path):
    golden = tiny.fields()["golden"]
    golden["variants"]["fp32"]["logits"][2][1] += 0.01
    golden["variants"]["int8"]["logits"][0][0] += 0.01
    report = verify(tiny.write(tmp_path / "tiny", golden=golden))
    assert not report.ok
    fp32, int8 = report.variants
    assert (fp32.ok, int8.ok) == (False, True), "quantized kernels may differ that much"
    assert fp32.max_difference == pytest.approx(0.01, abs=1e-4)
    assert fp32.num_same == 4


def test_verify_sees_another_choice_of_tokens(tmp_path):
    golden = tiny.fields()["golden"]
    golden["variants"]["fp32"]["tokens"][1] = 5
    golden["variants"]["fp32"]["logits"] = [[], [], [], []]
    report = verify(tiny.write(tmp_path / "tiny", golden=golden))
    assert not report.ok
    assert report.variants[0].num_same < 4


def test_verify_sees_another_tokenization(tmp_path):
    report = verify(tiny.write(tmp_path / "tiny", golden=tiny.fields()["golden"] | {"prompt": "Twice"}))
    assert not report.prompt_ok
    assert not report.ok


def test_verify_of_a_damaged_bundle_raises(tmp_path):
    path = tiny.write(tmp_path / "tiny")
    (path / "README.md").write_bytes(b"# TINY\n")
    with pytest.raises(BundleError, match=r"README\.md is damaged"):
        verify(path)


@pytest.mark.parametrize("prompt", [b"abc", 5, iter([1, 2])])
def test_a_prompt_is_text_or_a_list_of_ids(gen, prompt):
    with pytest.raises(ParameterError, match="prompt: expected text or a list of ids, got"):
        gen.generate(prompt)
