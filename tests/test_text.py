import codecs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sdgm_edge.runtime.errors import ParameterError, TokenizerError
from sdgm_edge.runtime.sampling import Sampler, SamplingParams
from sdgm_edge.runtime.text import HealingMask, TokenStream, Vocabulary, _byte_of_character, heal
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "def main(): return 1\nmain maintain the cat there then hello world\n" * 9,
    "Être ou ne pas être, 日本語 日本 😀😀\n" * 9,
]


def make_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["née", "two words", AddedToken("<kept>", special=False)])
    return tokenizer


def make_words(decoder=None):
    words = ["<eos>", "<unk>", "the", "cat", "cats", "category", "sat", "日本", "a", "1"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace("\n", " <eos> ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def line_ends():
    return decoders.Sequence(
        [decoders.WordPiece(prefix="\0", cleanup=False), decoders.Replace(Regex(" ?<eos>"), "\n")]
    )


BPE = make_bpe()
TOKENIZERS = {"bpe": BPE, "words": make_words(), "lines": make_words(line_ends())}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
names = st.sampled_from(sorted(TOKENIZERS))
numbers = st.lists(st.integers(0, 10**6), max_size=40)


def byte_tokens(data):
    """The tokens of single bytes."""
    character = {byte: character for character, byte in _byte_of_character().items()}
    return [BPE.token_to_id(character[byte]) for byte in data]


def pieces(vocabulary, ids, **options):
    stream = TokenStream(vocabulary, **options)
    return [stream.push(token) for token in ids] + [stream.finish()], stream.stopped


# Streaming


@settings(max_examples=500)
@given(names, numbers)
def test_pieces_make_what_the_tokenizer_decodes(name, tokens):
    tokenizer = TOKENIZERS[name]
    ids = [token % tokenizer.get_vocab_size() for token in tokens]
    assert "".join(pieces(VOCABULARIES[name], ids)[0]) == tokenizer.decode(ids)


@given(st.text())
def test_any_text_streams_back(text):
    parts, stopped = pieces(VOCABULARIES["bpe"], BPE.encode(text).ids)
    assert "".join(parts) == BPE.decode(BPE.encode(text).ids)
    assert stopped is None


@given(st.text(alphabet="aé日😀"))
def test_only_whole_characters_come_out(text):
    singles = byte_tokens(text.encode())
    stream, told = TokenStream(VOCABULARIES["bpe"]), b""
    for position, token in enumerate(singles, 1):
        told += stream.push(token).encode()
        whole = codecs.getincrementaldecoder("utf-8")().decode(text.encode()[:position])
        assert told == whole.encode()  # all that is complete, and nothing that is not
    assert stream.finish() == ""


def test_the_alphabet_is_that_of_the_tokenizer():
    assert set(_byte_of_character()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(_byte_of_character().values()) == list(range(256))


def test_an_incomplete_character_becomes_the_replacement_character():
    assert pieces(BPE, byte_tokens("é".encode())[:1])[0] == ["", "\ufffd"]


@given(st.text(alphabet="aé日😀", min_size=1), st.data())
def test_streams_of_parts_say_together_what_one_stream_says(text, data):
    singles, vocabulary = byte_tokens(text.encode()), VOCABULARIES["bpe"]
    cut = data.draw(st.integers(0, len(singles)))
    told, before = "", b""
    for part in (singles[:cut], singles[cut:]):
        stream = TokenStream(vocabulary, before=before)
        told += "".join(map(stream.push, part)) + stream.finish(ended=False)
        before = vocabulary.tail(part)
    assert told == text


def test_tokens_say_the_same_whether_one_is_asked_for_or_all_are():
    vocabulary = Vocabulary(BPE)
    one = vocabulary.first[BPE.token_to_id("two words")]
    assert one == b"two words"
    assert len(vocabulary.first) == BPE.get_vocab_size()
    assert [Vocabulary(BPE).first[token] for token in range(BPE.get_vocab_size())] == list(vocabulary.first)


def test_special_tokens_say_nothing():
    ids = [BPE.token_to_id(token) for token in ("the", "<|endoftext|>", "<kept>")]
    assert pieces(BPE, ids)[0] == ["the", "", "<kept>", ""]


def test_words_that_follow_a_text_keep_their_space():
    assert pieces(VOCABULARIES["lines"], [2, 3, 0, 2])[0] == ["the", " cat", "\n", " the", ""]
    assert pieces(VOCABULARIES["lines"], [2, 3], continues=True)[0] == [" the", " cat", ""]


@pytest.mark.parametrize("token", [-1, 10])
def test_a_token_beyond_the_vocabulary(token):
    with pytest.raises(
        ParameterError, match=rf"token: expected an id from 0 to 9, got {token}; use the tokenizer of"
    ):
        TokenStream(VOCABULARIES["words"]).push(token)


# Stop texts


def up_to_stop(text, stops):
    """The definition: read character by character until one is complete, then leave out the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=500)
@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=2, max_size=6), max_size=3),
)
def test_text_ends_before_the_stop_that_is_complete_first(words, stops):
    ids = [BPE.token_to_id(c) for word in words for c in word]
    expected, which = up_to_stop("".join(words), stops)
    parts, stopped = pieces(VOCABULARIES["bpe"], ids, stop=stops)
    assert ("".join(parts), stopped) == (expected, which)


@given(
    st.lists(st.sampled_from(["the", "Ġcat", "Ġthe", "re", "n", "Ġ", "<|endoftext|>"]), max_size=12),
    st.lists(st.sampled_from(["the cat", "t", " the", "ren", "cat the", "  "]), max_size=3),
)
def test_nothing_of_a_stop_is_ever_told(tokens, stops):
    ids = [i for i in map(BPE.token_to_id, tokens) if i is not None]
    expected, which = up_to_stop(BPE.decode(ids), stops)
    stream, told = TokenStream(VOCABULARIES["bpe"], stops), ""
    for token in ids:
        told += stream.push(token)
        assert expected.startswith(told)
    assert (told + stream.finish(), stream.stopped) == (expected, which)


def test_what_is_held_back_is_told_as_soon_as_it_is_no_stop():
    ids = [BPE.token_to_id(c) for c in "aabx"]
    assert pieces(BPE, ids, stop=["aaba", "bc"])[0] == ["", "", "", "aabx", ""]
    assert pieces(BPE, ids[:3], stop=["aaba"])[0] == ["", "", "", "aab"]


def test_a_stop_that_begins_like_itself():
    ids = [BPE.token_to_id(c) for c in "aaab"]
    assert pieces(BPE, ids, stop=["aab"]) == (["", "", "a", "", ""], "aab")


def test_nothing_comes_after_a_stop():
    ids = [BPE.token_to_id(c) for c in "abcd"]
    parts, stopped = pieces(BPE, ids, stop=["b", "bc"])
    assert (parts, stopped) == (["a", "", "", "", ""], "b")


def test_an_incomplete_character_can_complete_a_stop():
    assert pieces(BPE, byte_tokens("é".encode())[:1], stop=["\ufffd"]) == (["", ""], "\ufffd")


# Vocabularies that cannot be used


def test_a_decoder_without_bytes():
    tokenizer = make_bpe()
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(
        TokenizerError,
        match="expected a byte-level decoder or a model of whole words, got BPE with Metaspace; use",
    ):
        Vocabulary(tokenizer)


def test_a_decoder_that_changes_earlier_words():
    spaces = decoders.WordPiece(prefix="\0", cleanup=False)
    decoder = decoders.Sequence([spaces, decoders.Fuse(), decoders.Replace("<eos> <unk>", "X")])
    with pytest.raises(
        TokenizerError, match="leaves earlier words as they are, got 'X' after '<eos>'; use a"
    ):
        Vocabulary(make_words(decoder))


# Healing


def heals(prompt, name="bpe"):
    vocabulary = VOCABULARIES[name]
    healing = heal(vocabulary, prompt)
    return vocabulary.tokenizer.decode(healing.ids, skip_special_tokens=False), healing.removed


@pytest.mark.parametrize(
    ("prompt", "kept", "removed"),
    [
        ("def mai", "def", b" mai"),  # inside a word, across tokens
        ("hello ", "hello", b" "),  # a trailing space
        ("the cat", "the cat", b""),  # no token goes on
        ("a main", "a", b" main"),  # " maintain" does
        ("zz", "zz", b""),
        ("", "", b""),
        ("main<|endoftext|>", "main<|endoftext|>", b""),  # never beyond a special token
    ],
)
def test_the_tokens_that_a_longer_one_could_replace_are_taken_back(prompt, kept, removed):
    assert heals(prompt) == (kept, removed)


@pytest.mark.parametrize(
    ("prompt", "kept", "removed"),
    [
        ("the ca", "the", b" ca"),
        ("the ", "the", b" "),
        ("cat", "", b" cat"),
        ("the\nca", "the\n", b" ca"),
        ("the\n", "the\n", b""),
        ("the xyz", "the <unk>", b""),  # no word begins so
        ("", "", b""),
    ],
)
def test_an_unfinished_word_is_taken_back(prompt, kept, removed):
    assert heals(prompt, "lines") == (kept, removed)


@pytest.mark.parametrize("name", ["bpe", "lines"])
@pytest.mark.parametrize("prompt", ["\ud800", "the ca\ud800", "\ud800 ca", "ca\ud800 "])
def test_a_prompt_that_is_not_unicode_is_not_healed(name, prompt):
    with pytest.raises(ParameterError, match="not valid Unicode"):
        heal(VOCABULARIES[name], prompt)


@given(st.text() | st.sampled_from(["def mai", "日本", "hel"]))
def test_what_is_kept_and_removed_is_the_prompt(prompt):
    vocabulary = VOCABULARIES["bpe"]
    healing = heal(vocabulary, prompt)
    data = b"".join(vocabulary.first[token] for token in healing.ids) + healing.removed
    assert data == b"".join(vocabulary.first[token] for token in vocabulary.encode(prompt))


@given(st.text(alphabet="aht en日", min_size=1, max_size=6))
def test_allowed_tokens_are_those_that_agree(text):
    vocabulary, remaining = VOCABULARIES["bpe"], text.encode()
    agree = [
        i
        for i, b in enumerate(vocabulary.first)
        if b and (b.startswith(remaining) or remaining.startswith(b))
    ]
    assert vocabulary.mask.allowed(remaining).tolist() == agree  # every byte is a token: all can be completed


def test_tokens_that_lead_nowhere_are_not_allowed():
    mask = HealingMask([b"", b"a", b"ab", b"abc", b"abcd", b"c", b"xa", b"\xff", b"\xff\xff"])
    assert mask.allowed(b"abc").tolist() == [2, 3, 4]  # "a" leaves "bc", with which nothing begins
    assert mask.allowed(b"\xff").tolist() == [7, 8]
    assert mask.allowed(b"q").tolist() == []


@given(st.text(alphabet="aht en日m", min_size=1, max_size=12), st.integers(0, 2**32))
def test_a_healed_stream_goes_on_exactly_where_the_prompt_ends(prompt, seed):
    vocabulary = VOCABULARIES["bpe"]
    mask, healing = vocabulary.mask, heal(vocabulary, prompt)
    sampler = Sampler(SamplingParams(seed=seed), len(vocabulary.first))
    stream, ids, told, remaining = (
        TokenStream(vocabulary, skip=healing.removed),
        list(healing.ids),
        "",
        healing.removed,
    )
    for _ in range(len(healing.removed) + 3):
        allowed = mask.allowed(remaining) if remaining else None
        token = sampler.sample(np.zeros(len(vocabulary.first), np.float32), allowed).token
        remaining = mask.advance(remaining, token)
        ids.append(token)
        told += stream.push(token)
    assert not remaining
    assert prompt + told + stream.finish() == BPE.decode(ids)


def test_a_healed_word():
    vocabulary = VOCABULARIES["lines"]
    assert [vocabulary.tokenizer.id_to_token(i) for i in vocabulary.mask.allowed(b" ca")] == [
        "cat",
        "cats",
        "category",
    ]
    assert pieces(vocabulary, [5, 6], skip=b" ca")[0] == ["tegory", " sat", ""]


def test_tokens_that_do_not_agree():
    vocabulary = VOCABULARIES["bpe"]
    token = BPE.token_to_id("x")
    with pytest.raises(
        ParameterError, match=r"token: expected bytes that agree with b' mai', got b'x'; sample from"
    ):
        vocabulary.mask.advance(b" mai", token)
    with pytest.raises(
        ParameterError, match=r"token: expected bytes that begin with b' mai', got b'x'; sample from"
    ):
        TokenStream(vocabulary, skip=b" mai").push(token)
    with pytest.raises(ParameterError, match="agree with"):
        vocabulary.mask.advance(b" mai", BPE.token_to_id("<|endoftext|>"))
