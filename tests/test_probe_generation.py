"""The evaluation of generation: the same passages for all, the human ones as they stand, figures by hand."""

import dataclasses
import math

import numpy as np
import pytest
import tiny

from sdgm_edge.diversity import distinct, repetition, self_bleu, split_words
from sdgm_edge.probe_generation import (
    COLUMNS,
    Passage,
    Row,
    Settings,
    _judged,
    draw_passages,
    evaluate_generation,
    open_scorer,
)
from sdgm_edge.runtime import Generator, ParameterError, Score, UsageError, count_words

TEXT = tiny.TEXT * 20
SETTINGS = Settings(num_texts=3, num_tokens=12, prompt_words=4, strengths=(0.2, 0.5), seed=7)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return Generator.load(tiny.write(tmp_path_factory.mktemp("bundle") / "tiny"), variant="fp32")


@pytest.fixture(scope="module")
def rows(generator):
    return evaluate_generation(generator, TEXT, SETTINGS, one_bit_a_byte)


def one_bit_a_byte(text):
    return Score.of(text, len(text.encode()) * math.log(2), len(text))


def test_passages_are_pieces_of_the_text_one_after_another(generator):
    passages = draw_passages(generator, TEXT, SETTINGS)
    place = 0
    for prompt, rest in passages:
        place = TEXT.index(prompt + rest, place) + len(prompt + rest)
        assert len(prompt.split()) == 4
        assert len(generator.encode(rest)) in (11, 12)  # 12, but for a character cut in two
        assert rest.startswith(" ")
    assert len(passages) == 3
    assert len({prompt for prompt, _ in passages}) == 3


@pytest.mark.parametrize("text", ["", "a few words", tiny.TEXT])
def test_a_text_that_is_too_short_is_refused(generator, text):
    with pytest.raises(
        UsageError, match=r"expected a text with 3 passages of 4 words and 90 tokens, got \d+"
    ):
        draw_passages(generator, text, dataclasses.replace(SETTINGS, num_tokens=90))


def test_every_way_of_sampling_has_a_row(rows, generator):
    assert [(row.mode, row.strength) for row in rows] == [
        ("human", 0), ("plain", 0), ("posterior", 0.2), ("posterior", 0.5), ("prior", 1)
    ]  # fmt: skip
    assert len({row.texts for row in rows}) == 5
    passages = draw_passages(generator, TEXT, SETTINGS)
    assert rows[0].texts == tuple(rest for _, rest in passages)
    again = evaluate_generation(generator, TEXT, SETTINGS, one_bit_a_byte)
    assert again == rows
    assert set(COLUMNS.values()) == {field.name for field in dataclasses.fields(Row)} - {"texts"}


def test_plain_is_the_model_itself_whatever_the_bundle_asks_for(rows, generator):
    assert generator.bundle.generation.sampling.top_p == 0.95
    passages = draw_passages(generator, TEXT, SETTINGS)
    for i, (text, passage) in enumerate(zip(rows[1].texts, passages, strict=True)):
        made = generator.generate(
            passage.prompt, max_new_tokens=12, top_p=1.0, seed=7 + i, banned_tokens=(0,)
        )
        assert made.text == text
        assert len(made.tokens) == 12


def test_the_mixture_is_used_as_the_row_says(rows, generator):
    passages = draw_passages(generator, TEXT, SETTINGS)
    for row, mode in ((rows[3], "posterior"), (rows[4], "prior")):
        made = generator.generate(
            passages[1].prompt, max_new_tokens=12, top_p=1.0, seed=8, banned_tokens=(0,),
            prior_strength=row.strength, prior_mode=mode,
        )  # fmt: skip
        assert made.text == row.texts[1]


def test_figures_are_those_of_the_continuations_alone(rows, generator):
    passages = draw_passages(generator, TEXT, SETTINGS)
    for row in rows:
        words = [split_words(text) for text in row.texts]
        assert (row.distinct_2, row.self_bleu_4) == (distinct(words, 2), self_bleu(words))
        assert row.repetition_4 == repetition(words)
        assert row.bits_per_byte == pytest.approx(1)
        num_bytes = sum(len(text.encode()) for text in row.texts)
        num_words = sum(
            count_words(passage.prompt + text) - count_words(passage.prompt)
            for passage, text in zip(passages, row.texts, strict=True)
        )
        assert row.word_perplexity == pytest.approx(2 ** (num_bytes / num_words))
        densities = [
            generator.typicality(passage.prompt + text)[len(generator.encode(passage.prompt)) :].mean()
            for passage, text in zip(passages, row.texts, strict=True)
        ]
        assert row.typicality == pytest.approx(np.mean(densities))


def test_without_a_mixture_or_a_judge_the_rest_is_told(tmp_path):
    generator = Generator.load(tiny.write(tmp_path / "tiny", {"gmm": b""}), variant="fp32")
    rows = evaluate_generation(generator, TEXT, SETTINGS)
    assert [row.mode for row in rows] == ["human", "plain"]
    for row in rows:
        assert row.typicality is row.word_perplexity is row.bits_per_byte is None
        assert 0 < row.distinct_1 < 1


def test_bits_per_byte_are_not_told_by_a_judge_that_does_not_know_every_word(generator):
    def doubtful(text):
        return dataclasses.replace(one_bit_a_byte(text), has_unk=True)

    (human, _) = evaluate_generation(generator, TEXT, SETTINGS, doubtful)[:2]
    assert human.bits_per_byte is None
    assert human.word_perplexity > 1


def test_texts_that_add_no_word_have_no_perplexity(generator):
    passages = [Passage("one tw", "o three")] * 2
    assert _judged(passages, ["o", "ofold"], generator.score) is None
    assert _judged(passages, ["o", "o three"], generator.score).num_words == 1


def test_a_bundle_can_judge(generator):
    scorer = open_scorer(generator.bundle.path, "fp32")
    assert scorer("Once upon a time") == generator.score("Once upon a time")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_texts": 1}, "num_texts: expected at least 2, got 1"),
        ({"temperature": -1}, "temperature: expected a number from 0 to 100, got -1"),
        ({"num_tokens": 0}, "num_tokens: expected at least 1, got 0"),
        ({"strengths": (0.5, 0.0)}, "strengths: expected numbers above 0 and up to 1, got 0"),
        ({"strengths": (1.5,)}, "strengths: expected numbers above 0 and up to 1, got 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ParameterError, match=message):
        dataclasses.replace(SETTINGS, **changes)
