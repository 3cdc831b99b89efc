"""Figures of diversity, against values worked out by hand."""

import math

import pytest

from sdgm_edge.diversity import distinct, loops, repetition, self_bleu, split_words


def words(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def test_words_are_runs_of_letters_and_single_marks():
    assert split_words("Été 2026: a_b, 'tis <unk> …\n") == [
        "Été", "2026", ":", "a_b", ",", "'", "tis", "<", "unk", ">", "…"
    ]  # fmt: skip


def test_distinct_counts_over_all_texts_together():
    texts = words("a b a b", "a b c")
    assert distinct(texts, 1) == 3 / 7
    assert distinct(texts, 2) == 3 / 5  # ab, ba, bc of ab, ba, ab, ab, bc
    assert distinct(texts, 3) == 3 / 3
    assert distinct(texts, 4) == 1
    assert distinct(texts, 5) == 0  # no text is so long


def test_repetition_counts_inside_each_text():
    assert repetition(words("a b c d", "a b c d")) == 0
    assert repetition(words("a b c d a b c d", "x y")) == pytest.approx(1 / 5)
    assert repetition(words("a a a a a a a"), order=2) == pytest.approx(5 / 6)
    assert repetition(words("a b")) == 0


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("x " * 12, True),
        ("x " * 11, False),  # too short to be more than a stammer
        ("say a b c d a b c d a b c d and stop", True),
        ("a b c d a b c d a b c", False),  # not three times whole
        ("a b c d e f g h a b c d e f g h", False),  # twice
        ("a b " * 6, True),
        ("a b a b a c " * 2, False),
        ("", False),
    ],
)
def test_a_loop_comes_round_three_times_over_a_dozen_words(text, loop):
    assert loops(words(text)) == loop
    assert loops(words(text, "another one that says nothing twice")) == loop / 2


def test_self_bleu_is_one_for_texts_that_are_alike_and_small_for_others():
    assert self_bleu(words("a b c d e", "a b c d e", "a b c d e")) == pytest.approx(1)
    none = math.exp(sum(math.log(0.1 / n) for n in (5, 4, 3, 2)) / 4)
    assert self_bleu(words("a b c d e", "v w x y z")) == pytest.approx(none)


def test_self_bleu_by_hand():
    # "a a b" against "a b c d": a (once, clipped) and b of 3 words, ab of 2 pairs; one word too short.
    first = math.exp(1 - 4 / 3) * math.sqrt(2 / 3 * 1 / 2)
    # The other way: a and b of 4 words, ab of 3 pairs; longer than its reference.
    second = math.sqrt(2 / 4 * 1 / 3)
    assert self_bleu(words("a a b", "a b c d"), order=2) == pytest.approx((first + second) / 2)


def test_a_reference_is_the_best_of_all_others():
    # "a a" finds both in the third text, the third both in the first; "b b" finds none.
    texts = words("a a", "b b", "a a")
    assert self_bleu(texts, order=1) == pytest.approx((1 + 0.1 / 2 + 1) / 3)
    # The nearest length counts, of equally near ones the shorter: 2 for the text of 3 words, 3 for that of 4.
    got = self_bleu(words("a a", "a a a", "a a a a"), order=1)
    assert got == pytest.approx((math.exp(1 - 3 / 2) + 1 + 3 / 4) / 3)
