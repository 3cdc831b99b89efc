import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sdgm_edge.runtime.errors import ParameterError, StateError, TokenizerError
from sdgm_edge.runtime.scoring import Score, count_words, score_chunks, token_nlls

TEXT = "the cat\nsat é\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("a", 2), ("a\n", 2), ("a\nb", 4), ("\n\n", 2), (" a  b\tc ", 4), (TEXT, 6), ("a\r\nb\r\n", 4)],
)
def test_words_are_counted_with_one_eos_a_line(text, words):
    assert count_words(text) == words


@given(st.lists(st.lists(st.sampled_from(["the", "cat", "<unk>", "N"]))))
def test_words_are_counted_as_published_results_do(lines):
    text = "".join(f" {' '.join(words)} \n" for words in lines)
    assert count_words(text) == sum(len([*line.split(), "<eos>"]) for line in text.splitlines())


def test_figures_are_those_of_their_definitions():
    score = Score.of(TEXT, nll=12.0, num_tokens=5)
    assert score.num_bytes == len(TEXT.encode()) == 15
    assert score.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert score.token_perplexity == pytest.approx(math.exp(12 / 5))
    assert score.word_perplexity == pytest.approx(math.exp(12 / 6))
    assert score.bits_per_byte == pytest.approx(12 / (15 * math.log(2)))
    assert score.byte_perplexity == pytest.approx(2**score.bits_per_byte)


def test_a_uniform_model_over_bytes_costs_eight_bits_a_byte():
    num_bytes = len(TEXT.encode())
    nlls = token_nlls(np.zeros((num_bytes, 256), np.float32), np.frombuffer(TEXT.encode(), np.uint8))
    assert score_chunks(TEXT, [nlls]).bits_per_byte == pytest.approx(8)


def test_unk_hides_the_byte_figures():
    score = Score.of(TEXT, 12.0, 5, has_unk=True)
    for name in ("bits_per_byte", "byte_perplexity"):
        with pytest.raises(
            TokenizerError, match=r"bits_per_byte: expected a tokenizer that .*, got <unk>; use word"
        ):
            getattr(score, name)
    assert score.to_dict()["bits_per_byte"] is None
    assert score.to_dict()["byte_perplexity"] is None
    assert score.to_dict()["word_perplexity"] == score.word_perplexity


def test_all_figures_are_in_the_dict():
    score = Score.of(TEXT, 12.0, 5)
    names = {name for name, member in vars(Score).items() if isinstance(member, property)}
    fields = set(Score.__dataclass_fields__)
    values = json.loads(json.dumps(score.to_dict()))
    assert set(values) == names | fields
    assert all(values[name] == getattr(score, name) for name in values)


def test_a_hopeless_model_has_infinite_perplexity():
    assert Score.of(TEXT, math.inf, 5).token_perplexity == math.inf
    assert Score.of(TEXT, 1e6, 5).word_perplexity == math.inf


def test_figures_that_no_float_holds_are_none_in_the_dict():
    values = json.loads(json.dumps(Score.of("你" * 400, 2e3, 400).to_dict(), allow_nan=False))
    assert values["word_perplexity"] is None
    assert values["token_perplexity"] == pytest.approx(math.exp(5))
    assert values["bits_per_byte"] == pytest.approx(2e3 / (1200 * math.log(2)))


@given(st.lists(st.lists(st.floats(0, 20, width=32), max_size=9), min_size=1), st.integers(0, 3))
def test_chunks_do_not_matter(chunks, seed):
    flat = np.array([nll for chunk in chunks for nll in chunk], np.float32)
    if not len(flat):
        return
    score = score_chunks(TEXT, (np.array(chunk, np.float32) for chunk in chunks))
    assert score.num_tokens == len(flat)
    assert score.nll == pytest.approx(flat.sum(dtype=np.float64), rel=1e-12)


def test_a_long_text_is_summed_in_float64():
    chunks = [np.full(1000, 0.1, np.float32)] * 2000
    assert score_chunks(TEXT, chunks).nll == pytest.approx(2e6 * float(np.float32(0.1)), rel=1e-12)


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("a", 0), ("", 3)])
def test_nothing_to_score(text, tokens):
    with pytest.raises(
        ParameterError, match=r"text to score: expected tokens, got . of . bytes; give a text that"
    ):
        score_chunks(text, [np.zeros(tokens)])


def test_a_score_that_is_no_number():
    with pytest.raises(StateError, match=r"score: expected a number, got NaN; .*`sdgm-edge verify`"):
        score_chunks("a", [np.array([math.nan])])


def test_infinite_logits_give_a_score_that_is_no_number_and_no_warning():
    nlls = token_nlls(np.array([[math.inf, 0.0]], np.float32), np.array([1]))
    with pytest.raises(StateError, match="got NaN"):
        score_chunks("a", [nlls])


# NLLs


@given(st.integers(0, 12), st.integers(1, 40), st.sampled_from([0.0, 1e4, -1e4]), st.integers(0, 99))
def test_nlls_are_minus_log_softmax(length, vocab_size, shift, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((length, vocab_size)) * 5 + shift).astype(np.float32)
    targets = rng.integers(0, vocab_size, length)
    before, nlls = logits.copy(), token_nlls(logits, targets)
    exact = logits.astype(np.float64) - shift
    expected = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(length), targets]
    assert nlls.dtype == np.float64
    np.testing.assert_allclose(nlls, expected, atol=1e-5)  # float32 differences of logits up to 20
    np.testing.assert_array_equal(logits, before)


def test_targets_of_another_length():
    with pytest.raises(
        ParameterError, match=r"targets: expected shape \(2,\), got \(3,\); give one for each position"
    ):
        token_nlls(np.zeros((2, 4), np.float32), np.zeros(3, int))


@pytest.mark.parametrize("target", [-1, 4])
def test_targets_out_of_range(target):
    with pytest.raises(
        ParameterError, match=r"targets: expected ids from 0 to 3, got .*; use this model's tokenizer"
    ):
        token_nlls(np.zeros((1, 4), np.float32), np.array([target]))
